"""Made-up books: what a session would have written, with just what a test is about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from qpostcopy.bench.limits import Latency, Limits, Measured
from qpostcopy.bench.model import (
    Baseline,
    Book,
    Cell,
    Engine,
    Figures,
    Link,
    Machine,
    Outcome,
    Portrait,
    Run,
    Session,
    Subject,
)

MACHINE = Machine(cpu="Made-up CPU", cores=2, memory_bytes=8 << 30, kernel="6.18")
SUBJECT = Subject(code="c0de" * 16, guest="9e57" * 16, machine=MACHINE, qemus={"10.0": "10.0.2"})
SESSION = Session(id="20261123T101500", subject=SUBJECT, rates={"10.0/512": 1800})
BASELINE = Baseline(
    operations_per_second=1000.0,
    operations_per_cpu_second=1000.0,
    deviation=0.01,
    seconds=2.0,
)
_MEASURED = Measured(median=21.5, low=20.5, high=22.5, samples=5)
_LATENCY = Latency(p50_us=_MEASURED, p90_us=_MEASURED, p99_us=_MEASURED)
LIMITS = Limits(
    size_bytes=512 << 20,
    socket_bytes_per_second=_MEASURED.model_copy(update={"median": float(3 << 30)}),
    place_bytes_per_second=_MEASURED,
    fault_poll=_LATENCY,
    fault_same_core=_LATENCY,
    fault_spin=_LATENCY,
    byte_roundtrip=_LATENCY,
    page_roundtrip=_LATENCY,
)


def cell(engine: Engine = Engine.QPOSTCOPY, **changed: Any) -> Cell:
    given = {"qemu": "10.0", "workload": "kv", "link": Link.GIGABIT, "memory_mib": 512}
    return Cell.model_validate({"engine": engine} | given | changed)


def run(of: Cell | None = None, *, figures: dict[str, float] | None = None, **changed: Any) -> Run:
    given: dict[str, Any] = {
        "session": SESSION.id,
        "round": 0,
        "at": "2026-11-23T10:15:00Z",
        "outcome": Outcome.GOOD,
        "baseline": BASELINE,
        "figures": Figures(**(figures or {})),
    }
    return Run.model_validate({"cell": of or cell()} | given | changed)


def runs(of: Cell, name: str, values: Iterable[float], **figures: float) -> list[Run]:
    """One for each value of the named figure."""
    return [run(of, figures={**figures, name: value}) for value in values]


def moved(speed: float, cpu_speed: float | None = None) -> Baseline:
    """A baseline of another speed."""
    per_cpu = speed if cpu_speed is None else cpu_speed
    return BASELINE.model_copy(
        update={"operations_per_second": speed, "operations_per_cpu_second": per_cpu}
    )


def book(
    of: Sequence[Run], sessions: Sequence[Session] = (SESSION,), portraits: Sequence[Portrait] = ()
) -> Book:
    return Book(sessions=tuple(sessions), runs=tuple(of), portraits=tuple(portraits))
