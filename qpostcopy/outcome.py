"""How a migration ended, and the result object that tells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qpostcopy.errors import ExitCode, QpostcopyError
from qpostcopy.migration import Migration, error_code, now_seconds
from qpostcopy.phases import Phase
from qpostcopy.report import (
    EXIT_CODES,
    ErrorReport,
    Location,
    PhaseTime,
    Result,
    ResultStatus,
    byte_counts,
    page_counts,
)
from qpostcopy.state import PhaseStamp

Signal = Literal["SIGINT", "SIGTERM"]


class CancelledError(QpostcopyError):
    """Somebody aborted before the commit."""

    def __init__(self, signal_name: Signal | None) -> None:
        super().__init__(f"cancelled by {signal_name or 'abort'} before the commit")
        self.code = "cancelled"
        # `abort` from elsewhere counts as a request to terminate.
        self.rc = ExitCode.SIGINT if signal_name == "SIGINT" else ExitCode.SIGTERM


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended."""

    status: ResultStatus
    location: Location
    error: BaseException | None = None


def make_result(migration: Migration, outcome: Outcome) -> Result:
    """The result, as of now."""
    state, now = migration.state, now_seconds()
    rc = EXIT_CODES[outcome.status]
    if isinstance(outcome.error, CancelledError):
        rc = outcome.error.rc
    result = Result(
        status=outcome.status,
        rc=rc,
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
    """What the handler counted; nothing if it never served."""
    stats, served = migration.stats, migration.state.served_seconds
    if stats is None or served is None:
        return {}
    placed = (s.start_seconds for s in migration.state.phases if s.name is Phase.COMPLETE)
    push_seconds = max(next(placed, now) - served, 1e-3)
    return {
        "pages": page_counts(stats),
        "bytes": byte_counts(stats),
        "faults": stats.faults,
        "push_bytes_per_second": stats.push_bytes / push_seconds,
    }


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
