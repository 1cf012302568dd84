"""Arithmetic on counters; no I/O."""

from __future__ import annotations

from collections.abc import Sequence


def quantile_us(buckets: Sequence[tuple[float, int]], fraction: float) -> float:
    """The upper end of the bucket in which the quantile lies; 0.0 without samples.

    :param buckets: (upper end in us, count), ascending, as in `faults.histogram`.
    """
    wanted = fraction * sum(count for _, count in buckets)
    seen = 0
    for upper_us, count in buckets:
        seen += count
        if count and seen >= wanted:
            return upper_us
    return 0.0


def latency_summary(buckets: Sequence[tuple[float, int]], max_us: float) -> dict[str, float]:
    """p50_us, p90_us, p99_us and max_us of a histogram; no quantile exceeds the maximum."""
    quantiles = {
        name: min(quantile_us(buckets, fraction), max_us)
        for name, fraction in (("p50_us", 0.5), ("p90_us", 0.9), ("p99_us", 0.99))
    }
    return quantiles | {"max_us": max_us}
