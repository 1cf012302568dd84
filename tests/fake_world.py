"""Two QEMUs and their companions in miniature, for faults that nothing real can produce.

It knows just enough of QEMU 7.2's run states to be wrong in the same places,
checks at every change that never both guests run, and lets a test lose a reply,
hang a command or fail one. Everything that a real QEMU can be made to do is
tested with a real QEMU instead (tests/vm).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qpostcopy.errors import OutcomeUnknownError, QpostcopyError, StateLostError
from qpostcopy.netns import NetnsAbsentError
from qpostcopy.process import Process
from qpostcopy.qmp import schema
from qpostcopy.qmp.connection import CommandError, ConnectionLostError
from qpostcopy.qmp.events import Event
from qpostcopy.side import EventBook, NotProvenGoneError, Role
from qpostcopy.state import StateDirectory
from qpostcopy.uffd.registration import RECORD

BLOCK_BYTES = 1 << 20
#: Both are "process 1", told apart by their start times.
TICKS: dict[str, int] = {"source": 1, "destination": 2}
CAPABILITIES = (
    "x-ignore-shared",
    "events",
    "pause-before-switchover",
    "late-block-activate",
    "return-path",
)


class FakeQemu:
    """Run state and migration state of one QEMU."""

    def __init__(self, status: str) -> None:
        self.status = status
        self.migration = "none"
        self.autostart = True
        self.arguments: tuple[str, ...] = ("qemu-system-x86_64", "-incoming", "defer")
        self.alive = True
        self.capabilities = dict.fromkeys(CAPABILITIES, False)
        self.parameters: dict[str, object] = {"max-bandwidth": 1 << 27, "downtime-limit": 300}

    @property
    def running(self) -> bool:
        return self.alive and self.status == "running"


class World:
    """Both QEMUs, the commands that each got, and the faults that a test asked for.

    :ivar faults: (role, command) -> called in place of the command; it may call the
        second argument, which runs the command, and may raise or wait for ever.
    """

    def __init__(self, *, running: bool = True) -> None:
        self.source = FakeQemu("running" if running else "paused")
        self.destination = FakeQemu("inmigrate")
        self.log: list[tuple[str, str]] = []
        self.faults: dict[tuple[str, str], Callable[[World, Callable[[], Any]], Any]] = {}
        self.sides: dict[str, FakeSide] = {}
        self.placed_at_once = True
        #: RAM in QEMU's own stream: by the source before it sends the last of it, and after
        self.announced_bytes = self.stream_bytes = 200_000
        self.remaining_bytes = 0
        self.kill_works = True
        self.was_running = running
        #: of each qpc-serve of the source: whether it is to push at once
        self.pushes: list[bool] = []
        #: whose network namespace is gone
        self.without_network: set[str] = set()
        #: what hangs: a companion that lives and says nothing, until `ensure` replaces it
        self.hung: set[str] = set()

    def qemu(self, role: str) -> FakeQemu:
        return self.source if role == "source" else self.destination

    def check(self) -> None:
        """The invariant of all invariants."""
        assert not (self.source.running and self.destination.running), "both sides run"

    def event(self, role: Role, name: str, **data: object) -> None:
        self.check()
        self.sides[role].book.put(role, Event(name, data))

    def got(self, role: str, command: str) -> int:
        """How often a side got a command."""
        return self.log.count((role, command))

    def make_side(
        self,
        role: Role,
        directory: StateDirectory,
        book: EventBook,
        plan_pid: int | None,
        netns: str | None,
    ) -> FakeSide:
        """In place of the class Side: a new connection, to a companion that may live already."""
        side = FakeSide(self, role, directory, book)
        if role in self.sides:
            side.up, side.attached = self.sides[role].up, self.sides[role].attached
        self.sides[role] = side
        return side


class FakeSide:
    """Stands in for side.Side."""

    def __init__(
        self, world: World, role: Role, directory: StateDirectory, book: EventBook
    ) -> None:
        self.role = role
        self.book = book
        self.world = world
        self.directory = directory
        self.up = False
        self.quits = 0
        self.hung_up = False
        self.attached = False

    # --- what Side offers -----------------------------------------------------------------

    @property
    def qemu(self) -> FakeProcess | None:
        known = self.directory.state.side(self.role).qemu
        return None if known is None else FakeProcess(self.world, self.role)

    def qemu_alive(self) -> bool:
        return self.world.qemu(self.role).alive

    def qemu_arguments(self) -> tuple[str, ...]:
        return self.world.qemu(self.role).arguments

    async def answers(self, within_seconds: float) -> bool:
        return self.up and self.role not in self.world.hung

    async def ensure(self, *, monitor: bool = False, network: bool = True) -> bool:
        if self.role in self.world.hung:
            self.world.hung.discard(self.role)
            self.up = self.attached = False
        if self.up:
            return False
        if network and self.role in self.world.without_network:
            raise NetnsAbsentError("there is no such network namespace")
        await self._run("ensure", lambda: None)
        self.up = True
        if self.qemu is None:
            self.directory.update_side(self.role, qemu=Process(pid=1, start_ticks=TICKS[self.role]))
        return True

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, timeout_seconds: float = 30
    ) -> object:
        return await self._limited(command, arguments or {}, timeout_seconds)

    async def query(self, command: str, timeout_seconds: float = 30) -> dict[str, object]:
        reply = await self._limited(command, {}, timeout_seconds)
        assert isinstance(reply, dict)
        return reply

    async def call(
        self, command: str, arguments: schema.Model, reply: type, timeout_seconds: float = 30
    ) -> Any:
        return await self._limited(command, arguments.model_dump(), timeout_seconds)

    async def kill_qemu(self) -> None:
        await self._run("kill", lambda: None)
        if not self.world.kill_works:
            raise NotProvenGoneError("it does not end", remedy="find out why")
        self.world.qemu(self.role).alive = False

    async def quit(self) -> None:
        self.quits += 1
        self.up = self.attached = False

    async def hang_up(self) -> None:
        self.hung_up = True

    # --- commands -------------------------------------------------------------------------

    async def _limited(
        self, command: str, arguments: Mapping[str, Any], timeout_seconds: float
    ) -> object:
        if not self.up:
            raise ConnectionLostError(f"{command} was not sent")
        try:
            async with asyncio.timeout(min(timeout_seconds, 0.2)):
                return await self._run(command, lambda: self._act(command, arguments))
        except TimeoutError as error:
            raise OutcomeUnknownError(f"{command}: no reply") from error

    async def _run(self, command: str, act: Callable[[], Any]) -> Any:
        self.world.log.append((self.role, command))
        await asyncio.sleep(0)
        fault = self.world.faults.get((self.role, command))
        result = act() if fault is None else fault(self.world, act)
        if asyncio.iscoroutine(result):
            result = await result
        self.world.check()
        return result

    def _act(self, command: str, arguments: Mapping[str, Any]) -> object:
        if not self.world.qemu(self.role).alive and not command.startswith("qpc-"):
            raise ConnectionLostError(f"{command} was not sent")
        name = "do_" + command.replace("-", "_")
        return getattr(self, name)(arguments)

    def do_query_status(self, _: Mapping[str, Any]) -> object:
        qemu = self.world.qemu(self.role)
        return {"status": qemu.status, "running": qemu.running}

    def do_query_migrate(self, _: Mapping[str, Any]) -> object:
        world, qemu = self.world, self.world.qemu(self.role)
        if qemu.migration == "completed":
            return {"status": "completed", "ram": {"total": world.stream_bytes}}
        ram = {"total": world.announced_bytes, "remaining": world.remaining_bytes}
        return {"status": qemu.migration, "ram": ram}

    def do_query_migrate_capabilities(self, _: Mapping[str, Any]) -> object:
        states = self.world.qemu(self.role).capabilities
        return [{"capability": name, "state": state} for name, state in states.items()]

    def do_query_migrate_parameters(self, _: Mapping[str, Any]) -> object:
        return dict(self.world.qemu(self.role).parameters)

    def do_migrate_set_parameters(self, arguments: Mapping[str, Any]) -> object:
        self.world.qemu(self.role).parameters.update(arguments)
        return {}

    def do_migrate_set_capabilities(self, arguments: Mapping[str, Any]) -> object:
        for item in arguments["capabilities"]:
            self.world.qemu(self.role).capabilities[item["capability"]] = item["state"]
        return {}

    def do_stop(self, _: Mapping[str, Any]) -> object:
        assert self.role == "destination", "the source is stopped by migrate only"
        self.world.destination.autostart = False
        return {}

    def do_cont(self, _: Mapping[str, Any]) -> object:
        qemu = self.world.qemu(self.role)
        if qemu.status == "inmigrate":
            qemu.autostart = True
        elif qemu.status == "finish-migrate":
            raise CommandError("cont", "GenericError", "Migration is not finalized yet")
        else:
            qemu.status = "running"
            self.world.event(self.role, "RESUME")
        return {}

    def do_quit(self, _: Mapping[str, Any]) -> object:
        self.world.qemu(self.role).alive = False
        return {}

    def do_migrate_incoming(self, _: Mapping[str, Any]) -> object:
        self.world.destination.migration = "setup"
        return {}

    def do_migrate(self, _: Mapping[str, Any]) -> object:
        source = self.world.source
        source.migration = "pre-switchover"
        if source.running:
            source.status = "finish-migrate"
            self.world.event("source", "STOP")
        source.status = "finish-migrate"
        self.world.event("source", "MIGRATION", status="pre-switchover")
        return {}

    def do_migrate_continue(self, _: Mapping[str, Any]) -> object:
        world = self.world
        world.source.migration, world.source.status = "completed", "postmigrate"
        world.event("source", "MIGRATION", status="completed")
        self.load()
        return {}

    def load(self) -> None:
        """The destination loads and, by its autostart, stays paused or runs."""
        destination = self.world.destination
        destination.migration = "completed"
        runs = destination.autostart and self.world.was_running
        destination.status = "running" if runs else "paused"
        self.world.event("destination", "MIGRATION", status="completed")

    def do_migrate_cancel(self, _: Mapping[str, Any]) -> object:
        self.world.source.migration = "cancelled"
        self.world.source.status = "running" if self.world.was_running else "postmigrate"
        return {}

    def do_qpc_inspect(self, _: Mapping[str, Any]) -> object:
        return facts(self.role, self.world.qemu(self.role))

    @property
    def _record(self) -> Path:
        return self.directory.path / RECORD

    def do_qpc_attach(self, _: Mapping[str, Any]) -> object:
        self._record.touch()
        self.attached = True
        return schema.Attached(uffd_fd=33, ranges=1, registered_bytes=BLOCK_BYTES)

    def do_qpc_adopt(self, arguments: Mapping[str, Any]) -> object:
        assert arguments["uffd_fd"] == 33
        if not self._record.exists():
            raise StateLostError("nothing to adopt")
        return self.do_qpc_attach(arguments)

    def do_qpc_detach(self, _: Mapping[str, Any]) -> object:
        if self.attached:
            self._record.unlink()
        self.attached = False
        return schema.Empty()

    def do_qpc_prepare(self, _: Mapping[str, Any]) -> object:
        return schema.Prepared(extents=1)

    def do_qpc_listen(self, _: Mapping[str, Any]) -> object:
        return schema.Listening(port=4444)

    def do_qpc_connect(self, arguments: Mapping[str, Any]) -> object:
        assert arguments["device_state"] is not self.directory.committed, "once, before the commit"
        return schema.Empty()

    def do_qpc_state_lend(self, _: Mapping[str, Any]) -> object:
        return schema.Empty()

    def do_closefd(self, _: Mapping[str, Any]) -> object:
        raise CommandError("closefd", "GenericError", "File descriptor not found")

    def do_qpc_committed(self, _: Mapping[str, Any]) -> object:
        return schema.Empty()

    def do_qpc_serve(self, arguments: Mapping[str, Any]) -> object:
        if self.role == "source":
            self.world.pushes.append(arguments["push"])
        if self.role == "destination" and self.world.placed_at_once:
            self.world.event("destination", "QPC_PLACED")
        return schema.Empty()

    def do_qpc_push(self, _: Mapping[str, Any]) -> object:
        assert self.world.destination.migration == "completed", "in device state's way"
        return schema.Empty()

    def do_qpc_stats(self, _: Mapping[str, Any]) -> object:
        if not self.attached:
            raise QpostcopyError("not attached")
        counters: dict[str, Any] = dict.fromkeys(schema.HandlerStats.model_fields, 0)
        counters |= {"total_pages": 256, "remaining_pages": 0 if self.world.placed_at_once else 9}
        return schema.HandlerStats(**counters | {"faults": schema.FaultStats()})


class FakeProcess:
    """Stands in for process.Process where only its end matters."""

    pid = 4711

    def __init__(self, world: World, role: Role) -> None:
        self._world, self._role = world, role

    def wait_gone(self, _: float) -> bool:
        """Whether it is gone; a miniature never takes long to die."""
        return not self._world.qemu(self._role).alive


def facts(role: Role, qemu: FakeQemu) -> schema.SideFacts:
    """What `qpc-inspect` says of a QEMU that nothing speaks against."""
    return schema.SideFacts(
        role=role,
        host="local",
        pid=1,
        pid_start_ticks=TICKS[role],
        uid=0,
        machine="pc-q35-7.2",
        qemu_version="7.2.22",
        run_status=qemu.status,
        running=qemu.running,
        migration_status=None,
        migration_blockers=(),
        capabilities=dict(qemu.capabilities),
        mem_lock=False,
        blocks=(
            schema.BlockFacts(
                name="ram",
                size_bytes=BLOCK_BYTES,
                first_gpa=0,
                page_bytes=4096,
                share=True,
                backend="memory-backend-file",
                mem_path="/dev/shm",
                device=1,
                inode=2 if role == "source" else 3,
                filesystem="tmpfs",
                mappings=(),
            ),
        ),
        unshared_bytes=540_000,
        other_mappers=(),
        devices=(),
        userfaults=(),
        effective_rights=("CAP_SYS_PTRACE",),
        kernel_release="6.1",
        kernel_missing=(),
        memory_available_bytes=1 << 33,
        tmpfs_available_bytes=1 << 33,
    )


def write_plan(path: Path, *, after: str = "quit", before_switch: str = "1h") -> Path:
    """A plan whose sockets nobody will open."""
    path.write_text(
        "version: 1\nname: web1\n"
        f"source: {{qmp: /run/a.qmp, after: {after}}}\n"
        "destination: {qmp: /run/b.qmp}\n"
        f"limits: {{before_switch: {before_switch}}}\n"
    )
    return path
