"""The pictures: guest speed over time, how long faults take, when RAM arrives.

Drawn without a display and without global state. Engines keep their colour and
line style over all pictures; both tell them apart (Okabe and Ito, Color Universal
Design), so that the colour-blind read them, too. No data, no picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, nan
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure as Picture
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, PercentFormatter

from qpostcopy.bench.compare import Place, by_place, interval_of, place_of
from qpostcopy.bench.figures import FIGURES, Figure
from qpostcopy.bench.judge import Judged, judge, sessions_of, subject_of
from qpostcopy.bench.model import Book, Engine, Portrait
from qpostcopy.bench.series import BEFORE_MS, arrivals_on, fault_shares, look_ms, speed_curve
from qpostcopy.bench.statistics import Summary, summarize

_DPI = 90
_WIDTH_INCHES = 9.0
#: Of a guest that catches up, what is above is not interesting.
_MAX_SPEED = 2.0
_STOPPED_COLOUR = "black"
_MOMENT_COLOUR = "#D55E00"
_ARRIVAL_ROWS = 96
_ARRIVAL_COLUMNS = 240
_ARRIVAL_COLOURS = "viridis_r"
_LEAST_SHARE = 0.0001
_TIME_AXIS = "seconds since the operator's command"

_FAULTS_CAPTION = (
    "How long faults take (a curve: only of engines that measure faults singly; a line: the mean)"
)

Dashes = tuple[int, tuple[float, ...]]


class Look(NamedTuple):
    """How an engine is drawn."""

    colour: str
    dashes: Dashes


#: That no two are alike, for whatever eye, is tested.
LOOKS = {
    Engine.QPOSTCOPY: Look("#D55E00", (0, ())),
    Engine.PRECOPY: Look("#009E73", (0, (1, 1.2))),
    Engine.POSTCOPY: Look("#0072B2", (0, (6, 1.5))),
    Engine.PREEMPT: Look("#CC79A7", (0, (4, 1, 1, 1))),
    Engine.MULTIFD: Look("#56B4E9", (0, (2.5, 2.5))),
    Engine.HYBRID: Look("#4D4D4D", (0, (3, 1, 1, 1, 1, 1))),
}


class Plot(NamedTuple):
    """A file, and what it shows."""

    file: str
    caption: str


def write_plots(book: Book, directory: Path) -> dict[Place, tuple[Plot, ...]]:
    """All pictures of what the newest session measured, as PNG.

    :param directory: made if it is not there.
    :raise OSError: it cannot be written.
    """
    subject = subject_of(book)
    if subject is None:
        return {}
    directory.mkdir(parents=True, exist_ok=True)
    sessions = {session.id for session in sessions_of(book, subject)}
    portraits = [portrait for portrait in book.portraits if portrait.session in sessions]
    rows_of = by_place(judge(book, subject).values())
    places = dict.fromkeys([*rows_of, *(place_of(one.cell) for one in portraits)])
    return {
        place: tuple(_write(place, rows_of.get(place, ()), portraits, directory))
        for place in places
    }


def _write(
    place: Place, judged: Sequence[Judged], portraits: Iterable[Portrait], directory: Path
) -> Iterable[Plot]:
    rows = [row for row in judged if not row.cell.label]
    watched = [portrait for portrait in portraits if place_of(portrait.cell) == place]
    drawn: dict[str, tuple[str, Picture | None]] = {
        "speed": ("Guest speed over time", draw_speed(place, rows)),
        "faults": (_FAULTS_CAPTION, draw_faults(place, rows)),
        "arrivals": ("When RAM arrives", draw_arrivals(place, watched)),
    }
    for name, (caption, picture) in drawn.items():
        if picture is not None:
            plot = Plot(f"{name}-{_file_stem(place)}.png", f"{caption}: {place}")
            picture.savefig(directory / plot.file, dpi=_DPI)
            yield plot


def _file_stem(place: Place) -> str:
    words = (place.qemu, place.workload, place.link, str(place.memory_mib))
    return "-".join("".join(c if c.isalnum() or c in ".-" else "_" for c in word) for word in words)


# --- guest speed over time --------------------------------------------------------------------


def draw_speed(place: Place, rows: Sequence[Judged]) -> Picture | None:
    """All engines in one picture: speed above, below it what the migration was doing."""
    end_ms = _shown_ms(rows)
    known = [(row, curve) for row in rows if (curve := speed_curve(row.good, end_ms))]
    if not known:
        return None
    picture = _picture(4.4 + 0.24 * len(known))
    above, below = picture.subplots(2, 1, sharex=True, height_ratios=(3.6, 0.24 * len(known) + 0.1))
    for row, curve in known:
        look = LOOKS[row.cell.engine]
        times = [point.at_ms / 1000 for point in curve]
        above.fill_between(
            times,
            [point.low for point in curve],
            [point.high for point in curve],
            color=look.colour,
            alpha=0.15,
            linewidth=0,
        )
        above.plot(times, [point.median for point in curve], **_line(row.cell.engine))
    highest = max(point.high for _, curve in known for point in curve)
    _speed_axes(above, min(max(highest, 1.1), _MAX_SPEED))
    _draw_courses(below, [row for row, _ in known])
    _title(picture, above, f"Guest speed: {place}", [row.cell.engine for row, _ in known])
    return picture


def _shown_ms(rows: Iterable[Judged]) -> float:
    """Until a while after the slowest engine is done; the quiet after that shows nothing."""
    totals = [_median_ms(run.figures.total_ms for run in row.good) for row in rows]
    return 1.25 * max((total for total in totals if total is not None), default=inf) + BEFORE_MS


def _speed_axes(axes: Axes, highest: float) -> None:
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.axvline(0.0, color="grey", linewidth=0.8)
    axes.set_ylim(0, highest * 1.03)
    axes.margins(x=0.01)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("speed, % of the baseline\n(median, band: 90% interval)")
    axes.grid(alpha=0.25)


def _draw_courses(axes: Axes, rows: Sequence[Judged]) -> None:
    """A bar an engine: light while it migrates, black while the guest is stopped."""
    for height, row in enumerate(rows):
        look = LOOKS[row.cell.engine]
        total = _median_ms(run.figures.total_ms for run in row.good)
        stopped = _median_ms(run.stopped_ms for run in row.good)
        resumed = _median_ms(run.resumed_ms for run in row.good)
        if total is not None:
            axes.barh(height, total / 1000, height=0.6, color=look.colour, alpha=0.45)
        if stopped is not None and resumed is not None:
            axes.barh(
                height,
                (resumed - stopped) / 1000,
                left=stopped / 1000,
                height=0.8,
                color=_STOPPED_COLOUR,
                edgecolor=_STOPPED_COLOUR,
                linewidth=1,
            )
    axes.set_yticks(range(len(rows)), [str(row.cell.engine) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(f"{_TIME_AXIS} (bar: the migration; black: guest stopped)")


def _median_ms(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return summarize(known).median if known else None


# --- how long faults take ---------------------------------------------------------------------


def draw_faults(place: Place, rows: Sequence[Judged]) -> Picture | None:
    """The distribution where faults are measured singly; the mean of every engine as a line."""
    mean = next(figure for figure in FIGURES if figure.name == "fault_mean_us")
    known = [row for row in rows if fault_shares(row.good) or row.summary(mean)]
    if not known:
        return None
    picture = _picture(4.4)
    axes = picture.subplots()
    axes.set_xscale("log")
    for row in known:
        _draw_shares(axes, row)
        _draw_mean(axes, row, mean)
    _fault_axes(axes)
    _title(picture, axes, f"How long faults take: {place}", [row.cell.engine for row in known])
    return picture


def _draw_shares(axes: Axes, row: Judged) -> None:
    shares = fault_shares(row.good)
    if shares:
        axes.step(
            [shares[0].upper_us, *(share.upper_us for share in shares)],
            [0.0, *(share.share for share in shares)],
            where="post",
            **_line(row.cell.engine),
        )


def _draw_mean(axes: Axes, row: Judged, mean: Figure) -> None:
    """The line of a mean with its interval; of noise the interval alone."""
    summary, interval = row.summary(mean), interval_of(row, mean)
    if summary is None or interval is None:
        return
    look = LOOKS[row.cell.engine]
    axes.axvspan(summary.low, summary.high, color=look.colour, alpha=0.15, linewidth=0)
    if not row.is_noise(mean):
        axes.axvline(summary.median, color=look.colour, linestyle=look.dashes, linewidth=1.2)
        _label_mean(axes, summary, f"mean {mean.text(summary.median)}", look)


def _label_mean(axes: Axes, summary: Summary, text: str, look: Look) -> None:
    axes.annotate(
        text,
        (summary.median, 0.03),
        xycoords=("data", "axes fraction"),
        xytext=(3, 0),
        textcoords="offset points",
        rotation=90,
        va="bottom",
        fontsize=8,
        color=look.colour,
    )


def _fault_axes(axes: Axes) -> None:
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 0.9, 0.99])
    axes.xaxis.set_major_formatter(FuncFormatter(_time_text))
    axes.set_xlabel("time from the read of a fault to its page (curve: each fault; line: mean)")
    axes.set_ylabel("share of faults that took no longer")
    axes.grid(alpha=0.25)


def _time_text(value_us: float, _position: object) -> str:
    if value_us >= 1e6:
        return f"{value_us / 1e6:g} s"
    return f"{value_us / 1000:g} ms" if value_us >= 1000 else f"{value_us:g} us"


# --- when RAM arrives -------------------------------------------------------------------------


def draw_arrivals(place: Place, portraits: Iterable[Portrait]) -> Picture | None:
    """A panel an engine: time from left to right, RAM from its first address upwards."""
    newest = {one.cell.engine: one for one in portraits if one.arrivals and not one.cell.label}
    shown = [newest[engine] for engine in Engine if engine in newest]
    if not shown:
        return None
    picture = _picture(1.0 + 1.7 * len(shown))
    end_ms = max(at_ms for one in shown for at_ms, _, _ in one.arrivals)
    panels = picture.subplots(len(shown), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    norm = LogNorm(_LEAST_SHARE, 1.0)
    for axes, portrait in zip(panels, shown, strict=True):
        _draw_portrait(axes, portrait, max(end_ms / _ARRIVAL_COLUMNS, look_ms(portrait), 0.1), norm)
    panels[-1].set_xlim(-0.01 * end_ms / 1000, 1.01 * end_ms / 1000)
    panels[-1].set_xlabel(_TIME_AXIS)
    bar = picture.colorbar(ScalarMappable(norm, _ARRIVAL_COLOURS), ax=list(panels), pad=0.01)
    bar.set_label("how much of that place in RAM arrives at that time")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    picture.suptitle(
        f"When RAM arrives: {place} (orange: the guest is stopped, resumed)", fontsize=11
    )
    return picture


def _draw_portrait(axes: Axes, portrait: Portrait, column_ms: float, norm: LogNorm) -> None:
    grid = arrivals_on(portrait, _ARRIVAL_ROWS, column_ms)
    shares = [[_visible(share) for share in row] for row in grid.shares]
    end = len(grid.shares[0]) * column_ms / 1000
    axes.imshow(
        shares,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(0, end, 0, portrait.cell.memory_mib),
        cmap=_ARRIVAL_COLOURS,
        norm=norm,
    )
    for at_ms in (portrait.stopped_ms, portrait.resumed_ms):
        if at_ms is not None:
            axes.axvline(at_ms / 1000, color=_MOMENT_COLOUR, linewidth=1)
    axes.set_ylabel("RAM (MiB)")
    axes.set_title(str(portrait.cell.engine), fontsize=9, loc="left")


def _visible(share: float) -> float:
    """A single page is seen; where nothing arrives it stays white."""
    return max(share, _LEAST_SHARE) if share else nan


# --- of all pictures --------------------------------------------------------------------------


def _picture(height_inches: float) -> Picture:
    picture = Picture(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
    FigureCanvasAgg(picture)
    return picture


def _line(engine: Engine) -> dict[str, Any]:
    look = LOOKS[engine]
    return {"color": look.colour, "linestyle": look.dashes, "linewidth": 1.8}


def _title(picture: Picture, axes: Axes, text: str, engines: Iterable[Engine]) -> None:
    """The title, and under it who is who."""
    picture.suptitle(text, fontsize=11)
    handles = [Line2D([], [], label=str(engine), **_line(engine)) for engine in engines]
    axes.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=len(handles),
        fontsize=8,
        frameon=False,
        handlelength=3,
    )
