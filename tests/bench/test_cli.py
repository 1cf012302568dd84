"""`scripts/bench`: options, exit codes, and what is said when it cannot go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from qpostcopy.bench import cli
from qpostcopy.bench.book import FILE, BookFile
from qpostcopy.bench.limits import Limits, Place
from qpostcopy.bench.matrix import Matrix
from qpostcopy.bench.model import Engine, Link, Run
from qpostcopy.bench.page import PAGE
from qpostcopy.bench.qemus import Qemu
from qpostcopy.environment import LOG_LEVEL_VARIABLE
from qpostcopy.errors import ExitCode, QpostcopyError
from tests.bench.books import LIMITS, SESSION, book, cell, runs

Captured = pytest.CaptureFixture[str]


def write_book(directory: Path, *of: Run) -> Path:
    directory.mkdir()
    (directory / FILE).write_text(book(of).model_dump_json())
    return directory


def five_runs(total_ms: float, engine: Engine = Engine.QPOSTCOPY) -> list[Run]:
    totals_ms = [total_ms * share for share in (0.98, 0.99, 1.0, 1.01, 1.02)]
    return runs(cell(engine), "total_ms", totals_ms, downtime_ms=8.0)


# --- what is asked for ---------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help(option: str, capsys: Captured) -> None:
    assert cli.run([option]) == ExitCode.COMPLETED
    told = capsys.readouterr().out
    assert told.startswith("Usage: scripts/bench ")
    for word in ("--quick", "--engine", "--output", "limits", "report", "selfcheck", "agree"):
        assert word in told


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("--engine", list(Engine)),
        ("--workload", ["service", "kv", "scan", "churn", "idle"]),
        ("--link", list(Link)),
    ],
)
def test_a_wrong_choice_is_told_the_right_ones(
    option: str, choices: list[str], capsys: Captured
) -> None:
    assert cli.run([option, "nonsense"]) == ExitCode.USAGE
    told = capsys.readouterr().err
    assert option in told
    assert "'nonsense'" in told
    for choice in choices:
        assert f"'{choice}'" in told


@pytest.mark.parametrize(
    "arguments",
    [
        ["--memory", "127"],
        ["--memory", "much"],
        ["--runs", "0"],
        ["--nonsense"],
        ["nonsense"],
        ["limits", "--link", "nonsense"],
        ["selfcheck", "--runs", "2"],
        ["agree", "one"],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: Captured) -> None:
    assert cli.run(arguments) == ExitCode.USAGE
    assert "Error: " in capsys.readouterr().err


def test_a_qemu_that_cannot_be_had(capsys: Captured) -> None:
    assert cli.run(["--qemu", "/no/such/qemu"]) == ExitCode.USAGE
    assert capsys.readouterr().err.splitlines() == [
        "bench: error: --qemu /no/such/qemu: /no/such/qemu is not an executable",
        "bench:   remedy: install qemu-system-x86, or give the path of a QEMU",
    ]


# --- what was measured before --------------------------------------------------------------


def test_report_without_a_book(tmp_path: Path, capsys: Captured) -> None:
    assert cli.run(["report", str(tmp_path)]) == ExitCode.USAGE
    assert capsys.readouterr().err.splitlines() == [
        f"bench: error: {tmp_path / FILE}: No such file or directory",
        "bench:   remedy: run scripts/bench first",
    ]


def test_report_of_what_is_no_book(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / FILE).write_text("{}, or not")
    assert cli.run(["report", str(tmp_path)]) == ExitCode.USAGE
    told = capsys.readouterr().err
    assert "bench:   remedy: move the file away" in told
    assert "Traceback" not in told


def test_debug_shows_where_it_was_raised(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOG_LEVEL_VARIABLE, "debug")
    assert cli.run(["report", str(tmp_path)]) == ExitCode.USAGE
    assert "Traceback" in capsys.readouterr().err


def test_report_prints_and_writes_anew(tmp_path: Path, capsys: Captured) -> None:
    all_runs = five_runs(900.0) + five_runs(1800.0, Engine.POSTCOPY)
    directory = write_book(tmp_path / "bench", *all_runs)
    assert cli.run(["report", str(directory)]) == ExitCode.COMPLETED
    told = capsys.readouterr().out
    assert "900 ms" in told
    assert "qemu-postcopy" in told
    assert told.splitlines()[-1] == str(directory / PAGE)
    assert "900 ms" in (directory / PAGE).read_text()


@pytest.mark.parametrize(
    ("other_ms", "code"), [(905.0, ExitCode.COMPLETED), (1800.0, ExitCode.UNEXPECTED)]
)
def test_whether_two_books_agree(
    tmp_path: Path, capsys: Captured, other_ms: float, code: ExitCode
) -> None:
    one = write_book(tmp_path / "one", *five_runs(900.0))
    other = write_book(tmp_path / "other", *five_runs(other_ms))
    assert cli.run(["agree", str(one), str(other)]) == code
    assert capsys.readouterr().out


# --- what would be measured ----------------------------------------------------------------


@dataclass
class Asked:
    """What the command asked of its session, and what becomes of that."""

    matrix: Matrix | None = None
    directory: Path | None = None
    limits: object = None
    portraits: bool | None = None
    qemus: list[str] = field(default_factory=list)
    error: BaseException | None = None


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """`BenchSession` in which one made-up run is found."""
    asked = Asked()

    class Session:
        def __init__(
            self, file: BookFile, matrix: Matrix, _image: Any, qemus: Mapping[str, Qemu], _tell: Any
        ) -> None:
            asked.matrix, asked.directory, asked.qemus = matrix, file.directory, list(qemus)
            self._file = file

        def run(self, limits: Callable[[Link], Limits] | None, *, portraits: bool) -> None:
            asked.limits, asked.portraits = limits, portraits
            if asked.error is not None:
                raise asked.error
            self._file.add(session=SESSION, run=five_runs(900.0)[0])

    def find_qemus(words: tuple[str, ...]) -> dict[str, Qemu]:
        return {word: Qemu(word, f"/usr/bin/qemu-{word}", f"{word}.1") for word in words}

    monkeypatch.setattr(cli, "BenchSession", Session)
    monkeypatch.setattr(cli, "find_qemus", find_qemus)
    monkeypatch.setattr(cli, "find_image", lambda: (tmp_path, tmp_path))
    monkeypatch.setattr(cli, "CACHE", tmp_path / "cache")
    return asked


def test_what_is_measured_if_nothing_is_said(asked: Asked, tmp_path: Path) -> None:
    assert cli.run([]) == ExitCode.COMPLETED
    assert asked.matrix == Matrix(
        engines=(Engine.QPOSTCOPY, Engine.PRECOPY, Engine.POSTCOPY, Engine.PREEMPT),
        qemus=["10.0"],
        workloads=("service", "kv", "churn"),
        links=(Link.LOOPBACK, Link.GIGABIT),
        memory_mib=512,
        runs=5,
    )
    assert asked.directory == tmp_path / "cache"
    assert asked.limits is cli.limits_of_link
    assert asked.portraits is True
    assert (tmp_path / "cache" / PAGE).is_file()


def test_options_choose(asked: Asked, tmp_path: Path) -> None:
    arguments = (
        "--engine qemu-hybrid --engine qpostcopy --qemu 7.2 --qemu 10.0 --workload scan "
        "--link 1gbit --memory 128 --runs 1 --no-limits --no-portraits --output"
    )
    assert cli.run([*arguments.split(), str(tmp_path / "mine")]) == ExitCode.COMPLETED
    assert asked.matrix == Matrix(
        engines=[Engine.HYBRID, Engine.QPOSTCOPY],
        qemus=["7.2", "10.0"],
        workloads=["scan"],
        links=[Link.GIGABIT],
        memory_mib=128,
        runs=1,
    )
    assert asked.directory == tmp_path / "mine"
    assert asked.limits is None
    assert asked.portraits is False


def test_quick_measures_little_in_a_directory_of_its_own(asked: Asked, tmp_path: Path) -> None:
    assert cli.run(["--quick"]) == ExitCode.COMPLETED
    assert asked.matrix
    assert asked.matrix.memory_mib == 256
    assert asked.matrix.workloads == ("service",)
    assert asked.matrix.links == (Link.LOOPBACK,)
    assert asked.matrix.runs == 5
    # Nothing that was measured before counts: two of them can be compared.
    assert asked.directory
    assert asked.directory.parent == tmp_path / "cache"
    assert asked.directory.name.startswith("quick-")
    # Further options still choose.
    assert cli.run(["--quick", "--memory", "128", "--output", str(tmp_path)]) == 0
    assert asked.matrix.memory_mib == 128
    assert asked.directory == tmp_path


def test_ctrl_c_says_how_to_go_on(asked: Asked, tmp_path: Path, capsys: Captured) -> None:
    asked.error = KeyboardInterrupt()
    assert cli.run(["--quick"]) == ExitCode.SIGINT
    assert asked.directory
    captured = capsys.readouterr()
    assert captured.err.strip() == (
        f"bench: interrupted; with --output {asked.directory} the same command goes on from here"
    )
    assert captured.out == ""


def test_what_goes_wrong_is_one_line_and_its_exit_code(asked: Asked, capsys: Captured) -> None:
    asked.error = QpostcopyError("the link is down", remedy="plug it in")
    assert cli.run([]) == ExitCode.UNEXPECTED
    assert capsys.readouterr().err.splitlines() == [
        "bench: error: the link is down",
        "bench:   remedy: plug it in",
    ]


def test_an_output_that_cannot_be_made(asked: Asked, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "file").touch()
    directory = tmp_path / "file" / "bench"
    assert cli.run(["--output", str(directory)]) == ExitCode.USAGE
    told = capsys.readouterr().err
    assert f"bench: error: {directory}: Not a directory" in told
    assert "remedy: " in told
    assert asked.matrix is None


# --- limits --------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize("chosen", [list(Link), [Link.GIGABIT]])
def test_limits_are_measured_over_each_link(
    chosen: list[Link], tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[tuple[str, str]] = []

    def measure(_size_bytes: int, source: Place, destination: Place, *, cache: Path) -> Limits:
        assert cache == tmp_path / "limits"
        for place in (source, destination):
            assert place.netns
            assert place.netns.exists()
        places.append((source.address, destination.address))
        return LIMITS

    monkeypatch.setattr(cli, "measure_limits", measure)
    monkeypatch.setattr(cli, "CACHE", tmp_path)
    options = [] if chosen == list(Link) else [f"--link={link}" for link in chosen]
    assert cli.run(["limits", *options]) == ExitCode.COMPLETED
    ends = {Link.LOOPBACK: ("127.0.0.1", "127.0.0.1"), Link.GIGABIT: ("10.0.0.1", "10.0.0.2")}
    assert places == [ends[link] for link in chosen]
    told = capsys.readouterr().out
    assert [line for line in told.splitlines() if line in {f"{link}:" for link in Link}] == [
        f"{link}:" for link in chosen
    ]
    assert "3.00 GiB/s" in told


@pytest.mark.parametrize("words", [["--quick", "report"], ["--link", "1gbit", "limits"]])
def test_what_is_said_of_the_whole_is_no_option_of_a_command(
    words: list[str], capsys: Captured
) -> None:
    assert cli.run(words) == 2
    verb = words[-1]
    assert f"{words[0]} is no option of {verb}" in capsys.readouterr().err
