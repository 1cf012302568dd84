"""The connection for device state: made by us, lent to QEMU once, or not there at all."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from qpostcopy import stream
from qpostcopy.lanes import Lanes
from qpostcopy.migration import COMMAND_SECONDS
from qpostcopy.qmp import schema
from qpostcopy.qmp.client import RemoteError
from qpostcopy.qmp.connection import CommandError, ConnectionLostError
from qpostcopy.qmp.holder import LEND_SECONDS, MonitorHolder
from tests.companions import MIB, CompanionProcess, Pair, connected, memfd_backends, vm_pair
from tests.qmp.support import private_directory, run


class Borrower(MonitorHolder):
    """A QEMU that keeps what it is lent, or takes nothing."""

    def __init__(self, problem: Exception | None = None) -> None:
        super().__init__(Path("/none"), on_event=lambda _: None, on_lost=lambda _: None)
        self.got: dict[str, int] = {}
        self._refusal = problem

    async def lend(self, fd: int, name: str) -> None:
        if self._refusal:
            raise self._refusal
        self.got[name] = os.dup(fd)


def lanes_with(device_state: socket.socket | None) -> Lanes:
    demand, push = socket.socketpair()
    return Lanes(demand, (push,), device_state)


def test_each_gets_its_end_of_one_connection() -> None:
    async def body() -> None:
        got = []
        for end in socket.socketpair():
            end.setblocking(False)
            lanes, borrower = lanes_with(end), Borrower()
            await stream.lend(lanes, borrower)
            assert end.fileno() < 0, "it is QEMU's alone"
            lanes.close()
            got.append(borrower.got[stream.NAME])
        assert [os.get_blocking(end) for end in got] == [True, True]
        os.write(got[0], b"state")
        assert os.read(got[1], 9) == b"state"
        for copy in got:
            os.close(copy)

    run(body)


def test_it_is_lent_once() -> None:
    async def body() -> None:
        ours, theirs = socket.socketpair()
        lanes, borrower = lanes_with(ours), Borrower()
        await stream.lend(lanes, borrower)
        with pytest.raises(stream.NoStreamError, match="or it was lent"):
            await stream.lend(lanes, borrower)
        os.close(borrower.got[stream.NAME])
        lanes.close()
        theirs.close()

    run(body)


def test_lanes_without_one() -> None:
    async def body() -> None:
        lanes = lanes_with(None)
        with pytest.raises(stream.NoStreamError, match="no connection for device state"):
            await stream.lend(lanes, Borrower())
        lanes.close()

    run(body)


def test_what_qemu_does_not_take_is_closed() -> None:
    """The other side sees that nobody is there, and does not wait."""

    async def body() -> None:
        ours, theirs = socket.socketpair()
        lanes = lanes_with(ours)
        with pytest.raises(ConnectionLostError):
            await stream.lend(lanes, Borrower(ConnectionLostError("QEMU's monitor: gone")))
        assert theirs.recv(1) == b""
        lanes.close()
        theirs.close()

    run(body)


@pytest.mark.vm
@pytest.mark.root
def test_real_qemus_have_it_until_it_is_taken_back() -> None:
    async def lend(side: CompanionProcess) -> None:
        await side.client.call("qpc-state-lend", schema.StateLend(), schema.Empty)

    async def body(pair: Pair) -> None:
        async with asyncio.timeout(60), connected(pair):
            await pair.start()
            with pytest.raises(RemoteError, match="qpc-connect first"):
                await lend(pair.page_server)
            await pair.attach()
            with pytest.raises(RemoteError, match="qpc-listen first"):
                await lend(pair.handler)
            await pair.open_lanes()
            for side in (pair.page_server, pair.handler):
                with pytest.raises(RemoteError, match="no connection for device state"):
                    await lend(side)
            await pair.open_lanes(device_state=True)
            for side in (pair.page_server, pair.handler):
                await lend(side)
                await side.client.execute("closefd", {"fdname": stream.NAME})
                with pytest.raises(CommandError, match="not found"):
                    await side.client.execute("closefd", {"fdname": stream.NAME})
            await pair.serve()  # the lanes for pages are as good as before
            await pair.detach()

    with private_directory() as directory, vm_pair(directory, memfd_backends(32 * MIB)) as pair:
        asyncio.run(body(pair))


def test_a_controller_waits_long_enough_to_hear_why() -> None:
    assert stream.LANES_SECONDS + LEND_SECONDS < COMMAND_SECONDS
