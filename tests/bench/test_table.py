"""What people read in the terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qpostcopy.bench.figures import FIGURES
from qpostcopy.bench.judge import judge
from qpostcopy.bench.model import Book, Engine, Link, Run
from qpostcopy.bench.sheet import NOT_YET, PRECOPY_ROW, Entry, Sheet, entry_of, report_of
from qpostcopy.bench.table import print_report, tables_of
from tests.bench.books import LIMITS, SESSION, SUBJECT, book, cell, moved, run, runs

BY_NAME = {figure.name: figure for figure in FIGURES}
ALL_FIGURES = dict.fromkeys(BY_NAME, 123456.0)


def printed(of: Book, width: int = 200, styled: bool = False) -> str:
    out = io.StringIO()
    console = Console(
        file=out, width=width, force_terminal=styled, no_color=not styled, soft_wrap=True
    )
    print_report(of, console)
    return out.getvalue()


def sheet(of: Sequence[Run]) -> Sheet:
    report = report_of(book(of))
    assert report is not None
    (found,) = report.sheets
    return found


def entry(values: list[float], name: str = "total_ms") -> Entry:
    (one,) = judge(book(runs(cell(), name, values)), SUBJECT).values()
    return entry_of(one, BY_NAME[name])


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("total_ms", [420.0, 400.0, 440.0], Entry("420 ms", "400..440 ms")),
        ("total_ms", [980.0, 960.0, 1020.0], Entry("980 ms", "960 ms..1.02 s")),
        ("total_ms", [980.0], Entry("980 ms")),
        ("wire_bytes", [float(3 << 20)] * 2, Entry("3.0 MiB", "3.0..3.0 MiB")),
        ("faults", [10.0, 12.0], Entry("11", "10..12")),
        ("work_lost_ms", [3.0, -8.0, 5.0], Entry("noise", "< 20 ms")),
        ("work_lost_ms", [3.0, -8.0, 45.0], Entry("noise", "< 45 ms")),
        ("total_ms", [100.0, 10.0, 150.0], Entry("noise", "10..150 ms")),
    ],
)
def test_a_cell(name: str, values: list[float], expected: Entry) -> None:
    assert entry(values, name) == expected


@given(
    st.sampled_from(FIGURES),
    st.lists(st.floats(-1e4, 1e7), min_size=1, max_size=12),
    st.floats(0.0, 1e3),
)
def test_noise_is_never_a_number(figure: object, values: list[float], faults: float) -> None:
    name = next(one.name for one in FIGURES if one is figure)
    of = runs(cell(), name, values, **({} if name == "faults" else {"faults": faults}))
    (one,) = judge(book(of), SUBJECT).values()
    shown = entry_of(one, BY_NAME[name])
    assert (shown.value == "noise") is one.is_noise(BY_NAME[name])


def test_the_median_of_noise_is_printed_nowhere() -> None:
    ours = runs(cell(), "work_lost_ms", [7.77, 7.77, 7.77, 7.77, 7.77], total_ms=50.0)
    theirs = runs(cell(Engine.POSTCOPY), "work_lost_ms", [900.0] * 5, total_ms=50.0)
    text = printed(book([*ours, *theirs]))
    assert "7.77" not in text
    assert "work lost: better, noise (< 20 ms) against 900 ms" in text


def test_thrown_out_is_counted_and_does_not_count() -> None:
    off = [run(figures={"total_ms": 98765.0}, baseline=moved(10.0)) for _ in range(2)]
    of = [*runs(cell(), "total_ms", [100.0] * 5), *off]
    ours, _ = sheet(of).grid.rows
    assert ours.runs == ("5", "2 thrown out")
    assert ours.entries[0].value == "100 ms"
    text = printed(book(of))
    assert "98.8 s" not in text
    assert "7, thrown out because the baseline had moved: 2" in text


def test_bad_ends_are_named() -> None:
    died = [run(outcome="guest-died", reason="no answer") for _ in range(3)]
    gave_up = [run(cell(Engine.PRECOPY), outcome="gave-up") for _ in range(5)]
    found = sheet([*runs(cell(), "total_ms", [100.0] * 2), *died, *gave_up])
    by_engine = {row.engine: row for row in found.grid.rows}
    assert by_engine["qpostcopy"].runs == ("2 of 5", "guest died 3 of 5")
    assert by_engine["qemu-precopy"].runs == ("gave up 5 of 5",)
    assert by_engine["qemu-precopy"].entries == (Entry("-"),)
    assert found.notes[1:] == (
        "qpostcopy: guest died 3 of 5, figures are of the others: no answer",
        "qemu-precopy: gave up 5 of 5",
        "fewer than 5 good runs, so the spread says less: qpostcopy 2",
    )


def test_a_row_waits_for_precopy() -> None:
    rows = sheet([run(cell(Engine.POSTCOPY)), run(cell())]).grid.rows
    assert [row.engine for row in rows] == ["qpostcopy", PRECOPY_ROW, "qemu-postcopy"]
    assert rows[1].runs == (NOT_YET,)


def test_overlap_has_no_winner_in_the_table() -> None:
    near = [*runs(cell(), "total_ms", [100.0, 120.0] * 3)]
    rival = runs(cell(Engine.POSTCOPY), "total_ms", [119.0, 140.0] * 3)
    assert not any(one.is_best for row in sheet([*near, *rival]).grid.rows for one in row.entries)
    assert "total: no difference within the spread" in printed(book([*near, *rival]))


def test_a_clear_winner_is_bold() -> None:
    ours = runs(cell(), "total_ms", [100.0] * 5)
    of = [*ours, *runs(cell(Engine.POSTCOPY), "total_ms", [333.0] * 5)]
    best = [row.engine for row in sheet(of).grid.rows if row.entries[0].is_best]
    assert best == ["qpostcopy"]
    text = printed(book(of), styled=True)
    assert re.search(r"\x1b\[1m *100 ms", text)
    assert not re.search(r"\x1b\[1m *333 ms", text)
    assert "total: 3.33 times better than qemu-postcopy (3.33..3.33)" in printed(book(of))


def test_the_worse_is_said_as_plainly() -> None:
    of = [
        *runs(cell(), "total_ms", [300.0] * 5),
        *runs(cell(Engine.PRECOPY), "total_ms", [200.0] * 5),
    ]
    assert "total: 1.50 times worse than qemu-precopy (1.50..1.50)" in printed(book(of))


def test_where_neither_is_better_both_are_shown() -> None:
    ours = runs(cell(), "total_ms", [100.0] * 5)
    near = runs(cell(Engine.POSTCOPY), "total_ms", [101.0] * 5)
    both = "100 ms (100..100 ms) against 101 ms (101..101 ms) of qemu-postcopy"
    assert sheet([*ours, *near]).verdicts == (f"total: equal within 2%, {both}",)
    assert not any(row.entries[0].is_best for row in sheet([*ours, *near]).grid.rows)
    corrupt = run(outcome="corrupt")
    assert sheet([*ours, corrupt, *near]).verdicts == (
        f"total: no verdict, runs of qpostcopy ended badly, {both}",
    )


def test_the_guest_of_each_engine_is_named() -> None:
    """Of the good runs, where there are any: the others' speeds belong to no figure."""
    private = [run(cell(Engine.POSTCOPY), baseline=moved(speed)) for speed in (119e3, 12e4, 125e3)]
    ours = [run(baseline=moved(11e4)), run(baseline=moved(99e3), outcome="corrupt")]
    gave_up = [run(cell(Engine.PRECOPY), baseline=moved(13e4), outcome="gave-up")]
    never_began = [run(cell(Engine.PREEMPT), baseline=None, outcome="failed")]
    of = [*private, *ours, *gave_up, *never_began]
    line = (
        "guest before the start, median operations/s: "
        "qpostcopy 110,000; qemu-precopy 130,000; qemu-postcopy 120,000"
    )
    assert sheet(of).notes[0] == line
    assert line in printed(book(of))
    assert sheet(never_began).notes == ("qemu-postcopy-preempt: failed 1 of 1",)


