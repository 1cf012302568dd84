"""The page server's half of bringing up lanes: connect, and say hello."""

from __future__ import annotations

import contextlib
import socket

from qpostcopy.core import Hello, LaneKind, RamBlock, greet
from qpostcopy.core.hello import HIGHEST_VERSION, lowest_version
from qpostcopy.lanes import Lanes, LaneSetupError, lane_keys
from qpostcopy.netns import hint
from qpostcopy.qmp.schema import Connect

CONNECT_SECONDS = 4.0


def connect_lanes(arguments: Connect, migration_id: str, blocks: tuple[RamBlock, ...]) -> Lanes:
    """Connect and greet every lane. Blocking.

    :raise LaneSetupError: nobody listens there.
    :raise HelloError: the handler refused, with its reason.
    """
    token = bytes.fromhex(arguments.token)
    with contextlib.ExitStack() as undo:
        socks, version = {}, HIGHEST_VERSION
        for kind, index in lane_keys(arguments.push_lanes, arguments.device_state):
            _expect_known(kind, version)
            sock = socks[kind, index] = _connect(arguments.host, arguments.port)
            undo.callback(sock.close)
            version = greet(sock, Hello(migration_id, token, kind, index, blocks), CONNECT_SECONDS)
        undo.pop_all()
    return Lanes.of(socks)


def _expect_known(kind: LaneKind, version: int) -> None:
    """A handler of an older version says nothing to a lane that it does not know: it hangs up."""
    if version < lowest_version(kind):
        raise LaneSetupError(
            f"the handler speaks version {version} of the lanes: it knows no "
            f"{kind.name.lower()} lane",
            remedy="use the same version of qpostcopy on both sides",
        )


def _connect(host: str, port: int) -> socket.socket:
    try:
        return socket.create_connection((host, port), CONNECT_SECONDS)
    except OSError as error:
        raise LaneSetupError(
            f"cannot connect a lane to {host} port {port}: {error.strerror or error}",
            remedy="the destination must be reachable there: lanes.listen, lanes.port, firewall"
            + hint(error),
        ) from error
