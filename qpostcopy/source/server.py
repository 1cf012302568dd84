"""The page server: the companion beside the source QEMU.

It reads the stopped guest's RAM through the files under it, never through a
mapping, and sends it over lanes: asked-for pages first, the rest in the order of
the profile. Guarantees: nothing of the source is changed; serving does not begin
while the source runs (whether it is stopped is asked at `qpc-serve`, once: that it
stays so is up to the controller, which never `cont`s it); it keeps the RAM files
open, so that pages can still be had if the source QEMU dies after the commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Literal

from pydantic import ValidationError

from qpostcopy import regions, stream
from qpostcopy.companion import Companion, Options, WrongStateError
from qpostcopy.config import Profile
from qpostcopy.core import LaneEnd, RamBlock, SourceCore
from qpostcopy.errors import QpostcopyError, RefusedError, UsageError
from qpostcopy.lanes import (
    Lanes,
    LaneThreads,
    Outcome,
    in_thread,
    is_harmless,
    is_lane_trouble,
    reason_of,
)
from qpostcopy.qmp import schema
from qpostcopy.source.connect import connect_lanes
from qpostcopy.source.schedule import compile_schedule

log = logging.getLogger(__name__)

HAVE_MS = 4000
#: While the push is held: how often the state directory is looked at for the commit.
COMMIT_LOOK_SECONDS = 0.5
#: From the commit seen to a push that nobody asked for; `cont` and qpc-push take milliseconds.
PUSH_BY_ITSELF_SECONDS = 2.0
_STATUS_SECONDS = 3.0
#: Run states in which no vCPU runs and no device writes to RAM.
_STOPPED = frozenset({"postmigrate", "finish-migrate", "paused", "prelaunch", "shutdown"})


class SourceRunsError(RefusedError):
    """The source still runs: its pages would be torn."""


@dataclass(slots=True)
class Ram:
    """The source's RAM: one read-only descriptor for each block."""

    blocks: tuple[RamBlock, ...]
    fds: tuple[int, ...]


@dataclass(slots=True)
class Session:
    """One session of lanes, from `qpc-connect` on.

    :ivar push: held back until `qpc-push`, or begun; none of both before it serves.
    :ivar pushing: the push loops that are not done yet, begun or not.
    :ivar watch: looks for the commit while the push is held.
    """

    lanes: Lanes
    threads: LaneThreads
    serving: bool = False
    push: Literal["none", "held", "begun"] = "none"
    reported: bool = False
    pushing: set[str] = field(default_factory=set)
    watch: asyncio.Task[None] | None = None


