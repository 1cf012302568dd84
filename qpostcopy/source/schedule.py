"""A profile and the RAM blocks of a VM, compiled to the order in which pages are pushed.

Pure interval arithmetic: the work grows with the number of steps, never with the
number of pages. Guarantees: every page of every block is in exactly one extent;
the first step that names a page places it; what no step names comes last, in
address order; neighbours in the result that could be one extent are one.

    steps   [range b..c] [range a..b+] [the rest]       offsets through all blocks
                 |            |            |
    extents  (0,b,c-b)   (0,a,b-a)   (0,0,a) (0,c,..) (1,0,..)
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

from qpostcopy.config.profile import PAGE_BYTES, Profile, RangeStep, Step
from qpostcopy.config.units import format_bytes
from qpostcopy.errors import UsageError


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


def compile_schedule(profile: Profile, blocks: Sequence[Block]) -> list[Extent]:
    """The extents to push, in order.

    :param blocks: in order of guest physical address; sizes in whole pages.
    :raise ScheduleError: a step names a block that is not there, or begins
        beyond the end of RAM or of its block. An end beyond it is cut off.
    """
    ends = _block_ends(blocks)
    total = ends[-1] if ends else 0
    covered = _Covered()
    result: list[Extent] = []
    for index, step in enumerate(profile.push):
        first, end = _pages_of(step, f"push[{index}].range", profile, blocks, ends)
        for piece in covered.take(first, end):
            _append(result, piece, ends)
    for piece in covered.take(0, total):
        _append(result, piece, ends)
    return result


# --- steps -> pages of all RAM laid end to end ------------------------------------------------


def _block_ends(blocks: Sequence[Block]) -> list[int]:
    """The page, counted through all RAM, at which each block ends."""
    for block in blocks:
        if block.size_bytes <= 0 or block.size_bytes % PAGE_BYTES:
            size = f"{block.size_bytes} bytes"
            raise ScheduleError(f'RAM block "{block.name}" is {size}: expected whole 4KiB pages')
    return list(accumulate(block.size_bytes // PAGE_BYTES for block in blocks))


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
        limit = blocks[index].size_bytes // PAGE_BYTES
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


class _Covered:
    """The pages that are in the schedule already: sorted intervals that never touch."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def take(self, first: int, end: int) -> list[tuple[int, int]]:
        """Cover [first, end); return the parts of it that were not covered before."""
        if first >= end:
            return []
        low = bisect_left(self._ends, first)  # the first interval that touches, and
        high = bisect_right(self._starts, end)  # the one after the last
        pieces: list[tuple[int, int]] = []
        cursor = first
        for start, stop in zip(self._starts[low:high], self._ends[low:high], strict=True):
            if cursor < start:
                pieces.append((cursor, start))
            cursor = stop
        if cursor < end:
            pieces.append((cursor, end))
        merged_start = min(first, self._starts[low]) if low < high else first
        merged_end = max(cursor, end)
        self._starts[low:high] = [merged_start]
        self._ends[low:high] = [merged_end]
        return pieces


def _append(result: list[Extent], piece: tuple[int, int], ends: Sequence[int]) -> None:
    for extent in _split(piece, ends):
        last = result[-1] if result else None
        if last and last.block == extent.block and _end(last) == extent.first_page:
            result[-1] = last._replace(page_count=last.page_count + extent.page_count)
        else:
            result.append(extent)


def _end(extent: Extent) -> int:
    return extent.first_page + extent.page_count


def _split(piece: tuple[int, int], ends: Sequence[int]) -> Iterator[Extent]:
    """Cut pages counted through all RAM at the borders of the blocks."""
    first, end = piece
    block = bisect_right(ends, first)
    while first < end:
        base = ends[block - 1] if block else 0
        stop = min(end, ends[block])
        yield Extent(block, first - base, stop - first)
        first, block = stop, block + 1
