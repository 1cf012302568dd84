"""Who is better, and when nobody is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qpostcopy.bench.compare import by_place, place_of, verdicts, winner
from qpostcopy.bench.figures import FIGURES, Figure
from qpostcopy.bench.judge import Judged, judge
from qpostcopy.bench.model import Cell, Engine, Run
from tests.bench.books import SUBJECT, book, cell, run, runs

BY_NAME = {figure.name: figure for figure in FIGURES}
TOTAL, LOST, P99 = (BY_NAME[name] for name in ("total_ms", "work_lost_ms", "fault_p99_us"))


def rows(*of: list[Run]) -> tuple[Judged, ...]:
    (found,) = by_place(
        judge(book([run for some in of for run in some]), SUBJECT).values()
    ).values()
    return found


def sample(engine: Engine, figure: Figure, values: list[float], **changed: str) -> list[Run]:
    return runs(cell(engine, **changed), figure.name, values)


def won(*of: list[Run], figure: Figure = TOTAL) -> Cell | None:
    found = winner(rows(*of), figure)
    return None if found is None else found.cell


OURS = [90.0, 95.0, 100.0, 105.0, 110.0]


def test_tables_are_by_place_and_rows_in_the_order_of_the_engines() -> None:
    cells = [
        cell(Engine.PREEMPT),
        cell(Engine.QPOSTCOPY, workload="churn"),
        cell(Engine.QPOSTCOPY),
        cell(Engine.QPOSTCOPY, label="b"),
    ]
    found = by_place(judge(book([run(one) for one in cells]), SUBJECT).values())
    assert {place: [row.cell for row in of] for place, of in found.items()} == {
        place_of(cell()): [cells[2], cells[3], cells[0]],
        place_of(cells[1]): [cells[1]],
    }
    assert str(place_of(cell())) == "QEMU 10.0, kv, 1gbit, 512 MiB"


def test_who_is_clear_of_all_others_wins() -> None:
    ours = sample(Engine.QPOSTCOPY, TOTAL, OURS)
    far = sample(Engine.POSTCOPY, TOTAL, [value + 100 for value in OURS])
    assert won(ours, far) == cell()
    near = sample(Engine.PREEMPT, TOTAL, [value + 20 for value in OURS])
    assert won(ours, far, near) is None
    assert won(ours) is None


@given(st.lists(st.floats(1.0, 1000.0), min_size=5, max_size=7), st.data())
def test_overlap_has_no_winner(values: list[float], data: st.DataObject) -> None:
    """Of up to seven values the interval is from the least to the greatest."""
    inside = data.draw(st.floats(min(values), max(values)))
    ours = sample(Engine.QPOSTCOPY, TOTAL, values)
    theirs = sample(Engine.POSTCOPY, TOTAL, [inside] * 5)
    assert won(ours, theirs) is None
    (verdict,) = verdicts(rows(ours, theirs), [TOTAL])
    assert verdict.better is None
    assert verdict.ratio is None


def test_a_single_run_wins_nothing() -> None:
    one = sample(Engine.QPOSTCOPY, TOTAL, [1.0])
    assert won(one, sample(Engine.POSTCOPY, TOTAL, OURS)) is None


def test_survivors_win_nothing() -> None:
    ours = [*sample(Engine.QPOSTCOPY, TOTAL, OURS), run(cell(), outcome="guest-died")]
    assert won(ours, sample(Engine.POSTCOPY, TOTAL, [500.0] * 5)) is None


def test_a_label_is_no_rival() -> None:
    ours = sample(Engine.QPOSTCOPY, TOTAL, OURS)
    again = sample(Engine.QPOSTCOPY, TOTAL, OURS, label="b")
    assert won(ours, again, sample(Engine.POSTCOPY, TOTAL, [500.0] * 5)) == cell()
    assert won(again, sample(Engine.POSTCOPY, TOTAL, [500.0] * 5)) is None


def test_below_the_resolution_all_are_alike() -> None:
    """20 ms is what `work lost` can see; 1 and 15 are the same, and both beat 400."""
    least = sample(Engine.QPOSTCOPY, LOST, [1.0] * 5)
    less = sample(Engine.POSTCOPY, LOST, [15.0] * 5)
    much = sample(Engine.PREEMPT, LOST, [400.0] * 5)
    assert won(least, less, figure=LOST) is None
    assert won(least, much, figure=LOST) == cell()
    (verdict,) = verdicts(rows(least, much), [LOST])
    assert (verdict.better, verdict.ratio) == (True, None)


def test_the_99th_of_few_faults_beats_nothing() -> None:
    few = runs(cell(), P99.name, [1.0] * 5, faults=10.0)
    many = runs(cell(Engine.POSTCOPY), P99.name, [900.0] * 5, faults=1000.0)
    assert won(few, many, figure=P99) is None


def test_the_verdict_is_against_the_best_of_qemu() -> None:
    ours = sample(Engine.QPOSTCOPY, TOTAL, [100.0] * 5)
    slow = sample(Engine.POSTCOPY, TOTAL, [400.0] * 5)
    fast = sample(Engine.PREEMPT, TOTAL, [40.0, 45.0, 50.0, 55.0, 60.0])
    (verdict,) = verdicts(rows(ours, slow, fast), [TOTAL])
    assert (verdict.better, verdict.other.cell.engine) == (False, Engine.PREEMPT)
    assert verdict.ratio == (2.0, 100 / 60, 2.5)
    (verdict,) = verdicts(rows(ours, slow), [TOTAL])
    assert (verdict.better, verdict.ratio) == (True, (4.0, 4.0, 4.0))


def test_no_verdict_on_what_one_side_lacks() -> None:
    assert verdicts(rows(sample(Engine.QPOSTCOPY, TOTAL, OURS)), [TOTAL]) == ()
    gave_up = [run(cell(Engine.PRECOPY), outcome="gave-up", figures={"total_ms": 1.0})]
    assert verdicts(rows(sample(Engine.QPOSTCOPY, TOTAL, OURS), gave_up), [TOTAL]) == ()
