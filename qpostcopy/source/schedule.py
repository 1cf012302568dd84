"""A profile and the RAM blocks of a VM, compiled to the order in which pages are pushed.

Interval arithmetic: the work grows with the number of steps and of the faults in
their traces, never with the number of pages. Guarantees: every page of every block
is in exactly one extent; the first step that names a page places it; what no step
names comes last, in address order; neighbours in the result that could be one
extent are one.

    steps   [range b..c] [range a..b+] [the rest]       offsets through all blocks
                 |            |            |
    extents  (0,b,c-b)   (0,a,b-a)   (0,0,a) (0,c,..) (1,0,..)

A trace's pages are merged into extents only where the guest asked for neighbours
one after the other: their order is what the step is for.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NamedTuple, Protocol

from qpostcopy.config.profile import PAGE_BYTES, Profile, RangeStep, Step, TraceStep
from qpostcopy.config.units import format_bytes
from qpostcopy.errors import UsageError
from qpostcopy.trace import PAGE_BITS, TraceError, read_trace


class ScheduleError(UsageError):
    """The profile names RAM that this VM does not have."""


class Block(Protocol):
    """What the schedule needs to know of a RAM block (core.RamBlock has it)."""

    @property
    def name(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...


class Extent(NamedTuple):
    """Pages of one block; `block` is its index, pages are 4 KiB and count from 0."""

    block: int
    first_page: int
    page_count: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """Extents, in order; `table` has them flat, three numbers each, for there may be millions."""

    table: array[int]

    def __len__(self) -> int:
        return len(self.table) // 3

    def __iter__(self) -> Iterator[Extent]:
        numbers = iter(self.table)
        return map(Extent, numbers, numbers, numbers)


def compile_schedule(profile: Profile, blocks: Sequence[Block]) -> Schedule:
    """The extents to push, in order.

    :param blocks: in order of guest physical address; sizes in whole pages.
    :raise ScheduleError: a step names a block that is not there, or begins
        beyond the end of RAM or of its block (an end beyond it is cut off), or
        names a trace that is not of this RAM, or is none.
    """
    ends = _block_ends(blocks)
    starts: list[int] = []
    stops: list[int] = []
    for pieces in pieces_by_step(profile, blocks):
        starts += pieces.starts
        stops += pieces.ends
    return Schedule(_table(_joined(starts, stops, set(ends)), ends))


def _table(pieces: Pieces, ends: Sequence[int]) -> array[int]:
    block_starts = [0, *ends]
    index = [bisect_right(ends, start) for start in pieces.starts]
    table = array("Q", bytes(3 * 8 * len(index)))
    table[0::3] = array("Q", index)
    pairs = zip(pieces.starts, index, strict=True)
    table[1::3] = array("Q", [start - block_starts[block] for start, block in pairs])
    pairs = zip(pieces.starts, pieces.ends, strict=True)
    table[2::3] = array("Q", [end - start for start, end in pairs])
    return table


def pieces_by_step(profile: Profile, blocks: Sequence[Block]) -> Iterator[Pieces]:
    """What each step pushes, in order, in pages counted through all RAM; last, what no step names.

    :raise ScheduleError: as `compile_schedule`.
    """
    ends = _block_ends(blocks)
    covered = _Covered(ends)
    for index, step in enumerate(profile.push):
        if isinstance(step, TraceStep):
            yield covered.take_pages(_traced_pages(step, index, profile, blocks, ends))
        else:
            yield covered.take(*_pages_of(step, f"push[{index}].range", profile, blocks, ends))
    yield covered.take(0, ends[-1] if ends else 0)


# --- steps -> pages of all RAM laid end to end ------------------------------------------------


def _block_ends(blocks: Sequence[Block]) -> list[int]:
    """The page, counted through all RAM, at which each block ends."""
    for block in blocks:
        if block.size_bytes <= 0 or block.size_bytes % PAGE_BYTES:
            size = f"{block.size_bytes} bytes"
            raise ScheduleError(f'RAM block "{block.name}" is {size}: expected whole 4KiB pages')
    return list(accumulate(pages_of(block) for block in blocks))


def _pages_of(
    step: Step, key: str, profile: Profile, blocks: Sequence[Block], ends: Sequence[int]
) -> tuple[int, int]:
    """(first page, end) of what the step names, counted through all RAM."""
    total = ends[-1] if ends else 0
    if not isinstance(step, RangeStep):
        return 0, total
    base, limit, place = 0, total, "RAM"
    if step.block is not None:
        index = _find_block(step.block, key, profile, blocks)
        limit = pages_of(blocks[index])
        base, place = ends[index] - limit, f'block "{step.block}"'
    first = step.start_offset // PAGE_BYTES
    if first >= limit:
        start, size = format_bytes(step.start_offset), format_bytes(limit * PAGE_BYTES)
        raise ScheduleError(
            f'profile "{profile.name}": {key}.start: {start} is beyond the end of {place}, {size};'
            f" this VM has {_describe(blocks)}",
            remedy="choose another profile, or take the step out of this one",
        )
    end = limit if step.end_offset is None else min(step.end_offset // PAGE_BYTES, limit)
    return base + first, base + end


def _traced_pages(
    step: TraceStep, index: int, profile: Profile, blocks: Sequence[Block], ends: Sequence[int]
) -> list[int]:
    """The pages of a trace, each where it is named first, counted through all RAM."""
    place = step.named_in or f'profile "{profile.name}": push[{index}].trace.file'
    try:
        trace = read_trace(step.file)
    except TraceError as cause:
        raise ScheduleError(f"{place}: {step.file}: {cause}", remedy=cause.remedy) from cause
    here = {block.name: block.size_bytes for block in blocks}
    if {block.name: block.size_bytes for block in trace.blocks} != here:
        raise ScheduleError(
            f"{place}: {step.file}: is a trace of another VM, with {_describe(trace.blocks)};"
            f" this VM has {_describe(blocks)}",
            remedy="migrate this VM once without the step: that leaves a trace of it; or take the"
            " step out",
        )
    starts = {block.name: end - pages_of(block) for block, end in zip(blocks, ends, strict=True)}
    base = [starts[block.name] for block in trace.blocks]
    in_block = (1 << PAGE_BITS) - 1
    named = (base[location >> PAGE_BITS] + (location & in_block) for location in trace.locations)
    return list(dict.fromkeys(named))


def pages_of(block: Block) -> int:
    return block.size_bytes // PAGE_BYTES


def _find_block(name: str, key: str, profile: Profile, blocks: Sequence[Block]) -> int:
    for index, block in enumerate(blocks):
        if block.name == name:
            return index
    raise ScheduleError(
        f'profile "{profile.name}": {key}.block: "{name}" is no RAM block of this VM,'
        f" which has {_describe(blocks)}",
        remedy="name one of these blocks, or leave `block` out to count through all of them",
    )


def _describe(blocks: Sequence[Block]) -> str:
    return ", ".join(f"{b.name} ({format_bytes(b.size_bytes)})" for b in blocks) or "no RAM blocks"


# --- intervals --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pieces:
    """Runs of pages in some order, each within one block: two lists, for there may be millions."""

    starts: list[int]
    ends: list[int]


def _joined(starts: Sequence[int], ends: Sequence[int], borders: Set[int]) -> Pieces:
    """The same pages in the same order; what continues its predecessor, but for a border, joined.

    Comprehensions throughout: they are what makes a million faults some seconds' work.
    """
    before, after = chain((-1,), ends), chain(starts[1:], (-1,))
    return Pieces(
        [
            start
            for start, end in zip(starts, before, strict=False)
            if start != end or start in borders
        ],
        [end for end, start in zip(ends, after, strict=False) if start != end or start in borders],
    )


class _Covered:
    """The pages that are in the schedule already: sorted intervals.

    :param ends: of the blocks; no piece that is returned goes beyond one.
    """

    def __init__(self, ends: Sequence[int]) -> None:
        self._borders = list(ends)
        self._starts: list[int] = []
        self._ends: list[int] = []

    def take(self, first: int, end: int) -> Pieces:
        """Cover [first, end); return the parts of it that were not covered before."""
        if first >= end:
            return Pieces([], [])
        low = bisect_left(self._ends, first)  # the first interval that touches, and
        high = bisect_right(self._starts, end)  # the one after the last
        before, after = [first, *self._ends[low:high]], [*self._starts[low:high], end]
        pieces = Pieces(
            [start for start, stop in zip(before, after, strict=True) if start < stop],
            [stop for start, stop in zip(before, after, strict=True) if start < stop],
        )
        self._cut(pieces)
        if low < high:
            first, end = min(first, self._starts[low]), max(end, self._ends[high - 1])
        self._starts[low:high] = [first]
        self._ends[low:high] = [end]
        return pieces

    def take_pages(self, pages: list[int]) -> Pieces:
        """The same for distinct pages, in their order."""
        if self._starts:
            pages = [page for page in pages if not self._has(page)]
        borders = set(self._borders)
        pieces = _joined(pages, [page + 1 for page in pages], borders)
        # Disjoint intervals: their ends are in the order of their starts.
        starts = sorted(self._starts + pieces.starts)
        covered = _joined(starts, sorted(self._ends + pieces.ends), borders)
        self._starts, self._ends = covered.starts, covered.ends
        return pieces

    def _has(self, page: int) -> bool:
        at = bisect_right(self._starts, page)
        return at > 0 and page < self._ends[at - 1]

    def _cut(self, pieces: Pieces) -> None:
        """At the borders; the pieces are sorted, so each border is in one of them at most."""
        for border in self._borders:
            at = bisect_left(pieces.starts, border)
            if at and border < pieces.ends[at - 1]:
                pieces.starts.insert(at, border)
                pieces.ends.insert(at - 1, border)
