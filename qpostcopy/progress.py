"""Progress of a migration: what is measured, and the one line that shows it.

`Meter` turns the handler's counters into rates; it does no I/O and takes the
time as an argument. The line is the same on a terminal and in a log.
"""

from __future__ import annotations

from qpostcopy.qmp.schema import HandlerStats, Model

#: What the handler's counters count (qmp/schema.py).
PAGE_BYTES = 4096
#: How much a new rate weighs against the old one.
_SMOOTHING = 0.4


class Progress(Model):
    """One moment of a migration, as `--json` prints it."""

    phase: str
    percent: float = 0.0
    placed_bytes: int = 0
    total_bytes: int = 0
    left_bytes: int = 0
    bytes_per_second: float = 0.0
    faults: int = 0
    faults_per_second: float = 0.0
    fault_p50_us: float = 0.0
    fault_p99_us: float = 0.0
    downtime_ms: float | None = None
    eta_seconds: float | None = None


class Meter:
    """Keeps the last counters, to tell rates."""

    def __init__(self) -> None:
        self._at_seconds: float | None = None
        self._left_bytes = 0
        self._faults = 0
        self._bytes_per_second = 0.0
        self._faults_per_second = 0.0

    def measure(
        self,
        phase: str,
        stats: HandlerStats,
        now_seconds: float,
        downtime_ms: float | None,
        served_seconds: float | None = None,
    ) -> Progress:
        """The progress now. Each call moves the rates on.

        :param served_seconds: when the push began, if it is known: the first rates count from
            there.
        """
        total = stats.total_pages * PAGE_BYTES
        left = stats.remaining_pages * PAGE_BYTES
        if self._at_seconds is None and served_seconds is not None:
            self._at_seconds, self._left_bytes = served_seconds, total
        self._update_rates(left, stats.faults.count, now_seconds)
        rate = self._bytes_per_second
        return Progress(
            phase=phase,
            percent=100.0 * (total - left) / total if total else 0.0,
            placed_bytes=total - left,
            total_bytes=total,
            left_bytes=left,
            bytes_per_second=rate,
            faults=stats.faults.count,
            faults_per_second=self._faults_per_second,
            fault_p50_us=stats.faults.p50_us,
            fault_p99_us=stats.faults.p99_us,
            downtime_ms=downtime_ms,
            eta_seconds=left / rate if rate > 0 else None,
        )

    def _update_rates(self, left_bytes: int, faults: int, now_seconds: float) -> None:
        if self._at_seconds is not None and now_seconds > self._at_seconds:
            elapsed = now_seconds - self._at_seconds
            self._bytes_per_second = _smooth(
                self._bytes_per_second, max(0, self._left_bytes - left_bytes) / elapsed
            )
            # A restarted handler may count from its last record.
            self._faults_per_second = _smooth(
                self._faults_per_second, max(0, faults - self._faults) / elapsed
            )
        self._at_seconds = now_seconds
        self._left_bytes = left_bytes
        self._faults = faults


def _smooth(old: float, new: float) -> float:
    return new if old == 0 else old + _SMOOTHING * (new - old)


def human_bytes(count: float) -> str:
    """`4.6 GiB`: the largest unit that leaves at least 1."""
    for unit, exponent in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << exponent:
            value = count / (1 << exponent)
            return f"{value:.2f} {unit}" if value < 10 and exponent == 30 else f"{value:.1f} {unit}"
    return f"{count:.0f} B"


def human_seconds(seconds: float) -> str:
    """`850 ms`, `4.2 s`, `3 min 5 s`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def line(progress: Progress, columns: int | None = None) -> str:
    """One line, without colour.

    `postcopy 71% 11.4/16.0 GiB  left 4.6 GiB  1.12 GiB/s  faults 812/s p50 0.4 p99 2.1 ms
    downtime 12 ms  ETA 4 s`

    :param columns: what is least missed is left out until it fits.
    """
    if not progress.total_bytes:
        return progress.phase[:columns]
    part = _parts(progress)
    for names in _FORMS:
        text = "  ".join(part[name] for name in names.split() if part[name])
        if columns is None or len(text) <= columns:
            return text
    return text[:columns]


#: What is shown, the widest first. The last but one fits 40 columns, the others 80 and more.
_FORMS = (
    "where left rate faults downtime eta",
    "where left rate faults eta",
    "where rate slowest-faults downtime eta",
    "where rate slowest-faults eta",
    "where rate eta",
    "where eta",
    "where",
)


def _parts(progress: Progress) -> dict[str, str]:
    """The parts of the line; one that says nothing is empty."""
    faults = f"faults {progress.faults_per_second:.0f}/s"
    p50, p99 = _ms(progress.fault_p50_us), _ms(progress.fault_p99_us)
    downtime, eta = progress.downtime_ms, progress.eta_seconds
    return {
        "where": f"{progress.phase} {progress.percent:.0f}% {_of(progress)}",
        "left": f"left {human_bytes(progress.left_bytes)}",
        "rate": f"{human_bytes(progress.bytes_per_second)}/s",
        "faults": f"{faults} p50 {p50} p99 {p99} ms",
        "slowest-faults": f"{faults} p99 {p99} ms",
        "downtime": "" if downtime is None else f"downtime {downtime:.0f} ms",
        "eta": "" if eta is None or not progress.left_bytes else f"ETA {human_seconds(eta)}",
    }


def _of(progress: Progress) -> str:
    unit, exponent = ("GiB", 30) if progress.total_bytes >= 1 << 30 else ("MiB", 20)
    scale = 1 << exponent
    return f"{progress.placed_bytes / scale:.1f}/{progress.total_bytes / scale:.1f} {unit}"


def _ms(us: float) -> str:
    return f"{us / 1000:.1f}" if us >= 100 or us == 0 else f"{us / 1000:.2f}"
