"""`qpostcopy profile show`: the table, the picture, and what its options refuse."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from qpostcopy.cli.heatmap import look_at
from qpostcopy.cli.profile import command
from qpostcopy.cli.show import CHARACTERS, ROWS, cells_in_a_row, show
from qpostcopy.config import Profile, RangeStep, load_profile, shipped_profiles
from qpostcopy.errors import UsageError
from qpostcopy.source.schedule import compile_schedule
from qpostcopy.trace import PAGE_BITS, Trace, TracedBlock, encode

PAGE = 4096


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, ["show", *arguments])


def test_the_table_and_the_picture() -> None:
    result = run("low-memory-first", "--memory", "64MiB")
    assert result.exit_code == 0
    assert result.output.splitlines()[:8] == [
        "low-memory-first: 64.0 MiB of RAM: ram0 (64MiB)",
        "a fault brings 64KiB ahead, 0 behind, then schedule",
        "",
        "step                    extents  pages     bytes  share  so far",
        "1 range 0..1MiB               1    256   1.0 MiB   1.6%    1.6%",
        "2 range 0..16MiB              1   3840  15.0 MiB  23.4%   25.0%",
        "3 sequential                  1  12288  48.0 MiB  75.0%  100.0%",
        "  (what no step names)        0      0       0 B   0.0%  100.0%",
    ]
    cells = "".join(re.findall(r"^.{14}(.*)\|$", result.output, re.M))
    assert cells == "".join(sorted(cells, key=CHARACTERS.index))  # address order: ever later
    assert set(cells) == set(CHARACTERS)


def test_a_trace_says_what_the_vm_has(tmp_path: Path) -> None:
    blocks = (TracedBlock("low", 64 * PAGE), TracedBlock("high", 64 * PAGE))
    faults = [1 << PAGE_BITS | page for page in range(63, 31, -1)]
    (tmp_path / "web.trace").write_bytes(encode(Trace(blocks, faults, range(32))))
    path = tmp_path / "p.yaml"
    path.write_text("version: 1\nname: p\npush:\n  - trace: {file: web.trace}\n")
    result = run(str(path))
    assert result.exit_code == 0
    assert "low (256KiB), high (256KiB)" in result.output
    assert re.search(r"^1 trace web.trace +32 +32 +128.0 KiB +25.0% +25.0%$", result.output, re.M)
    assert re.search(r"first .* last$", result.output, re.M)

    other = run(str(path), "--memory", "512KiB")
    assert isinstance(other.exception, UsageError)
    said = str(other.exception)
    assert said.startswith(f"{path}:4: push[0].trace.file: {tmp_path}/web.trace: is a trace of")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no trace in it says what that is"),
        (["--memory", "1GB"], "'1GB': expected a multiple of 4KiB"),
        (["--memory", "0"], "'0': expected a multiple of 4KiB"),
        (["--memory", "5000"], "'5000': expected a multiple of 4KiB"),
        (["--memory", "2048TiB"], "'2048TiB': expected a multiple of 4KiB up to 1024TiB"),
        (["--blocks", "ram0"], "'ram0': expected NAME=SIZE"),
        (["--blocks", "=1GiB"], "'=1GiB': expected NAME=SIZE"),
        (["--blocks", "a=1GiB,a=1GiB"], "'a=1GiB': expected NAME=SIZE, each name once"),
        (["--blocks", "a=1GiB,"], "'': expected NAME=SIZE"),
        (["--blocks", "a=1GiB", "--memory", "1GiB"], "exclude each other"),
    ],
)
def test_options_that_make_no_sense(arguments: list[str], said: str) -> None:
    error = run("sequential", *arguments).exception
    assert isinstance(error, UsageError)
    assert said in str(error)
    assert error.remedy


def test_a_profile_that_is_not_there() -> None:
    error = run("sequental", "--memory", "1GiB").exception
    assert isinstance(error, UsageError)
    assert error.remedy == "did you mean sequential?"


def picture_on(columns: int, *, terminal: bool, no_color: bool = False) -> str:
    profile = load_profile(shipped_profiles()["low-memory-first"])
    blocks = [TracedBlock("a-block-with-a-long-name" * 3, 1 << 40)]
    console = Console(
        file=io.StringIO(), width=columns, force_terminal=terminal, no_color=no_color,
        color_system="256" if terminal else None, highlight=False, markup=False,
    )  # fmt: skip
    show(console, profile, blocks, *look_at(profile, blocks, cells_in_a_row(console) * ROWS))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_it_fits_the_terminal_and_80_columns(columns: int) -> None:
    text = re.sub(r"\x1b\[[0-9;]*m", "", picture_on(columns, terminal=True))
    assert max(map(len, text.splitlines()[3:])) <= min(columns, 80)
    assert max(map(len, text.splitlines())) <= columns


def test_colours_only_where_they_are_wanted() -> None:
    assert "\x1b[48;5;196m" in picture_on(80, terminal=True)
    for text in (
        picture_on(80, terminal=True, no_color=True),
        picture_on(80, terminal=False),
        run("sequential", "--memory", "1GiB").output,
    ):
        assert not re.search(r"\x1b\[[0-9;]*[34]\d", text)
        assert "@@" in text


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    ranges=st.lists(st.tuples(st.integers(0, 59), st.integers(1, 60)), max_size=5),
    cells=st.integers(1, 70),
)
def test_the_picture_is_of_the_schedule(
    sizes: list[int], ranges: list[tuple[int, int]], cells: int
) -> None:
    """Against each page's own place in the order."""
    blocks = [TracedBlock(f"ram{index}", size * PAGE) for index, size in enumerate(sizes)]
    total = sum(sizes)
    steps = tuple(
        RangeStep(start_offset=first % total * PAGE, end_offset=(first % total + count) * PAGE)
        for first, count in ranges
    )
    profile = Profile(name="p", push=steps)
    shares, picture = look_at(profile, blocks, cells)
    bases = [sum(sizes[:index]) for index in range(len(sizes))]
    order = [
        bases[block] + first + index
        for block, first, count in compile_schedule(profile, blocks)
        for index in range(count)
    ]
    place = {page: at for at, page in enumerate(order)}
    width = picture.cell_bytes // PAGE
    assert len(picture.arrivals) <= cells
    for cell, arrival in enumerate(picture.arrivals):
        pages = range(cell * width, min((cell + 1) * width, total))
        mean = sum(place[page] for page in pages) / len(pages)
        assert arrival == pytest.approx(mean / max(total - 1, 1))
    assert sum(row.pages for row in shares) == total
    assert shares[-1].cumulative == 1.0
    assert len(shares) == len(steps) + 1