class PageServer(Companion):
    """See the module."""

    role = "page-server"
    side = "source"
    commands = schema.PAGE_SERVER

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._ram: Ram | None = None
        self._core: SourceCore | None = None
        self._core_for: tuple[bool, int | None] | None = None
        self._prepared_for: tuple[Profile, int | None] | None = None
        self._extents = 0
        self._scan: LaneThreads | None = None  # the core's, over all its sessions
        self._session: Session | None = None
        self._changing = asyncio.Lock()

    # --- commands -----------------------------------------------------------------------------

    async def qpc_prepare(self, arguments: schema.Prepare) -> schema.Prepared:
        """See schema.Prepare.

        :raise UsageError: the profile does not fit this RAM.
        """
        profile = _profile_of(arguments)
        async with self._changing:
            if self._session is not None and self._session.serving:
                raise WrongStateError("qpc-prepare: this page server is serving")
            ram = await self._open_ram()
            wanted = (profile, arguments.push_bytes_per_second)
            if self._prepared_for != wanted:
                # A trace can make this some seconds' work: not again for each repair.
                order = await asyncio.to_thread(compile_schedule, profile, ram.blocks)
                self._prepared_for = None
                core = await self._core_of(profile, arguments.push_bytes_per_second, ram)
                await in_thread(core.set_schedule, order.table)
                self._prepared_for, self._extents = wanted, len(order)
        return schema.Prepared(extents=self._extents)

    async def qpc_connect(self, arguments: schema.Connect) -> schema.Empty:
        """See schema.Connect.

        :raise LaneSetupError, HelloError: no lanes.
        """
        self._stop_core()
        async with self._changing:
            await self._end_session()
            ram = await self._open_ram()
            lanes = await asyncio.to_thread(
                connect_lanes, arguments, self.options.migration_id, ram.blocks
            )
            self._session = Session(lanes, LaneThreads(self._on_loop_end))
        return schema.Empty()

    async def qpc_state_lend(self, _: schema.StateLend) -> schema.Empty:
        """See schema.StateLend, and stream.py.

        :raise QpostcopyError: there is no connection, or QEMU did not take it.
        """
        async with self._changing:
            session = self._session
            if session is None:
                raise WrongStateError("qpc-state-lend needs lanes: qpc-connect first")
            with stream.take_end(session.lanes) as end:
                await stream.lend(end, self.monitor)
        return schema.Empty()

    async def qpc_serve(self, arguments: schema.ServePages) -> schema.Empty:
        """See schema.ServePages.

        :raise SourceRunsError: it is not stopped.
        """
        async with self._changing:
            session, core = self._session, self._core
            if core is None:
                raise WrongStateError("qpc-serve needs an order to push in: qpc-prepare first")
            if session is None or session.serving:
                raise WrongStateError("qpc-serve needs a new session of lanes: qpc-connect first")
            await self._expect_stopped()
            session.serving = True
            demand = session.lanes.demand.fileno()
            await in_thread(core.receive_have, demand, HAVE_MS)
            self._start_loops(core, session)
            if arguments.push:
                self._start_push(core, session)
            else:
                self._hold_push(session)
        return schema.Empty()

    async def qpc_push(self, _: schema.Push) -> schema.Empty:
        """See schema.Push. Idempotent."""
        async with self._changing:
            session, core = self._session, self._core
            if core is None or session is None or session.push == "none":
                raise WrongStateError("qpc-push needs lanes that serve: qpc-serve first")
            if session.push == "held":
                self._start_push(core, session)
        return schema.Empty()

    async def qpc_stats(self, _: schema.Empty) -> schema.SourceStats:
        if self._core is None:
            raise WrongStateError("qpc-stats: this page server has nothing to count yet")
        return schema.SourceStats(**asdict(self._core.stats()))

    # --- the source's RAM ---------------------------------------------------------------------

    async def _open_ram(self) -> Ram:
        if self._ram is None:
            await self.await_monitor()
            found = await regions.discover_blocks(self.monitor.execute, self.pid)
            facts = tuple(sorted(found, key=lambda block: block.first_gpa))
            fds: list[int] = []
            with contextlib.ExitStack() as undo:
                for block in facts:
                    fds.append(await asyncio.to_thread(regions.open_ram, self.pid, block, False))
                    undo.callback(os.close, fds[-1])
                undo.pop_all()
            blocks = tuple(RamBlock(block.name, block.size_bytes) for block in facts)
            self._ram = Ram(blocks, tuple(fds))
        return self._ram

    async def _expect_stopped(self) -> None:
        """A QEMU that is gone, or that hangs after the commit, does not run its guest."""
        if self.qemu_gone:
            return
        try:
            status = await self.query_status(_STATUS_SECONDS)
        except QpostcopyError:
            if not self._is_committed():
                raise
            log.warning("the source does not answer; it was stopped at the commit")
            return
        if status not in _STOPPED:
            raise SourceRunsError(f"qpc-serve: the source is {status}, not stopped")

    async def _core_of(
        self, profile: Profile, push_bytes_per_second: int | None, ram: Ram
    ) -> SourceCore:
        """The core; the same one over sessions, so that its counters go on."""
        wanted = (profile.fault.then == "here", push_bytes_per_second)
        if self._core is not None and self._core_for == wanted:
            return self._core
        await self._close_core()
        self._core = SourceCore(
            ram.fds, ram.blocks, push_from_fault=wanted[0], push_bytes_per_second=wanted[1]
        )
        self._core_for = wanted
        return self._core

    async def _close_core(self) -> None:
        """The only place that waits for the scan."""
        if self._core is None:
            return
        self._core.stop_scan()
        if self._scan is not None:
            await self._scan.join()
            self._scan = None
        self._core.close()
        self._core = None

    # --- sessions of lanes --------------------------------------------------------------------

    def _start_loops(self, core: SourceCore, session: Session) -> None:
        if self._scan is None or not self._scan.running:
            self._scan = LaneThreads(self._on_scan_end)
            self._scan.start("scan", core.run_scan)
        session.pushing = {_push_name(index) for index in range(len(session.lanes.push))}
        session.threads.start("demand", partial(core.run_demand, session.lanes.demand.fileno()))

    @staticmethod
    def _start_push(core: SourceCore, session: Session) -> None:
        session.push = "begun"
        for index, sock in enumerate(session.lanes.push):
            run = partial(core.run_push, sock.fileno(), index)
            session.threads.start(_push_name(index), run)

    def _hold_push(self, session: Session) -> None:
        session.push = "held"
        session.watch = asyncio.create_task(self._push_after_commit(session))
        self.spawn(session.watch)

    async def _push_after_commit(self, session: Session) -> None:
        """The guest needs its pages though a controller that died will not send `qpc-push`."""
        while not self._is_committed():  # noqa: ASYNC110 - a file of another process
            await asyncio.sleep(COMMIT_LOOK_SECONDS)
        await asyncio.sleep(PUSH_BY_ITSELF_SECONDS)
        async with self._changing:
            if session.push == "held" and self._session is session and self._core is not None:
                log.warning("the commit is on disk, and no qpc-push came: the push begins")
                self._start_push(self._core, session)

    def _stop_core(self) -> None:
        if self._core is not None:
            self._core.stop()

    async def _end_session(self) -> None:
        session, self._session = self._session, None
        self._stop_core()
        if session is not None:
            if session.watch is not None:
                session.watch.cancel()
            await session.threads.join()
            session.lanes.close()
        if self._core is not None:
            await in_thread(self._core.reset)

    def _on_loop_end(self, name: str, outcome: Outcome) -> None:
        """In the event loop: one of the core's loops has ended."""
        session = self._session
        if session is None or is_harmless(outcome):
            log.info("%s loop ended: %s", name, outcome)
            if session is not None and outcome is LaneEnd.DONE:
                session.pushing.discard(name)
            return
        log.warning("%s loop ended: %s", name, reason_of(outcome))
        if not is_lane_trouble(outcome):
            self.endpoint.emit(schema.Fatal(reason=f"{name} loop: {reason_of(outcome)}"))
        elif session.pushing and not session.reported:
            # With everything pushed, a handler that hangs up has simply finished.
            session.reported = True
            self.endpoint.emit(schema.LaneLost(lane=name, reason=reason_of(outcome)))

    def _on_scan_end(self, name: str, outcome: Outcome) -> None:
        log.info("%s loop ended: %s", name, outcome)
        if not is_harmless(outcome):
            self.endpoint.emit(schema.Fatal(reason=f"{name} loop: {reason_of(outcome)}"))

    async def close_service(self) -> None:
        """End the loops and let the RAM go; nothing of the source was changed."""
        self._stop_core()
        async with self._changing:
            await self._end_session()
            await self._close_core()
            if self._ram is not None:
                for fd in self._ram.fds:
                    os.close(fd)
                self._ram = None


def _push_name(index: int) -> str:
    return f"push {index}"


def _profile_of(arguments: schema.Prepare) -> Profile:
    try:
        return Profile.model_validate(arguments.profile)
    except ValidationError as error:
        raise UsageError(f"qpc-prepare: the profile is not one: {error}") from error
