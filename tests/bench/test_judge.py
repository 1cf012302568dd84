"""Which runs count."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qpostcopy.bench.figures import FIGURES
from qpostcopy.bench.judge import Judged, judge, subject_of
from qpostcopy.bench.model import Baseline, Book, Engine, Link, Run
from tests.bench.books import SESSION, SUBJECT, book, cell, moved, run, runs

BY_NAME = {figure.name: figure for figure in FIGURES}


def judged(of: list[Run]) -> Judged:
    (one,) = judge(book(of), SUBJECT).values()
    return one


def with_baselines(baselines: list[Baseline]) -> Judged:
    return judged([run(baseline=baseline) for baseline in baselines])


def test_a_guest_that_was_slower_before_the_start_is_thrown_out() -> None:
    one = with_baselines([moved(1000.0)] * 4 + [moved(790.0), moved(1210.0), moved(810.0)])
    assert [len(one.good), len(one.moved)] == [5, 2]
    assert {run.baseline for run in one.moved} == {moved(790.0), moved(1210.0)}


def test_a_fixed_rate_moves_by_its_cpu_time_alone() -> None:
    one = with_baselines([moved(1000.0)] * 4 + [moved(1000.0, cpu_speed=700.0)])
    assert [len(one.good), len(one.moved)] == [4, 1]


def test_the_usual_speed_is_that_of_the_session() -> None:
    later = SESSION.model_copy(update={"id": "20261124T101500"})
    slower = [run(baseline=moved(500.0), session=later.id) for _ in range(3)]
    both = book([*(run() for _ in range(3)), *slower], sessions=[SESSION, later])
    (one,) = judge(both, SUBJECT).values()
    assert [len(one.good), len(one.moved)] == [6, 0]


def test_the_usual_speed_is_that_of_the_engine() -> None:
    """Guest RAM is not of the same kind for all of them, so the guest is not equally fast."""
    quick = [run(cell(Engine.POSTCOPY)) for _ in range(5)]
    of = judge(book([*quick, *(run(baseline=moved(500.0)) for _ in range(3))]), SUBJECT)
    assert [len(found.moved) for found in of.values()] == [0, 0]


def test_the_usual_speed_is_that_of_all_links_together() -> None:
    usual = [run(cell(link=Link.LOOPBACK)) for _ in range(3)]
    of = judge(book([*usual, run(cell(link=Link.GIGABIT), baseline=moved(500.0))]), SUBJECT)
    assert {one.link: len(found.moved) for one, found in of.items()} == {
        Link.LOOPBACK: 0,
        Link.GIGABIT: 1,
    }


def test_what_is_thrown_out_is_in_no_figure() -> None:
    lucky = run(figures={"total_ms": 1.0}, baseline=moved(2000.0))
    one = judged([*runs(cell(), "total_ms", [100.0] * 3), lucky])
    summary = one.summary(BY_NAME["total_ms"])
    assert summary is not None
    assert (summary.low, summary.high, summary.values) == (100.0, 100.0, 3)
    assert one.counted == 3


def test_a_bad_end_counts_but_its_figures_do_not() -> None:
    one = judged([run(figures={"total_ms": 5.0}), run(outcome="gave-up", figures={"total_ms": 1})])
    assert (one.counted, len(one.bad)) == (2, 1)
    summary = one.summary(BY_NAME["total_ms"])
    assert summary is not None
    assert summary.values == 1


def test_a_run_without_a_baseline_is_kept_as_what_it_is() -> None:
    one = judged([run(), run(outcome="failed", baseline=None)])
    assert [len(one.good), len(one.bad), len(one.moved)] == [1, 1, 0]


def test_runs_of_another_subject_are_never_put_together() -> None:
    other = SESSION.model_copy(
        update={"id": "20261101T000000", "subject": SUBJECT.model_copy(update={"code": "0ther"})}
    )
    both = book([run(session=other.id), run()], sessions=[other, SESSION])
    assert subject_of(both) == SUBJECT
    assert sum(one.counted for one in judge(both, SUBJECT).values()) == 1
    assert subject_of(Book()) is None


def test_the_99th_of_few_faults_is_anecdote() -> None:
    p99 = BY_NAME["fault_p99_us"]
    for faults, noise in ((199.0, True), (200.0, False)):
        one = judged(runs(cell(), "fault_p99_us", [500.0] * 5, faults=faults))
        assert one.is_noise(p99) is one.is_anecdote(p99) is noise
        assert not one.is_anecdote(BY_NAME["fault_p50_us"])
    assert not judged([run(outcome="failed")]).is_noise(p99)


def test_lost_work_is_as_sharp_as_its_worst_baseline() -> None:
    of = [run(figures={"work_lost_ms": 40.0}, work_lost_resolution_ms=ms) for ms in (5.0, 45.0)]
    assert judged(of).is_noise(BY_NAME["work_lost_ms"])
    assert not judged(of[:1]).is_noise(BY_NAME["work_lost_ms"])


@given(
    st.lists(
        st.tuples(st.floats(1.0, 1e6), st.sampled_from(["good", "gave-up", "failed"])), min_size=1
    )
)
def test_no_run_is_lost_or_counted_twice(given_runs: list[tuple[float, str]]) -> None:
    of = [run(baseline=moved(speed), outcome=outcome) for speed, outcome in given_runs]
    one = judged(of)
    assert sorted(map(id, (*one.good, *one.bad, *one.moved))) == sorted(map(id, of))
    assert sum(one.outcomes.values()) == one.counted
