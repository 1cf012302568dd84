"""The controller: one detached process that takes one migration through its phases.

    CLI migrate, status, abort  --QMP-->  controller  --QMP-->  page server, handler

Guarantees: it survives its terminal and whoever started it; every phase change
is on disk before anybody hears of it; exactly one result is written and sent.
Before the commit any failure, abort or time limit ends in recovery.roll_back;
after it the only ways are on, `interrupted`, or `failed`. Our own bugs are
failures like any other: they take the same ways.

The process around it is in controller_process.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from typing import Literal

from qpostcopy import __version__
from qpostcopy.config import Plan, SidePlan
from qpostcopy.errors import (
    BeforeSwitchTimeoutError,
    ExitCode,
    InterruptedMigrationError,
    QpostcopyError,
    StateLostError,
)
from qpostcopy.migration import Migration, now_seconds, together, trouble
from qpostcopy.outcome import (
    CancelledError,
    ControllerDiedError,
    Outcome,
    Signal,
    after_commit,
    after_failed_rollback,
    after_rollback,
    ended_already,
    make_result,
)
from qpostcopy.phases import BEFORE_COMMIT, Phase, PhaseMachine
from qpostcopy.postcopy import complete, current_stats, run_postcopy
from qpostcopy.prepare import PREPARE
from qpostcopy.progress import Meter, Progress
from qpostcopy.qmp import schema
from qpostcopy.qmp.server import Endpoint
from qpostcopy.recovery import give_up_destination, leave_companions, roll_back, take_back_commit
from qpostcopy.report import Location, Result, ResultStatus
from qpostcopy.side import EventBook, Role, Side
from qpostcopy.state import CONTROL_SOCKET as CONTROL_SOCKET
from qpostcopy.state import PhaseStamp, StateDirectory
from qpostcopy.switchover import COMMIT, SWITCHOVER, ContRefusedError, run_steps

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 0.5


class AbortRefusedError(QpostcopyError):
    """Abort came too late."""


class Controller:
    """One migration, from its state directory.

    :param resuming: another controller has begun it.
    """

    def __init__(self, directory: StateDirectory, plan: Plan, *, resuming: bool) -> None:
        self._directory = directory
        self._resuming = resuming
        self._abort: asyncio.Future[Signal | None] = asyncio.get_running_loop().create_future()
        self._endpoint = Endpoint(directory.path / CONTROL_SOCKET, schema.CONTROLLER, self)
        self._progress = Progress(phase=directory.state.phase)
        self._outcome: Outcome | None = None
        self._result: dict[str, object] | None = None
        book = EventBook()
        self._migration = Migration(
            directory=directory,
            plan=plan,
            machine=PhaseMachine(directory.state.phase, self._on_phase),
            book=book,
            source=_side("source", directory, book, plan.source),
            destination=_side("destination", directory, book, plan.destination),
            say=self._say,
        )

    # --- life -----------------------------------------------------------------------------

    async def listen(self) -> None:
        """Be reachable; nothing has begun."""
        await self._endpoint.listen()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)

    async def hang_up(self) -> None:
        """Be reachable no more."""
        await self._endpoint.close()

    async def run(self) -> ExitCode:
        """The whole migration. Its failures are in the result, not raised."""
        self._send("phase", phase=self._migration.machine.phase, **self._place())
        ticker = asyncio.create_task(self._tick())
        try:
            outcome = await (self._resume() if self._resuming else self._migrate())
        finally:
            ticker.cancel()
            await asyncio.wait([ticker])
        result = await self._conclude(outcome)
        await self.hang_up()
        return ExitCode(result.rc)

    async def _migrate(self) -> Outcome:
        try:
            await self._until_commit()
        except Exception as error:
            if not self._directory.committed:
                return await self._go_back(error)
            log.exception("after the record of the commit")
        return await self._go_on()

    async def _resume(self) -> Outcome:
        if (ended := ended_already(self._migration)) is not None:
            return ended
        if self._directory.committed:
            return await self._go_on("resumed")
        return await self._go_back(
            ControllerDiedError("the controller died before the commit; rolled back")
        )

    async def _until_commit(self) -> None:
        """All steps up to the record; abort, time limit and trouble end it early.

        The record is the last thing that the work does, so either it is there
        or the guards have won: never both.
        """
        limit_seconds = self._migration.plan.limits.before_switch_seconds
        guards = [
            asyncio.ensure_future(guard)
            for guard in (self._aborted(), self._troubled(), self._timed_out(limit_seconds))
        ]
        work = asyncio.ensure_future(self._work_until_commit())
        try:
            await asyncio.wait([work, *guards], return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                await asyncio.wait([work])
            if self._directory.committed:
                return
            for task in (*guards, work):
                if task.done() and not task.cancelled():
                    task.result()
        finally:
            await _cancel(work, *guards)

    async def _work_until_commit(self) -> None:
        await run_steps(self._migration, PREPARE)
        self._migration.machine.set(Phase.SWITCHOVER)
        await run_steps(self._migration, SWITCHOVER)

    async def _aborted(self) -> None:
        raise CancelledError(await asyncio.shield(self._abort))

    async def _troubled(self) -> None:
        seen = await self._migration.book.wait(lambda seen: trouble(seen) is not None)
        error = trouble(seen)
        assert error is not None
        raise error

    async def _timed_out(self, limit_seconds: float) -> None:
        await asyncio.sleep(limit_seconds)
        raise BeforeSwitchTimeoutError(
            f"limits.before_switch ({limit_seconds:g} s) passed before the commit"
        )

    async def _go_back(self, error: Exception) -> Outcome:
        log.warning("rolling back: %s", error, exc_info=not isinstance(error, QpostcopyError))
        try:
            location = await roll_back(self._migration)
        except Exception as lost:
            log.exception("rollback failed")
            return after_failed_rollback(self._migration, lost)
        return after_rollback(self._migration, location, error)

    async def _go_on(self, problem: str = "") -> Outcome:
        """After the commit: the guest is the destination's, whatever happens.

        :param problem: why the session of lanes, or what there is of it, cannot be trusted.
        """
        migration, machine = self._migration, self._migration.machine
        try:
            if machine.phase is not Phase.COMPLETE:
                problem = problem or await self._start_destination()
                location = await run_postcopy(migration, problem)
                machine.set(Phase.COMPLETE)
            else:
                location = "ended" if migration.state.guest_ended else "destination"
            location = await complete(migration, location)
            return Outcome(ResultStatus.COMPLETED, location, Phase.COMPLETE)
        except Exception as error:
            return await self._after_trouble(error)

    async def _after_trouble(self, error: Exception) -> Outcome:
        """Back if the guest has not run there and never will; else interrupted, or failed."""
        if not isinstance(error, StateLostError | InterruptedMigrationError | ContRefusedError):
            log.error("after the commit", exc_info=error)
        try:
            refused = isinstance(error, ContRefusedError)
            undo = give_up_destination if refused else take_back_commit
            if await undo(self._migration):
                return await self._go_back(error)
        except Exception as stands:
            log.exception("the commit stands")
            error = stands
        return after_commit(self._migration, error)

    async def _start_destination(self) -> str:
        """What went wrong, if anything did: whether `cont` arrived is found out by asking.

        :raise ContRefusedError: it arrived, and was refused.
        """
        for step in COMMIT:
            try:
                await run_steps(self._migration, (step,))
            except ContRefusedError:
                raise
            except QpostcopyError as error:
                problem = f"{step.__name__.replace('_', ' ')}: {error}"
                log.warning("after the commit: %s", problem)
                return problem
        return ""

    # --- what others see ------------------------------------------------------------------

    async def qpc_hello(self, _: schema.Empty) -> schema.Hello:
        return schema.Hello(
            role="controller",
            version=__version__,
            migration_id=self._directory.migration_id,
            pid=os.getpid(),
            qemu_pid=None,
            monitor="none",
        )

    async def qpc_status(self, _: schema.Empty) -> schema.Status:
        place = self._place()
        return schema.Status(
            migration_id=self._directory.migration_id,
            phase=self._migration.machine.phase,
            vm_location=place["vm_location"],
            abort_safe=bool(place["abort_safe"]),
            message=str(place["message"]),
            progress=self._progress.model_dump(mode="json"),
            result=self._result,
        )

    async def qpc_abort(self, arguments: schema.Abort) -> schema.Empty:
        self._request_abort(arguments.signal)
        return schema.Empty()

    def _request_abort(self, signal_name: Signal | None) -> None:
        """:raise AbortRefusedError: the guest may run at the destination already."""
        if self._directory.committed:
            raise AbortRefusedError(
                "the migration is committed: the VM is at the destination, and abort is not "
                "possible any more",
                remedy="let it finish; the guest runs meanwhile",
            )
        if not self._abort.done():
            self._abort.set_result(signal_name)

    def _on_signal(self, number: int) -> None:
        name: Signal = "SIGINT" if number == signal.SIGINT else "SIGTERM"
        try:
            self._request_abort(name)
        except AbortRefusedError as error:
            self._say("warning", f"{name}: {error}")

    def _on_phase(self, old: Phase, new: Phase) -> None:
        stamp = PhaseStamp(name=new, start_seconds=now_seconds())
        phases = (*self._directory.state.phases, stamp)
        self._directory.update(phase=new, phases=phases)
        self._progress = self._progress.model_copy(update={"phase": new.value})
        self._send("phase", phase=new, previous=old, **self._place())

    def _place(self) -> dict[str, object]:
        """Where the VM is and whether abort is safe, in words too."""
        committed = self._directory.committed
        location: Location = "destination" if committed else "source"
        if self._outcome is not None:
            location = self._outcome.location
        safe = not committed and self._migration.machine.phase in BEFORE_COMMIT
        advice = "abort is safe" if safe else "abort is not possible"
        return {
            "vm_location": location,
            "abort_safe": safe,
            "message": f"VM at: {location}; {advice}",
        }

    def _say(self, level: Literal["info", "warning"], message: str) -> None:
        log.log(logging.WARNING if level == "warning" else logging.INFO, "%s", message)
        self._send("log", level=level, message=message)

    def _send(self, kind: str, **content: object) -> None:
        """One object of the `--json` stream to every viewer."""
        message: dict[str, object] = {
            "v": 1,
            "type": kind,
            "ts": round(time.time(), 6),
            "migration_id": self._directory.migration_id,
        }
        self._endpoint.emit(schema.ControllerMessage(message=message | content))

    async def _tick(self) -> None:
        meter = Meter()
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            if self._migration.machine.phase is not Phase.POSTCOPY:
                continue
            stats = await current_stats(self._migration)
            if stats is not None:
                self._progress = meter.measure(
                    self._migration.machine.phase,
                    stats,
                    now_seconds(),
                    self._migration.downtime_ms,
                    None if self._resuming else self._migration.state.served_seconds,
                )
                self._send("progress", **self._progress.model_dump(mode="json"))

    # --- the end --------------------------------------------------------------------------

    async def _conclude(self, outcome: Outcome) -> Result:
        """Leave nothing running that is not needed, write the result, tell it.

        The phase comes last: killed before the result, we are resumed where we were, and come
        here again; once the result is on disk, there is nothing left to do.
        """
        self._outcome = outcome
        if outcome.status is ResultStatus.INTERRUPTED:
            await leave_companions(self._migration)
        else:
            await together(self._migration.source.quit(), self._migration.destination.quit())
        result = make_result(self._migration, outcome)
        self._result = result.to_json()
        self._directory.write_result(self._result)
        if self._migration.machine.phase is not outcome.phase:
            self._migration.machine.set(outcome.phase)
        self._send("result", **self._result)
        return result


def _side(role: Role, directory: StateDirectory, book: EventBook, plan: SidePlan) -> Side:
    pid = plan.pid if isinstance(plan.pid, int) else None
    return Side(role, directory, book, pid, plan.netns)


async def _cancel(*tasks: asyncio.Future[None]) -> None:
    """Cancel what still runs and collect all, so that no exception is left unread."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    from qpostcopy.controller_process import main

    sys.exit(main())
