"""One run: a guest is booted, left alone, moved by an engine, and asked what it noticed.

    boot -> destination waits -> baseline (quiet) -> memory warmed -> move -> settle -> verify

What an engine did is taken from outside, by the same means for all: downtime, lost
work, CPU time, bytes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, pstdev

from qpostcopy.bench.engine import GaveUpError, Moved, Mover
from qpostcopy.bench.model import Baseline, Cell, Engine, Figures, Outcome, Run
from qpostcopy.bench.own_engine import OwnEngine
from qpostcopy.bench.portrait import Painter
from qpostcopy.bench.qemu_engine import QemuEngine, event_s
from qpostcopy.bench.stage import Conditions, Stage, stage
from qpostcopy.bench.usage import overhead_cpu_seconds, stolen_and_all_ticks, vcpu_cpu_seconds
from qpostcopy.errors import QpostcopyError
from qpostcopy.lab.guest import GuestError
from qpostcopy.lab.measure import Measurement
from qpostcopy.lab.warm import touch_and_free_elsewhere

ENGINES: dict[Engine, Mover] = {
    Engine.QPOSTCOPY: OwnEngine(),
    Engine.PRECOPY: QemuEngine(postcopy=False),
    Engine.MULTIFD: QemuEngine(postcopy=False, multifd=True, shared_ram=True),
    Engine.POSTCOPY: QemuEngine(postcopy=True),
    Engine.PREEMPT: QemuEngine(postcopy=True, preempt=True),
    Engine.HYBRID: QemuEngine(postcopy=True, preempt=True, passes=1),
}

BASELINE_SECONDS = 2.0
_BASELINE_WINDOWS = 10
_REPORT_SECONDS = 10.0
_SETTLE_SECONDS = 1.0
#: A guest whose speed is not back by then has lost what it has lost.
_SETTLE_AT_MOST_SECONDS = 6.0
#: QEMU's own events come at once, or came already.
_EVENT_SECONDS = 5.0


def play(cell: Cell, conditions: Conditions, number: int, painter: Painter | None = None) -> Run:
    """One run of a cell, whatever becomes of it.

    :param number: of the round.
    :param painter: watches the destination's RAM meanwhile, which costs time.
    :raise GuestError: there was no guest to move; VmError, ObserverError: no QEMU.
    :raise UnsupportedError: this QEMU has not got this engine.
    """
    # Only a file can be watched.
    shared = painter is not None or ENGINES[cell.engine].shared_ram
    with stage(cell, conditions, shared=shared) as staged:
        return _Play(staged, number, painter).run()


class _Play:
    """The steps of a run, and what they find out."""

    def __init__(self, staged: Stage, number: int, painter: Painter | None) -> None:
        self._stage = staged
        self._pair = staged.pair
        self._guest = staged.guest
        self._mover = ENGINES[staged.cell.engine]
        self._painter = painter
        self._run = Run(
            session=staged.conditions.session,
            round=number,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            cell=staged.cell,
            outcome=Outcome.GOOD,
            rate=staged.ready.rate,
        )
        self._started_s = 0.0
        #: Between the wall clock, which QEMU's events carry, and the one that we use.
        self._wall_offset_s = time.time() - time.monotonic()

    def run(self) -> Run:
        # Before the move no engine has done anything that it could be blamed for: that raises.
        self._mover.prepare(self._pair)
        baseline = self._baseline()
        self._note(baseline=baseline)
        touch_and_free_elsewhere(self._stage.memory_bytes)
        try:
            self._note(figures=self._move())
            self._settle(baseline)
            self._note_cost(baseline)
            self._verify()
        except GaveUpError as error:
            self._note(outcome=Outcome.GAVE_UP, reason=str(error))
        except GuestError as error:
            self._note(outcome=Outcome.GUEST_DIED, reason=str(error))
        except QpostcopyError as error:
            self._note_failure(error)
        return self._run

    def _note(self, **found: object) -> None:
        self._run = self._run.model_copy(update=found)

    # --- the steps ---------------------------------------------------------------------------

    def _baseline(self) -> Baseline:
        """Quiet seconds: nothing of ours runs but the guest."""
        source = self._pair.source
        from_s, from_cpu_seconds = time.monotonic(), vcpu_cpu_seconds(source)
        to_s = from_s + BASELINE_SECONDS
        self._guest.wait_report_after(to_s, BASELINE_SECONDS + _REPORT_SECONDS)
        cpu_seconds = vcpu_cpu_seconds(source) - from_cpu_seconds
        measured_s = time.monotonic() - from_s
        measurement = Measurement(self._guest.reports)
        speed = measurement.speed(from_s, to_s)
        if speed <= 0:
            raise GuestError("the guest does no work")
        window_s = BASELINE_SECONDS / _BASELINE_WINDOWS
        starts = (from_s + window_s * i for i in range(_BASELINE_WINDOWS))
        speeds = [measurement.speed(start_s, start_s + window_s) for start_s in starts]
        return Baseline(
            operations_per_second=speed,
            operations_per_cpu_second=speed * measured_s / cpu_seconds,
            deviation=pstdev(speeds) / fmean(speeds),
            seconds=BASELINE_SECONDS,
        )

    def _move(self) -> Figures:
        vms = (self._pair.source, self._pair.destination)
        cpu_seconds = sum(map(overhead_cpu_seconds, vms))
        wire_bytes = self._pair.ends.wire_bytes()
        stolen, ticks = stolen_and_all_ticks()
        with self._painted():
            self._started_s = time.monotonic()
            moved = self._mover.move(self._pair)
        stolen_after, ticks_after = stolen_and_all_ticks()
        qemu_cpu_seconds = sum(map(overhead_cpu_seconds, vms)) - cpu_seconds
        self._note(
            processes=dict(moved.processes),
            histogram=moved.faults.histogram if moved.faults else (),
            steal=(stolen_after - stolen) / max(1, ticks_after - ticks),
        )
        own = self._run.processes.values()
        own_cpu_seconds = sum(usage.cpu_seconds for usage in own)
        return Figures(
            total_ms=(moved.ended_s - self._started_s) * 1e3,
            **self._stop_and_resume(moved),
            **_fault_figures(moved),
            wire_bytes=self._pair.ends.wire_bytes() - wire_bytes,
            cpu_seconds=qemu_cpu_seconds + own_cpu_seconds,
            own_cpu_seconds=own_cpu_seconds if own else None,
            own_rss_bytes=sum(usage.peak_rss_bytes for usage in own) if own else None,
        )

    @contextmanager
    def _painted(self) -> Iterator[None]:
        if self._painter is None:
            yield
            return
        with self._painter.watching(self._pair.destination, time.monotonic()):
            yield

    def _stop_and_resume(self, moved: Moved) -> dict[str, float]:
        """From the events of both QEMUs, stamped by themselves with the clock of this host."""
        source, destination = self._pair.source.observer, self._pair.destination.observer
        stopped_s = event_s(source.wait_event("STOP", limit_seconds=_EVENT_SECONDS))
        resumed_s = event_s(destination.wait_event("RESUME", limit_seconds=_EVENT_SECONDS))
        self._note(
            stopped_ms=self._since_start_ms(stopped_s), resumed_ms=self._since_start_ms(resumed_s)
        )
        placed_s = max(moved.placed_s, resumed_s)
        return {
            "downtime_ms": (resumed_s - stopped_s) * 1e3,
            "exposed_ms": (placed_s - stopped_s) * 1e3,
        }

    def _since_start_ms(self, wall_s: float) -> float:
        return (wall_s - self._wall_offset_s - self._started_s) * 1e3

    def _settle(self, baseline: Baseline) -> None:
        """Until the guest has its speed back, and a bit, so that what it lost can be summed up."""
        deadline = time.monotonic() + _SETTLE_AT_MOST_SECONDS
        wait_s = _SETTLE_SECONDS
        while True:
            report = self._guest.wait_report_after(time.monotonic() + wait_s, _REPORT_SECONDS)
            recovered_s = self._recovered_s(baseline)
            if recovered_s < report.host_s or time.monotonic() >= deadline:
                return
            wait_s = _SETTLE_SECONDS / 4

    def _recovered_s(self, baseline: Baseline) -> float:
        return Measurement(self._guest.reports).recovered_s(
            self._resumed_s, baseline.operations_per_second
        )

    @property
    def _resumed_s(self) -> float:
        assert self._run.resumed_ms is not None, "never moved"
        return self._started_s + self._run.resumed_ms / 1e3

    def _note_cost(self, baseline: Baseline) -> None:
        reports = self._guest.reports
        measurement = Measurement(reports)
        speed, last_s = baseline.operations_per_second, reports[-1].host_s
        lost_ms = measurement.work_lost_ms(self._started_s, self._resumed_s, speed)
        recovered_s = self._recovered_s(baseline)
        took_ms = (recovered_s - self._started_s) * 1e3
        late_ms = measurement.late_ms(self._started_s, last_s) if self._run.rate else None
        figures = self._run.figures.model_copy(update={"work_lost_ms": lost_ms, "late_ms": late_ms})
        self._note(
            figures=figures,
            recovered=recovered_s < last_s,
            # Two standard errors of the baseline's mean, over the time that is summed up.
            work_lost_resolution_ms=2 * baseline.deviation / _BASELINE_WINDOWS**0.5 * took_ms,
            speed=tuple(
                (round((report.host_s - self._started_s) * 1e3, 1), report.operations)
                for report in reports
                if report.host_s >= self._started_s - BASELINE_SECONDS / 2
            ),
        )

    def _verify(self) -> None:
        """Have the guest check every byte of its memory."""
        verified = self._guest.verify(10 + self._stage.memory_bytes / (50 << 20))
        if verified.corrupt:
            told = "; ".join(self._guest.corrupt_lines)
            self._note(
                outcome=Outcome.CORRUPT,
                reason=f"{verified.corrupt} of {verified.pages} pages corrupt: {told}",
            )

    def _note_failure(self, error: QpostcopyError) -> None:
        """A QEMU that hung up may have done so because its guest ended."""
        panicked = [line for line in self._guest.other_lines if "panic" in line.lower()]
        if panicked:
            self._note(outcome=Outcome.GUEST_DIED, reason=panicked[0])
            return
        kept = self._keep()
        where = f" (logs and state: {kept})" if kept else ""
        self._note(outcome=Outcome.FAILED, reason=f"{error}{where}")

    def _keep(self) -> Path | None:
        """Logs and state of this run, where they outlive it."""
        failures = self._stage.conditions.failures
        if failures is None:
            return None
        kept = failures / f"{self._run.at}-{self._run.cell.engine}".replace(":", "")
        with suppress(OSError, shutil.Error):
            shutil.copytree(self._pair.directory, kept, ignore=_no_sockets)
            return kept
        return None


def _no_sockets(directory: str, names: list[str]) -> list[str]:
    return [name for name in names if (Path(directory) / name).is_socket()]


def _fault_figures(moved: Moved) -> dict[str, float | None]:
    faults = moved.faults
    if faults is None:
        return {}
    quantiles = {f"fault_{name}_us": value for name, value in faults.quantiles_us.items()}
    return {
        "faults": float(faults.count),
        "faults_local": None if faults.local is None else float(faults.local),
        "fault_mean_us": faults.mean_us,
        **quantiles,
    }
