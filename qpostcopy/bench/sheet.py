"""The report as words, before anybody draws it: the terminal (table.py) and the page
(page.py) show the same cells, verdicts and notes. Pure.

    Report: what was measured, how much of it
        -> Sheet for each (QEMU, workload, link, memory)
            -> Grid: a row an engine, a column a figure, an Entry each
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from qpostcopy.bench.compare import (
    EQUAL_SHARE,
    Place,
    Standing,
    Verdict,
    by_place,
    verdicts,
    winner,
)
from qpostcopy.bench.figures import FIGURES, Figure
from qpostcopy.bench.judge import Judged, judge, sessions_of, subject_of
from qpostcopy.bench.limits import Limits
from qpostcopy.bench.model import Book, Engine, Link, Outcome, Run, Session, Subject
from qpostcopy.bench.statistics import Summary
from qpostcopy.progress import human_bytes

#: With fewer the interval holds the true median less than nine times of ten.
ENOUGH_RUNS = 5
#: A host that took more than this from the machine is worth a word.
_STEAL_SHARE = 0.02
_HASH_DIGITS = 12
_MAX_REASONS = 3

BAD_WORDS = {
    Outcome.GAVE_UP: "gave up",
    Outcome.GUEST_DIED: "guest died",
    Outcome.CORRUPT: "corrupt memory",
    Outcome.FAILED: "failed",
}
_STANDINGS = {
    Standing.BETTER: "better",
    Standing.WORSE: "worse",
    Standing.EQUAL: f"equal within {EQUAL_SHARE:.0%}",
    Standing.OPEN: "no difference within the spread",
    Standing.BAD_ENDS: "no verdict, runs of qpostcopy ended badly",
}
PRECOPY_ROW = "qpostcopy with precopy"
NOT_YET = "not in this version"


class Entry(NamedTuple):
    """A figure of an engine.

    :ivar value: median with unit, or `noise`, or `-`.
    :ivar span: its interval, or of noise the bound; may be empty.
    """

    value: str
    span: str = ""
    is_best: bool = False


NOTHING = Entry("-")


class Row(NamedTuple):
    """An engine.

    :ivar runs: how many were good, and what became of the others.
    """

    engine: str
    runs: tuple[str, ...]
    entries: tuple[Entry, ...]


class Grid(NamedTuple):
    """Columns that at least one engine has."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Sheet:
    """One table.

    :ivar more: the figures that only the page has room for.
    :ivar own_cost: what the page has in `more`, for where there is no room.
    """

    place: Place
    grid: Grid
    more: Grid
    verdicts: tuple[str, ...]
    own_cost: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """All of it.

    :ivar head: (what, which): what was measured, where, and how much of it counts.
    """

    head: tuple[tuple[str, str], ...]
    limits: dict[Link, Limits]
    sheets: tuple[Sheet, ...]


def report_of(book: Book) -> Report | None:
    """Of what the newest session measured; None of an empty book."""
    subject = subject_of(book)
    if subject is None:
        return None
    judged = judge(book, subject)
    sheets = tuple(sheet_of(place, rows) for place, rows in by_place(judged.values()).items())
    sessions = sessions_of(book, subject)
    head = (*_measured(subject), *_counted(book, sessions, judged.values()))
    return Report(head, limits_of(sessions), sheets)


def limits_of(sessions: Iterable[Session]) -> dict[Link, Limits]:
    """By link, the newest there are."""
    found: dict[Link, Limits] = {}
    for session in sessions:
        found.update(session.limits)
    return found


def sheet_of(place: Place, rows: Sequence[Judged]) -> Sheet:
    main = [figure for figure in FIGURES if figure.in_table]
    rest = [figure for figure in FIGURES if not figure.in_table]
    return Sheet(
        place,
        grid=_grid(rows, main),
        more=_grid(rows, rest),
        verdicts=tuple(verdict_text(verdict) for verdict in verdicts(rows, main)),
        own_cost=tuple(_own_cost(rows)),
        notes=(*_baselines(rows), *_ends(rows), *_unrecovered(rows), *_few(rows)),
    )


