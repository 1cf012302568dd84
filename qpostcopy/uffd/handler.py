"""The userfault handler: the companion beside the destination QEMU.

    idle -- qpc-attach, qpc-adopt --> attached -- qpc-listen, qpc-serve --> serving
      ^                                  ^                                    |
      +--------- qpc-detach -------------+---- qpc-listen (a new session) ----+

Guarantees: a file of the source is never punched; a failed attach leaves nothing
behind, or says what, and `qpc-detach` can be tried again; `qpc-detach` is refused
while it would turn missing pages of a committed guest into zeroes; a fault that
needs no page server is answered while the lanes are down; the handler's own death
costs nothing, for QEMU keeps the userfaultfd open and `handler.json` and the page
maps tell the next one all.
This process maps nothing that can fault, so no Python thread ever waits for a
page.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from functools import partial

from qpostcopy import inspect, regions, stream
from qpostcopy.companion import Companion, Options, WrongStateError
from qpostcopy.core import (
    PAGE_BYTES,
    CoreError,
    HandlerCore,
    HandlerCounters,
    Hello,
    LaneKind,
    TargetGoneError,
)
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
from qpostcopy.stats import latency_summary
from qpostcopy.uffd import recording
from qpostcopy.uffd import registration as ram
from qpostcopy.uffd.lending import Lender
from qpostcopy.uffd.listener import LaneListener
from qpostcopy.uffd.registration import Registration, UnsafeRamError

log = logging.getLogger(__name__)

#: How long the lanes of a session may take to come in, counted from `qpc-serve`.
LANES_SECONDS = 4.0
_STATUS_SECONDS = 5.0
#: From the end of QEMU's address space to that of its process: freeing a big guest takes time.
GONE_SECONDS = 10.0
#: The loop that answers faults, and the one that does so while there are no lanes.
_DEMAND, _LOCAL = "demand", "local"
#: Run states of a QEMU that waits for a migration: its RAM holds nothing yet.
_WAITING = frozenset({"inmigrate"})


class MissingPagesError(WrongStateError):
    """Detaching now would make missing pages zeroes: the guest would be lost."""


@dataclass(slots=True)
class Session:
    """One session of lanes, from `qpc-listen` on."""

    listener: LaneListener
    threads: LaneThreads
    lanes: Lanes | None = None
    serving: bool = False
    reported: bool = False

    async def take_lanes(self, timeout_seconds: float) -> Lanes:
        """All of them, once they are in; from then on they are this session's to close.

        :raise LaneSetupError: not all came in time.
        """
        if self.lanes is None:
            self.lanes = await self.listener.lanes(timeout_seconds)
        return self.lanes


@dataclass(slots=True)
class Attachment:
    """What we hold once attached."""

    registration: Registration
    core: HandlerCore
    fresh: bool = True
    committed: bool = False
    leaving: bool = False
    sessions: int = 0
    session: Session | None = field(default=None)

    @property
    def was_served(self) -> bool:
        """Whether somebody read faults before, which may have stayed without an answer."""
        return self.sessions > 0 or not self.fresh


class Handler(Companion):
    """See the module."""

    role = "handler"
    side = "destination"
    commands = schema.HANDLER

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._attachment: Attachment | None = None
        self._changing = asyncio.Lock()

    # --- attach, adopt, detach ----------------------------------------------------------------

    async def qpc_attach(self, arguments: schema.Attach) -> schema.Attached:
        """See schema.Attach.

        :raise UnsafeRamError: nothing was touched.
        """
        async with self._changing:
            self._expect_idle("qpc-attach")
            if self._is_committed():
                raise WrongStateError(
                    "qpc-attach after the commit would empty the guest's RAM; use qpc-adopt"
                )
            await self.await_monitor()
            blocks = ram.in_gpa_order(await regions.discover_blocks(self.monitor.execute, self.pid))
            ram.refuse_unsafe(blocks, arguments.forbidden)
            status = await self.query_status(_STATUS_SECONDS)
            if status not in _WAITING:
                raise UnsafeRamError(
                    f"the destination QEMU is {status}, not waiting for a migration: its RAM "
                    "may be in use",
                    remedy="start it with -incoming defer",
                )
            others = await asyncio.to_thread(inspect.find_other_mappers, self.pid, blocks)
            names = [f"{other.command} ({other.pid})" for other in others]
            state_dir = self.options.state_dir
            lender = Lender(self.monitor, self.pid)
            taken = await in_thread(ram.take, self.pid, blocks, state_dir, names, lender)
            return await self._begin(taken, arguments.ahead_bytes, arguments.behind_bytes, True)

    async def qpc_adopt(self, arguments: schema.Adopt) -> schema.Attached:
        """See schema.Adopt. Works though QEMU's monitor hangs."""
        async with self._changing:
            self._expect_idle("qpc-adopt")
            taken = await in_thread(ram.adopt, self.pid, arguments.uffd_fd, self.options.state_dir)
            return await self._begin(taken, arguments.ahead_bytes, arguments.behind_bytes, False)

    async def _begin(
        self, taken: Registration, ahead_bytes: int, behind_bytes: int, fresh: bool
    ) -> schema.Attached:
        """Make the core, and be attached. What cannot be begun is given back, if it is new."""
        try:
            core = await in_thread(
                self._make_core, taken, ahead_bytes // PAGE_BYTES, behind_bytes // PAGE_BYTES, fresh
            )
        except Exception as error:
            if fresh:
                await in_thread(ram.undo, taken, self.options.state_dir, error)
            else:
                ram.let_go(taken)
            raise
        attachment = Attachment(taken, core, fresh=fresh)
        self._attachment = attachment
        asyncio.get_running_loop().add_reader(core.done_fd, self._on_done)
        if self._is_committed():
            self._commit(attachment)
        untraced = await self._record(attachment)
        log.info("%s: %s", "attached" if fresh else "adopted", taken.described)
        return taken.described.model_copy(update={"untraced": untraced})

    async def _record(self, attachment: Attachment) -> str | None:
        """Begin the trace, or go on with it; why not, or None. Before any loop runs."""
        core, blocks = attachment.core, attachment.registration.ram_blocks
        state_dir, fresh = self.options.state_dir, attachment.fresh
        untraced = await in_thread(partial(recording.record, core, blocks, state_dir, fresh=fresh))
        if attachment.committed:
            core.commit()  # once more: now the trace's time runs, if it did not before
        return untraced

    def _make_core(
        self, taken: Registration, ahead_pages: int, behind_pages: int, fresh: bool
    ) -> HandlerCore:
        """Blocking. An adopted core learns what its predecessor has placed."""
        core = HandlerCore(
            taken.uffd,
            taken.ram_blocks,
            taken.mappings,
            self.options.state_dir,
            ahead_pages=ahead_pages,
            behind_pages=behind_pages,
            fresh=fresh,
        )
        try:
            if not fresh:
                ram.tell_what_is_there(taken, core)
        except Exception:
            core.close()
            raise
        return core

    async def qpc_committed(self, _: schema.Committed) -> schema.Empty:
        self._commit(self._attached("qpc-committed"))
        return schema.Empty()

    async def qpc_detach(self, _: schema.Detach) -> schema.Empty:
        """See schema.Detach. Idempotent: nothing attached, nothing to do.

        :raise MissingPagesError: the guest still needs pages that are not here.
        :raise AttachError, LeftInQemuError: QEMU did not close its copy; call it again.
        """
        attachment = self._attachment
        if attachment is not None:
            self._refuse_loss(attachment)
            attachment.core.stop()
        async with self._changing:
            if self._attachment is None:
                if not self._is_committed():
                    lender = Lender(self.monitor, self.pid)
                    await in_thread(ram.close_leftovers, self.pid, self.options.state_dir, lender)
                    recording.forget(self.options.state_dir)
                return schema.Empty()
            attachment = self._attachment
            await self._end_session(attachment)
            self._refuse_loss(attachment)
            attachment.leaving = True
            await in_thread(ram.give_back, attachment.registration, self.options.state_dir)
            self._close_core(attachment)
            if not attachment.committed and not self._is_committed():
                recording.forget(self.options.state_dir)
            log.info("detached")
        return schema.Empty()

    async def qpc_kill(self, _: schema.Kill) -> schema.Empty:
        await self.kill_qemu()
        return schema.Empty()

    # --- the connection of QEMU's own stream ---------------------------------------------------

    async def qpc_state_lend(self, _: schema.StateLend) -> schema.Empty:
        """See schema.StateLend, and stream.py.

        :raise QpostcopyError: there is no connection, or QEMU did not take it.
        """
        async with self._changing:
            session = self._attached("qpc-state-lend").session
            if session is None:
                raise WrongStateError("qpc-state-lend needs lanes: qpc-listen first")
            with stream.take_end(await session.take_lanes(stream.LANES_SECONDS)) as end:
                await stream.lend(end, self.monitor)
        return schema.Empty()

    # --- sessions of lanes --------------------------------------------------------------------

    async def qpc_listen(self, arguments: schema.Listen) -> schema.Listening:
        attachment = self._attached("qpc-listen")
        attachment.core.stop()  # before the lock: a qpc-serve that waits in the core holds it
        async with self._changing:
            await self._end_session(attachment)
            expected = Hello(
                migration_id=self.options.migration_id,
                token=bytes.fromhex(arguments.token),
                kind=LaneKind.DEMAND,
                index=0,
                blocks=attachment.registration.ram_blocks,
            )
            listener = LaneListener(expected, arguments.push_lanes, arguments.device_state)
            port = await listener.open(arguments.host, arguments.port)
            session = Session(listener, LaneThreads(self._on_loop_end))
            attachment.session = session
            if attachment.was_served:  # until the page server comes, which may take its time
                self._start_local(attachment, session)
                await in_thread(attachment.core.wake_all)
            return schema.Listening(port=port)

    async def qpc_serve(self, _: schema.Serve) -> schema.Empty:
        attachment = self._attached("qpc-serve")
        session = attachment.session
        if session is None or session.serving:
            raise WrongStateError("qpc-serve needs a new session of lanes: qpc-listen first")
        session.serving = True
        lanes = await session.take_lanes(LANES_SECONDS)
        async with self._changing:
            if attachment is not self._attachment or attachment.session is not session:
                raise WrongStateError("qpc-serve: this session of lanes was ended meanwhile")
            await self._stop_loops(attachment.core, session)
            try:
                await in_thread(attachment.core.send_have, lanes.demand.fileno())
            except CoreError:
                if attachment.was_served:
                    self._start_local(attachment, session)
                raise
            self._start_loops(attachment, session.threads, lanes)
            if attachment.was_served:
                await in_thread(attachment.core.wake_all)
            attachment.sessions += 1
        return schema.Empty()

    async def qpc_stats(self, _: schema.Empty) -> schema.HandlerStats:
        return _stats_of(self._attached("qpc-stats").core.stats())

    @staticmethod
    def _start_loops(attachment: Attachment, threads: LaneThreads, lanes: Lanes) -> None:
        core = attachment.core
        threads.start(_DEMAND, partial(core.run_demand, lanes.demand.fileno()))
        for index, sock in enumerate(lanes.push):
            threads.start(f"push {index}", partial(core.run_push, sock.fileno()))

    @staticmethod
    def _start_local(attachment: Attachment, session: Session) -> None:
        session.threads.start(_LOCAL, attachment.core.run_local)

    @staticmethod
    async def _stop_loops(core: HandlerCore, session: Session | None) -> None:
        """Stop and join them; the core is ready for others."""
        core.stop()
        if session is not None:
            await session.threads.join()
        await in_thread(core.reset)

    async def _end_session(self, attachment: Attachment) -> None:
        """Stop the loops, close the lanes; the core is ready for the next ones."""
        session, attachment.session = attachment.session, None
        attachment.core.stop()
        if session is not None:
            session.reported = True
            await session.listener.close()
        await self._stop_loops(attachment.core, session)
        if session is not None and session.lanes is not None:
            session.lanes.close()

    # --- what happens by itself ---------------------------------------------------------------

    def _on_loop_end(self, name: str, outcome: Outcome) -> None:
        """In the event loop: one of the core's loops has ended."""
        attachment = self._attachment
        session = attachment.session if attachment is not None else None
        if attachment is None or session is None or is_harmless(outcome):
            log.info("%s loop ended: %s", name, outcome)
            return
        log.warning("%s loop ended: %s", name, reason_of(outcome))
        if isinstance(outcome, TargetGoneError):
            self.spawn(asyncio.create_task(self._judge_gone(name, outcome)))
        elif name == _LOCAL or not is_lane_trouble(outcome):
            self._report_fatal(name, outcome)
        else:
            self._on_lane_lost(attachment, session, name, reason_of(outcome))

    def _on_lane_lost(
        self, attachment: Attachment, session: Session, name: str, reason: str
    ) -> None:
        if name == _DEMAND:
            self._start_local(attachment, session)
        if not session.reported and attachment.core.stats().remaining_pages:
            session.reported = True
            self.endpoint.emit(schema.LaneLost(lane=name, reason=reason))

    async def _judge_gone(self, name: str, error: TargetGoneError) -> None:
        """The core met no address space: harmless if QEMU has ended, which is told elsewhere."""
        if not await self.await_gone(GONE_SECONDS):
            self._report_fatal(name, error)

    def _report_fatal(self, name: str, outcome: Outcome) -> None:
        self.endpoint.emit(schema.Fatal(reason=f"{name} loop: {reason_of(outcome)}"))

    def _on_done(self) -> None:
        attachment = self._attachment
        assert attachment is not None, "watched a core that is closed"
        asyncio.get_running_loop().remove_reader(attachment.core.done_fd)
        log.info("every page is placed or known to be zero")
        self.endpoint.emit(schema.PlacedAll())

    # --- guards -------------------------------------------------------------------------------

    @staticmethod
    def _commit(attachment: Attachment) -> None:
        attachment.core.commit()
        attachment.committed = True

    def _attached(self, command: str) -> Attachment:
        if self._attachment is None:
            raise WrongStateError(f"{command}: this handler is not attached to its QEMU")
        if self._attachment.leaving:
            raise WrongStateError(
                f"{command}: a qpc-detach failed half way, and no range may be registered any more",
                remedy="only qpc-detach can be sent, until it succeeds",
            )
        return self._attachment

    def _expect_idle(self, command: str) -> None:
        if self._attachment is not None:
            raise WrongStateError(f"{command}: this handler is attached already")

    def _refuse_loss(self, attachment: Attachment) -> None:
        remaining = attachment.core.stats().remaining_pages
        needed = attachment.committed or self._is_committed()
        if needed and remaining and not self.qemu_gone:
            raise MissingPagesError(
                f"qpc-detach: {remaining} pages of the guest are still missing; detaching would "
                "make them zeroes",
                remedy="let the migration finish: qpostcopy resume",
            )

    async def close_service(self) -> None:
        """End the loops; QEMU keeps its userfaultfd, and its guest waits for the next handler."""
        attachment = self._attachment
        if attachment is None:
            return
        attachment.core.stop()
        async with self._changing:
            await self._end_session(attachment)
            self._close_core(attachment)
            ram.let_go(attachment.registration)

    def _close_core(self, attachment: Attachment) -> None:
        asyncio.get_running_loop().remove_reader(attachment.core.done_fd)
        self._attachment = None
        attachment.core.close()


def _stats_of(counted: HandlerCounters) -> schema.HandlerStats:
    """The core's counters as the schema gives them."""
    own = schema.HandlerStats.model_fields.keys() - {"faults", "precopy_pages"}
    faults = schema.FaultStats(
        count=counted.faults,
        local=counted.local_faults,
        histogram=counted.histogram,
        **latency_summary(counted.histogram, float(counted.fault_max_us)),
    )
    return schema.HandlerStats(
        **{name: getattr(counted, name) for name in own}, precopy_pages=0, faults=faults
    )
