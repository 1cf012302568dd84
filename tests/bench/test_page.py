"""The report as a page."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

from qpostcopy.bench.model import Book, Engine, Link, Run
from qpostcopy.bench.page import PAGE, cell_text, page_text, write_report
from qpostcopy.bench.sheet import report_of
from tests.bench.books import LIMITS, SESSION, book, cell, moved, run, runs
from tests.bench.test_plots import whole


def page(*of: Run) -> str:
    return page_text(report_of(book(of)), {})


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table, row by row."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, re.M)
    split = r"(?<!\\)\|"
    return [
        [[one.strip() for one in re.split(split, line)[1:-1]] for line in block.splitlines()]
        for block in blocks
    ]


def test_every_link_leads_to_a_picture_and_every_picture_is_linked(tmp_path: Path) -> None:
    written = write_report(whole(), tmp_path / "report")
    assert written == tmp_path / "report" / PAGE
    links = re.findall(r"^!\[.*\]\((.*)\)$", written.read_text(), re.M)
    assert len(links) == 3
    assert {(written.parent / link).resolve() for link in links} == set(
        written.parent.glob("plots/*")
    )


def test_a_report_can_be_written_again(tmp_path: Path) -> None:
    first = write_report(whole(), tmp_path).read_text()
    assert write_report(whole(), tmp_path).read_text() == first
    assert "kv" not in write_report(Book(), tmp_path).read_text()


def test_tables_are_whole() -> None:
    """As many cells in each row as in its head, whatever words were in them."""
    of = [run(cell(one, link=link), figures={"total_ms": 9}) for one in Engine for link in Link]
    of.append(run(cell(workload="a|b"), outcome="failed", reason="a | b\nnext *line*"))
    text = page(*of)
    assert len(tables(text)) == 1 + 3
    for table in tables(text):
        assert {len(row) for row in table} == {len(table[0])}
    assert r"failed 1 of 1: a \| b next \*line\*" in text
    assert r"## QEMU 10.0, a\|b, 1gbit, 512 MiB" in text


def test_the_cells_are_those_of_the_terminal() -> None:
    of = [
        *runs(cell(), "total_ms", [100.0] * 5, work_lost_ms=7.77, exposed_ms=50.0),
        *runs(cell(Engine.POSTCOPY), "total_ms", [300.0] * 5, work_lost_ms=900.0, exposed_ms=60.0),
        run(figures={"total_ms": 98765.0}, baseline=moved(10.0)),
    ]
    text = page(*of)
    _, main, more = tables(text)
    assert main[0] == ["engine", "runs", "total", "work lost"]
    assert main[2] == ["qpostcopy", "5<br>1 thrown out", "**100 ms**<br>100..100 ms", NOISE]
    assert main[3] == ["qpostcopy with precopy", "not in this version", "-", "-"]
    assert main[4][2:] == ["300 ms<br>300..300 ms", "900 ms<br>900..900 ms"]
    assert [row[2] for row in more[2:]] == ["**50 ms**<br>50..50 ms", "-", "60 ms<br>60..60 ms"]
    assert "\n- guest before the start, median operations/s: qpostcopy 1,000; qemu-" in text
    assert "7.77" not in text
    assert "98.8" not in text
    assert "- total: 3.00 times better than qemu-postcopy (3.00..3.00)\n" in text


NOISE = r"**noise**<br>\< 20 ms"


def test_the_limits_have_tables_of_their_own() -> None:
    session = SESSION.model_copy(update={"limits": dict.fromkeys(Link, LIMITS)})
    text = page_text(report_of(book([run()], sessions=[session])), {})
    _, *limits, _ = tables(text)
    assert [table[0] for table in limits] == [["at best", "median", "low", "high", "samples"]] * 2
    assert limits[0][2][:2] == ["bare socket", "3.00 GiB/s"]
    assert "## Limits of the machine: 1gbit\n" in text


def test_a_portrait_without_runs_has_its_place(tmp_path: Path) -> None:
    of = whole().model_copy(update={"runs": ()})
    text = write_report(of, tmp_path).read_text()
    assert text.count("## QEMU 10.0, kv, 1gbit, 512 MiB\n") == 1
    assert "![When RAM arrives" in text


def test_nothing_yet() -> None:
    assert page_text(report_of(Book()), {}) == "# Benchmark\n\nNo runs yet.\n"


def test_words_of_others_stay_words() -> None:
    assert cell_text("a\n b|`c`<br>") == r"a b\|\`c\`\<br\>"


def test_the_template_is_in_the_package() -> None:
    root = Path(__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["qpostcopy"]
    (template,) = (root / "qpostcopy" / "bench").glob("*.j2")
    assert any(fnmatch(f"bench/{template.name}", pattern) for pattern in patterns)