# --- what was measured ------------------------------------------------------------------------


def _measured(subject: Subject) -> Iterable[tuple[str, str]]:
    machine = subject.machine
    memory = human_bytes(machine.memory_bytes)
    yield "machine", f"{machine.cpu}, {machine.cores} cores, {memory}, Linux {machine.kernel}"
    yield "code", f"{subject.code[:_HASH_DIGITS]}, guest {subject.guest[:_HASH_DIGITS]}"
    yield "QEMU", "; ".join(f"{name}: {version}" for name, version in subject.qemus.items())


def _counted(
    book: Book, sessions: Sequence[Session], judged: Iterable[Judged]
) -> Iterable[tuple[str, str]]:
    """How much there is of it, and what does not count."""
    ids = {session.id for session in sessions}
    runs = [run for run in book.runs if run.session in ids]
    moved = sum(len(one.moved) for one in judged)
    yield "sessions", f"{len(sessions)}: {', '.join(session.id for session in sessions)}"
    yield "runs", f"{len(runs)}, thrown out because the baseline had moved: {moved}"
    if others := len(book.runs) - len(runs):
        yield "left out", f"{others} runs of other code, another guest, QEMU or machine"
    yield from _rates(sessions)
    yield from _steal(runs)


def _rates(sessions: Iterable[Session]) -> Iterable[tuple[str, str]]:
    """A rate is calibrated once and holds on, so later sessions rarely add one."""
    known: dict[str, list[str]] = {}
    for session in sessions:
        for key, rate in session.rates.items():
            if str(rate) not in known.setdefault(key, []):
                known[key].append(str(rate))
    if known:
        listed = "; ".join(f"{key}: {', '.join(rates)}" for key, rates in known.items())
        yield "service", f"requests a second, by QEMU/MiB: {listed}"


def _steal(runs: Sequence[Run]) -> Iterable[tuple[str, str]]:
    robbed = [run.steal for run in runs if run.steal > _STEAL_SHARE]
    if robbed:
        took = f"up to {max(robbed):.0%} of CPU time"
        yield "steal", f"the machine's own host took {took} in {len(robbed)} of {len(runs)} runs"


# --- a table ----------------------------------------------------------------------------------


def _grid(rows: Sequence[Judged], figures: Iterable[Figure]) -> Grid:
    known = [figure for figure in figures if any(row.summary(figure) for row in rows)]
    best = [winner(rows, figure) for figure in known]
    listed = [
        Row(
            engine_text(row),
            _runs_text(row),
            tuple(
                entry_of(row, figure)._replace(is_best=row is first)
                for figure, first in zip(known, best, strict=True)
            ),
        )
        for row in rows
    ]
    place = sum(row.cell.engine is Engine.QPOSTCOPY for row in rows)
    listed.insert(place, Row(PRECOPY_ROW, (NOT_YET,), (NOTHING,) * len(known)))
    return Grid(tuple(figure.title for figure in known), tuple(listed))


def engine_text(judged: Judged) -> str:
    label = judged.cell.label
    return f"{judged.cell.engine} [{label}]" if label else str(judged.cell.engine)


def _runs_text(judged: Judged) -> tuple[str, ...]:
    lines = [_of(len(judged.good), judged.counted)] if judged.good or not judged.bad else []
    lines += _bad_texts(judged)
    if judged.moved:
        lines.append(f"{len(judged.moved)} thrown out")
    return tuple(lines)


def _bad_texts(judged: Judged) -> list[str]:
    outcomes = judged.outcomes
    return [
        f"{words} {outcomes[outcome]} of {judged.counted}"
        for outcome, words in BAD_WORDS.items()
        if outcomes[outcome]
    ]


def _of(count: int, total: int) -> str:
    return str(count) if count == total else f"{count} of {total}"


