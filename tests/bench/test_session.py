"""A session: what is played, what is not played again, and what is told. Nothing real is moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from qpostcopy.bench import session as session_module
from qpostcopy.bench.book import FILE, BookFile, read_book
from qpostcopy.bench.engine import UnsupportedError
from qpostcopy.bench.judge import judge, subject_of
from qpostcopy.bench.limits import Limits
from qpostcopy.bench.matrix import Matrix
from qpostcopy.bench.model import Book, Cell, Engine, Link, Outcome, Run
from qpostcopy.bench.portrait import Painter
from qpostcopy.bench.qemus import Qemu
from qpostcopy.bench.session import BenchSession
from qpostcopy.bench.stage import Conditions
from qpostcopy.lab.guest import GuestError
from qpostcopy.lab.observer import ObserverError, ObserverTimeoutError
from qpostcopy.lab.vm import VmError
from tests.bench.books import LIMITS, moved, run

QEMU = Qemu("10.0", "/usr/bin/qemu", "10.0.2")
MATRIX = Matrix(
    engines=[Engine.QPOSTCOPY, Engine.PRECOPY, Engine.POSTCOPY],
    qemus=["10.0"],
    workloads=["kv"],
    links=[Link.LOOPBACK],
    memory_mib=256,
    runs=2,
)
RATE = 1700

#: What becomes of the n-th run (from 0), if not what usually does.
Fate = Callable[[int, Run], Run]


def as_usual(_number: int, usual: Run) -> Run:
    return usual


@dataclass
class Bench:
    """What sessions in one directory would measure with, and a record of it."""

    directory: Path
    image: tuple[Path, Path]
    fate: Fate = as_usual
    qemu: Qemu = QEMU
    played: list[Cell] = field(default_factory=list)
    conditions: list[Conditions] = field(default_factory=list)
    painted: list[Cell] = field(default_factory=list)
    calibrated: list[Cell] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def play(
        self, cell: Cell, conditions: Conditions, number: int, painter: Painter | None = None
    ) -> Run:
        if painter is not None:
            self.painted.append(cell)
            painter.arrivals.append((12.5, 3, 100))
        self.played.append(cell)
        self.conditions.append(conditions)
        figures = {"total_ms": 900.0, "downtime_ms": 8.0}
        usual = run(cell, figures=figures, session=conditions.session, round=number)
        return self.fate(len(self.played) - 1, usual)

    def calibrate(self, cell: Cell, _conditions: Conditions) -> int:
        self.calibrated.append(cell)
        return RATE

    def session(
        self,
        matrix: Matrix = MATRIX,
        *,
        portraits: bool = False,
        limits: Callable[[Link], Limits] | None = None,
    ) -> None:
        """A session of its own, from its start to its end."""
        of = BenchSession(
            BookFile(self.directory), matrix, self.image, {"10.0": self.qemu}, self.told.append
        )
        of.run(limits, portraits=portraits)

    @property
    def book(self) -> Book:
        """As it is on disk."""
        return read_book(self.directory / FILE)

    def said(self, text: str) -> list[str]:
        return [line for line in self.told if text in line]


class Clock:
    """An hour later each time that it is asked, so that each session has a name of its own."""

    def __init__(self) -> None:
        self._now = datetime(2026, 11, 23, tzinfo=UTC)

    def now(self, _zone: object) -> datetime:
        self._now += timedelta(hours=1)
        return self._now


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    image = (tmp_path / "vmlinuz", tmp_path / "initrd")
    for path in image:
        path.write_bytes(b"")
    bench = Bench(tmp_path / "bench", image)
    monkeypatch.setattr(session_module, "play", bench.play)
    monkeypatch.setattr(session_module, "calibrate", bench.calibrate)
    monkeypatch.setattr(session_module, "datetime", Clock())
    # It would outlive the test.
    monkeypatch.setattr(session_module, "become_reaper", lambda: None)
    return bench


def raising(error: BaseException, engine: Engine | None = None) -> Fate:
    """Each run, or each of one engine, ends so."""

    def fate(_number: int, usual: Run) -> Run:
        if engine in (None, usual.cell.engine):
            raise error
        return usual

    return fate


# --- which run is next ---------------------------------------------------------------------


def test_another_engine_comes_first_in_each_round(bench: Bench) -> None:
    bench.session(replace(MATRIX, runs=3))
    own, precopy, postcopy = MATRIX.engines
    assert [cell.engine for cell in bench.played] == [
        *(own, precopy, postcopy),
        *(precopy, postcopy, own),
        *(postcopy, own, precopy),
    ]
    assert [run.round for run in bench.book.runs] == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize("done", range(6))
def test_an_interrupted_session_goes_on_where_it_was(bench: Bench, done: int) -> None:
    def fate(number: int, usual: Run) -> Run:
        if number == done:
            raise KeyboardInterrupt
        return usual

    bench.fate = fate
    with pytest.raises(KeyboardInterrupt):
        bench.session()
    assert len(bench.book.runs) == done
    bench.session()
    # One more than there are: the one that was interrupted.
    assert len(bench.played) == 7
    assert Counter(run.cell for run in bench.book.runs) == dict.fromkeys(MATRIX.cells, 2)
    assert len(bench.book.sessions) == 2


def test_what_is_complete_is_not_measured_again(bench: Bench) -> None:
    bench.session()
    bench.session()
    assert len(bench.played) == 6
    bench.session(replace(MATRIX, runs=3))
    assert len(bench.played) == 9


def test_another_qemu_is_measured_anew(bench: Bench) -> None:
    bench.session()
    bench.qemu = QEMU._replace(version="10.0.3")
    bench.session()
    assert len(bench.played) == 12


def test_runs_whose_baseline_moved_are_replaced(bench: Bench) -> None:
    matrix = replace(MATRIX, engines=[Engine.QPOSTCOPY], runs=3)
    (cell,) = matrix.cells

    def fate(number: int, usual: Run) -> Run:
        return usual.model_copy(update={"baseline": moved(500)}) if number == 1 else usual

    bench.fate = fate
    bench.session(matrix)
    assert len(bench.book.runs) == 4
    subject = subject_of(bench.book)
    assert subject
    judged = judge(bench.book, subject)[cell]
    assert (len(judged.good), len(judged.moved)) == (3, 1)


def test_a_run_that_ended_badly_counts(bench: Bench) -> None:
    def fate(_number: int, usual: Run) -> Run:
        return usual.model_copy(update={"outcome": Outcome.GAVE_UP, "reason": "not converged"})

    bench.fate = fate
    bench.session()
    assert len(bench.played) == len(bench.book.runs) == 6
    assert len(bench.said("gave-up (not converged)")) == 6


# --- what cannot be had --------------------------------------------------------------------


@pytest.mark.parametrize("error", [GuestError, VmError, ObserverError, ObserverTimeoutError])
def test_what_did_not_start_is_told_and_not_booked(bench: Bench, error: type[Exception]) -> None:
    def fate(number: int, usual: Run) -> Run:
        if number == 1:
            raise error("no boot")
        return usual

    bench.fate = fate
    bench.session()
    assert len(bench.played) == 7
    assert len(bench.book.runs) == 6
    assert len(bench.said("did not start (no boot)")) == 1


def test_a_cell_that_never_succeeds_is_left(bench: Bench) -> None:
    bench.fate = raising(VmError("no boot"), Engine.PRECOPY)
    bench.session()
    own, precopy, postcopy = MATRIX.cells
    assert Counter(bench.played) == {own: 2, precopy: MATRIX.most_attempts, postcopy: 2}
    (told,) = bench.said("not enough runs")
    assert told == f"{precopy.title}: not enough runs, after {MATRIX.most_attempts} attempts"
    # The next session may have better luck.
    bench.fate = as_usual
    bench.session()
    assert Counter(run.cell for run in bench.book.runs)[precopy] == 2


def test_what_a_qemu_has_not_got_is_left_out(bench: Bench) -> None:
    bench.fate = raising(UnsupportedError("no preempt"), Engine.POSTCOPY)
    bench.session()
    own, precopy, postcopy = MATRIX.cells
    assert Counter(bench.played) == {own: 2, precopy: 2, postcopy: 1}
    assert len(bench.said(f"{postcopy.title}: left out (no preempt)")) == 1
    assert {run.cell for run in bench.book.runs} == {own, precopy}


def test_each_run_is_told_of(bench: Bench) -> None:
    bench.session()
    lines = bench.said("to go, about")
    assert len(lines) == 6
    assert lines[0].startswith(f"{MATRIX.cells[0].title}: total ")
    assert [line.partition("; ")[2].split()[0] for line in lines] == list("543210")


# --- rates, limits, environments -----------------------------------------------------------

SERVICE = replace(MATRIX, workloads=["service", "kv"], links=list(Link), runs=1)


def test_rates_are_calibrated_once_for_all_engines_and_sessions(bench: Bench) -> None:
    bench.session(SERVICE)
    assert len(bench.calibrated) == 1
    bench.session(replace(SERVICE, runs=2))
    assert len(bench.calibrated) == 1
    # Another size holds another rate.
    bench.session(replace(SERVICE, memory_mib=512))
    assert len(bench.calibrated) == 2
    assert bench.book.sessions[-1].rates == {"10.0/256": RATE, "10.0/512": RATE}
    # Another subject knows nothing of that.
    bench.qemu = QEMU._replace(version="10.0.3")
    bench.session(SERVICE)
    assert len(bench.calibrated) == 3
    assert bench.book.sessions[-1].rates == {"10.0/256": RATE}


def test_every_run_has_the_calibrated_rate(bench: Bench) -> None:
    bench.session(SERVICE)
    bench.session(replace(SERVICE, runs=2))
    assert len(bench.conditions) == 24
    for cell, conditions in zip(bench.played, bench.conditions, strict=True):
        words = (f"rate={RATE}",) if cell.workload == "service" else ()
        assert conditions.rate_words(cell) == words


def test_other_workloads_need_no_rate(bench: Bench) -> None:
    bench.session()
    assert bench.calibrated == []


def test_limits_are_measured_when_runs_are(bench: Bench) -> None:
    measured: list[Link] = []

    def measure(link: Link) -> Limits:
        measured.append(link)
        return LIMITS

    matrix = replace(MATRIX, links=list(Link))
    bench.session(matrix, limits=measure)
    assert measured == list(Link)
    assert bench.book.sessions[0].limits == dict.fromkeys(Link, LIMITS)
    bench.session(matrix, limits=measure)
    assert measured == list(Link)


def test_the_environment_is_of_the_label(bench: Bench) -> None:
    matrix = replace(MATRIX, engines=[Engine.QPOSTCOPY], labels=("plain", "slow"), runs=1)
    file = BookFile(bench.directory)
    of = BenchSession(
        file, matrix, bench.image, {"10.0": QEMU}, bench.told.append, {"slow": {"DELAY": "1"}}
    )
    of.run(None, portraits=False)
    assert [cell.label for cell in bench.played] == ["plain", "slow"]
    assert [conditions.environment for conditions in bench.conditions] == [{}, {"DELAY": "1"}]


# --- portraits -----------------------------------------------------------------------------

TWO_WORKLOADS = replace(MATRIX, workloads=["kv", "churn"])
FIRST = [cell for cell in TWO_WORKLOADS.cells if cell.workload == "kv"]


def test_portraits_are_of_the_first_workload_and_made_once(bench: Bench) -> None:
    bench.session(TWO_WORKLOADS, portraits=True)
    assert bench.painted == FIRST
    assert [portrait.cell for portrait in bench.book.portraits] == FIRST
    assert all(portrait.arrivals == ((12.5, 3, 100),) for portrait in bench.book.portraits)
    # Its runs count for nothing else.
    assert len(bench.book.runs) == 12
    bench.session(TWO_WORKLOADS, portraits=True)
    assert bench.painted == FIRST


def test_a_portrait_that_failed_is_remembered(bench: Bench) -> None:
    def fate(_number: int, usual: Run) -> Run:
        if usual.cell in bench.painted and usual.cell.engine is Engine.PRECOPY:
            return usual.model_copy(update={"outcome": Outcome.FAILED})
        return usual

    bench.fate = fate
    bench.session(portraits=True)
    bench.session(portraits=True)
    assert bench.painted == MATRIX.cells
    empty = [portrait.cell.engine for portrait in bench.book.portraits if not portrait.arrivals]
    assert empty == [Engine.PRECOPY]


def test_a_portrait_that_did_not_start_is_tried_again_next_time(bench: Bench) -> None:
    def fate(number: int, usual: Run) -> Run:
        if number == 6:
            raise VmError("no boot")
        return usual

    bench.fate = fate
    bench.session(portraits=True)
    assert bench.painted == MATRIX.cells
    assert len(bench.said("portrait: ")) == 4
    assert [portrait.cell for portrait in bench.book.portraits] == MATRIX.cells[1:]
    bench.session(portraits=True)
    assert bench.painted == [*MATRIX.cells, MATRIX.cells[0]]


def test_no_portraits_if_not_asked_for(bench: Bench) -> None:
    bench.session()
    assert bench.book.portraits == ()
