"""Medians, their intervals, and what is called noise."""

from __future__ import annotations

import random
from statistics import median

import pytest

from qpostcopy.bench.statistics import Summary, chance_apart, ratio_of, summarize


def test_five_values_span_from_the_least_to_the_greatest() -> None:
    assert summarize([5.0, 1.0, 3.0, 2.0, 4.0]) == Summary(3.0, 1.0, 5.0, 5)


@pytest.mark.parametrize(("count", "left_out"), [(1, 0), (7, 0), (8, 1), (10, 1), (11, 2), (20, 5)])
def test_more_values_leave_the_outermost_out(count: int, left_out: int) -> None:
    summary = summarize([float(i) for i in range(count)])
    assert (summary.low, summary.high) == (left_out, count - 1 - left_out)


@pytest.mark.parametrize("count", [5, 8, 13, 20])
def test_the_interval_holds_the_true_median_nine_times_of_ten(count: int) -> None:
    dice = random.Random(count)
    held = 0
    for _ in range(2000):
        summary = summarize([dice.expovariate(1.0) for _ in range(count)])
        held += summary.low <= 0.6931 <= summary.high
    assert held / 2000 > 0.88


def test_noise() -> None:
    assert Summary(10.0, 4.0, 15.0, 5).is_noise()
    assert not Summary(10.0, 6.0, 15.0, 5).is_noise()
    assert Summary(10.0, 9.0, 11.0, 5).is_noise(resolution=20.0)
    assert Summary(-30.0, -31.0, -29.0, 5).is_noise(resolution=0.0) is False
    # Wide, but not wider than what the instrument can see: a steady 0.0 is no noise.
    assert not Summary(0.0, 0.0, 0.0, 5).is_noise()


def test_agreement_is_overlap() -> None:
    assert Summary(2.0, 1.0, 3.0, 5).agrees(Summary(3.5, 3.0, 4.0, 5))
    assert not Summary(2.0, 1.0, 3.0, 5).agrees(Summary(4.0, 3.1, 5.0, 5))


def test_a_ratio_is_as_wide_as_its_parts_allow() -> None:
    ratio = ratio_of(Summary(2.0, 1.0, 3.0, 5), Summary(4.0, 2.0, 5.0, 5))
    assert ratio is not None
    assert (ratio.ratio, ratio.low, ratio.high) == (0.5, 0.2, 1.5)
    assert ratio.is_one


def test_no_ratio_to_nothing() -> None:
    assert ratio_of(Summary(1.0, 1.0, 1.0, 5), Summary(0.0, 0.0, 1.0, 5)) is None


def test_the_same_twice_is_one() -> None:
    dice = random.Random(4)
    ones = [summarize([dice.gauss(10, 1) for _ in range(5)]) for _ in range(200)]
    others = [summarize([dice.gauss(10, 1) for _ in range(5)]) for _ in range(200)]
    ratios = [ratio_of(one, other) for one, other in zip(ones, others, strict=True)]
    assert sum(ratio is not None and ratio.is_one for ratio in ratios) >= 195
    assert median(ratio.ratio for ratio in ratios if ratio) == pytest.approx(1.0, abs=0.05)


def test_five_and_five_values_are_seldom_apart() -> None:
    assert chance_apart(1, 1) == 1.0
    assert chance_apart(3, 3) == pytest.approx(2 / 20)
    assert chance_apart(5, 5) == pytest.approx(2 / 252)


@pytest.mark.parametrize(("one", "other"), [(3, 5), (5, 5), (8, 8), (11, 8), (14, 5)])
def test_intervals_of_the_same_are_apart_as_often_as_is_said(one: int, other: int) -> None:
    dice = random.Random(one)
    apart, tries = 0, 20_000
    for _ in range(tries):
        left = summarize([dice.random() for _ in range(one)])
        right = summarize([dice.random() for _ in range(other)])
        apart += not left.agrees(right)
    assert apart / tries == pytest.approx(chance_apart(one, other), rel=0.3, abs=0.002)
    assert chance_apart(one, other) == pytest.approx(chance_apart(other, one))
