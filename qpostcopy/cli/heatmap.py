"""What a push order does to RAM, in numbers and as a picture; pure, tests need no terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qpostcopy.config import Profile, RangeStep, TraceStep
from qpostcopy.config.profile import PAGE_BYTES, step_name
from qpostcopy.config.units import format_bytes
from qpostcopy.source.schedule import Block, pages_of, pieces_by_step


@dataclass(frozen=True, slots=True)
class StepShare:
    """What one step pushes; the last is what no step names.

    :ivar extents: runs of neighbouring pages.
    :ivar cumulative: share of RAM that is pushed when this step is done.
    """

    step: str
    extents: int
    pages: int
    bytes: int
    share: float
    cumulative: float


@dataclass(frozen=True, slots=True)
class Picture:
    """When RAM arrives: of each cell, from the lowest address on, the mean of its pages.

    :ivar arrivals: 0.0 comes first, 1.0 last.
    """

    cell_bytes: int
    arrivals: tuple[float, ...]


def look_at(
    profile: Profile, blocks: Sequence[Block], cells: int
) -> tuple[list[StepShare], Picture]:
    """Each step's share, and the picture, of at most so many cells.

    :raise ScheduleError: the profile does not fit these blocks.
    """
    total = sum(pages_of(block) for block in blocks)
    names = [*(described(step) for step in profile.push), "(what no step names)"]
    canvas = _Canvas(total, cells)
    shares: list[StepShare] = []
    for name, pieces in zip(names, pieces_by_step(profile, blocks), strict=True):
        before = canvas.painted
        canvas.paint(zip(pieces.starts, pieces.ends, strict=True))
        pages = canvas.painted - before
        shares.append(
            StepShare(
                step=name,
                extents=len(pieces.starts),
                pages=pages,
                bytes=pages * PAGE_BYTES,
                share=pages / total,
                cumulative=canvas.painted / total,
            )
        )
    return shares, canvas.picture()


def described(step: object) -> str:
    """A step as its writer would know it again: `range 0..16MiB`."""
    if isinstance(step, TraceStep):
        return f"trace {step.file.name}"
    if isinstance(step, RangeStep):
        block = f"{step.block} " if step.block is not None else ""
        end = "" if step.end_offset is None else format_bytes(step.end_offset)
        return f"range {block}{format_bytes(step.start_offset)}..{end}"
    return step_name(step)


class _Canvas:
    """Cells that add up when their pages arrive. A piece costs what cells it touches."""

    def __init__(self, pages: int, cells: int) -> None:
        self._total = pages
        self._cell_pages = max(-(-pages // cells), 1)
        self._sums = [0] * -(-pages // self._cell_pages)
        self.painted = 0

    def paint(self, pieces: Iterable[tuple[int, int]]) -> None:
        """These pages arrive next, in this order."""
        cell_pages = self._cell_pages
        for start, end in pieces:
            while start < end:
                cell = start // cell_pages
                count = min(end, (cell + 1) * cell_pages) - start
                # positions painted, painted + 1, ... : their sum, twice, to stay whole
                self._sums[cell] += count * (2 * self.painted + count - 1)
                self.painted += count
                start += count

    def picture(self) -> Picture:
        last = max(self._total - 1, 1)
        arrivals = []
        for cell, doubled in enumerate(self._sums):
            count = min((cell + 1) * self._cell_pages, self._total) - cell * self._cell_pages
            arrivals.append(doubled / 2 / count / last)
        return Picture(self._cell_pages * PAGE_BYTES, tuple(arrivals))
