"""The connection for device state: made by us, lent to QEMU once, or not there at all."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any, cast

import pytest

from qpostcopy import stream
from qpostcopy.companion import Options
from qpostcopy.core.hello import DEAD_PEER_MS
from qpostcopy.lanes import Lanes, LaneThreads
from qpostcopy.migration import COMMAND_SECONDS
from qpostcopy.qmp import schema
from qpostcopy.qmp.client import RemoteError
from qpostcopy.qmp.connection import CommandError, ConnectionLostError
from qpostcopy.qmp.holder import LEND_SECONDS, MonitorHolder
from qpostcopy.recovery import SETTLE_SECONDS
from qpostcopy.source.server import PageServer
from qpostcopy.source.server import Session as SourceSession
from qpostcopy.switchover import load_seconds
from qpostcopy.uffd.handler import Attachment, Handler
from qpostcopy.uffd.handler import Session as HandlerSession
from tests.companions import MIB, CompanionProcess, Pair, connected, memfd_backends, vm_pair
from tests.qmp.support import private_directory, run


class Borrower(MonitorHolder):
    """A QEMU that keeps what it is lent, or takes nothing."""

    def __init__(self, problem: Exception | None = None) -> None:
        super().__init__(Path("/none"), on_event=lambda _: None, on_lost=lambda _: None)
        self.got: dict[str, int] = {}
        self.asked, self.may_take = asyncio.Event(), asyncio.Event()
        self.may_take.set()
        self._refusal = problem

    async def lend(self, fd: int, name: str) -> None:
        if self._refusal:
            raise self._refusal
        self.asked.set()
        await self.may_take.wait()
        self.got[name] = os.dup(fd)


def lanes_with(device_state: socket.socket | None) -> Lanes:
    demand, push = socket.socketpair()
    return Lanes(demand, (push,), device_state)


def test_each_gets_its_end_of_one_connection() -> None:
    async def body() -> None:
        got = []
        for sock in socket.socketpair():
            sock.setblocking(False)
            lanes, borrower = lanes_with(sock), Borrower()
            with stream.take_end(lanes) as end:
                await stream.lend(end, borrower)
            lanes.close()
            got.append(borrower.got[stream.NAME])
        assert [os.get_blocking(end) for end in got] == [True, True]
        os.write(got[0], b"state")
        assert os.read(got[1], 9) == b"state"
        for copy in got:
            os.close(copy)

    run(body)


def test_it_is_taken_once() -> None:
    ours, theirs = socket.socketpair()
    lanes = lanes_with(ours)
    with theirs, stream.take_end(lanes):
        with pytest.raises(stream.NoStreamError, match="or it was lent"):
            stream.take_end(lanes)
        lanes.close()


def test_lanes_without_one() -> None:
    lanes = lanes_with(None)
    with pytest.raises(stream.NoStreamError, match="no connection for device state"):
        stream.take_end(lanes)
    lanes.close()


# --- by the companions ----------------------------------------------------------------------


def companion_with(
    kind: type[Handler | PageServer], lanes: Lanes, path: Path
) -> Handler | PageServer:
    companion = kind(Options(path / "qmp", os.getpid(), "m-1", path, path / "sock"))
    threads = LaneThreads(lambda *_: None)
    if isinstance(companion, PageServer):
        companion._session = SourceSession(lanes, threads)
    else:
        nothing = cast(Any, None)
        session = HandlerSession(nothing, threads, lanes)
        companion._attachment = Attachment(nothing, nothing, session=session)
    return companion


@pytest.mark.parametrize("kind", [Handler, PageServer])
def test_two_calls_at_once(kind: type[Handler | PageServer], tmp_path: Path) -> None:
    """What ends the session meanwhile closes no number that QEMU is about to be sent."""

    async def body() -> None:
        ours, theirs = socket.socketpair()
        lanes, borrower = lanes_with(ours), Borrower()
        companion = companion_with(kind, lanes, tmp_path)
        companion.monitor = borrower
        borrower.may_take.clear()
        calls = [asyncio.create_task(companion.qpc_state_lend(schema.StateLend())) for _ in "ab"]
        await borrower.asked.wait()
        lanes.close()
        borrower.may_take.set()
        first, second = await asyncio.gather(*calls, return_exceptions=True)
        assert first == schema.Empty()
        assert isinstance(second, stream.NoStreamError)
        copy = borrower.got[stream.NAME]
        os.write(copy, b"state")
        assert theirs.recv(9) == b"state"
        os.close(copy)
        theirs.settimeout(10)
        assert theirs.recv(1) == b"", "with QEMU's own its last copy is closed"
        theirs.close()

    run(body)


@pytest.mark.parametrize("kind", [Handler, PageServer])
def test_what_qemu_does_not_take_is_closed(
    kind: type[Handler | PageServer], tmp_path: Path
) -> None:
    """The other side sees that nobody is there, and does not wait."""

    async def body() -> None:
        ours, theirs = socket.socketpair()
        lanes = lanes_with(ours)
        companion = companion_with(kind, lanes, tmp_path)
        companion.monitor = Borrower(ConnectionLostError("QEMU's monitor: gone"))
        with pytest.raises(ConnectionLostError):
            await companion.qpc_state_lend(schema.StateLend())
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


def test_a_send_into_a_cut_link_fails_before_the_source_is_given_up() -> None:
    """QEMU's main loop is free while there is still hope."""
    assert load_seconds(0) + SETTLE_SECONDS > DEAD_PEER_MS / 1000


def test_a_controller_waits_long_enough_to_hear_why() -> None:
    assert stream.LANES_SECONDS + LEND_SECONDS < COMMAND_SECONDS
