"""The report in the terminal.

A cell is a median with its interval below it. A table that is too wide for the
terminal goes on below itself, as many columns at a time as fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qpostcopy.bench.limits_table import limits_table
from qpostcopy.bench.model import Book
from qpostcopy.bench.sheet import Entry, Grid, Report, Row, Sheet, report_of

#: Between two columns.
_GAP = 2


def print_report(book: Book, console: Console) -> None:
    """All tables of what the newest session measured."""
    report = report_of(book)
    parts = _parts(report, console.width) if report else [Text("no runs yet")]
    # Cut into lines here, whatever the console is used to: a table knows its width.
    console.print(Group(*parts), soft_wrap=False)


def _parts(report: Report, width: int) -> Iterator[RenderableType]:
    yield _head(report)
    yield ""
    for link, limits in report.limits.items():
        yield Text(f"limits of the machine, {link}", style="bold")
        yield limits_table(limits)
        yield ""
    for sheet in report.sheets:
        yield from _sheet_parts(sheet, width)


def _sheet_parts(sheet: Sheet, width: int) -> Iterator[RenderableType]:
    """One table, its verdict and its notes."""
    yield Text(str(sheet.place), style="bold")
    for table in tables_of(sheet.grid, width):
        yield table
        yield ""
    for verdict in sheet.verdicts:
        yield _indented(verdict)
    for note in (*sheet.own_cost, *sheet.notes):
        yield _indented(note, style="dim")
    yield ""


def tables_of(grid: Grid, width: int) -> list[Table]:
    """As many as it takes to stay within so many columns of characters."""
    engines = _width(["engine", *(row.engine for row in grid.rows)])
    used = engines + _width(["runs", *(line for row in grid.rows for line in row.runs)])
    groups: list[list[int]] = [[]]
    for index in range(len(grid.columns)):
        needed = _column_width(grid, index)
        if groups[-1] and used + needed > width:
            groups.append([])
            used = engines
        groups[-1].append(index)
        used += needed
    return [_table(grid, group, with_runs=group is groups[0]) for group in groups]


def _column_width(grid: Grid, index: int) -> int:
    entries = [row.entries[index] for row in grid.rows]
    return _width([grid.columns[index], *(text for one in entries for text in one[:2])])


def _width(texts: Iterable[str]) -> int:
    return max(len(text) for text in texts) + _GAP


def _table(grid: Grid, shown: Sequence[int], with_runs: bool) -> Table:
    # the box puts a column of its own between two
    table = Table(box=SIMPLE_HEAD, padding=(0, _GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("engine", no_wrap=True)
    if with_runs:
        table.add_column("runs", no_wrap=True)
    for index in shown:
        table.add_column(grid.columns[index], justify="right", no_wrap=True)
    for row in grid.rows:
        runs = [_runs(row)] if with_runs else []
        table.add_row(Text(row.engine), *runs, *(_cell(row.entries[i]) for i in shown))
    return table


def _runs(row: Row) -> Text:
    return Text("\n".join(row.runs))


def _cell(entry: Entry) -> Text:
    text = Text(entry.value, style="bold" if entry.is_best else "")
    if entry.span:
        text.append(f"\n{entry.span}", style="not bold dim")
    return text


def _indented(text: str, style: str = "") -> Padding:
    return Padding(Text(text, style=style), (0, 0, 0, _GAP), expand=False)


def _head(report: Report) -> Table:
    table = Table(box=None, show_header=False, padding=(0, _GAP, 0, 0), pad_edge=False)
    for what, which in report.head:
        table.add_row(Text(what, style="dim"), Text(which))
    return table