def test_a_speed_that_did_not_come_back_is_said() -> None:
    slow = runs(cell(), "work_lost_ms", [900.0] * 5)
    slow = [one.model_copy(update={"recovered": number > 1}) for number, one in enumerate(slow)]
    fine = runs(cell(Engine.POSTCOPY), "work_lost_ms", [900.0] * 5)
    died = run(cell(Engine.POSTCOPY), outcome="guest-died", recovered=False)
    said = [note for note in sheet([*slow, *fine, died]).notes if "speed" in note]
    assert said == [
        "qpostcopy: speed not back in 2 of 5 runs, so work lost is more than it says",
    ]


def test_a_column_that_nobody_has_is_left_out() -> None:
    assert sheet(runs(cell(), "total_ms", [1.0])).grid.columns == ("total",)


def test_our_own_cost_is_said() -> None:
    of = runs(cell(), "own_rss_bytes", [float(90 << 20)] * 5, own_cpu_seconds=0.5)
    assert sheet(of).own_cost == (
        "qpostcopy: our CPU 0.50 s (0.50..0.50 s), our memory 90.0 MiB (90.0..90.0 MiB)",
    )
    assert "qpostcopy: our CPU 0.50 s" in printed(book(of))


def test_the_head_says_what_was_measured() -> None:
    other = SESSION.model_copy(
        update={"id": "20261101T000000", "subject": SUBJECT.model_copy(update={"code": "0ther"})}
    )
    of = [*(run(session=other.id) for _ in range(3)), run(), run(steal=0.25)]
    report = report_of(book(of, sessions=[other, SESSION]))
    assert report is not None
    head = dict(report.head)
    assert head["machine"] == "Made-up CPU, 2 cores, 8.00 GiB, Linux 6.18"
    assert head["QEMU"] == "10.0: 10.0.2"
    assert head["sessions"] == "1: 20261123T101500"
    assert head["left out"] == "3 runs of other code, another guest, QEMU or machine"
    assert head["service"].endswith("by QEMU/MiB: 10.0/512: 1800")
    assert head["steal"] == "the machine's own host took up to 25% of CPU time in 1 of 2 runs"
    assert "0ther" not in printed(book(of, sessions=[other, SESSION]))


