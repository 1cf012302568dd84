"""How `qpostcopy profile show` looks: a table of the steps, and RAM as a strip of heat.

On a terminal with colours a cell is a coloured space, red first and blue last; else
(no terminal, NO_COLOR, TERM=dumb) a character, dense first. Never wider than 80 columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from qpostcopy.cli.heatmap import Picture, StepShare
from qpostcopy.config import Profile
from qpostcopy.config.units import format_bytes
from qpostcopy.progress import human_bytes
from qpostcopy.source.schedule import Block

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

COLUMNS = 80
ROWS = 8
_LABEL_COLUMNS = 14
#: First to last: without colours, and the background of a cell in a palette of 256.
CHARACTERS = "@%#*+=-:. "
_COLOURS = (196, 202, 208, 214, 220, 148, 71, 31, 26, 19)


def cells_in_a_row(console: Console) -> int:
    return max(min(console.width, COLUMNS) - _LABEL_COLUMNS - 2, 8)


def make_console() -> Console:
    """Of stdout. Off a terminal it has 80 columns."""
    from rich.console import Console

    console = Console(highlight=False, emoji=False, markup=False)
    return console if console.is_terminal and console.width < COLUMNS else _of_80_columns()


def _of_80_columns() -> Console:
    from rich.console import Console

    return Console(width=COLUMNS, highlight=False, emoji=False, markup=False)


def show(
    console: Console,
    profile: Profile,
    blocks: Sequence[Block],
    shares: Sequence[StepShare],
    picture: Picture,
) -> None:
    """Print it all."""
    ram = sum(block.size_bytes for block in blocks)
    listed = ", ".join(f"{block.name} ({format_bytes(block.size_bytes)})" for block in blocks)
    fault = profile.fault
    console.print(f"{profile.name}: {human_bytes(ram)} of RAM: {listed}")
    console.print(
        f"a fault brings {format_bytes(fault.ahead_bytes)} ahead, "
        f"{format_bytes(fault.behind_bytes)} behind, then {fault.then}"
    )
    console.print()
    console.print(_table(shares))
    console.print()
    _print_picture(console, picture)


def _table(shares: Sequence[StepShare]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, expand=False)
    table.add_column("step", no_wrap=True, overflow="ellipsis")
    for name in ("extents", "pages", "bytes", "share", "so far"):
        table.add_column(name, justify="right", no_wrap=True)
    for index, row in enumerate(shares):
        table.add_row(
            f"{index + 1} {row.step}" if index + 1 < len(shares) else f"  {row.step}",
            str(row.extents),
            str(row.pages),
            human_bytes(row.bytes),
            f"{row.share:.1%}",
            f"{row.cumulative:.1%}",
        )
    return table


def _print_picture(console: Console, picture: Picture) -> None:
    from rich.text import Text

    coloured = console.is_terminal and not console.no_color and console.color_system is not None
    width = cells_in_a_row(console)
    console.print(f"when RAM arrives, {human_bytes(picture.cell_bytes)} a cell:")
    for first in range(0, len(picture.arrivals), width):
        label = human_bytes(first * picture.cell_bytes) if first else "0"
        row = Text(f"{label:>{_LABEL_COLUMNS - 2}}  ")
        _add_cells(row, picture.arrivals[first : first + width], coloured)
        if not coloured:
            row.append("|")  # the end of a row of cells that look like nothing
        console.print(row)
    scale = Text(" " * _LABEL_COLUMNS + "first ")
    last = len(CHARACTERS) - 1
    _add_cells(scale, [level / last for level in range(len(CHARACTERS))], coloured)
    scale.append(" last")
    console.print(scale)


def _add_cells(text: Text, arrivals: Sequence[float], coloured: bool) -> None:
    levels = (min(int(arrival * len(CHARACTERS)), len(CHARACTERS) - 1) for arrival in arrivals)
    for level, same in groupby(levels):
        count = sum(1 for _ in same)
        if coloured:
            text.append(" " * count, style=f"on color({_COLOURS[level]})")
        else:
            text.append(CHARACTERS[level] * count)
