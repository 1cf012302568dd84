"""The command itself: verbs found lazily, every error one line and its exit code."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from qpostcopy import __version__
from qpostcopy.cli import main
from qpostcopy.environment import LOG_LEVEL_VARIABLE
from qpostcopy.errors import (
    InterruptedMigrationError,
    QpostcopyError,
    RefusedError,
    StateLostError,
    UsageError,
)


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPOSTCOPY_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.delenv(LOG_LEVEL_VARIABLE, raising=False)


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException | int) -> None:
    """Make `status` end in an error, or in a code."""

    @click.command(name="status")
    def command() -> int:
        if isinstance(error, int):
            return error
        raise error

    monkeypatch.setattr("qpostcopy.cli.status.command", command)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (QpostcopyError("it broke", remedy="mend it"), 1),
        (UsageError("it broke", remedy="mend it"), 2),
        (RefusedError("it broke", remedy="mend it"), 3),
        (InterruptedMigrationError("it broke", remedy="mend it"), 10),
        (StateLostError("it broke", remedy="mend it"), 11),
    ],
)
def test_an_error_is_one_line_a_remedy_and_its_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: QpostcopyError,
    code: int,
) -> None:
    raising(monkeypatch, error)
    assert main.run(["status"]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "qpostcopy: error: it broke\n  remedy: mend it\n"


def test_our_own_bugs_are_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, ZeroDivisionError("oh"))
    assert main.run(["status"]) == 1
    said = capsys.readouterr().err
    assert "unexpected ZeroDivisionError: oh" in said
    assert "Traceback" not in said


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, ZeroDivisionError("oh"))
    monkeypatch.setenv(LOG_LEVEL_VARIABLE, "debug")
    assert main.run(["status"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (click.Abort(), 130)])
def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    raising(monkeypatch, error)
    assert main.run(["status"]) == code


@pytest.mark.parametrize("code", [0, 4, 143])
def test_a_verbs_code_is_the_commands(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    raising(monkeypatch, code)
    assert main.run(["status"]) == code


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["migrate"], ["status", "--nonsense"], ["--log-level", "loud"]]
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main.run(arguments) == 2
    assert capsys.readouterr().err


def test_help_offers_only_verbs_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--help"]) == 0
    offered = capsys.readouterr().out
    assert all(f"\n  {verb} " in offered for verb in ("check", "migrate", "status", "abort"))
    assert "switch" not in offered


def every_verb(group: click.Group, *above: str) -> Iterator[list[str]]:
    """The words of each verb, those below `profile` too."""
    context = click.Context(group)
    for name in group.list_commands(context):
        yield [*above, name]
        below = group.get_command(context, name)
        if isinstance(below, click.Group):
            yield from every_verb(below, *above, name)


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_every_verb_has_help_that_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    verbs = list(every_verb(main.cli))
    assert {"check", "migrate", "status", "abort", "resume"} <= {words[0] for words in verbs}
    for words in [[], *verbs]:
        assert main.run([*words, "--help"]) == 0
        said = capsys.readouterr().out
        assert "Usage: qpostcopy" in said
        if columns != "40":
            assert [line for line in said.splitlines() if len(line) > 80] == []
            assert re.findall(r"(?m)^  .*\.\.\.$", said) == [], "a summary that is cut off"


def test_starting_imports_only_what_the_verb_needs() -> None:
    code = "import sys, qpostcopy.cli.main; print(' '.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(out.stdout.split())
    assert not loaded & {"pydantic", "rich", "yaml", "asyncio", "qpostcopy.core", "qemu.qmp"}


def test_python_m_is_the_command() -> None:
    arguments = [sys.executable, "-m", "qpostcopy", "--version"]
    out = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert __version__ in out.stdout
