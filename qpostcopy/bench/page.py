"""The report as a Markdown page with pictures, beside `bench.json`.

DIRECTORY/bench.md
          plots/*.png
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from qpostcopy.bench.compare import Place
from qpostcopy.bench.limits_table import LIMIT_COLUMNS, limit_rows
from qpostcopy.bench.model import Book
from qpostcopy.bench.plots import Plot, write_plots
from qpostcopy.bench.sheet import Entry, Report, report_of

PAGE = "bench.md"
PLOTS = "plots"


def write_report(book: Book, directory: Path) -> Path:
    """The page and its plots; what was there of an earlier report is replaced.

    :return: the page.
    :raise OSError: it cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    plots = write_plots(book, directory / PLOTS)
    page = directory / PAGE
    page.write_text(page_text(report_of(book), plots))
    return page


def page_text(report: Report | None, plots: Mapping[Place, Sequence[Plot]]) -> str:
    """In Markdown, as GitHub has it."""
    if report is None:
        return "# Benchmark\n\nNo runs yet.\n"
    in_sheets = {sheet.place for sheet in report.sheets}
    template = _environment().get_template("page.md.j2")
    text = template.render(
        report=report,
        limits={link: list(limit_rows(limits)) for link, limits in report.limits.items()},
        limit_columns=LIMIT_COLUMNS,
        plots=plots,
        alone=[place for place in plots if plots[place] and place not in in_sheets],
        folder=PLOTS,
    )
    return text.rstrip("\n") + "\n"


def _environment() -> Environment:
    """Markdown is no HTML: what must be escaped goes through `cell`."""
    environment = Environment(
        loader=PackageLoader("qpostcopy.bench", "."),
        undefined=StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": cell_text, "entry": entry_text}
    return environment


def cell_text(text: str) -> str:
    """On one line, and nothing in it that Markdown would take for its own."""
    plain = " ".join(text.split())
    for mark in "\\|`*_[]<>":
        plain = plain.replace(mark, f"\\{mark}")
    return plain


def entry_text(entry: Entry) -> str:
    value = f"**{cell_text(entry.value)}**" if entry.is_best else cell_text(entry.value)
    return f"{value}<br>{cell_text(entry.span)}" if entry.span else value
