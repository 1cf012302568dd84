"""Whether the benchmark may be believed: it is checked against what is known beforehand.

    same     one engine under two labels: each ratio is 1 within its spread
    slowed   a handler that is slower by so much on purpose (slow.py): by so much it shows
    agree    two runs of the whole benchmark, figure by figure

Pure: from the raw runs of books. An interval of five values misses now and then
though nothing differs (statistics.py: chance_apart), and there are many
figures; so as many may be apart as chance alone makes, if they are not far apart.
All that are apart are listed, whatever the verdict.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from math import exp
from typing import TYPE_CHECKING, NamedTuple

from qpostcopy.bench.figures import FIGURES, Figure
from qpostcopy.bench.judge import Judged, judge, subject_of
from qpostcopy.bench.model import Book, Cell
from qpostcopy.bench.statistics import Summary, chance_apart, ratio_of

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

#: With two, intervals of equals are apart in one case of three.
FEWEST_RUNS = 3
#: Farther apart than so many times the wider interval is not chance: 0.2% with three values.
_FAR = 2.0
#: How sure it is that chance makes no more misses than are allowed.
_SURE = 0.99
#: A difference that is farther off the delay is another one, whatever its interval.
_CLOSE_SHARE = 0.25
#: What must show the delay, and how wide a bucket is: a quantile is the upper end of its
#: bucket, an eighth of a power of two wide; in the mean of many faults that evens out.
_BUCKET_SHARES = {"fault_p50_us": 1 / 8, "fault_mean_us": 0.0}
#: Between the end of a sleep and the thread running again, where cores are few.
_WAKING_US = 100.0
#: Of the table, with the share of its width.
_COLUMNS = {"figure": 12, "one": 20, "other": 20, "found": 18, "holds": 10}


class Row(NamedTuple):
    """One comparison.

    :ivar cell: where; empty if the whole check is about one pair of cells.
    :ivar found: ratio or difference of the medians, with its interval.
    :ivar noise: one of the two is called noise: they may be equal for want of precision.
    :ivar far: they differ by more than chance explains.
    :ivar chance: how likely they are apart though nothing differs.
    """

    cell: str
    figure: str
    one: str
    other: str
    found: str
    holds: bool
    noise: bool = False
    far: bool = False
    chance: float = 0.0

    @property
    def verdict(self) -> str:
        if self.holds:
            return "yes"
        return "no, by far" if self.far else "no"


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check has found.

    :ivar problems: why nothing can be said, in words.
    """

    title: str
    rows: tuple[Row, ...]
    problems: tuple[str, ...] = ()

    @property
    def failing(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.holds)

    @property
    def by_chance(self) -> int:
        """How many rows may fail though nothing differs."""
        return _most_by_chance(sum(row.chance for row in self.rows))

    @property
    def holds(self) -> bool:
        if self.problems or all(row.noise for row in self.rows):
            return False
        failing = self.failing
        return not any(row.far for row in failing) and len(failing) <= self.by_chance

    @property
    def verdict(self) -> str:
        """One line."""
        lines = [f"{len(self.failing)} of {len(self.rows)} differ"]
        if self.by_chance:
            lines.append(f"chance alone makes up to {self.by_chance}")
        if all(row.noise for row in self.rows):
            lines.append("nothing but noise was compared")
        lines += self.problems
        return ("holds: " if self.holds else "DOES NOT HOLD: ") + "; ".join(lines)


def same(book: Book, cell_a: Cell, cell_b: Cell) -> Checked:
    """Whether two cells that differ in their label alone have the same figures."""
    one, other = (_judged(book, cell) for cell in (cell_a, cell_b))
    problems = (*_too_few(cell_a, one), *_too_few(cell_b, other))
    rows = tuple(_figure_rows("", one, other)) if one and other and not problems else ()
    return Checked(f"the same twice: {cell_a.title} and {cell_b.title}", rows, problems)


def slowed(book: Book, plain: Cell, slow: Cell, delay_us: int) -> Checked:
    """Whether a handler that answers later by `delay_us` shows up as just that.

    The difference of the medians must be the delay but for a quarter of it. And with the
    interval that theirs allow it must have the delay within it, after that was made wider by
    what the instrument does not tell: of a quantile a bucket of the slow handler's histogram
    either way, since it is known to a bucket only, and downwards by 0.1 ms, since a thread
    that has slept runs a little later than it wanted to. Of an interval that is wider than
    the difference itself (noise) nothing follows.
    """
    one, other = _judged(book, plain), _judged(book, slow)
    problems = (*_too_few(plain, one), *_too_few(slow, other))
    rows: tuple[Row, ...] = ()
    if one and other and not problems:
        figures = [figure for figure in FIGURES if figure.name in _BUCKET_SHARES]
        rows = tuple(_slowed_row(figure, one, other, delay_us) for figure in figures)
    return Checked(f"slower by {delay_us} us: {slow.title} and {plain.title}", rows, problems)


