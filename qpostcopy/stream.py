"""The connection that QEMU's own stream (device state) takes: made by us, lent to both QEMUs.

    qpc-listen, qpc-connect   a lane of its own beside those for pages: same address, same hello
    page server: qpc-state-lend   lends its end to the source QEMU
    handler:     qpc-state-lend   lends the other end to the destination QEMU

QEMU could listen and connect by itself, but not everywhere: a QEMU with another
user, network or mount namespace, chroot or security label may not reach the
other, and its port would be open to anybody, while a lane is opened with the
migration's token only. A descriptor knows no paths and no addresses. QEMU forgets
its name at `migrate` and `migrate-incoming`; before that, `closefd` takes it back.
Once it is lent it is QEMU's alone: nobody else reads or writes, and not a byte
after the hello was read before. No copy of ours stays open, on either side: a
QEMU that dies must end the connection.

prepare_lane has set TCP_USER_TIMEOUT: a source QEMU that sends into a cut link
holds its main loop until the send fails, and cannot be brought back before.
"""

from __future__ import annotations

import socket

from qpostcopy.errors import QpostcopyError
from qpostcopy.lanes import Lanes
from qpostcopy.qmp.holder import MonitorHolder

#: Under this name each QEMU has its end.
NAME = "qpostcopy-device-state"
#: For `migrate` and `migrate-incoming`.
URI = f"fd:{NAME}"
#: For lanes that are under way. With LEND_SECONDS within what a controller waits for a reply: it
#: should hear why.
LANES_SECONDS = 2.0


class NoStreamError(QpostcopyError):
    """There is no connection for device state."""


def take_end(lanes: Lanes) -> socket.socket:
    """This side's end, once: from here on the caller's to close.

    :raise NoStreamError: there is none among these lanes (any more).
    """
    end = lanes.device_state
    if end is None or end.fileno() < 0:
        raise NoStreamError("these lanes have no connection for device state, or it was lent")
    return socket.socket(fileno=end.detach())


async def lend(end: socket.socket, monitor: MonitorHolder) -> None:
    """Lend QEMU an end, which must stay open until this returns.

    :raise QpostcopyError: QEMU did not take it; see MonitorHolder.lend.
    """
    end.setblocking(True)  # as QEMU's own are; the mode belongs to the socket, not to us
    await monitor.lend(end.fileno(), NAME)
