"""The page server beside a real source QEMU: what it refuses, what it never changes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qpostcopy.companion import Options
from qpostcopy.config import Profile, TraceStep
from qpostcopy.core import LaneEnd, LoopStoppedError
from qpostcopy.errors import QpostcopyError, UsageError
from qpostcopy.lanes import Lanes, LaneThreads
from qpostcopy.qmp import schema
from qpostcopy.qmp.client import RemoteError
from qpostcopy.source import server as server_module
from qpostcopy.source.server import PageServer, Session
from qpostcopy.trace import Trace, TracedBlock, encode
from tests.companions import MIB, Pair, assert_same_ram, connected, fill, memfd_backends, vm_pair
from tests.qmp.support import private_directory

pytestmark = [pytest.mark.vm, pytest.mark.root]

SECONDS = 60.0
TOKEN = "11" * 32


def data_extents(fd: int, size_bytes: int) -> list[tuple[int, int]]:
    """Where a file has pages."""
    found, offset = [], 0
    while offset < size_bytes:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError:
            break
        offset = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, offset))
    return found


def test_the_source_is_not_changed_and_its_holes_stay_holes() -> None:
    async def body(pair: Pair) -> None:
        async with asyncio.timeout(SECONDS), connected(pair):
            await pair.start()
            fd = pair.source_vm.ram_fd("ram0")
            fill(fd, 64 * MIB, b"s")
            before = data_extents(fd, 64 * MIB)
            await pair.attach()
            with pair.handler.client.subscribe("QPC_PLACED") as placed:
                await pair.open_lanes(2)
                await pair.serve()
                await placed.get(30)
            stats = await pair.page_server.client.call(
                "qpc-stats", schema.Empty(), schema.SourceStats
            )
            assert stats.push_done
            assert stats.hole_pages > 0
            assert stats.zero_pages > 0
            assert data_extents(fd, 64 * MIB) == before
            await pair.detach()
            assert_same_ram(pair)

    with private_directory() as directory, vm_pair(directory, memfd_backends(64 * MIB)) as pair:
        asyncio.run(body(pair))


def test_pages_can_still_be_had_when_the_source_qemu_is_gone() -> None:
    async def body(pair: Pair) -> None:
        async with asyncio.timeout(SECONDS), connected(pair):
            await pair.start()
            fill(pair.source_vm.ram_fd("ram0"), 32 * MIB, b"s")
            copy = os.dup(pair.source_vm.ram_fd("ram0"))
            await pair.attach()
            await pair.open_lanes()
            await pair.serve(push_bytes_per_second=MIB)
            pair.source_vm.kill()
            with pair.handler.client.subscribe("QPC_PLACED") as placed:
                await pair.open_lanes()
                await pair.serve()
                await placed.get(30)
            await pair.detach()
            pair.source_vm._memfds["ram0"] = copy
            assert_same_ram(pair)

    with private_directory() as directory, vm_pair(directory, memfd_backends(32 * MIB)) as pair:
        asyncio.run(body(pair))


def test_a_push_can_wait() -> None:
    async def body(pair: Pair) -> None:
        async with asyncio.timeout(SECONDS), connected(pair):
            await pair.start()
            fill(pair.source_vm.ram_fd("ram0"), 32 * MIB, b"s")
            await pair.attach()
            await pair.open_lanes()
            client = pair.page_server.client
            with pytest.raises(RemoteError, match="lanes that serve"):
                await client.call("qpc-push", schema.Push(), schema.Empty)
            with pair.handler.client.subscribe("QPC_PLACED") as placed:
                await pair.serve(push=False)
                assert (await pair.handler_stats()).push_pages == 0
                await client.call("qpc-push", schema.Push(), schema.Empty)
                await placed.get(30)
            await client.call("qpc-push", schema.Push(), schema.Empty)  # it has: no matter
            await pair.detach()
            assert_same_ram(pair)

    with private_directory() as directory, vm_pair(directory, memfd_backends(32 * MIB)) as pair:
        asyncio.run(body(pair))


def test_a_push_that_nobody_asks_for_begins_after_the_commit() -> None:
    """The controller was killed right after `cont`."""

    async def body(pair: Pair) -> None:
        async with asyncio.timeout(SECONDS), connected(pair):
            await pair.start()
            fill(pair.source_vm.ram_fd("ram0"), 32 * MIB, b"s")
            await pair.attach()
            await pair.open_lanes()
            with pair.handler.client.subscribe("QPC_PLACED") as placed:
                await pair.serve(push=False)
                (pair.state_dir / "committed").touch()
                await placed.get(30)
            # Too late, and no error.
            await pair.page_server.client.call("qpc-push", schema.Push(), schema.Empty)
            await pair.detach()
            assert_same_ram(pair)
            assert pair.page_server.log.count("the push begins") == 1

    with private_directory() as directory, vm_pair(directory, memfd_backends(32 * MIB)) as pair:
        asyncio.run(body(pair))


def test_lanes_that_are_lost_before_the_push_are_told() -> None:
    async def body(pair: Pair) -> None:
        async with asyncio.timeout(SECONDS), connected(pair):
            await pair.start()
            fill(pair.source_vm.ram_fd("ram0"), 32 * MIB, b"s")
            await pair.attach()
            await pair.open_lanes()
            await pair.serve(push=False)
            with pair.page_server.client.subscribe("QPC_LANE_LOST") as lost:
                await pair.handler.kill()
                await lost.get(30)

    with private_directory() as directory, vm_pair(directory, memfd_backends(32 * MIB)) as pair:
        asyncio.run(body(pair))


def test_what_it_refuses() -> None:
    async def body(pair: Pair) -> None:
        async with asyncio.timeout(SECONDS), connected(pair):
            client = await pair.page_server.start()
            with pytest.raises(RemoteError, match="nothing to count yet"):
                await client.call("qpc-stats", schema.Empty(), schema.SourceStats)
            with pytest.raises(UsageError, match="the profile is not one"):
                await client.call(
                    "qpc-prepare", schema.Prepare(profile={"push": 5}), schema.Prepared
                )
            with pytest.raises(RemoteError, match="qpc-prepare first"):
                await client.call("qpc-serve", schema.ServePages(), schema.Empty)
            profile = Profile(name="in-order").model_dump(mode="json")
            await client.call("qpc-prepare", schema.Prepare(profile=profile), schema.Prepared)
            with pytest.raises(RemoteError, match="qpc-connect first"):
                await client.call("qpc-serve", schema.ServePages(), schema.Empty)
            with socket.create_server(("127.0.0.1", 0)) as other:
                port = other.getsockname()[1]
            nobody = schema.Connect(host="127.0.0.1", port=port, push_lanes=1, token=TOKEN)
            with pytest.raises(RemoteError, match="cannot connect a lane") as caught:
                await client.call("qpc-connect", nobody, schema.Empty)
            assert "lanes.listen" in str(caught.value.remedy)
            with pytest.raises(UsageError, match=r"qpc-connect: token"):
                await client.execute(
                    "qpc-connect",
                    {"host": "127.0.0.1", "port": port, "push_lanes": 1, "token": "x"},
                )
            await pair.page_server.quit()

    with private_directory() as directory, vm_pair(directory, memfd_backends(32 * MIB)) as pair:
        asyncio.run(body(pair))


def test_a_trace_is_compiled_once(tmp_path: Path) -> None:
    """A repair prepares again, while the guest waits: the file is not even looked at."""

    async def body(pair: Pair) -> None:
        async with asyncio.timeout(SECONDS), connected(pair):
            client = await pair.page_server.start()

            async def prepare(blocks: tuple[TracedBlock, ...], rate: int | None = None) -> int:
                (tmp_path / "t").write_bytes(encode(Trace(blocks, (5, 3, 4), (0, 0, 0))))
                steps = (TraceStep(file=tmp_path / "t", named_in="web.yaml:5: push[0]"),)
                profile = Profile(name="traced", push=steps).model_dump(mode="json")
                wanted = schema.Prepare(profile=profile, push_bytes_per_second=rate)
                return (await client.call("qpc-prepare", wanted, schema.Prepared)).extents

            ours = TracedBlock("ram0", 32 * MIB)
            with pytest.raises(UsageError, match=r"^web\.yaml:5: .* trace of another VM"):
                await prepare((ours, TracedBlock("ram1", MIB)))
            assert await prepare((ours,)) == 4  # 5; 3 and 4; what is below; what is above
            assert await prepare((TracedBlock("other", MIB),)) == 4
            with pytest.raises(UsageError, match="trace of another VM"):
                await prepare((TracedBlock("other", MIB),), rate=MIB)  # another order: anew
            await pair.page_server.quit()

    with private_directory() as directory, vm_pair(directory, memfd_backends(32 * MIB)) as pair:
        asyncio.run(body(pair))


def test_a_handler_that_stays_silent_is_given_up() -> None:
    """It accepts the connection and never says hello."""

    async def body(pair: Pair) -> None:
        async with asyncio.timeout(SECONDS), connected(pair):
            client = await pair.page_server.start()
            with socket.create_server(("127.0.0.1", 0)) as mute:
                arguments = schema.Connect(
                    host="127.0.0.1", port=mute.getsockname()[1], push_lanes=1, token=TOKEN
                )
                with pytest.raises(RemoteError, match="did not finish its hello in time"):
                    await client.call("qpc-connect", arguments, schema.Empty)
            await client.call("qpc-hello", schema.Empty(), schema.Hello)

    with private_directory() as directory, vm_pair(directory, memfd_backends(32 * MIB)) as pair:
        asyncio.run(body(pair))


class FakeCore:
    """Its calls block until they are told to stop, as those of the C core do."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.begun, self.stopped = threading.Event(), threading.Event()
        self.scans, self.scan_stopped = 0, threading.Event()

    def receive_have(self, _fd: int, _deadline_ms: int) -> None:
        self.begun.set()
        self.stopped.wait(10)
        time.sleep(0.05)  # on its way out it still uses the core
        self.said.append("returned")
        raise LoopStoppedError("asked to stop", 0, 0, 0)

    def stop(self) -> None:
        self.stopped.set()

    def run_scan(self) -> LaneEnd:
        self.scans += 1
        assert self.scan_stopped.wait(10)
        self.said.append("scan ended")
        return LaneEnd.STOPPED

    def stop_scan(self) -> None:
        self.scan_stopped.set()

    def run_demand(self, _fd: int) -> LaneEnd:
        assert self.stopped.wait(10)
        return LaneEnd.STOPPED

    def reset(self) -> None:
        self.said.append("reset")

    def close(self) -> None:
        self.said.append("closed")


