"""The checks of the benchmark, from made-up books: what is right passes, what is wrong does not."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping, Sequence

import pytest
from rich.console import Console

from qpostcopy.bench.model import (
    Book,
    Cell,
    Engine,
    Figures,
    Link,
    Machine,
    Outcome,
    Run,
    Session,
    Subject,
)
from qpostcopy.bench.selfcheck import Checked, Row, agree, same, selfcheck_table, slowed

SUBJECT = Subject(
    code="c", guest="g", machine=Machine(cpu="x", cores=2, memory_bytes=1, kernel="6"), qemus={}
)
DELAY_US = 1000
#: What a run of it has, each moved by a few per cent from run to run.
USUAL = {"total_ms": 900.0, "downtime_ms": 12.0, "fault_mean_us": 90.0, "wire_bytes": 5e8}
NOTHING: Mapping[str, float] = {}


def cell(label: str = "", engine: Engine = Engine.POSTCOPY) -> Cell:
    return Cell(engine=engine, qemu="10.0", workload="kv", link=Link.LOOPBACK,
                memory_mib=512, label=label)  # fmt: skip


def run_of(where: Cell, figures: Mapping[str, float], outcome: Outcome = Outcome.GOOD) -> Run:
    return Run(session="s", round=0, at="2026-01-01T00:00:00Z", cell=where, outcome=outcome,
               figures=Figures(**figures))  # fmt: skip


def book_of(*runs: Run, subject: Subject = SUBJECT) -> Book:
    return Book(sessions=(Session(id="s", subject=subject),), runs=runs)


def runs_of(
    where: Cell, dice: random.Random, count: int = 5, factors: Mapping[str, float] = NOTHING
) -> list[Run]:
    """Good runs. :param factors: by how much a figure is not the usual one."""

    def one() -> dict[str, float]:
        return {
            name: value * factors.get(name, 1.0) * dice.gauss(1.0, 0.05)
            for name, value in USUAL.items()
        }

    return [run_of(where, one()) for _ in range(count)]


def exact(where: Cell, name: str, values: Sequence[float]) -> list[Run]:
    return [run_of(where, {name: value}) for value in values]


def row(checked: Checked, figure: str) -> Row:
    (found,) = (row for row in checked.rows if row.figure == figure)
    return found


A, B = cell("a"), cell("b")


# --- the same twice -------------------------------------------------------------------------


def same_with(dice: random.Random, count: int, factors: Mapping[str, float] = NOTHING) -> Checked:
    runs = runs_of(A, dice, count) + runs_of(B, dice, count, factors)
    return same(book_of(*runs), A, B)


@pytest.mark.parametrize("count", [3, 5, 8])
def test_the_same_twice_holds(count: int) -> None:
    dice = random.Random(count)
    assert sum(same_with(dice, count).holds for _ in range(300)) >= 285


@pytest.mark.parametrize("name", USUAL)
def test_one_figure_that_is_another_does_not_hold(name: str) -> None:
    dice = random.Random(1)
    for _ in range(50):
        checked = same_with(dice, 5, {name: 3.0})
        assert not checked.holds, checked.verdict
        assert any(row.far for row in checked.failing)


def test_the_ratio_is_told_with_its_interval() -> None:
    ones = exact(A, "total_ms", [90, 95, 100, 105, 110])
    others = exact(B, "total_ms", [100, 100, 100, 100, 125])
    checked = same(book_of(*ones, *others), A, B)
    assert row(checked, "total").found == "1.00 (0.72..1.10)"
    assert [row.figure for row in checked.rows] == ["total"], "what nobody has is no row"
    assert checked.holds


def test_intervals_that_do_not_meet_are_listed() -> None:
    ones = exact(A, "total_ms", [90, 95, 100, 105, 110])
    others = exact(B, "total_ms", [111, 115, 120, 125, 130])
    checked = same(book_of(*ones, *others), A, B)
    assert [row.figure for row in checked.failing] == ["total"]
    assert not row(checked, "total").far
    assert not checked.holds, "chance makes no miss among so few"


def test_what_cannot_be_told_from_nothing_is_equal_and_says_nothing() -> None:
    ones = exact(A, "work_lost_ms", [1, 1, 2, 1, 2])
    others = exact(B, "work_lost_ms", [9, 9, 8, 9, 8])
    checked = same(book_of(*ones, *others), A, B)
    lost = row(checked, "work lost")
    assert (lost.holds, lost.noise, lost.found) == (True, True, "noise")
    assert not checked.holds, "nothing but noise proves nothing"


def test_noise_that_is_far_from_a_number_is_no_excuse() -> None:
    ones = exact(A, "work_lost_ms", [1, 1, 2, 1, 2])
    others = exact(B, "work_lost_ms", [500, 510, 505, 504, 503])
    assert row(same(book_of(*ones, *others), A, B), "work lost").far


def test_a_figure_that_one_side_lacks_does_not_hold() -> None:
    dice = random.Random(5)
    extra = exact(B, "late_ms", [30.0] * 5)
    checked = same(book_of(*runs_of(A, dice), *runs_of(B, dice), *extra), A, B)
    assert row(checked, "late").one == "-"
    assert not checked.holds


@pytest.mark.parametrize("count", [0, 2])
def test_too_few_runs_prove_nothing(count: int) -> None:
    runs = exact(A, "total_ms", [100] * 5) + exact(B, "total_ms", [100] * count)
    checked = same(book_of(*runs), A, B)
    assert not checked.holds
    assert f"{B.title}: {count} good runs" in checked.problems[0]
    assert not same(Book(), A, B).holds


# --- slowed ---------------------------------------------------------------------------------

PLAIN, SLOW = cell("", Engine.QPOSTCOPY), cell("slow", Engine.QPOSTCOPY)


def bucket_end(us: float) -> float:
    """As the core's histogram has it: eight buckets a power of two."""
    step = 2.0 ** (int(us).bit_length() - 4)
    return (us // step + 1) * step


def slowed_by(added_us: Sequence[float], plain_us: Sequence[float] = (70, 66, 72, 75, 68)) -> Book:
    """A book of a handler that takes so much longer, in each of its runs."""

    def run_at(where: Cell, us: float) -> Run:
        return run_of(where, {"fault_p50_us": bucket_end(us), "fault_mean_us": us})

    plain = [run_at(PLAIN, us) for us in plain_us]
    slow = [run_at(SLOW, us + more) for us, more in zip(plain_us, added_us, strict=True)]
    return book_of(*plain, *slow)


def test_a_millisecond_shows_as_a_millisecond() -> None:
    checked = slowed(slowed_by([1005, 1040, 1010, 1090, 1020]), PLAIN, SLOW, DELAY_US)
    assert [row.figure for row in checked.rows] == ["fault mean", "fault p50"]
    assert checked.holds, checked.rows


@pytest.mark.parametrize("added_us", [0, 500, 750, 1500, 2000])
def test_another_delay_does_not(added_us: float) -> None:
    checked = slowed(slowed_by([added_us] * 5), PLAIN, SLOW, DELAY_US)
    assert not checked.holds
    assert len(checked.failing) == 2


def test_what_was_seen_on_a_real_machine() -> None:
    plain = [(1152, 884), (960, 806), (1152, 935), (1152, 911), (1024, 816)]
    slow = [(2304, 1975), (2304, 2076), (2304, 2057), (2304, 2019), (2304, 2072)]
    runs = [
        run_of(where, {"fault_p50_us": p50_us, "fault_mean_us": mean_us})
        for where, of in ((PLAIN, plain), (SLOW, slow))
        for p50_us, mean_us in of
    ]
    checked = slowed(book_of(*runs), PLAIN, SLOW, DELAY_US)
    assert checked.holds, checked.rows
    assert row(checked, "fault p50").found == "1.15 ms (1.15..1.34 ms)"
    assert row(checked, "fault mean").found == "1.17 ms (1.04..1.27 ms)"


def test_a_wide_interval_excuses_no_other_delay() -> None:
    """1 ms lies within both intervals, and the medians are 1.3 ms apart."""
    book = slowed_by([1400, 1400, 1300, 1200, 1100], plain_us=(600, 700, 800, 900, 1000))
    checked = slowed(book, PLAIN, SLOW, DELAY_US)
    assert [row.figure for row in checked.failing] == ["fault mean", "fault p50"]
    assert not any(row.noise for row in checked.rows)


def test_a_bucket_is_no_excuse_for_a_mean() -> None:
    """0.2 ms too little all the time: within a bucket of 2 ms, so the median may have it."""
    checked = slowed(slowed_by([800] * 5, plain_us=[1200] * 5), PLAIN, SLOW, DELAY_US)
    assert [row.figure for row in checked.failing] == ["fault mean"]


def test_one_of_the_two_figures_is_not_enough() -> None:
    book = slowed_by([1010] * 5)
    runs = [
        run.model_copy(update={"figures": run.figures.model_copy(update={"fault_mean_us": 90.0})})
        for run in book.runs
    ]
    checked = slowed(book_of(*runs), PLAIN, SLOW, DELAY_US)
    assert [row.figure for row in checked.failing] == ["fault mean"]
    assert not checked.holds


def test_a_difference_of_any_size_is_none() -> None:
    """An interval that holds the delay because it holds everything."""
    checked = slowed(slowed_by([100, 300, 1000, 2500, 4000]), PLAIN, SLOW, DELAY_US)
    assert all(row.noise and not row.holds for row in checked.rows)
    assert not checked.holds


def test_faults_that_were_not_measured_do_not_hold() -> None:
    runs = exact(PLAIN, "total_ms", [1] * 5) + exact(SLOW, "total_ms", [1] * 5)
    assert not slowed(book_of(*runs), PLAIN, SLOW, DELAY_US).holds
    assert not slowed(Book(), PLAIN, SLOW, DELAY_US).holds


# --- two runs of it all ---------------------------------------------------------------------

CELLS = tuple(cell(engine=engine) for engine in Engine if engine is not Engine.MULTIFD)


def quick(dice: random.Random, count: int = 5, factors: Mapping[str, float] = NOTHING) -> Book:
    return book_of(*(run for where in CELLS for run in runs_of(where, dice, count, factors)))


@pytest.mark.parametrize("count", [3, 5])
def test_two_runs_of_the_same_agree(count: int) -> None:
    dice = random.Random(count)
    assert sum(agree(quick(dice, count), quick(dice, count)).holds for _ in range(100)) >= 95


def test_runs_on_a_machine_that_became_slower_do_not() -> None:
    dice = random.Random(6)
    checked = agree(quick(dice), quick(dice, 5, {"total_ms": 1.3, "downtime_ms": 1.3}))
    assert not checked.holds
    assert {row.figure for row in checked.failing} >= {"total", "downtime"}
    assert {row.cell.split(":")[0] for row in checked.failing} == {where.engine for where in CELLS}


def test_more_misses_than_chance_makes_do_not_hold() -> None:
    """Though none is far."""
    one = book_of(*(r for where in CELLS for r in exact(where, "total_ms", [90, 95, 100])))
    two = book_of(*(r for where in CELLS for r in exact(where, "total_ms", [101, 105, 110])))
    checked = agree(one, two)
    assert not any(row.far for row in checked.rows)
    assert 0 < checked.by_chance < len(checked.failing) == len(CELLS)
    assert not checked.holds


def test_a_miss_that_chance_makes_is_listed_and_allowed() -> None:
    (first, *rest) = CELLS
    one = [r for where in CELLS for r in exact(where, "total_ms", [90, 95, 100])]
    two = [r for where in rest for r in exact(where, "total_ms", [91, 95, 99])]
    two += exact(first, "total_ms", [101, 105, 110])
    checked = agree(book_of(*one), book_of(*two))
    assert [row.cell.split(":")[0] for row in checked.failing] == [first.engine]
    assert checked.holds


def test_other_outcomes_do_not_agree() -> None:
    (where, *_) = CELLS
    dice = random.Random(7)
    gave_up = [run_of(where, {}, Outcome.GAVE_UP)] * 5
    good = runs_of(where, dice)
    assert not agree(book_of(*gave_up), book_of(*good)).holds
    (outcome,) = agree(book_of(*gave_up), book_of(*good)).rows
    assert (outcome.one, outcome.other) == ("gave-up 5 of 5", "good 5 of 5")
    # What sometimes gives up may do so more or less often.
    mixed = agree(book_of(*gave_up[:2], *good), book_of(*gave_up[:3], *good))
    assert mixed.holds


def test_what_was_not_measured_in_both_is_a_problem() -> None:
    dice = random.Random(8)
    one = quick(dice)
    fewer = one.model_copy(update={"runs": tuple(r for r in one.runs if r.cell != CELLS[0])})
    assert f"{CELLS[0].title}: in one run only" in agree(one, fewer).problems
    assert not agree(one, fewer).holds
    assert not agree(Book(), one).holds
    other = one.model_copy(
        update={"sessions": (Session(id="s", subject=SUBJECT.model_copy(update={"code": "d"})),)}
    )
    assert agree(one, one).holds
    assert not agree(one, other).holds


# --- for people -----------------------------------------------------------------------------


def test_the_table_says_all_of_it() -> None:
    dice = random.Random(9)
    checked = agree(quick(dice), quick(dice, 5, {"wire_bytes": 2.0}))
    said = printed(checked)
    assert said.count("no, by far") == len(CELLS)
    assert said.count(checked.verdict) == 1
    assert said.splitlines()[-1] == checked.verdict
    assert checked.verdict.startswith("DOES NOT HOLD: 5 of 25 differ")
    assert all(where.engine in said for where in CELLS)


def printed(checked: Checked, width: int = 80) -> str:
    """As the command prints it."""
    out = io.StringIO()
    Console(file=out, width=width, soft_wrap=True, highlight=False).print(selfcheck_table(checked))
    return out.getvalue()


def test_a_narrow_terminal_has_a_line_for_each_cell() -> None:
    """And the same columns below each of them."""
    dice = random.Random(10)
    lines = printed(agree(quick(dice), quick(dice))).splitlines()
    titles = [number for number, line in enumerate(lines) if line in {c.title for c in CELLS}]
    assert [lines[number] for number in titles] == [where.title for where in CELLS]
    assert len({lines[number + 1].rstrip() for number in titles}) == 1
    for figure in ("outcome", "total", "downtime", "fault mean", "on the wire"):
        assert sum(line.startswith(f"{figure} ") for line in lines) == len(CELLS)
    assert max(len(line) for line in lines) <= 80


def test_what_is_about_one_pair_has_no_cell() -> None:
    checked = slowed(slowed_by([1005, 1040, 1010, 1090, 1020]), PLAIN, SLOW, DELAY_US)
    title, head, *rows, verdict = printed(checked).splitlines()
    assert (title, verdict) == (checked.title, checked.verdict)
    assert head.split() == ["figure", "one", "other", "found", "holds"]
    assert len(rows) == 4
