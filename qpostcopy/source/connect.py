"""The page server's half of bringing up lanes: connect, and say hello."""

from __future__ import annotations

import contextlib
import socket

from qpostcopy.core import Hello, RamBlock, greet
from qpostcopy.lanes import Lanes, LaneSetupError, lane_keys
from qpostcopy.qmp.schema import Connect

CONNECT_SECONDS = 4.0


def connect_lanes(arguments: Connect, migration_id: str, blocks: tuple[RamBlock, ...]) -> Lanes:
    """Connect and greet every lane. Blocking.

    :raise LaneSetupError: nobody listens there.
    :raise HelloError: the handler refused, with its reason.
    """
    token = bytes.fromhex(arguments.token)
    with contextlib.ExitStack() as undo:
        socks = {}
        for kind, index in lane_keys(arguments.push_lanes, arguments.device_state):
            sock = socks[kind, index] = _connect(arguments.host, arguments.port)
            undo.callback(sock.close)
            greet(sock, Hello(migration_id, token, kind, index, blocks), CONNECT_SECONDS)
        undo.pop_all()
    return Lanes.of(socks)


def _connect(host: str, port: int) -> socket.socket:
    try:
        return socket.create_connection((host, port), CONNECT_SECONDS)
    except OSError as error:
        raise LaneSetupError(
            f"cannot connect a lane to {host} port {port}: {error.strerror or error}",
            remedy="the destination must be reachable there: lanes.listen, lanes.port, firewall",
        ) from error
