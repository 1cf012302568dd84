"""Our own engine: what its command tells, and what is left when it is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpostcopy.bench import own_engine, stage
from qpostcopy.bench.book import FILE, read_book
from qpostcopy.bench.engine import NotMovedError
from qpostcopy.bench.link import open_link
from qpostcopy.bench.model import Link, Outcome
from qpostcopy.bench.own_engine import mean_us
from qpostcopy.core._core import lib
from qpostcopy.errors import ExitCode
from qpostcopy.lab.leftovers import processes_naming
from qpostcopy.state import StateDirectory
from tests.vm.scene import wait_until

# --- the mean of a histogram ---------------------------------------------------------------

BUCKETS = 256
UPPER_US = [float(lib.qpc_bucket_upper_us(bucket)) for bucket in range(BUCKETS)]
LOWER_US = [0.0, *UPPER_US]
_MINUTE_US = 60_000_000


def bucket_of(us: float) -> int:
    """An upper end is exclusive."""
    return bisect_right(UPPER_US, us)


def histogram_of(faults_us: list[int]) -> tuple[tuple[float, int], ...]:
    counts = Counter(map(bucket_of, faults_us))
    return tuple((UPPER_US[bucket], counts[bucket]) for bucket in sorted(counts))


def test_a_bucket_counts_at_its_middle() -> None:
    middles_us = [(lower + upper) / 2 for lower, upper in zip(LOWER_US, UPPER_US, strict=False)]
    assert [mean_us([(upper, 7)]) for upper in UPPER_US] == middles_us


# Most faults take less than a millisecond; none takes longer than a minute.
@given(st.lists(st.integers(0, 1000) | st.integers(0, _MINUTE_US), min_size=1))
def test_the_mean_is_within_half_a_bucket(faults_us: list[int]) -> None:
    buckets = [bucket_of(us) for us in faults_us]
    half_us = fmean((UPPER_US[bucket] - LOWER_US[bucket]) / 2 for bucket in buckets)
    assert mean_us(histogram_of(faults_us)) == pytest.approx(
        fmean(faults_us), rel=1e-12, abs=half_us + 1e-9
    )


def test_no_faults_have_no_mean() -> None:
    assert mean_us(()) is None


# --- what the command told -----------------------------------------------------------------

PROGRESS = {"v": 1, "type": "progress", "ts": 1.0, "migration_id": "bench-1"}


def result(status: str, rc: int, **more: Any) -> dict[str, Any]:
    return PROGRESS | {
        "type": "result",
        "status": status,
        "rc": rc,
        "vm_location": "destination",
        "profile": "sequential",
        "qemu": {},
        "ram_bytes": 1 << 28,
        "downtime_ms": None,
        "total_ms": 900.0,
        "phases": [],
        **more,
    }


@pytest.mark.parametrize("heard", [[], [PROGRESS], [result("completed", 0), PROGRESS]])
def test_without_a_result_at_its_end_nothing_was_moved(heard: list[dict[str, Any]]) -> None:
    with pytest.raises(NotMovedError, match="ended with -9 and without a result"):
        own_engine._result_of(heard, -9)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ("error", ExitCode.UNEXPECTED),
        ("refused", ExitCode.REFUSED),
        ("rolled-back", ExitCode.ROLLED_BACK),
        ("timed-out", ExitCode.TIMED_OUT),
        ("interrupted", ExitCode.INTERRUPTED),
        ("failed", ExitCode.FAILED),
        ("cancelled", ExitCode.SIGINT),
        ("cancelled", ExitCode.SIGTERM),
    ],
)
def test_a_bad_end_says_how_and_why(status: str, code: ExitCode) -> None:
    error = {"code": "E", "message": "the lane broke", "remedy": None}
    with pytest.raises(NotMovedError) as caught:
        own_engine._result_of([PROGRESS, result(status, code, error=error)], code)
    assert str(caught.value) == f"{status}: the lane broke"


@pytest.mark.parametrize("more", [{}, {"error": None}])
def test_a_bad_end_without_a_reason(more: dict[str, Any]) -> None:
    with pytest.raises(NotMovedError, match=r"^failed: no reason was given$"):
        own_engine._result_of([result("failed", 11, **more)], 11)


def test_a_command_that_contradicts_its_result_is_not_believed() -> None:
    with pytest.raises(NotMovedError):
        own_engine._result_of([result("completed", 0)], 1)


def test_a_good_end() -> None:
    assert own_engine._result_of([PROGRESS, result("completed", 0)], 0).status == "completed"


def test_the_last_page_is_placed_when_the_phase_says_so() -> None:
    phases = [
        PROGRESS | {"type": "phase", "phase": name, "ts": ts}
        for name, ts in (("postcopy", 10.5), ("complete", 11.25))
    ]
    assert own_engine._placed_s([PROGRESS, *phases, PROGRESS]) == 11.25
    with pytest.raises(NotMovedError, match="never told of phase `complete`"):
        own_engine._placed_s([PROGRESS, phases[0], PROGRESS])


# --- interrupted ---------------------------------------------------------------------------

_BOOT_SECONDS = 120.0
_END_SECONDS = 60.0
_TMPFS = Path("/dev/shm")
#: One run of ours that takes seconds to move, on this machine's own QEMU.
_ARGUMENTS = (
    *("--engine", "qpostcopy", "--workload", "kv", "--link", "1gbit"),
    *("--memory", "256", "--runs", "1", "--no-limits", "--no-portraits"),
)


class Bench:
    """`scripts/bench` in a process of its own, and what on this machine carries its pid."""

    def __init__(self, output: Path) -> None:
        command = [sys.executable, "-m", "qpostcopy.bench", *_ARGUMENTS]
        command += ["--qemu", "qemu-system-x86_64", "--output", str(output)]
        # A group of its own: what a terminal's Ctrl-C would reach.
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0)
        self.prefix = f"qpostcopy-bench-{self.process.pid}-"

    def states(self, name: str) -> list[Path]:
        """A file in the migration's state directory, if there is one."""
        assert self.process.poll() is None, "it ended by itself"
        return list(_TMPFS.glob(f"{self.prefix}*/run/*/{name}"))

    def boots(self) -> bool:
        return bool(self.processes())

    def moves(self) -> bool:
        return bool(self.states("state.json"))

    def has_committed(self) -> bool:
        return bool(self.states("committed"))

    def processes(self) -> list[str]:
        """QEMUs, companions and controller: all have the run's directory in their command."""
        return processes_naming(_TMPFS / self.prefix)

    def left(self) -> list[str]:
        namespaces = Path("/run/netns").glob(f"qpcbench-{self.process.pid}-*")
        directories = _TMPFS.glob(f"{self.prefix}*")
        return [*self.processes(), *map(str, namespaces), *map(str, directories)]

    def clear_away(self) -> None:
        """What a failed test left of it."""
        self.process.kill()
        self.process.wait()
        assert self.process.stderr
        self.process.stderr.close()
        for line in self.processes():
            os.kill(int(line.split()[0]), signal.SIGKILL)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    try:
        yield bench
    finally:
        bench.clear_away()


