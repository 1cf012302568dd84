"""The pictures: that there are some, that they say what they show, and none of nothing."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import combinations
from math import dist
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure as Picture
from matplotlib.image import imread

from qpostcopy.bench.compare import Place, by_place, place_of
from qpostcopy.bench.judge import Judged, judge
from qpostcopy.bench.model import Book, Cell, Engine, Link, Portrait, Run
from qpostcopy.bench.plots import (
    LOOKS,
    draw_arrivals,
    draw_faults,
    draw_speed,
    write_plots,
)
from tests.bench.books import SESSION, SUBJECT, book, cell, moved, run

PLACE = place_of(cell())
_MAX_BYTES = 150_000


def measured(of: Cell, total_ms: float = 1000.0, **changed: Any) -> Run:
    singly = of.engine is Engine.QPOSTCOPY
    given: dict[str, Any] = {
        "figures": {"total_ms": total_ms, "fault_mean_us": 150.0, "faults": 800.0},
        "speed": tuple((float(ms), int(0.8 * ms) + 1000) for ms in range(-600, 2000, 10)),
        "stopped_ms": 20.0,
        "resumed_ms": 31.0,
        "histogram": ((64.0, 300), (128.0, 400), (256.0, 100)) if singly else (),
    }
    return run(of, **given | changed)


def portrait(of: Cell, **changed: object) -> Portrait:
    arrivals = tuple((float(ms), ms // 20, 2048) for ms in range(0, 1280, 20))
    given = {"session": SESSION.id, "parts": 64, "stopped_ms": 20.0, "resumed_ms": 31.0}
    return Portrait.model_validate(given | {"cell": of, "arrivals": arrivals} | changed)


def whole(engines: tuple[Engine, ...] = tuple(Engine)) -> Book:
    cells = [cell(engine) for engine in engines]
    return book(
        [measured(one, 1000.0 + index) for one in cells for index in range(5)],
        portraits=[portrait(one) for one in cells],
    )


def rows(*of: Run) -> tuple[Judged, ...]:
    return by_place(judge(book(of), SUBJECT).values())[PLACE]


def words(picture: Picture | None) -> str:
    """All that is written in a picture."""
    assert picture is not None
    picture.draw_without_rendering()
    legends = [legend for axes in picture.axes if (legend := axes.get_legend())]
    return "\n".join(
        [
            picture.get_suptitle(),
            *(text.get_text() for legend in legends for text in legend.get_texts()),
            *(text.get_text() for axes in picture.axes for text in axes.texts),
            *(axes.get_title("left") for axes in picture.axes),
            *(axes.get_xlabel() for axes in picture.axes),
            *(axes.get_ylabel() for axes in picture.axes),
        ]
    )


def test_the_files_are_pictures_with_content(tmp_path: Path) -> None:
    written = write_plots(whole(), tmp_path / "new" / "plots")
    files = [plot.file for plot in written[PLACE]]
    assert files == [f"{name}-10.0-kv-1gbit-512.png" for name in ("speed", "faults", "arrivals")]
    assert "only of engines that measure faults singly" in written[PLACE][1].caption
    for file in files:
        path = tmp_path / "new" / "plots" / file
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert struct.unpack(">I", data[16:20])[0] == 810
        assert len(data) <= _MAX_BYTES
        assert imread(path)[..., :3].std() > 0.05


@pytest.mark.parametrize(
    ("name", "axis"),
    [("speed", "seconds since"), ("faults", "time from"), ("arrivals", "RAM (MiB)")],
)
def test_a_picture_says_what_it_shows(name: str, axis: str) -> None:
    of = whole()
    drawn = {
        "speed": draw_speed(PLACE, rows(*of.runs)),
        "faults": draw_faults(PLACE, rows(*of.runs)),
        "arrivals": draw_arrivals(PLACE, of.portraits),
    }
    text = words(drawn[name])
    assert str(PLACE) in text
    assert axis in text
    assert [engine for engine in Engine if str(engine) not in text.splitlines()] == []


def test_engines_differ_without_colour() -> None:
    assert LOOKS.keys() == set(Engine)
    strokes = {engine: _strokes(look.dashes[1]) for engine, look in LOOKS.items()}
    assert len(set(strokes.values())) == len(LOOKS)


def _strokes(dashes: tuple[float, ...]) -> str:
    """What an eye makes of it: `-` a dash, `.` a dot, and how much of the line is there."""
    drawn = dashes[::2]
    kind = "".join("-" if stroke > 2 else "." for stroke in drawn)
    return f"{kind} {'loose' if dashes and sum(drawn) <= 0.6 * sum(dashes) else 'dense'}"


#: What is seen without one kind of cone, of linear RGB (Machado, Oliveira, Fernandes 2009).
_EYES = {
    "all": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
}
#: Of linear sRGB to XYZ, as shares of its white (IEC 61966-2-1).
_XYZ = ((0.4339, 0.3762, 0.1899), (0.2127, 0.7152, 0.0721), (0.0178, 0.1095, 0.8730))
#: 2.3 is what can just be told apart side by side; lines are thin and apart.
_LEAST_DISTANCE = 15.0


@pytest.mark.parametrize("eye", _EYES)
def test_engines_differ_in_colour(eye: str) -> None:
    seen = {
        engine: _lab(_times(_EYES[eye], [_linear(part) for part in to_rgb(look.colour)]))
        for engine, look in LOOKS.items()
    }
    near = {
        (one, other): round(dist(seen[one], seen[other]))
        for one, other in combinations(seen, 2)
        if dist(seen[one], seen[other]) < _LEAST_DISTANCE
    }
    assert near == {}


def _linear(part: float) -> float:
    return float(part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)


def _times(matrix: Sequence[Sequence[float]], vector: Sequence[float]) -> list[float]:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def _lab(linear: Sequence[float]) -> tuple[float, float, float]:
    """CIE 1976 L*a*b*, in which distances are about those that are seen."""
    inside = [min(max(part, 0.0), 1.0) for part in linear]
    x, y, z = (max(part, 0.008856) ** (1 / 3) for part in _times(_XYZ, inside))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_no_picture_of_nothing(tmp_path: Path) -> None:
    bare = [run(cell(engine), figures={"total_ms": 9.0}) for engine in Engine]
    assert write_plots(book(bare), tmp_path) == {PLACE: ()}
    assert write_plots(Book(), tmp_path) == {}
    assert list(tmp_path.iterdir()) == []
    assert draw_arrivals(PLACE, [portrait(cell(), arrivals=())]) is None


def test_bad_and_moved_runs_are_in_no_picture() -> None:
    died = measured(cell(Engine.POSTCOPY), outcome="guest-died")
    usual = [measured(cell(Engine.PREEMPT, link=Link.LOOPBACK)) for _ in range(3)]
    off = measured(cell(Engine.PREEMPT), baseline=moved(3000.0))
    ours = [measured(cell()) for _ in range(3)]
    for draw in (draw_speed, draw_faults):
        text = words(draw(PLACE, rows(died, off, *usual, *ours)))
        assert "qpostcopy" in text
        assert "qemu" not in text


def test_what_has_a_label_is_in_no_picture(tmp_path: Path) -> None:
    """The benchmark checking itself: the same engine twice would be the same line twice."""
    of = cell(label="a")
    assert write_plots(book([measured(of)], portraits=[portrait(of)]), tmp_path) == {PLACE: ()}


def test_a_portrait_alone_is_drawn(tmp_path: Path) -> None:
    of = book([], portraits=[portrait(cell(Engine.PREEMPT, workload="odd name/.."))])
    ((place, (plot,)),) = write_plots(of, tmp_path).items()
    assert place == Place("10.0", "odd name/..", cell().link, 512)
    assert (tmp_path / plot.file).read_bytes().startswith(b"\x89PNG")


def test_portraits_of_other_subjects_are_not_drawn(tmp_path: Path) -> None:
    of = book([], portraits=[portrait(cell(), session="20250101T000000")])
    assert write_plots(of, tmp_path) == {}


def test_the_newest_portrait_is_drawn() -> None:
    old = portrait(cell(), arrivals=((90_000.0, 1, 1),))
    picture = draw_arrivals(PLACE, [old, portrait(cell())])
    assert picture is not None
    assert picture.axes[0].get_xlim()[1] < 2.0


def test_a_mean_that_is_noise_is_a_band_without_a_number() -> None:
    of = [
        measured(cell(Engine.POSTCOPY), figures={"fault_mean_us": mean})
        for mean in (100.0, 777.0, 5000.0)
    ]
    assert "mean 777 us" not in words(draw_faults(PLACE, rows(*of)))
    assert "mean 777 us" in words(draw_faults(PLACE, rows(of[1], of[1])))