@pytest.mark.parametrize("width", [80, 100, 132, 250])
def test_it_fits_the_terminal(width: int) -> None:
    of = [run(cell(engine, link=link), figures=ALL_FIGURES) for engine in Engine for link in Link]
    of += [run(cell(Engine.PRECOPY), outcome="gave-up", reason="word " * 50 + "last")]
    text = printed(book(of), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    assert "last" in text
    for figure in FIGURES:
        assert not figure.in_table or figure.title in text


def test_a_narrow_table_goes_on_below() -> None:
    grid = sheet([run(figures=ALL_FIGURES)]).grid
    assert len(tables_of(grid, 80)) > len(tables_of(grid, 300)) == 1
    headings = [str(column.header) for one in tables_of(grid, 80) for column in one.columns]
    assert [name for name in headings if name not in ("engine", "runs")] == list(grid.columns)


def test_nothing_yet() -> None:
    assert printed(Book()) == "no runs yet\n"


def test_the_limits_are_those_of_the_newest_session_that_has_them() -> None:
    older = SESSION.model_copy(update={"limits": dict.fromkeys(Link, LIMITS)})
    faster = LIMITS.model_copy(update={"fault_spin": LIMITS.fault_poll, "size_bytes": 1 << 20})
    newer = SESSION.model_copy(update={"id": "20261125", "limits": {Link.LOOPBACK: faster}})
    last = SESSION.model_copy(update={"id": "20261126"})
    of = book([run()], sessions=[older, newer, last])
    report = report_of(of)
    assert report is not None
    assert report.limits == {Link.LOOPBACK: faster, Link.GIGABIT: LIMITS}
    text = printed(of)
    assert text.count("3.00 GiB/s") == 2
    assert [str(link) for link in Link if f"limits of the machine, {link}\n" in text] == [*Link]
    assert "limits" not in printed(book([run()]))
