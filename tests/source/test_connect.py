"""The page server's half of bringing up lanes, before a handler of another version."""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import replace

import pytest

from qpostcopy.core import Hello, LaneKind, RamBlock
from qpostcopy.core.hello import judge_offer
from qpostcopy.lanes import LaneSetupError
from qpostcopy.qmp.schema import Connect
from qpostcopy.source.connect import connect_lanes
from tests.core.test_hello import speaking

TOKEN = os.urandom(32)
BLOCKS = (RamBlock("ram0", 1 << 20),)
EXPECTED = Hello("m-1", TOKEN, LaneKind.DEMAND, 0, BLOCKS)


def welcome_as_version_1(server: socket.socket, lanes: int) -> None:
    for index in range(lanes):
        sock, _ = server.accept()
        with sock:
            expected = replace(EXPECTED, index=index)
            answer = judge_offer(sock.recv(1 << 16), expected).answer
            sock.sendall(speaking(answer, 1, 1))


def test_a_handler_without_state_lanes_is_named() -> None:
    """It would only hang up, and nobody would know why. Lanes for pages it does have."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        handler = threading.Thread(target=welcome_as_version_1, args=(server, 2 + 2))
        handler.start()
        wanted = Connect(host="127.0.0.1", port=port, push_lanes=1, token=TOKEN.hex())
        connect_lanes(wanted, "m-1", BLOCKS).close()
        with pytest.raises(
            LaneSetupError, match="version 1 of the lanes: it knows no state"
        ) as told:
            connect_lanes(wanted.model_copy(update={"device_state": True}), "m-1", BLOCKS)
        handler.join()
    assert "same version" in str(told.value.remedy)