def test_a_core_is_not_destroyed_under_a_call(tmp_path: Path) -> None:
    """A companion that ends cancels commands that are late; their threads cannot be."""

    async def body() -> None:
        core = FakeCore()
        options = Options(tmp_path / "qmp", os.getpid(), "m-1", tmp_path, tmp_path / "sock")
        server = PageServer(options)
        ours, theirs = socket.socketpair()
        with theirs:
            server._core = core  # type: ignore[assignment]
            server._session = Session(Lanes(ours, ()), LaneThreads(server._on_loop_end))
            server._qemu_gone.set()  # a source that does not run
            serving = asyncio.create_task(server.qpc_serve(schema.ServePages()))
            await asyncio.to_thread(core.begun.wait, 10)
            serving.cancel()
            await asyncio.sleep(0)
            await server.close_service()
            assert core.said == ["returned", "reset", "closed"]
            with pytest.raises(asyncio.CancelledError):
                await serving

    asyncio.run(body())


def test_a_session_does_not_wait_for_the_scan(tmp_path: Path) -> None:
    """One lseek of a full terabyte takes ten seconds; a repair has five."""

    async def body() -> None:
        core = FakeCore()
        server = PageServer(Options(tmp_path / "qmp", os.getpid(), "m-1", tmp_path, tmp_path / "s"))
        server._core = core  # type: ignore[assignment]
        for session in range(2):
            ours, theirs = socket.socketpair()
            with theirs:
                server._session = Session(Lanes(ours, ()), LaneThreads(server._on_loop_end))
                server._start_loops(core, server._session)  # type: ignore[arg-type]
                await server._end_session()
            assert core.said == ["reset"] * (session + 1)
        assert core.scans == 1
        await server.close_service()
        assert core.said[2:] == ["reset", "scan ended", "closed"]

    asyncio.run(body())


