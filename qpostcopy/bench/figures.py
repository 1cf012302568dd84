"""The figures of a run: what each is called, in which unit, and which ones people look at first.

The names are the fields of `Figures` in model.py; docs/benchmarks.md says how each is taken.
"""

from __future__ import annotations

from typing import NamedTuple

from qpostcopy.bench.model import Figures, Run
from qpostcopy.progress import human_bytes


class Figure(NamedTuple):
    """One of them. Of all, less is better.

    :ivar resolution: smaller than this it cannot be told from nothing.
    :ivar in_table: whether it has a column in the table for people.
    """

    name: str
    title: str
    unit: str
    resolution: float = 0.0
    in_table: bool = True

    def of(self, run: Run) -> float | None:
        value: float | None = getattr(run.figures, self.name)
        return value

    def text(self, value: float) -> str:
        """A value with its unit, in three digits or so."""
        if self.unit == "bytes":
            return human_bytes(int(value))
        if self.unit == "us" and value >= 1000:
            return f"{_digits(value / 1000)} ms"
        if self.unit == "ms" and abs(value) >= 1000:
            return f"{_digits(value / 1000)} s"
        return f"{_digits(value)} {self.unit}".strip()

    def span_text(self, low: float, high: float) -> str:
        """`3.90..4.80 ms`, `960 ms..1.02 s`."""
        least, most = self.text(low), self.text(high)
        number, _, unit = least.partition(" ")
        return f"{number if most.endswith(f' {unit}') else least}..{most}"


FIGURES = (
    Figure("total_ms", "total", "ms"),
    Figure("downtime_ms", "downtime", "ms", resolution=0.1),
    Figure("exposed_ms", "exposed", "ms", in_table=False),
    Figure("work_lost_ms", "work lost", "ms", resolution=20.0),
    Figure("late_ms", "late", "ms", resolution=5.0),
    Figure("faults", "faults", "", in_table=False),
    Figure("faults_local", "answered locally", "", in_table=False),
    Figure("fault_mean_us", "fault mean", "us"),
    Figure("fault_p50_us", "fault p50", "us"),
    Figure("fault_p90_us", "fault p90", "us", in_table=False),
    Figure("fault_p99_us", "fault p99", "us"),
    Figure("wire_bytes", "on the wire", "bytes"),
    Figure("cpu_seconds", "CPU", "s", resolution=0.02),
    Figure("own_cpu_seconds", "our CPU", "s", resolution=0.02, in_table=False),
    Figure("own_rss_bytes", "our memory", "bytes", in_table=False),
)

assert [figure.name for figure in FIGURES] == list(Figures.model_fields)


def _digits(value: float) -> str:
    """Three significant digits, never in exponents."""
    size = abs(value)
    if size >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}"
