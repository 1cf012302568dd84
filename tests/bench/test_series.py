"""The numbers behind the plots."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpostcopy.bench.model import Portrait, Run
from qpostcopy.bench.series import (
    BEFORE_MS,
    BIN_MS,
    arrivals_on,
    fault_shares,
    look_ms,
    speed_bins,
    speed_curve,
)
from tests.bench.books import BASELINE, SESSION, cell, moved, run

Sample = tuple[float, int]


def steady(start_ms: int, end_ms: int, per_ms: int = 1, step_ms: int = 10) -> tuple[Sample, ...]:
    """The baseline of books.py is 1000 a second: one a millisecond."""
    return tuple((float(ms), (ms - start_ms) * per_ms) for ms in range(start_ms, end_ms, step_ms))


def portrait(arrivals: list[tuple[float, int, int]], parts: int = 8) -> Portrait:
    return Portrait(
        session=SESSION.id,
        cell=cell(memory_mib=8),
        parts=parts,
        stopped_ms=1.0,
        resumed_ms=2.0,
        arrivals=tuple(arrivals),
    )


def test_full_speed_is_one() -> None:
    bins = speed_bins(run(speed=steady(-200, 1010)))
    assert list(bins) == list(range(-4, 20))
    assert set(bins.values()) == {1.0}


def test_speed_is_relative_to_the_runs_own_baseline() -> None:
    bins = speed_bins(run(speed=steady(0, 210), baseline=moved(2000.0)))
    assert set(bins.values()) == {0.5}


def test_the_quiet_time_is_shown_for_a_moment_only() -> None:
    assert min(speed_bins(run(speed=steady(-3000, 100)))) == -BEFORE_MS / BIN_MS


@pytest.mark.parametrize(
    "of",
    [
        run(),
        run(speed=((0.0, 1),)),
        run(speed=steady(0, 500), baseline=None),
        run(speed=steady(0, 500), baseline=moved(0.0)),
        run(speed=((1.0, 0), (2.0, 5))),
    ],
)
def test_no_speed(of: Run) -> None:
    assert speed_bins(of) == {}
    assert speed_curve([of]) == []


@given(
    st.lists(st.tuples(st.floats(0.1, 200.0), st.integers(0, 500)), min_size=2, max_size=60),
    st.floats(-1000.0, 500.0),
)
def test_no_work_is_lost_in_the_bins(steps: list[tuple[float, int]], start_ms: float) -> None:
    """All bins together are what the guest did between their outer edges."""
    at_ms, done, samples = start_ms, 0, []
    for gap_ms, work in steps:
        at_ms, done = at_ms + gap_ms, done + work
        samples.append((at_ms, done))
    bins = speed_bins(run(speed=tuple(samples)))
    assert list(bins) == list(range(min(bins, default=0), max(bins, default=-1) + 1))
    assert all(speed >= 0 for speed in bins.values())
    full = BASELINE.operations_per_second * BIN_MS / 1000
    assert sum(bins.values()) * full <= samples[-1][1] - samples[0][1] + 1e-6
    if all(ms % BIN_MS == 0 for ms, _ in (samples[0], samples[-1])):
        assert sum(bins.values()) * full == pytest.approx(samples[-1][1] - samples[0][1])


def test_a_curve_has_the_median_of_the_runs_and_ends_with_half_of_them() -> None:
    of = [run(speed=steady(0, end, per_ms)) for end, per_ms in ((1010, 1), (510, 2), (510, 3))]
    curve = speed_curve(of)
    assert {(point.median, point.low, point.high) for point in curve} == {(2.0, 1.0, 3.0)}
    assert [curve[0].at_ms, curve[-1].at_ms] == [25.0, 475.0]
    assert speed_curve(of, end_ms=100.0)[-1].at_ms == 75.0


def test_faults_of_all_runs_add_up() -> None:
    of = [run(histogram=((10.0, 1), (20.0, 0), (40.0, 1))), run(histogram=((40.0, 2),)), run()]
    assert fault_shares(of) == [(10.0, 0.25), (40.0, 1.0)]
    assert fault_shares([run()]) == []


def test_arrivals_on_a_grid() -> None:
    """8 MiB in 8 parts are 256 pages each; two parts make a row."""
    grid = arrivals_on(portrait([(0.0, 0, 256), (9.0, 1, 128), (25.0, 7, 512)]), 4, 10.0)
    assert grid.shares == ((0.75, 0.0, 0.0), (0.0,) * 3, (0.0,) * 3, (0.0, 0.0, 1.0))


@given(
    st.lists(st.tuples(st.floats(-5.0, 1e4), st.integers(0, 12), st.integers(1, 50)), max_size=40),
    st.integers(1, 40),
    st.floats(1.0, 500.0),
)
def test_no_page_is_lost_on_the_grid(
    arrivals: list[tuple[float, int, int]], rows: int, column_ms: float
) -> None:
    grid = arrivals_on(portrait(arrivals, parts=13), rows, column_ms)
    assert len(grid.shares) == min(rows, 13)
    parts = [0] * len(grid.shares)
    for part in range(13):
        parts[part * len(parts) // 13] += 1
    pages = sum(sum(row) * of * 8 * 256 / 13 for row, of in zip(grid.shares, parts, strict=True))
    assert pages == pytest.approx(sum(count for _, _, count in arrivals))


def test_looks() -> None:
    assert look_ms(portrait([(20.0, 1, 1), (0.0, 1, 1), (20.0, 2, 1), (41.0, 1, 1)])) == 20.5
    assert look_ms(portrait([])) == 0.0
