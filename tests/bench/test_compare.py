"""Who is better, and when nobody is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qpostcopy.bench.compare import EQUAL_SHARE, Standing, by_place, place_of, verdicts, winner
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
    assert verdict.standing is Standing.OPEN
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
    assert (verdict.standing, verdict.ratio) == (Standing.BETTER, None)


def test_the_99th_of_few_faults_beats_nothing() -> None:
    few = runs(cell(), P99.name, [1.0] * 5, faults=10.0)
    many = runs(cell(Engine.POSTCOPY), P99.name, [900.0] * 5, faults=1000.0)
    assert won(few, many, figure=P99) is None


def test_the_verdict_is_against_the_best_of_qemu() -> None:
    ours = sample(Engine.QPOSTCOPY, TOTAL, [100.0] * 5)
    slow = sample(Engine.POSTCOPY, TOTAL, [400.0] * 5)
    fast = sample(Engine.PREEMPT, TOTAL, [40.0, 45.0, 50.0, 55.0, 60.0])
    (verdict,) = verdicts(rows(ours, slow, fast), [TOTAL])
    assert (verdict.standing, verdict.other.cell.engine) == (Standing.WORSE, Engine.PREEMPT)
    assert verdict.ratio == (2.0, 100 / 60, 2.5)
    (verdict,) = verdicts(rows(ours, slow), [TOTAL])
    assert (verdict.standing, verdict.ratio) == (Standing.BETTER, (4.0, 4.0, 4.0))


def test_no_verdict_on_what_one_side_lacks() -> None:
    assert verdicts(rows(sample(Engine.QPOSTCOPY, TOTAL, OURS)), [TOTAL]) == ()
    gave_up = [run(cell(Engine.PRECOPY), outcome="gave-up", figures={"total_ms": 1.0})]
    assert verdicts(rows(sample(Engine.QPOSTCOPY, TOTAL, OURS), gave_up), [TOTAL]) == ()


def standing(*of: list[Run]) -> tuple[Standing, Engine]:
    (verdict,) = verdicts(rows(*of), [TOTAL])
    return verdict.standing, verdict.other.cell.engine


def corrupt(engine: Engine, count: int) -> list[Run]:
    return [run(cell(engine), outcome="corrupt")] * count


def test_one_run_of_five_that_went_well_is_not_better() -> None:
    lucky = [*sample(Engine.QPOSTCOPY, TOTAL, OURS), *corrupt(Engine.QPOSTCOPY, 4)]
    slow = sample(Engine.POSTCOPY, TOTAL, [500.0] * 5)
    assert standing(lucky, slow) == (Standing.BAD_ENDS, Engine.POSTCOPY)
    near = sample(Engine.POSTCOPY, TOTAL, OURS)
    assert standing(lucky, near) == (Standing.BAD_ENDS, Engine.POSTCOPY)
    fast = sample(Engine.POSTCOPY, TOTAL, [50.0] * 5)
    assert standing(lucky, fast) == (Standing.WORSE, Engine.POSTCOPY), "lucky, and yet worse"


def test_luck_of_theirs_is_no_rival() -> None:
    """But where all have been lucky only, all are."""
    ours = sample(Engine.QPOSTCOPY, TOTAL, OURS)
    lucky = [*sample(Engine.PRECOPY, TOTAL, [10.0, 11.0]), *corrupt(Engine.PRECOPY, 4)]
    slow = sample(Engine.POSTCOPY, TOTAL, [500.0] * 5)
    assert standing(ours, lucky, slow) == (Standing.BETTER, Engine.POSTCOPY)
    assert won(ours, lucky, slow) == cell()
    all_lucky = [*slow, *corrupt(Engine.POSTCOPY, 1)]
    assert standing(ours, lucky, all_lucky) == (Standing.WORSE, Engine.PRECOPY)
    assert won(ours, lucky, all_lucky) is None
    assert standing(ours, all_lucky) == (Standing.BETTER, Engine.POSTCOPY)


def test_worse_than_any_is_worse() -> None:
    """Though the least median of theirs has a spread that says nothing."""
    ours = sample(Engine.QPOSTCOPY, TOTAL, [100.0] * 5)
    wide = sample(Engine.POSTCOPY, TOTAL, [10.0, 20.0, 30.0, 100.0, 200.0])
    less = sample(Engine.PREEMPT, TOTAL, [60.0] * 5)
    least = sample(Engine.HYBRID, TOTAL, [50.0] * 5)
    assert standing(ours, wide, less, least) == (Standing.WORSE, Engine.HYBRID)


def test_better_is_better_than_all() -> None:
    """Not only than the one of the least median."""
    ours = sample(Engine.QPOSTCOPY, TOTAL, OURS)
    least = sample(Engine.POSTCOPY, TOTAL, [200.0] * 5)
    wide = sample(Engine.PREEMPT, TOTAL, [100.0, 200.0, 300.0, 400.0, 500.0])
    assert standing(ours, least, wide) == (Standing.OPEN, Engine.PREEMPT)
    assert won(ours, least, wide) is None


def test_what_is_nearly_the_same_is_equal() -> None:
    ours = sample(Engine.QPOSTCOPY, TOTAL, [100.0] * 5)
    for near in (98.5, 101.5):
        theirs = sample(Engine.POSTCOPY, TOTAL, [near] * 5)
        assert standing(ours, theirs) == (Standing.EQUAL, Engine.POSTCOPY)
        assert won(ours, theirs) is None
    for other, expected in ((97.0, Standing.WORSE), (103.0, Standing.BETTER)):
        theirs = sample(Engine.POSTCOPY, TOTAL, [other] * 5)
        assert standing(ours, theirs) == (expected, Engine.POSTCOPY)
    assert EQUAL_SHARE == 0.02


def test_work_still_being_lost_is_never_better() -> None:
    """It may be worse than another's, but never better."""
    of = [*runs(cell(), LOST.name, [100.0] * 4), run(figures={LOST.name: 100.0}, recovered=False)]
    for other, expected in ((400.0, Standing.OPEN), (40.0, Standing.WORSE)):
        theirs = sample(Engine.POSTCOPY, LOST, [other] * 5)
        (verdict,) = verdicts(rows(of, theirs), [LOST])
        assert verdict.standing is expected
    assert won(of, sample(Engine.POSTCOPY, LOST, [400.0] * 5), figure=LOST) is None


_VALUES = st.lists(st.floats(90.0, 130.0), min_size=1, max_size=6)


@given(st.dictionaries(st.sampled_from(Engine), st.tuples(_VALUES, st.booleans()), min_size=2))
def test_bold_and_verdict_are_of_one_mind(of: dict[Engine, tuple[list[float], bool]]) -> None:
    found = [
        [*sample(engine, TOTAL, values), *corrupt(engine, is_lucky)]
        for engine, (values, is_lucky) in {Engine.QPOSTCOPY: ([100.0] * 5, False), **of}.items()
    ]
    standing_now, _ = standing(*found)
    bold = won(*found)
    assert (standing_now is Standing.BETTER) is (bold == cell())
    assert standing_now is not Standing.EQUAL or bold is None or bold.engine is not cell().engine
