"""The handler when QEMU is stopped, its lanes are gone, or its address space seems to be."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from pathlib import Path

import pytest

from qpostcopy.companion import Options
from qpostcopy.core import CoreMemoryError, HandlerCore, LaneEnd, TargetGoneError
from qpostcopy.lanes import LaneThreads
from qpostcopy.process import Process
from qpostcopy.qmp import schema
from qpostcopy.qmp.client import RemoteError
from qpostcopy.uffd import handler as handler_module
from qpostcopy.uffd import registration as ram
from qpostcopy.uffd.attach import find_userfaultfds
from qpostcopy.uffd.handler import Attachment, Handler, Session
from tests.companions import MIB, CompanionProcess, Pair, connected, memfd_backends, until, vm_pair
from tests.qmp.support import private_directory
from tests.qmp.support import run as run_unit
from tests.uffd.test_handler import assert_nothing_left, peek, registered_ranges, run
from tests.uffd.victims import NO_LENDER, victim

# --- QEMU cannot be touched ---------------------------------------------------------------


@pytest.mark.vm
@pytest.mark.root
def test_a_detach_that_qemu_refuses_can_be_tried_again() -> None:
    async def body(pair: Pair) -> None:
        async with connected(pair):
            await pair.start()
            await pair.attach()
            pid = pair.destination_vm.pid
            pair.destination_vm.signal(signal.SIGSTOP)
            for _ in range(2):  # the second must not pretend that all is well
                with pytest.raises(RemoteError, match="stopped by a signal") as caught:
                    await pair.detach()
                assert f"kill -CONT {pid}" in str(caught.value.remedy)
                assert len(find_userfaultfds(pid)) == 1
            with pytest.raises(RemoteError, match="qpc-listen: a qpc-detach failed half way"):
                await pair.open_lanes()
            assert (pair.state_dir / "handler.json").exists()
            pair.destination_vm.signal(signal.SIGCONT)
            await pair.detach()
            assert_nothing_left(pair)
            assert state_files(pair.handler) == set()
            await pair.attach()
            await pair.detach()
            await pair.handler.quit()

    with private_directory() as directory, vm_pair(directory, memfd_backends(32 * MIB)) as pair:
        run(body(pair))


@pytest.mark.root
def test_an_attach_that_fails_at_its_end_leaves_nothing(tmp_path: Path) -> None:
    """The userfaultfd is there, and then the core cannot be made."""

    def fail(*_: object) -> HandlerCore:
        (tmp_path / "placed.ram0").touch()
        raise CoreMemoryError("maps", errno.ENOMEM, 0, 0)

    async def body() -> None:
        handler = Told(tmp_path).handler
        handler._make_core = fail  # type: ignore[method-assign, assignment]
        with victim("ppoll") as target:
            taken = ram.take(target.pid, (), tmp_path, (), NO_LENDER)
            with pytest.raises(CoreMemoryError):
                await handler._begin(taken, 0, 0, True)
            assert find_userfaultfds(target.pid) == ()

    run_unit(body)
    assert list(tmp_path.iterdir()) == []


def state_files(who: CompanionProcess) -> set[str]:
    """What the handler keeps in the state directory."""
    ours = ("handler.json", "placed", "zero", "counters")
    return {path.name for path in who.state_dir.iterdir() if path.name.startswith(ours)}


# --- no lanes -----------------------------------------------------------------------------


@pytest.mark.vm
@pytest.mark.root
def test_known_pages_are_answered_while_there_are_no_lanes() -> None:
    async def body(pair: Pair) -> None:
        async with connected(pair):
            await pair.start()
            fd = pair.source_vm.ram_fd("ram0")
            for offset in range(0, 16 * MIB, MIB):
                os.pwrite(fd, os.urandom(MIB), offset)
            await pair.attach()
            await pair.open_lanes()
            execute = pair.handler.client.execute
            with pair.handler.client.subscribe("QPC_LANE_LOST", "QPC_FATAL") as events:
                await pair.serve(push_bytes_per_second=MIB)
                await until(pair, lambda stats: stats.hole_pages > 1000)
                await pair.page_server.kill()
                assert (await events.get(10)).name == "QPC_LANE_LOST"
                assert "0x00" in str(await peek(pair.destination_vm, execute, 40 * MIB))
                listen = schema.Listen(
                    host="127.0.0.1", port=0, push_lanes=1, token=pair.token
                )  # the page server takes its time
                await pair.handler.client.call("qpc-listen", listen, schema.Listening)
                assert "0x00" in str(await peek(pair.destination_vm, execute, 41 * MIB))
                pair.page_server = CompanionProcess("page-server", pair.source_vm, pair.state_dir)
                await pair.page_server.start("--pid", str(pair.source_vm.pid))
                await pair.open_lanes()
                await pair.serve()
                await until(pair, lambda stats: stats.remaining_pages == 0)
            await pair.detach()
            assert registered_ranges(pair.destination_vm.pid) == 0
            await asyncio.gather(pair.handler.quit(), pair.page_server.quit())
            assert "Traceback" not in pair.handler.log

    with private_directory() as directory, vm_pair(directory, memfd_backends(64 * MIB)) as pair:
        run(body(pair))


def test_a_takeover_is_not_made_worse_by_its_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is placed already: QPC_PLACED is told though the recorder had a bug."""

    class PlacedCore(FakeCore):
        def __init__(self) -> None:
            super().__init__()
            self.done_fd = os.eventfd(1, os.EFD_CLOEXEC)

        def commit(self) -> None:
            pass

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    process = Process.of(os.getpid())
    assert process
    taken = ram.Registration(process, -1, -1, ())
    monkeypatch.setattr("qpostcopy.uffd.recording.record", fail)
    (tmp_path / "committed").touch()

    async def body() -> None:
        told = Told(tmp_path)
        core, placed = PlacedCore(), asyncio.Queue[object]()
        told.handler._make_core = lambda *_: core  # type: ignore[method-assign, assignment]
        told.handler.endpoint.emit = placed.put_nowait  # type: ignore[method-assign, assignment]
        with pytest.raises(RuntimeError):
            await told.handler._begin(taken, 0, 0, False)
        assert told.handler._attachment is not None
        assert told.handler._attachment.committed
        async with asyncio.timeout(5):
            assert isinstance(await placed.get(), schema.PlacedAll)
        os.close(core.done_fd)

    run_unit(body)