@contextlib.asynccontextmanager
async def held_back(path: Path, core: FakeCore) -> AsyncIterator[tuple[PageServer, Session]]:
    """A page server that serves and does not push; no lanes for pages to push."""
    server = PageServer(Options(path / "qmp", os.getpid(), "m-1", path, path / "s"))
    server._core = core  # type: ignore[assignment]
    ours, theirs = socket.socketpair()
    with theirs:
        session = server._session = Session(Lanes(ours, ()), LaneThreads(server._on_loop_end))
        server._hold_push(session)
        yield server, session
        await server.close_service()


def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "COMMIT_LOOK_SECONDS", 0.001)
    monkeypatch.setattr(server_module, "PUSH_BY_ITSELF_SECONDS", 0.0)


def test_no_push_by_itself_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quickly(monkeypatch)

    async def body() -> None:
        async with held_back(tmp_path, FakeCore()) as (_, session):
            assert session.watch is not None
            done, _ = await asyncio.wait([session.watch], timeout=0.1)
            assert not done
            before = str(session.push)
            (tmp_path / "committed").touch()
            await session.watch
            assert (before, session.push) == ("held", "begun")

    asyncio.run(body())


def test_the_watch_ends_with_its_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch)

    async def body() -> None:
        async with held_back(tmp_path, FakeCore()) as (server, session):
            assert session.watch is not None
            async with server._changing:
                await server._end_session()
            with pytest.raises(asyncio.CancelledError):
                await session.watch
            (tmp_path / "committed").touch()
            assert session.push == "held"

    asyncio.run(body())


def test_a_page_server_that_waits_for_its_handler_ends_well() -> None:
    async def body(pair: Pair) -> None:
        async with asyncio.timeout(SECONDS), connected(pair):
            await pair.start()
            await pair.attach()
            await pair.open_lanes()
            client = pair.page_server.client
            profile = Profile(name="in-order").model_dump(mode="json")
            await client.call("qpc-prepare", schema.Prepare(profile=profile), schema.Prepared)
            serving = asyncio.create_task(
                client.call("qpc-serve", schema.ServePages(), schema.Empty)
            )
            await asyncio.sleep(0)
            await pair.page_server.quit()
            with pytest.raises(QpostcopyError):
                await serving
            assert "Traceback" not in pair.page_server.log

    with private_directory() as directory, vm_pair(directory, memfd_backends(32 * MIB)) as pair:
        asyncio.run(body(pair))
