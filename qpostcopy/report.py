"""The result of a migration: one object, the same for scripts and for people.

The names never change; docs/json.md describes them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from qpostcopy.errors import ExitCode
from qpostcopy.progress import human_bytes, human_seconds
from qpostcopy.qmp.schema import FaultStats, HandlerStats, Model

Location = Literal["source", "destination", "ended", "unknown"]


class ResultStatus(StrEnum):
    """How a migration ended."""

    COMPLETED = "completed"
    REFUSED = "refused"
    ROLLED_BACK = "rolled-back"
    TIMED_OUT = "timed-out"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    ERROR = "error"


#: The exit code of each; `cancelled` has two, by the signal.
EXIT_CODES: dict[ResultStatus, ExitCode] = {
    ResultStatus.COMPLETED: ExitCode.COMPLETED,
    ResultStatus.REFUSED: ExitCode.REFUSED,
    ResultStatus.ROLLED_BACK: ExitCode.ROLLED_BACK,
    ResultStatus.TIMED_OUT: ExitCode.TIMED_OUT,
    ResultStatus.CANCELLED: ExitCode.SIGTERM,
    ResultStatus.INTERRUPTED: ExitCode.INTERRUPTED,
    ResultStatus.FAILED: ExitCode.FAILED,
    ResultStatus.ERROR: ExitCode.UNEXPECTED,
}


class PhaseTime(Model):
    """One phase, counted from the start of the migration."""

    name: str
    start_ms: float
    duration_ms: float


class PageCounts(Model):
    """Each page counted once by how it came to be placed; `duplicate` were dropped."""

    total: int = 0
    hole: int = 0
    zero: int = 0
    precopy: int = 0
    push: int = 0
    demand: int = 0
    around: int = 0
    duplicate: int = 0


class ByteCounts(Model):
    """Payload by kind; `wire` is what the lanes carried, headers included."""

    precopy: int = 0
    push: int = 0
    demand: int = 0
    wire: int = 0


class TraceReport(Model):
    """What the guest asked for, and when: docs/trace.md."""

    file: str
    faults: int
    left_out: int


class FindingReport(Model):
    """One reason why preflight refused."""

    code: str
    side: str
    message: str
    remedy: str


class ErrorReport(Model):
    """What went wrong."""

    code: str
    message: str
    remedy: str | None = None
    findings: tuple[FindingReport, ...] = ()


class Result(Model):
    """How a migration ended."""

    status: ResultStatus
    rc: int
    vm_location: Location
    migration_id: str
    profile: str
    qemu: dict[str, str]
    ram_bytes: int
    downtime_ms: float | None
    total_ms: float
    phases: tuple[PhaseTime, ...]
    pages: PageCounts = PageCounts()
    bytes: ByteCounts = ByteCounts()
    faults: FaultStats = FaultStats()
    push_bytes_per_second: float = 0.0
    trace: TraceReport | None = None
    warnings: tuple[str, ...] = ()
    error: ErrorReport | None = None

    def to_json(self) -> dict[str, object]:
        """As the contract gives it: no `error` unless there is one."""
        data = self.model_dump(mode="json")
        if self.error is None:
            del data["error"]
        return data


def page_counts(stats: HandlerStats) -> PageCounts:
    return PageCounts(
        total=stats.total_pages,
        hole=stats.hole_pages,
        zero=stats.zero_pages,
        precopy=stats.precopy_pages,
        push=stats.push_pages,
        demand=stats.demand_pages,
        around=stats.around_pages,
        duplicate=stats.duplicate_pages,
    )


def byte_counts(stats: HandlerStats) -> ByteCounts:
    return ByteCounts(push=stats.push_bytes, demand=stats.demand_bytes, wire=stats.wire_bytes)


_WHERE: dict[Location, str] = {
    "source": "the VM is at the source",
    "destination": "the VM is at the destination",
    "ended": "the guest ended by itself",
    "unknown": "where the VM is, is unknown",
}


def error_lines(error: ErrorReport) -> list[str]:
    """For stderr: what went wrong, and what to do about it."""
    if error.findings:
        lines = [f"qpostcopy: error: {error.message}"]
        for finding in error.findings:
            lines.append(f"  {finding.side}: {finding.message} [{finding.code}]")
            lines.append(f"    remedy: {finding.remedy}")
        return lines
    lines = [f"qpostcopy: error: {error.message} [{error.code}]"]
    if error.remedy:
        lines.append(f"  remedy: {error.remedy}")
    return lines


def summary(result: Result) -> str:
    """The report for people, on stdout."""
    head = f"{result.migration_id}: {result.status}; {_WHERE[result.vm_location]}"
    if result.pages.total == 0:
        return head
    downtime = "none" if result.downtime_ms is None else f"{result.downtime_ms:.1f} ms"
    pages, faults = result.pages, result.faults
    return "\n".join(
        [
            head,
            f"  downtime {downtime}, total {human_seconds(result.total_ms / 1000)}, "
            f"RAM {human_bytes(result.ram_bytes)}, "
            f"push {human_bytes(result.push_bytes_per_second)}/s",
            f"  pages {pages.total}: hole {pages.hole}, zero {pages.zero}, push {pages.push}, "
            f"demand {pages.demand}, around {pages.around}; duplicate {pages.duplicate}",
            f"  faults {faults.count} ({faults.local} answered locally): "
            f"p50 {faults.p50_us:.0f} us, p99 {faults.p99_us:.0f} us, max {faults.max_us:.0f} us",
            *([] if result.trace is None else [_trace_line(result.trace)]),
            *(f"  warning: {warning}" for warning in result.warnings),
        ]
    )


def _trace_line(trace: TraceReport) -> str:
    left_out = f", {trace.left_out} left out" if trace.left_out else ""
    return f"  trace {trace.file}: {trace.faults} faults{left_out}"