# --- how the end of a loop is judged ------------------------------------------------------


class FakeCore:
    """As much of a core as the end of a loop needs."""

    def __init__(self) -> None:
        self.local_runs = 0

    def run_local(self) -> LaneEnd:
        self.local_runs += 1
        return LaneEnd.STOPPED

    def stats(self) -> FakeCore:
        return self

    remaining_pages = 1


class Told:
    """A handler whose loops end as a test wants, and what it tells."""

    def __init__(self, directory: Path) -> None:
        self.core = FakeCore()
        self.handler = Handler(
            Options(
                qmp=directory / "qmp",
                pid=os.getpid(),
                migration_id="m-1",
                state_dir=directory,
                control=directory / "handler.sock",
            )
        )
        self.threads = LaneThreads(self.handler._on_loop_end)
        session = Session(None, self.threads)  # type: ignore[arg-type]
        self.handler._attachment = Attachment(
            None,  # type: ignore[arg-type]
            self.core,  # type: ignore[arg-type]
            session=session,
        )
        self.events: list[schema.Model] = []
        self.handler.endpoint.emit = self.events.append  # type: ignore[method-assign, assignment]

    async def end_of(self, name: str, outcome: LaneEnd | Exception) -> list[str]:
        self.handler._on_loop_end(name, outcome)
        if self.handler._tasks:
            await asyncio.wait(self.handler._tasks)
        await self.threads.join()
        return [type(event).__name__ for event in self.events]


GONE = TargetGoneError("place a page", errno.ESRCH, 0x1000, 4096)


def test_an_address_space_is_only_gone_if_qemu_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler_module, "GONE_SECONDS", 0.05)

    async def body() -> None:
        assert await Told(tmp_path).end_of("demand", GONE) == ["Fatal"]
        told = Told(tmp_path)
        told.handler._qemu_gone.set()
        assert await told.end_of("demand", GONE) == []
        told = Told(tmp_path)
        monkeypatch.setattr(handler_module, "GONE_SECONDS", 10)
        asyncio.get_running_loop().call_later(0.05, told.handler._qemu_gone.set)
        assert await told.end_of("push 0", GONE) == []

    run_unit(body)


@pytest.mark.parametrize(
    ("name", "outcome", "events", "local_runs"),
    [
        ("demand", LaneEnd.CLOSED, ["LaneLost"], 1),
        ("push 0", LaneEnd.CLOSED, ["LaneLost"], 0),
        ("demand", LaneEnd.STOPPED, [], 0),
        ("demand", RuntimeError("a bug"), ["Fatal"], 0),
        ("local", LaneEnd.STOPPED, [], 0),
        ("local", RuntimeError("a bug"), ["Fatal"], 0),
    ],
)
def test_what_follows_the_end_of_a_loop(
    tmp_path: Path,
    name: str,
    outcome: LaneEnd | Exception,
    events: list[str],
    local_runs: int,
) -> None:
    async def body() -> None:
        told = Told(tmp_path)
        assert await told.end_of(name, outcome) == events
        assert told.core.local_runs == local_runs

    run_unit(body)
