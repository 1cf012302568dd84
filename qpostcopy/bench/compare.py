"""Who is better, and by how much, where the spread allows to say so. Pure.

Rows that differ in a label only (the harness checking itself) are no rivals of anybody.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from math import inf
from typing import NamedTuple

from qpostcopy.bench.figures import Figure
from qpostcopy.bench.judge import Judged
from qpostcopy.bench.model import Cell, Engine, Link
from qpostcopy.bench.statistics import Ratio, Summary, ratio_of

#: Closer than this two medians are equal, however narrow their intervals are.
EQUAL_SHARE = 0.02
_ENGINES = tuple(Engine)


class Place(NamedTuple):
    """What is equal for all rows of one table."""

    qemu: str
    workload: str
    link: Link
    memory_mib: int

    def __str__(self) -> str:
        return f"QEMU {self.qemu}, {self.workload}, {self.link}, {self.memory_mib} MiB"


class Interval(NamedTuple):
    """Where the true median lies, as far as can be told."""

    low: float
    high: float

    def is_below(self, other: Interval) -> bool:
        return self.high < other.low


class Standing(StrEnum):
    """Where qpostcopy stands among the engines of QEMU."""

    BETTER = "better"
    WORSE = "worse"
    EQUAL = "equal"
    #: The spread does not tell.
    OPEN = "open"
    #: Runs of ours ended badly, so the others' figures are of its lucky runs only.
    BAD_ENDS = "bad ends"


class Verdict(NamedTuple):
    """qpostcopy against QEMU's engines, in one figure.

    :ivar other: the best of those that say so.
    :ivar ratio: of the worse to the better; None where one of them is noise, or neither is better.
    """

    figure: Figure
    ours: Judged
    other: Judged
    standing: Standing
    ratio: Ratio | None = None


def place_of(cell: Cell) -> Place:
    return Place(cell.qemu, cell.workload, cell.link, cell.memory_mib)


def by_place(judged: Iterable[Judged]) -> dict[Place, tuple[Judged, ...]]:
    """The rows of each table, in the order of the engines."""
    found: dict[Place, list[Judged]] = {}
    for one in judged:
        found.setdefault(place_of(one.cell), []).append(one)
    return {place: tuple(sorted(rows, key=_order)) for place, rows in found.items()}


def interval_of(judged: Judged, figure: Figure) -> Interval | None:
    """Anything, if there is one value only; below the resolution as wide as that; without an
    end, if a run was not watched to its own."""
    summary = judged.summary(figure)
    if summary is None:
        return None
    if summary.values < 2 or judged.is_anecdote(figure):
        return Interval(-inf, inf)
    high = summary.high if _is_whole(judged, figure) else inf
    resolution = judged.resolution(figure)
    if abs(summary.median) >= resolution:
        return Interval(summary.low, high)
    return Interval(min(summary.low, -resolution), max(high, resolution))


def _is_whole(judged: Judged, figure: Figure) -> bool:
    """A guest that was still slow when nobody looked any longer has lost more than was seen."""
    return figure.name != "work_lost_ms" or all(run.recovered for run in judged.good)


def winner(rows: Sequence[Judged], figure: Figure) -> Judged | None:
    """The best of a column, if that is beyond doubt.

    An engine that lost guests or gave up has figures of its lucky runs only: it wins nothing,
    and takes the place of no engine that did not.
    """
    ranked = _ranked(rows, figure)
    for one in ranked:
        others = _rivals([other for other in ranked if other is not one])
        if not one.bad and others and all(_is_below(one, other, figure) for other in others):
            return one
    return None


def verdicts(rows: Sequence[Judged], figures: Iterable[Figure]) -> tuple[Verdict, ...]:
    """One for each figure that both sides have."""
    found = []
    for figure in figures:
        ranked = _ranked(rows, figure)
        ours = [one for one in ranked if one.cell.engine is Engine.QPOSTCOPY]
        theirs = [one for one in ranked if one.cell.engine is not Engine.QPOSTCOPY]
        if ours and theirs:
            found.append(_verdict(figure, ours[0], _rivals(theirs)))
    return tuple(found)


def _verdict(figure: Figure, ours: Judged, theirs: Sequence[Judged]) -> Verdict:
    """Worse than any is worse; better is only what is better than all."""
    for other in theirs:
        if _is_below(other, ours, figure):
            return Verdict(figure, ours, other, Standing.WORSE, _ratio(ours, other, figure))
    if ours.bad:
        return Verdict(figure, ours, theirs[0], Standing.BAD_ENDS)
    for other in theirs:
        if not _is_below(ours, other, figure):
            # Not below either way though the intervals are apart: too near.
            is_equal = _is_apart(ours, other, figure) or _is_apart(other, ours, figure)
            return Verdict(figure, ours, other, Standing.EQUAL if is_equal else Standing.OPEN)
    return Verdict(figure, ours, theirs[0], Standing.BETTER, _ratio(theirs[0], ours, figure))


def _ratio(worse: Judged, better: Judged, figure: Figure) -> Ratio | None:
    if worse.is_noise(figure) or better.is_noise(figure):
        return None
    return ratio_of(_summary(worse, figure), _summary(better, figure))


def _ranked(rows: Iterable[Judged], figure: Figure) -> list[Judged]:
    """The rivals that have this figure, the least median first."""
    known = [row for row in rows if not row.cell.label and row.summary(figure) is not None]
    return sorted(known, key=lambda row: _summary(row, figure).median)


def _rivals(ranked: Sequence[Judged]) -> Sequence[Judged]:
    """Those of which every run counts, unless there is none."""
    return [one for one in ranked if not one.bad] or ranked


def _is_below(one: Judged, other: Judged, figure: Figure) -> bool:
    """Beyond the spread, and by more than is called equal."""
    low, high = _summary(one, figure).median, _summary(other, figure).median
    return _is_apart(one, other, figure) and high - low >= EQUAL_SHARE * abs(low)


def _is_apart(one: Judged, other: Judged, figure: Figure) -> bool:
    """Wholly below, as far as the spread tells."""
    low, high = interval_of(one, figure), interval_of(other, figure)
    return low is not None and high is not None and low.is_below(high)


def _summary(judged: Judged, figure: Figure) -> Summary:
    """Of a row that is known to have one."""
    summary = judged.summary(figure)
    assert summary is not None
    return summary


def _order(judged: Judged) -> tuple[int, str]:
    return _ENGINES.index(judged.cell.engine), judged.cell.label
