"""The completion script, in a real bash, and what it offers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qpostcopy.cli import main

BIN = Path(sys.executable).parent
IDS = ["web1-20261123T101500", "web1-20261124T101500", "db-20261122T000000"]
#: As bash does on TAB: the words, and which of them the cursor is in.
BASH = """
source <(qpostcopy completion bash)
complete -p qpostcopy
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_qpostcopy_completion qpostcopy 2>/dev/null    # compopt works during a real TAB only
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name in IDS:
        (tmp_path / "run" / name).mkdir(parents=True)
    return tmp_path / "run"


def offered(run: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    path = f"{BIN}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", BASH, "bash", "qpostcopy", *words],
        env=dict(os.environ) | {"PATH": path, "QPOSTCOPY_RUN_DIR": str(run)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    set_up, *replies = done.stdout.splitlines()
    assert set_up.endswith("-F _qpostcopy_completion qpostcopy"), done.stderr
    return [reply for reply in replies if reply]


def test_verbs(run: Path) -> None:
    assert offered(run, "st") == ["status"]
    assert set(offered(run, "")) >= {"check", "migrate", "status", "abort", "resume", "completion"}


@pytest.mark.parametrize(
    ("verb", "begun", "replies"),
    [
        ("status", "", ["web1", "db", IDS[1], IDS[0], IDS[2]]),
        ("abort", "d", ["db", IDS[2]]),
        ("resume", "web1-2026112", [IDS[1], IDS[0]]),
    ],
)
def test_plans_and_ids_the_latest_first(
    run: Path, verb: str, begun: str, replies: list[str]
) -> None:
    assert offered(run, verb, begun) == replies


def test_profiles(run: Path) -> None:
    assert "sequential" in offered(run, "migrate", "--profile", "")
    assert offered(run, "demo", "--profile", "seq") == ["sequential"]


def test_options_and_shells(run: Path) -> None:
    assert offered(run, "status", "--w") == ["--watch"]
    assert offered(run, "completion", "") == ["bash", "zsh", "fish"]


def test_a_run_directory_that_cannot_be_read_offers_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert offered(tmp_path / "file", "status", "") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_its_script(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    assert main.run(["completion", shell]) == 0
    assert f"_QPOSTCOPY_COMPLETE={shell}_complete" in capsys.readouterr().out


def test_another_shell_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["completion", "tcsh"]) == 2
    assert "bash" in capsys.readouterr().err