@pytest.mark.root
@pytest.mark.vm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "number"),
    [
        (Bench.boots, signal.SIGINT),
        (Bench.moves, signal.SIGINT),
        (Bench.has_committed, signal.SIGINT),
        (Bench.has_committed, signal.SIGTERM),
    ],
    ids=lambda given: getattr(given, "__name__", None),
)
def test_an_interrupted_run_leaves_nothing(
    bench: Bench, tmp_path: Path, moment: Callable[[Bench], bool], number: signal.Signals
) -> None:
    wait_until(lambda: moment(bench), moment.__name__, _BOOT_SECONDS)
    os.killpg(bench.process.pid, number)
    _, told = bench.process.communicate(timeout=_END_SECONDS)
    assert bench.process.returncode == ExitCode.SIGINT, told
    assert f"with --output {tmp_path} the same command goes on from here" in told
    assert "Traceback" not in told
    assert read_book(tmp_path / FILE).runs == ()
    assert bench.left() == []


@pytest.mark.root
@pytest.mark.vm
@pytest.mark.slow
def test_a_move_that_broke_off_is_booked_and_leaves_nothing(bench: Bench, tmp_path: Path) -> None:
    """Command and controller die: the companions wait for a `resume` that does not come."""
    wait_until(bench.has_committed, "committed", _BOOT_SECONDS)
    state = StateDirectory.open(bench.states("committed")[0].parent).state
    assert state.controller
    (command,) = (line for line in bench.processes() if " migrate " in line)
    for pid in (int(command.split()[0]), state.controller.pid):
        os.kill(pid, signal.SIGKILL)
    _, told = bench.process.communicate(timeout=_END_SECONDS)
    assert bench.process.returncode == ExitCode.COMPLETED, told
    (run,) = read_book(tmp_path / FILE).runs
    assert run.outcome is Outcome.FAILED
    assert run.reason
    assert "`qpostcopy migrate` ended with -9 and without a result" in run.reason
    # What happened can be looked into.
    assert list((tmp_path / "failures").glob("*/run/*/state.json"))
    assert bench.left() == []


@pytest.mark.root
@pytest.mark.vm
@pytest.mark.slow
def test_what_a_killed_benchmark_leaves_the_next_one_removes(bench: Bench) -> None:
    wait_until(bench.has_committed, "committed", _BOOT_SECONDS)
    bench.process.kill()
    bench.process.wait()
    # QEMUs end with who started them, and companions with their QEMU.
    wait_until(lambda: not bench.processes(), "all have ended", _END_SECONDS)
    assert bench.left()
    stage._sweep()
    with open_link(Link.LOOPBACK):
        assert bench.left() == []
