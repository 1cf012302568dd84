"""A pytest plugin of scripts/test: the table of set-ups (tests/vm/test_setups.py), as it was run.

A row is a set-up, a column what was played in it; a cell is `ok`, `FAILED`,
`gone` (a Debian suite that the mirror no longer has), or `skipped` (the machine
lacks something).
"""

from __future__ import annotations

import pytest

from tests.suites import MAY_SKIP, reason_of

_FILE = "test_setups.py"
_WORDS = {"passed": "ok", "failed": "FAILED", "skipped": "skipped"}

_cells: dict[tuple[str, str], str] = {}


def cell_of(node_id: str) -> tuple[str, str] | None:
    """`…/test_setups.py::test_bytes[kvm]` is column `bytes` of row `kvm`."""
    file, _, test = node_id.partition("::")
    column, _, row = test.removesuffix("]").partition("[")
    if file.rpartition("/")[2] != _FILE or not row:
        return None
    return row, column.removeprefix("test_")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    cell = cell_of(report.nodeid)
    # A test is as good as the worst of its set-up, its call and its end.
    if cell is not None and _cells.get(cell, "ok") == "ok":
        gone = report.skipped and reason_of(report).startswith(MAY_SKIP)
        _cells[cell] = "gone" if gone else _WORDS[report.outcome]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _cells:
        return
    rows = list(dict.fromkeys(row for row, _ in _cells))
    columns = list(dict.fromkeys(column for _, column in _cells))
    widths = [max(map(len, rows)), *(max(len(column), len("skipped")) for column in columns)]
    lines = [["", *columns]]
    lines += [[row, *(_cells.get((row, column), "-") for column in columns)] for row in rows]
    terminalreporter.section("set-ups")
    for line in lines:
        padded = (word.ljust(width) for word, width in zip(line, widths, strict=True))
        terminalreporter.write_line("  ".join(padded).rstrip())
