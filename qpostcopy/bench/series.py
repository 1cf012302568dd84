"""What the plots draw, as numbers: speed by time, shares of faults, arrivals on a grid. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import ceil, floor, inf
from statistics import median
from typing import NamedTuple

from qpostcopy.bench.model import Portrait, Run
from qpostcopy.bench.statistics import summarize

BIN_MS = 50.0
#: So much of the quiet time before the start is shown.
BEFORE_MS = 500.0
_PAGES_PER_MIB = 256


class Point(NamedTuple):
    """Guest speed in one bin, over several runs, as a share of each run's baseline."""

    at_ms: float
    median: float
    low: float
    high: float


class Share(NamedTuple):
    """So large a share of all faults took at most so long."""

    upper_us: float
    share: float


class Arrivals(NamedTuple):
    """When RAM arrived.

    :ivar shares: of each row (lowest addresses first) the share of its pages, by column of time.
    """

    column_ms: float
    shares: tuple[tuple[float, ...], ...]


def speed_curve(runs: Iterable[Run], end_ms: float = inf) -> list[Point]:
    """Bins that at least half of the runs have, so that the longest run does not speak alone."""
    by_bin: dict[int, list[float]] = defaultdict(list)
    known = [bins for run in runs if (bins := speed_bins(run))]
    for bins in known:
        for index, speed in bins.items():
            by_bin[index].append(speed)
    points = []
    for index, speeds in sorted(by_bin.items()):
        if 2 * len(speeds) >= len(known) and index * BIN_MS < end_ms:
            of = summarize(speeds)
            points.append(Point((index + 0.5) * BIN_MS, of.median, of.low, of.high))
    return points


def speed_bins(run: Run) -> dict[int, float]:
    """Bin -> speed as a share of the baseline; bin 0 begins with the command."""
    if run.baseline is None or not run.baseline.operations_per_second or len(run.speed) < 2:
        return {}
    full = run.baseline.operations_per_second * BIN_MS / 1000
    first = ceil(max(run.speed[0][0], -BEFORE_MS) / BIN_MS)
    last = floor(run.speed[-1][0] / BIN_MS)
    totals = [_operations_at(run.speed, index * BIN_MS) for index in range(first, last + 1)]
    return {
        first + index: (totals[index + 1] - totals[index]) / full
        for index in range(len(totals) - 1)
    }


def _operations_at(samples: Sequence[tuple[float, int]], at_ms: float) -> float:
    """Between two samples the guest is taken to have worked steadily."""
    index = bisect_left(samples, at_ms, key=lambda sample: sample[0])
    after_ms, after = samples[index]
    if after_ms == at_ms or index == 0:
        return after
    before_ms, before = samples[index - 1]
    return before + (after - before) * (at_ms - before_ms) / (after_ms - before_ms)


def fault_shares(runs: Iterable[Run]) -> list[Share]:
    """Of the faults of all runs together."""
    counts: dict[float, int] = defaultdict(int)
    for run in runs:
        for upper_us, count in run.histogram:
            counts[upper_us] += count
    total, seen = sum(counts.values()), 0
    shares = []
    for upper_us, count in sorted(counts.items()):
        seen += count
        if count:
            shares.append(Share(upper_us, seen / total))
    return shares


def arrivals_on(portrait: Portrait, rows: int, column_ms: float) -> Arrivals:
    """On a grid of at most so many rows; a column may be no shorter than the looks are apart."""
    rows = min(rows, portrait.parts)
    end_ms = max((at_ms for at_ms, _, _ in portrait.arrivals), default=0.0)
    columns = int(max(end_ms, 0.0) / column_ms) + 1
    pages = [[0] * columns for _ in range(rows)]
    for at_ms, part, count in portrait.arrivals:
        pages[part * rows // portrait.parts][int(max(at_ms, 0.0) / column_ms)] += count
    parts = [0] * rows
    for part in range(portrait.parts):
        parts[part * rows // portrait.parts] += 1
    part_pages = portrait.cell.memory_mib * _PAGES_PER_MIB / portrait.parts
    shares = (
        tuple(count / (of * part_pages) for count in row)
        for row, of in zip(pages, parts, strict=True)
    )
    return Arrivals(column_ms, tuple(shares))


def look_ms(portrait: Portrait) -> float:
    """How far apart the looks were; 0.0 of less than two."""
    looks = sorted({at_ms for at_ms, _, _ in portrait.arrivals})
    gaps = [later - earlier for earlier, later in pairwise(looks)]
    return median(gaps) if gaps else 0.0
