"""How a migration ended, and the result object that tells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qpostcopy.errors import (
    BeforeSwitchTimeoutError,
    ExitCode,
    QpostcopyError,
    RefusedError,
    StateLostError,
    UsageError,
)
from qpostcopy.history import moved_before
from qpostcopy.migration import Migration, error_code, now_seconds
from qpostcopy.phases import Phase
from qpostcopy.qmp.schema import HandlerStats
from qpostcopy.report import (
    EXIT_CODES,
    ErrorReport,
    Location,
    PhaseTime,
    Result,
    ResultStatus,
    TraceReport,
    byte_counts,
    page_counts,
)
from qpostcopy.side import NotProvenGoneError
from qpostcopy.state import FAULT_TRACE, PhaseStamp

Signal = Literal["SIGINT", "SIGTERM"]


class CancelledError(QpostcopyError):
    """Somebody aborted before the commit."""

    def __init__(self, signal_name: Signal | None) -> None:
        super().__init__(f"cancelled by {signal_name or 'abort'} before the commit")
        self.code = "cancelled"
        # `abort` from elsewhere counts as a request to terminate.
        self.rc = ExitCode.SIGINT if signal_name == "SIGINT" else ExitCode.SIGTERM


class ControllerDiedError(QpostcopyError):
    """Why a resumed migration rolls back: it was not committed when its controller died."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended, and the phase that it ends in."""

    status: ResultStatus
    location: Location
    phase: Phase
    error: BaseException | None = None

    @property
    def rc(self) -> int:
        if isinstance(self.error, CancelledError):
            return self.error.rc
        if self.status is ResultStatus.ERROR and isinstance(self.error, QpostcopyError):
            return self.error.exit_code
        return EXIT_CODES[self.status]


# --- which outcome it is ------------------------------------------------------------------


def after_rollback(migration: Migration, location: Location, error: Exception) -> Outcome:
    """It is back at the source because of `error`; or its guest ended by itself meanwhile."""
    if location == "ended":
        return Outcome(ResultStatus.COMPLETED, location, Phase.COMPLETE)
    status = _status_before_commit(migration, error)
    if status in (ResultStatus.REFUSED, ResultStatus.ERROR):  # it stays where it was
        ours, there = migration.state.source, migration.state.destination
        facts = migration.facts.get("source")
        location = moved_before(
            ours.qmp, there.qmp, ours.qemu, None if facts is None else facts.run_status
        )
    return Outcome(status, location, Phase.ROLLED_BACK, error)


def _status_before_commit(migration: Migration, error: Exception) -> ResultStatus:
    if isinstance(error, CancelledError):
        return ResultStatus.CANCELLED
    if isinstance(error, BeforeSwitchTimeoutError):
        return ResultStatus.TIMED_OUT
    if isinstance(error, UsageError) and not migration.state.stop_sent:
        return ResultStatus.ERROR
    if isinstance(error, RefusedError) and migration.machine.phase is Phase.PREPARE:
        return ResultStatus.REFUSED
    return ResultStatus.ROLLED_BACK


def after_failed_rollback(migration: Migration, error: Exception) -> Outcome:
    """As long as there is a source, `resume` can try again."""
    alive = migration.source.qemu_alive()
    location: Location = "source" if alive else "ended"
    if isinstance(error, NotProvenGoneError):
        location = "unknown"
    phase = Phase.ROLLBACK_FAILED if alive else Phase.FAILED
    return Outcome(ResultStatus.FAILED, location, phase, error)


def after_commit(migration: Migration, error: Exception) -> Outcome:
    """It cannot go on, for good or for now.

    Interrupted in `switchover` it stays there: as long as no `cont` can have been executed,
    `resume` may still find that the guest has to go back.
    """
    if isinstance(error, StateLostError) and not isinstance(error, NotProvenGoneError):
        alive = migration.destination.qemu_alive()
        place: Location = "destination" if alive else "ended"
        return Outcome(ResultStatus.FAILED, place, Phase.FAILED, error)
    now = migration.machine.phase
    phase = Phase.INTERRUPTED if now is Phase.POSTCOPY else now
    return Outcome(ResultStatus.INTERRUPTED, "destination", phase, error)


def ended_already(migration: Migration) -> Outcome | None:
    """The outcome of a migration that was over but for its result: nothing is left to do."""
    phase = migration.machine.phase
    why = ControllerDiedError(f"the controller died when the migration was {phase} already")
    if phase is Phase.ROLLED_BACK:
        return Outcome(ResultStatus.ROLLED_BACK, "source", phase, why)
    if phase is Phase.FAILED:
        side = migration.destination if migration.directory.committed else migration.source
        place: Location = "ended"
        if side.qemu_alive():
            place = "destination" if migration.directory.committed else "source"
        return Outcome(ResultStatus.FAILED, place, phase, why)
    return None


# --- the result ---------------------------------------------------------------------------


def make_result(migration: Migration, outcome: Outcome) -> Result:
    """The result, as of now."""
    state, now = migration.state, now_seconds()
    result = Result(
        status=outcome.status,
        rc=outcome.rc,
        vm_location=outcome.location,
        migration_id=state.migration_id,
        profile=state.profile,
        qemu={"source": state.source.version, "destination": state.destination.version},
        ram_bytes=state.ram_bytes,
        downtime_ms=migration.downtime_ms,
        total_ms=(now - state.phases[0].start_seconds) * 1000,
        phases=_phase_times(state.phases, now),
        warnings=tuple(migration.warnings),
        error=None if outcome.error is None else _error_report(outcome.error),
    )
    return result.model_copy(update=_counters(migration, now))


def _counters(migration: Migration, now: float) -> dict[str, object]:
    """What the handler counted; nothing if it was never asked."""
    stats = migration.stats
    if stats is None:
        return {}
    return {
        "pages": page_counts(stats),
        "bytes": byte_counts(stats),
        "faults": stats.faults,
        "push_bytes_per_second": _push_bytes_per_second(migration, stats, now),
        "trace": _trace(migration, stats),
    }


def _push_bytes_per_second(migration: Migration, stats: HandlerStats, now: float) -> float:
    """From its start to the last page; 0 if we did not begin it."""
    began = migration.state.served_seconds
    if began is None:
        return 0.0
    placed = (s.start_seconds for s in migration.state.phases if s.name is Phase.COMPLETE)
    return stats.push_bytes / max(next(placed, now) - began, 1e-3)


def _trace(migration: Migration, stats: HandlerStats) -> TraceReport | None:
    """The trace that the handler wrote, if it could, and if there was anything to write."""
    path = migration.directory.path / FAULT_TRACE
    untraced = migration.state.untraced or not path.exists()
    if not migration.directory.committed or untraced:
        return None
    return TraceReport(file=str(path), faults=stats.traced_faults, left_out=stats.untraced_faults)


def _phase_times(stamps: tuple[PhaseStamp, ...], now: float) -> tuple[PhaseTime, ...]:
    start = stamps[0].start_seconds
    ends = [stamp.start_seconds for stamp in stamps[1:]] + [now]
    return tuple(
        PhaseTime(
            name=stamp.name,
            start_ms=(stamp.start_seconds - start) * 1000,
            duration_ms=(end - stamp.start_seconds) * 1000,
        )
        for stamp, end in zip(stamps, ends, strict=True)
    )


def _error_report(error: BaseException) -> ErrorReport:
    return ErrorReport(
        code=error_code(error),
        message=str(error) or type(error).__name__,
        remedy=getattr(error, "remedy", None),
        findings=getattr(error, "findings", ()),
    )