def entry_of(judged: Judged, figure: Figure) -> Entry:
    """A figure as it may be shown: never a number for what is noise."""
    summary = judged.summary(figure)
    if summary is None:
        return NOTHING
    if judged.is_noise(figure):
        return Entry("noise", _noise_span(judged, figure, summary))
    return Entry(figure.text(summary.median), _span(figure, summary))


def _noise_span(judged: Judged, figure: Figure, summary: Summary) -> str:
    resolution = judged.resolution(figure)
    if abs(summary.median) >= resolution:
        return _span(figure, summary)
    return f"< {figure.text(max(resolution, summary.high, -summary.low))}"


def _span(figure: Figure, summary: Summary) -> str:
    """Of a single value there is none."""
    return figure.span_text(summary.low, summary.high) if summary.values > 1 else ""


# --- in words ---------------------------------------------------------------------------------


def verdict_text(verdict: Verdict) -> str:
    """`total: 1.40 times better than qemu-postcopy (1.20..1.61)`."""
    title, word = verdict.figure.title, _STANDINGS[verdict.standing]
    if verdict.ratio is None:
        return f"{title}: {word}, {_against(verdict)}"
    ratio, low, high = (_times(value) for value in verdict.ratio)
    return f"{title}: {ratio} times {word} than {engine_text(verdict.other)} ({low}..{high})"


def _against(verdict: Verdict) -> str:
    """Both sides as they are: there is no ratio to give."""
    ours, other = (
        _inline(entry_of(judged, verdict.figure)) for judged in (verdict.ours, verdict.other)
    )
    return f"{ours} against {other} of {engine_text(verdict.other)}"


def _inline(entry: Entry) -> str:
    return f"{entry.value} ({entry.span})" if entry.span else entry.value


def _times(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _own_cost(rows: Iterable[Judged]) -> Iterable[str]:
    """What our processes take, which has no column of its own."""
    figures = [figure for figure in FIGURES if figure.name in ("own_cpu_seconds", "own_rss_bytes")]
    for row in rows:
        known = [figure for figure in figures if row.summary(figure)]
        if known:
            said = ", ".join(f"{one.title} {_inline(entry_of(row, one))}" for one in known)
            yield f"{engine_text(row)}: {said}"


def _baselines(rows: Iterable[Judged]) -> Iterable[str]:
    """No other figure shows it: each engine is held against the speed of its own guest, and
    guests are not equally fast on every kind of RAM."""
    known = [f"{engine_text(row)} {speed:,.0f}" for row in rows if (speed := _baseline(row))]
    if known:
        yield f"guest before the start, median operations/s: {'; '.join(known)}"


def _baseline(row: Judged) -> float | None:
    """Of the runs whose figures are shown; where there are none, of the others."""
    runs = row.good or row.bad
    speeds = [run.baseline.operations_per_second for run in runs if run.baseline]
    return median(speeds) if speeds else None


def _unrecovered(rows: Iterable[Judged]) -> Iterable[str]:
    for row in rows:
        if slow := sum(not run.recovered for run in row.good):
            runs = f"{slow} of {len(row.good)} runs"
            yield f"{engine_text(row)}: speed not back in {runs}, so work lost is more than it says"


def _ends(rows: Iterable[Judged]) -> Iterable[str]:
    """Why runs ended badly."""
    for row in rows:
        if row.bad:
            reasons = list(dict.fromkeys(run.reason for run in row.bad if run.reason))
            more = f": {'; '.join(reasons[:_MAX_REASONS])}" if reasons else ""
            rest = ", figures are of the others" if row.good else ""
            yield f"{engine_text(row)}: {', '.join(_bad_texts(row))}{rest}{more}"


def _few(rows: Iterable[Judged]) -> Iterable[str]:
    few = [f"{engine_text(row)} {len(row.good)}" for row in rows if 0 < len(row.good) < ENOUGH_RUNS]
    if few:
        yield f"fewer than {ENOUGH_RUNS} good runs, so the spread says less: {', '.join(few)}"
