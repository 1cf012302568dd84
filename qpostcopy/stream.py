"""The connection that QEMU's own stream (device state) takes: made by us, lent to both QEMUs.

    handler: qpc-state-listen      a socket in the state directory
    page server: qpc-state-connect connects, lends its end to the source QEMU
    handler: qpc-state-accept      lends the other end to the destination QEMU

QEMU could listen and connect by itself, but not everywhere: the state directory is
ours alone (0700), and a QEMU with another user, mount namespace, chroot or security
label has no path to it, nor any that the other QEMU shares. A descriptor knows no
paths. QEMU forgets its name at `migrate` and `migrate-incoming`; before that,
`closefd` takes it back.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from qpostcopy.errors import QpostcopyError
from qpostcopy.qmp.holder import MonitorHolder
from qpostcopy.qmp.sockets import bind_private, connect_socket

#: Under this name each QEMU has its end.
NAME = "qpostcopy-device-state"
#: For `migrate` and `migrate-incoming`.
URI = f"fd:{NAME}"
_SOCKET = "device-state.sock"
#: With LEND_SECONDS within what a controller waits for a reply: it should hear why.
CONNECT_SECONDS = 2.0


class NoStreamError(QpostcopyError):
    """The connection for device state was not made."""


def socket_path(state_dir: Path) -> Path:
    return state_dir / _SOCKET


async def connect_and_lend(state_dir: Path, monitor: MonitorHolder) -> None:
    """Connect, and lend our end to this QEMU.

    :raise CannotConnectError: nobody listens.
    :raise QpostcopyError: QEMU did not take it; see MonitorHolder.lend.
    """
    deadline = asyncio.get_running_loop().time() + CONNECT_SECONDS
    with await connect_socket(socket_path(state_dir), "device state", deadline) as end:
        await _lend(end, monitor)


class StreamListener:
    """The other end: listens from its making until `accept_and_lend` or `close`."""

    def __init__(self, state_dir: Path) -> None:
        self._path = socket_path(state_dir)
        self._socket = bind_private(self._path)

    async def accept_and_lend(self, monitor: MonitorHolder) -> None:
        """Accept the one connection, and lend our end to this QEMU.

        :raise NoStreamError: none came.
        :raise QpostcopyError: QEMU did not take it; see MonitorHolder.lend.
        """
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                end, _ = await asyncio.get_running_loop().sock_accept(self._socket)
        except TimeoutError as error:
            raise NoStreamError("the page server did not connect for device state") from error
        with end:
            await _lend(end, monitor)

    def close(self) -> None:
        self._socket.close()
        self._path.unlink(missing_ok=True)


async def _lend(end: socket.socket, monitor: MonitorHolder) -> None:
    end.setblocking(True)  # as QEMU's own are; the mode belongs to the socket, not to us
    await monitor.lend(end.fileno(), NAME)