def agree(book_one: Book, book_two: Book) -> Checked:
    """Whether two runs of the benchmark, each its newest subject, say the same of every cell."""
    title = "two runs of the benchmark"
    one, other = subject_of(book_one), subject_of(book_two)
    if one is None or other is None:
        return Checked(title, (), ("there are no two runs",))
    if not one.is_like(other):
        return Checked(title, (), ("they measured different things (code, guest, QEMU, machine)",))
    firsts, seconds = judge(book_one, one), judge(book_two, other)
    problems = [f"{cell.title}: in one run only" for cell in firsts.keys() ^ seconds.keys()]
    rows: list[Row] = []
    for cell in (cell for cell in firsts if cell in seconds):
        first, second = firsts[cell], seconds[cell]
        rows.append(_outcome_row(first, second))
        if first.good and second.good:
            problems += [*_too_few(cell, first), *_too_few(cell, second)]
            rows += _figure_rows(cell.title, first, second)
    return Checked(title, tuple(rows), tuple(sorted(problems)))


def selfcheck_table(checked: Checked) -> Group:
    """For people, on a terminal: each cell under its title, the verdict in the last line."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(checked.title, style="bold")]
    for cell, rows in groupby(checked.rows, key=lambda row: row.cell):
        parts += [Text(cell)] if cell else []
        parts.append(_rows_table(rows))
    return Group(*parts, Text(checked.verdict))


def _rows_table(rows: Iterable[Row]) -> Table:
    """As wide as the terminal, and so of equal columns below every title."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, expand=True)
    for name, ratio in _COLUMNS.items():
        table.add_column(name, ratio=ratio)
    for row in rows:
        # An interval stands below its median, as in the report.
        shown = (text.replace(" (", "\n(") for text in (row.one, row.other, row.found))
        table.add_row(*(Text(text) for text in (row.figure, *shown, row.verdict)))
    return table


# --- judging --------------------------------------------------------------------------------


def _judged(book: Book, cell: Cell) -> Judged | None:
    subject = subject_of(book)
    return judge(book, subject).get(cell) if subject else None


def _too_few(cell: Cell, judged: Judged | None) -> list[str]:
    good = len(judged.good) if judged else 0
    if good >= FEWEST_RUNS:
        return []
    return [f"{cell.title}: {good} good runs, at least {FEWEST_RUNS} are needed"]


def _most_by_chance(expected: float) -> int:
    """So many rare events or fewer, all but certainly (Poisson)."""
    most, share = 0, exp(-expected)
    seen = share
    while seen < _SURE:
        most += 1
        share *= expected / most
        seen += share
    return most


def _outcome_row(one: Judged, other: Judged) -> Row:
    """Both runs have seen one outcome at least in common."""
    shared = bool(one.outcomes.keys() & other.outcomes.keys())
    left, right = _outcomes_text(one), _outcomes_text(other)
    return Row(one.cell.title, "outcome", left, right, "", shared, far=not shared)


def _figure_rows(cell: str, one: Judged, other: Judged) -> Iterator[Row]:
    """Of every figure that either has."""
    for figure in FIGURES:
        left, right = one.summary(figure), other.summary(figure)
        if left and right:
            noise = one.is_noise(figure) or other.is_noise(figure)
            resolution = max(one.resolution(figure), other.resolution(figure))
            yield _figure_row(cell, figure, (left, right), noise, resolution)
        elif left or right:
            one_text, other_text = _text(figure, left), _text(figure, right)
            yield Row(cell, figure.title, one_text, other_text, "one has none", False, far=True)


def _figure_row(
    cell: str, figure: Figure, both: tuple[Summary, Summary], noise: bool, resolution: float
) -> Row:
    """They are equal if their intervals overlap, which is the same as a ratio that may be 1, or
    if no more lies between them than the instrument can tell."""
    one, other = both
    gap = max(one.low - other.high, other.low - one.high)
    widest = max(one.high - one.low, other.high - other.low, resolution)
    return Row(
        cell,
        figure.title,
        _text(figure, one),
        _text(figure, other),
        "noise" if noise else _ratio_text(one, other),
        holds=gap <= resolution,
        noise=noise,
        far=gap > _FAR * widest,
        chance=chance_apart(one.values, other.values),
    )


def _slowed_row(figure: Figure, plain: Judged, slow: Judged, delay_us: int) -> Row:
    one, other = slow.summary(figure), plain.summary(figure)
    slow_text, plain_text = _text(figure, one), _text(figure, other)
    if one is None or other is None:
        return Row("", figure.title, slow_text, plain_text, "one has none", False)
    difference = Summary(
        one.median - other.median, one.low - other.high, one.high - other.low, one.values
    )
    noise = difference.is_noise()
    bucket_us = one.median * _BUCKET_SHARES[figure.name]
    holds = not noise and _shows(difference, delay_us, bucket_us)
    found = _text(figure, difference)
    return Row("", figure.title, slow_text, plain_text, found, holds, noise)


def _shows(difference: Summary, delay_us: int, bucket_us: float) -> bool:
    is_close = abs(difference.median - delay_us) <= _CLOSE_SHARE * delay_us
    lowest, highest = difference.low - bucket_us - _WAKING_US, difference.high + bucket_us
    return is_close and lowest <= delay_us <= highest


# --- words ----------------------------------------------------------------------------------


def _text(figure: Figure, summary: Summary | None) -> str:
    if summary is None:
        return "-"
    return f"{figure.text(summary.median)} ({figure.span_text(summary.low, summary.high)})"


def _outcomes_text(judged: Judged) -> str:
    return ", ".join(f"{outcome} {n} of {judged.counted}" for outcome, n in judged.outcomes.items())


def _ratio_text(one: Summary, other: Summary) -> str:
    ratio = ratio_of(one, other)
    return f"{ratio.ratio:.2f} ({ratio.low:.2f}..{ratio.high:.2f})" if ratio else "-"
