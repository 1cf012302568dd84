"""What `bench.json` holds: sessions, and the runs that they made.

    Book -> Session   when, on what machine, of which code; calibrated rates; limits
         -> Run       one guest moved once by one engine: a cell of the matrix, and what was seen
         -> Portrait  page arrivals of a run that was watched closely, and counts for nothing else

Raw observations only: medians, verdicts and what is thrown out are computed from
them (judge.py), so a rule that changes needs no new runs. docs/benchmarks.md
documents every key. Times in a run are milliseconds since its start, which is
when the operator's command was given.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from qpostcopy.bench.limits import Limits
from qpostcopy.qmp.schema import Model

VERSION: Literal[1] = 1


class Engine(StrEnum):
    """Who moves the guest. qpostcopy with precopy comes once there is one."""

    QPOSTCOPY = "qpostcopy"
    PRECOPY = "qemu-precopy"
    #: With several connections, and threads on both sides, for pages.
    MULTIFD = "qemu-precopy-multifd"
    POSTCOPY = "qemu-postcopy"
    PREEMPT = "qemu-postcopy-preempt"
    #: Post-copy after one pass of pre-copy, as many management tools do it.
    HYBRID = "qemu-hybrid"


class Link(StrEnum):
    """What lies between the two ends; see link.py."""

    LOOPBACK = "loopback"
    GIGABIT = "1gbit"


class Outcome(StrEnum):
    """How a run ended. Only of a `good` one are the figures compared."""

    GOOD = "good"
    #: Pre-copy did not converge in the time given, and was cancelled.
    GAVE_UP = "gave-up"
    #: The guest ended, hung or went back.
    GUEST_DIED = "guest-died"
    CORRUPT = "corrupt"
    #: The migration did not complete, for whatever other reason.
    FAILED = "failed"


class Cell(Model):
    """A place in the matrix.

    :ivar qemu: which QEMU, by a short name such as 10.0.
    :ivar label: tells two otherwise equal cells apart when the harness checks itself.
    """

    engine: Engine
    qemu: str
    workload: str
    link: Link
    memory_mib: int
    label: str = ""

    @property
    def title(self) -> str:
        """In words."""
        where = f"QEMU {self.qemu}, {self.workload}, {self.link}, {self.memory_mib} MiB"
        return f"{self.engine}: {where}" + (f", {self.label}" if self.label else "")


class Machine(Model):
    """Where it was measured.

    :ivar huge_pages: the kernel's settings of transparent huge pages, as it writes them.
    """

    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    huge_pages: str = ""


class Subject(Model):
    """What was measured. Runs of different subjects are never put together.

    :ivar code: hash over the sources of the package, the benchmark's own included.
    :ivar guest: hash over the guest's image.
    :ivar qemus: full version by short name.
    """

    code: str
    guest: str
    machine: Machine
    qemus: dict[str, str]

    def is_like(self, other: Subject) -> bool:
        """Whether runs of both may be put together: of the QEMUs, only what both have counts."""
        same = (self.code, self.guest, self.machine) == (other.code, other.guest, other.machine)
        shared = self.qemus.keys() & other.qemus.keys()
        return same and all(self.qemus[name] == other.qemus[name] for name in shared)


class Session(Model):
    """One invocation.

    :ivar rates: by QEMU/MiB, the rate of `service` in requests a second, calibrated once.
    :ivar limits: by link, what the machine can do without any engine.
    """

    id: str = Field(description="UTC, YYYYmmddTHHMMSS")
    subject: Subject
    rates: dict[str, int] = Field({})
    limits: dict[Link, Limits] = Field({})


class Baseline(Model):
    """The guest in quiet seconds before the start.

    :ivar operations_per_cpu_second: by the CPU time of its vCPU: moves with the
        machine's speed even where the workload has a fixed rate.
    :ivar deviation: standard deviation of the speed over its windows, as a share of the mean.
    """

    operations_per_second: float
    operations_per_cpu_second: float
    deviation: float
    seconds: float


class Figures(Model):
    """What is compared; None where an engine or workload has no such figure. See figures.py."""

    total_ms: float | None = None
    downtime_ms: float | None = None
    exposed_ms: float | None = None
    work_lost_ms: float | None = None
    late_ms: float | None = None
    faults: float | None = None
    faults_local: float | None = None
    fault_mean_us: float | None = None
    fault_p50_us: float | None = None
    fault_p90_us: float | None = None
    fault_p99_us: float | None = None
    wire_bytes: float | None = None
    cpu_seconds: float | None = None
    own_cpu_seconds: float | None = None
    own_rss_bytes: float | None = None


class Usage(Model):
    """Of one process, from its start to its end."""

    cpu_seconds: float
    peak_rss_bytes: int


class Run(Model):
    """One migration.

    :ivar at: UTC, ISO 8601.
    :ivar rate: requests a second that the workload was given; 0: as fast as it can.
    :ivar recovered: the guest's speed was back before we stopped looking; else `work_lost_ms`
        is what it had lost by then.
    :ivar work_lost_resolution_ms: by how much the baseline's own unrest can move `work_lost_ms`.
    :ivar histogram: (upper end in us, faults) of each bucket, where faults are measured singly.
    :ivar processes: of our own by role.
    :ivar speed: (ms since the start, operations so far), for the plot.
    :ivar steal: share of CPU time that the machine's host kept for itself during the run.
    """

    session: str
    round: int
    at: str
    cell: Cell
    outcome: Outcome
    reason: str | None = None
    rate: int = 0
    baseline: Baseline | None = None
    figures: Figures = Figures()
    recovered: bool = True
    work_lost_resolution_ms: float | None = None
    stopped_ms: float | None = None
    resumed_ms: float | None = None
    histogram: tuple[tuple[float, int], ...] = ()
    processes: dict[str, Usage] = Field({})
    speed: tuple[tuple[float, int], ...] = ()
    steal: float = 0.0


class Portrait(Model):
    """When which part of RAM arrived at the destination.

    :ivar parts: RAM is cut in so many equal parts.
    :ivar arrivals: (ms since the start, part, pages that arrived there since the last look).
    """

    session: str
    cell: Cell
    parts: int
    stopped_ms: float | None
    resumed_ms: float | None
    arrivals: tuple[tuple[float, int, int], ...]


class Book(Model):
    """All of it, the oldest first."""

    v: Literal[1] = VERSION
    sessions: tuple[Session, ...] = ()
    runs: tuple[Run, ...] = ()
    portraits: tuple[Portrait, ...] = ()
