"""Medians and how far to trust them. Pure; no assumption about distributions."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from statistics import median
from typing import NamedTuple

_CONFIDENCE = 0.9
#: A median whose interval is wider than itself says nothing about the first digit.
_NOISE_SPREAD = 1.0


class Summary(NamedTuple):
    """A median, and the interval in which the true one lies with 90% confidence or more.

    With five values the interval is from the least to the greatest (93.75%); with
    fewer than five there is none that good, and it is from the least to the greatest, too.
    """

    median: float
    low: float
    high: float
    values: int

    @property
    def spread(self) -> float:
        """The interval's width as a share of the median."""
        width = self.high - self.low
        if not width:
            return 0.0
        return width / abs(self.median) if self.median else float("inf")

    def is_noise(self, resolution: float = 0.0) -> bool:
        """Whether to say "noise" instead of a number.

        :param resolution: what the instrument cannot tell from nothing.
        """
        if self.values > 1 and self.spread > _NOISE_SPREAD and self.high - self.low > resolution:
            return True
        return abs(self.median) < resolution

    def agrees(self, other: Summary) -> bool:
        """Whether the intervals overlap."""
        return self.low <= other.high and other.low <= self.high


class Ratio(NamedTuple):
    """Of two medians, and the widest interval that their own intervals allow."""

    ratio: float
    low: float
    high: float

    @property
    def is_one(self) -> bool:
        """Whether the two may be equal."""
        return self.low <= 1.0 <= self.high


def summarize(values: Sequence[float]) -> Summary:
    """The median of at least one value, with its interval from order statistics.

    The k-th least and k-th greatest of n values enclose the true median with
    probability 1 - 2 * P(Binomial(n, 1/2) < k) (David and Nagaraja, Order Statistics, 7.1).
    """
    ordered = sorted(values)
    inward = _inward(len(ordered))
    return Summary(median(ordered), ordered[inward], ordered[-1 - inward], len(ordered))


def ratio_of(one: Summary, other: Summary) -> Ratio | None:
    """`one` over `other`; None where a value that is not positive makes a ratio meaningless."""
    if min(one.low, one.median, other.low, other.median) <= 0:
        return None
    return Ratio(one.median / other.median, one.low / other.high, one.high / other.low)


def chance_apart(one: int, other: int) -> float:
    """How likely the intervals of so many and so many values do not overlap though nothing differs.

    The j values of the other sample below an order statistic of the first one are distributed
    negative hypergeometrically (David and Nagaraja, Order Statistics, 2.1 and 11.4).
    """
    return _below(one, other) + _below(other, one)


def _below(one: int, other: int) -> float:
    """The chance that the first interval ends where the second has not begun yet."""
    left_out = _inward(one)
    ways = sum(
        comb(one - left_out - 1 + below, below) * comb(left_out + other - below, other - below)
        for below in range(_inward(other) + 1)
    )
    return ways / comb(one + other, other)


def _inward(count: int) -> int:
    """How many values at each end may be left out."""
    outside, inward = 2 * 0.5**count, 0
    while (following := outside + 2 * comb(count, inward + 1) * 0.5**count) <= 1 - _CONFIDENCE:
        outside, inward = following, inward + 1
    return inward
