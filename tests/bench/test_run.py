"""One run of each engine: a real guest between two real QEMUs, over real links."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qpostcopy.bench.engine import Moved, Pair
from qpostcopy.bench.model import Cell, Engine, Link, Outcome, Run
from qpostcopy.bench.portrait import PARTS, Painter
from qpostcopy.bench.qemu_engine import QemuEngine
from qpostcopy.bench.run import ENGINES, play
from qpostcopy.bench.stage import Conditions, calibrate, rate_key
from qpostcopy.lab.guest import find_image
from tests.vm.debian import qemu_of

pytestmark = [pytest.mark.root, pytest.mark.vm]

MEMORY_MIB = 128


@pytest.fixture(scope="module")
def conditions() -> Conditions:
    kernel, initrd = find_image()
    return Conditions("test", kernel, initrd, {"10.0": qemu_of("trixie")})


def cell_of(engine: Engine, link: Link = Link.LOOPBACK, workload: str = "kv") -> Cell:
    return Cell(engine=engine, qemu="10.0", workload=workload, link=link, memory_mib=MEMORY_MIB)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = _present()
    yield
    assert _present() == before


def _present() -> set[str]:
    """By names that carry our pid: others may be at work on this machine."""
    netns, tmpfs = Path("/run/netns"), Path("/dev/shm")
    spaces = netns.glob(f"qpcbench-{os.getpid()}-*") if netns.is_dir() else ()
    return {path.name for path in (*spaces, *tmpfs.glob(f"qpostcopy-bench-{os.getpid()}-*"))}


def expect_good(run: Run) -> None:
    assert run.outcome is Outcome.GOOD, run.reason
    figures = run.figures
    assert figures.total_ms is not None
    assert figures.downtime_ms is not None
    assert figures.exposed_ms is not None
    assert 0 < figures.downtime_ms <= figures.exposed_ms <= figures.total_ms
    assert run.stopped_ms is not None
    assert run.resumed_ms is not None
    assert run.resumed_ms - run.stopped_ms == pytest.approx(figures.downtime_ms)
    assert figures.work_lost_ms is not None
    assert figures.wire_bytes is not None
    # Nearly all of it has content, four fifths of it other than zero.
    assert 0.3 * (MEMORY_MIB << 20) < figures.wire_bytes < 4 * (MEMORY_MIB << 20)
    assert figures.cpu_seconds is not None
    assert figures.cpu_seconds > 0
    assert len(run.speed) > 50


@pytest.mark.slow
@pytest.mark.parametrize("link", list(Link))
def test_our_engine(conditions: Conditions, link: Link) -> None:
    run = play(cell_of(Engine.QPOSTCOPY, link), conditions, 3)
    expect_good(run)
    figures = run.figures
    assert run.round == 3
    assert run.processes.keys() == {"cli", "controller", "page-server", "handler"}
    assert figures.own_cpu_seconds == pytest.approx(
        sum(used.cpu_seconds for used in run.processes.values())
    )
    assert figures.own_cpu_seconds is not None
    assert figures.cpu_seconds is not None
    assert figures.cpu_seconds >= figures.own_cpu_seconds
    assert figures.faults is not None
    assert 0.95 * figures.faults < sum(count for _, count in run.histogram) <= figures.faults
    assert figures.fault_p50_us is not None
    assert figures.fault_mean_us is not None
    assert figures.fault_p99_us is not None
    assert figures.fault_p50_us <= figures.fault_p99_us


@pytest.mark.slow
@pytest.mark.parametrize("engine", [Engine.POSTCOPY, Engine.PREEMPT])
def test_qemus_post_copy(conditions: Conditions, engine: Engine) -> None:
    run = play(cell_of(engine, Link.GIGABIT), conditions, 0)
    expect_good(run)
    assert run.figures.faults
    assert run.figures.fault_mean_us is not None
    assert run.figures.fault_mean_us > 0
    assert run.processes == {}
    assert run.figures.own_cpu_seconds is None


@pytest.mark.slow
@pytest.mark.parametrize("engine", [Engine.PRECOPY, Engine.HYBRID])
def test_qemus_pre_copy(conditions: Conditions, engine: Engine) -> None:
    run = play(cell_of(engine, workload="idle"), conditions, 0)
    expect_good(run)
    assert run.figures.late_ms is not None


@pytest.mark.slow
def test_what_does_not_converge_is_given_up(
    conditions: Conditions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENGINES, Engine.PRECOPY, QemuEngine(postcopy=False, give_up_seconds=0.25))
    run = play(cell_of(Engine.PRECOPY, Link.GIGABIT, "churn"), conditions, 0)
    assert run.outcome is Outcome.GAVE_UP
    assert run.reason == "not converged within 0.25 s"
    assert run.figures.total_ms is None


@pytest.mark.slow
def test_a_guest_that_dies_is_told(conditions: Conditions, monkeypatch: pytest.MonkeyPatch) -> None:
    """The destination is killed once the guest runs there."""

    class Killer(QemuEngine):
        def move(self, pair: Pair) -> Moved:
            moved = super().move(pair)
            os.kill(pair.destination.pid, signal.SIGSTOP)
            threading.Timer(0, os.kill, (pair.destination.pid, signal.SIGKILL)).start()
            return moved

    monkeypatch.setitem(ENGINES, Engine.POSTCOPY, Killer(postcopy=True))
    run = play(cell_of(Engine.POSTCOPY), conditions, 0)
    assert run.outcome in (Outcome.GUEST_DIED, Outcome.FAILED)
    assert run.reason


@pytest.mark.slow
def test_service_has_the_rate_of_its_session(conditions: Conditions) -> None:
    cell = cell_of(Engine.QPOSTCOPY, workload="service")
    assert 0 < calibrate(cell, conditions) <= 2000
    rates = {rate_key(cell): 300}
    run = play(cell, replace(conditions, rates=rates), 0)
    expect_good(run)
    assert run.rate == 300
    assert run.baseline is not None
    assert run.baseline.operations_per_second == pytest.approx(300, rel=0.1)
    assert run.baseline.operations_per_cpu_second > 600


@pytest.mark.slow
def test_a_portrait_tells_when_ram_arrives(conditions: Conditions) -> None:
    painter = Painter()
    run = play(cell_of(Engine.POSTCOPY, Link.GIGABIT), conditions, 0, painter)
    expect_good(run)
    assert run.resumed_ms is not None
    pages = sum(count for _, _, count in painter.arrivals)
    assert 0.5 * (MEMORY_MIB << 8) < pages <= MEMORY_MIB << 8
    assert {part for _, part, _ in painter.arrivals} <= set(range(PARTS))
    # Post-copy: most of it comes while the guest runs there.
    late = sum(count for ms, _, count in painter.arrivals if ms > run.resumed_ms)
    assert late > 0.5 * pages
