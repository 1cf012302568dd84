"""Terminals of any width, none at all, and standard streams that are closed or full."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qpostcopy.progress import Progress, line
from tests.terminal import Terminal

PLAN = "version: 1\nname: web1\nsource: {qmp: /nowhere/a}\ndestination: {qmp: /nowhere/b}\n"
COMMAND = [sys.executable, "-m", "qpostcopy"]
GIB = 1 << 30
BUSY = Progress(
    phase="postcopy",
    percent=71.25,
    placed_bytes=int(11.4 * GIB),
    total_bytes=16 * GIB,
    left_bytes=int(4.6 * GIB),
    bytes_per_second=1.12 * GIB,
    faults_per_second=812,
    fault_p50_us=400,
    fault_p99_us=2100,
    downtime_ms=12.3,
    eta_seconds=4.04,
)
#: A display as the verbs use it, and what it is told.
SHOW = f"""
from qpostcopy.cli.display import make_people_display
from qpostcopy.progress import Progress
progress = {BUSY.model_dump()!r} | {{"type": "progress"}}
place = "VM at: destination; abort is not possible"
with make_people_display() as display:
    display.show({{"type": "phase", "phase": "postcopy", "message": place}})
    display.show(progress)
    display.note("a long word of warning, " * 8 + "/a/path/that/stays/whole")
    input()
    display.show(progress | {{"percent": 99.0}})
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "plan.yaml").write_text(PLAN)
    return dict(os.environ) | {"QPOSTCOPY_RUN_DIR": str(tmp_path / "run")}


# --- the kept line ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (103, "postcopy 71% 11.4/16.0 GiB  left 4.60 GiB  1.12 GiB/s  faults 812/s "
              "p50 0.4 p99 2.1 ms  ETA 4.0 s"),
        (79, "postcopy 71% 11.4/16.0 GiB  1.12 GiB/s  faults 812/s p99 2.1 ms  ETA 4.0 s"),
        (60, "postcopy 71% 11.4/16.0 GiB  1.12 GiB/s  ETA 4.0 s"),
        (39, "postcopy 71% 11.4/16.0 GiB  ETA 4.0 s"),
        (30, "postcopy 71% 11.4/16.0 GiB"),
        (9, "postcopy "),
        (0, ""),
    ],
)  # fmt: skip
def test_a_narrow_line_leaves_out_what_is_least_missed(columns: int, text: str) -> None:
    assert line(BUSY, columns) == text


@pytest.mark.parametrize("columns", range(0, 130, 7))
def test_a_line_never_is_longer(columns: int) -> None:
    assert len(line(BUSY, columns)) <= columns
    assert len(line(Progress(phase="rollback-failed"), columns)) <= columns


@pytest.mark.parametrize(("columns", "later"), [(80, 80), (40, 132), (132, 40), (80, 3)])
def test_a_terminal_of_any_width_that_is_resized(
    environment: dict[str, str], columns: int, later: int
) -> None:
    with Terminal([sys.executable, "-c", SHOW], environment, columns) as shown:
        shown.read_until("/a/path/that/stays/whole")
        shown.read_until("71%")
        shown.resize(later)
        mark = len(shown.text)
        shown.press(b"\n")
        assert shown.end() == 0, shown.text
    before, after = shown.lines()[:-3], shown.lines(mark)
    assert all(len(line) <= columns for line in before), before
    assert all(len(line) < later for line in after), after


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_terminal_that_cannot_go_back_gets_plain_lines(
    environment: dict[str, str], term: str
) -> None:
    with Terminal([sys.executable, "-c", SHOW], environment | {"TERM": term}) as shown:
        shown.read_until("/a/path/that/stays/whole")
        shown.press(b"\n")
        assert shown.end() == 0, shown.text
    assert "\x1b" not in shown.text
    assert "postcopy 71%" in shown.text
    assert all(len(line) <= 80 for line in shown.lines())


@pytest.mark.parametrize("more", [{"NO_COLOR": "1"}, {"LC_ALL": "C"}, {"LC_ALL": "C.UTF-8"}])
def test_there_is_no_colour_and_no_letter_that_a_terminal_may_lack(
    environment: dict[str, str], more: dict[str, str]
) -> None:
    with Terminal([sys.executable, "-c", SHOW], environment | more) as shown:
        shown.read_until("71%")
        shown.press(b"\n")
        assert shown.end() == 0, shown.text
    assert shown.text.isascii()
    assert "m" not in {sequence[:1] for sequence in shown.text.split("\x1b[")[1:]}


# --- streams that are not there -----------------------------------------------------------


def shell(line: str, environment: dict[str, str], tmp_path: Path) -> tuple[int, str, str]:
    """Run a line with `$Q` the command and `$PLAN` a plan whose QEMUs are not there."""
    more = {"Q": " ".join(COMMAND), "PLAN": str(tmp_path / "plan.yaml")}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        env=environment | more,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        "check $PLAN 2>&-",
        "check $PLAN >&-",
        "check $PLAN 2>/dev/full",
        "migrate $PLAN --json 2>&-",
        "migrate $PLAN <&- >&- 2>&-",
    ],
)
def test_closed_streams_change_no_exit_code(
    environment: dict[str, str], tmp_path: Path, arguments: str
) -> None:
    """What is opened next must not get the number 1 or 2, and be written to."""
    code, out, err = shell(f"$Q {arguments}", environment, tmp_path)
    assert code == 3, (out, err)
    assert "Traceback" not in err
    for written in (tmp_path / "run").glob("*/*"):
        assert written.suffix == ".log" or "rolled-back:" not in written.read_text(), written


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&-", "<&- >&- 2>&-"])
def test_what_is_opened_later_gets_no_standard_number(closed: str) -> None:
    code = (
        "import os, sys\n"
        "from qpostcopy.cli.words import open_standard_streams\n"
        "open_standard_streams()\n"
        "print('a'), print('b', file=sys.stderr)\n"
        "sys.exit(os.open('/', os.O_RDONLY) < 3)\n"
    )
    line = f'"$0" -c "$1" {closed}'
    done = subprocess.run(["bash", "-c", line, sys.executable, code], capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", ["check", "migrate"])
def test_a_reader_that_leaves_changes_no_exit_code(
    environment: dict[str, str], tmp_path: Path, verb: str
) -> None:
    code, out, err = shell(f"$Q {verb} $PLAN --json | :", environment, tmp_path)
    assert (code, out, err) == (3, "", "")


def test_a_full_disk_is_told(environment: dict[str, str], tmp_path: Path) -> None:
    assert shell("$Q migrate $PLAN", environment, tmp_path)[0] == 3
    code, _, err = shell("$Q status >/dev/full", environment, tmp_path)
    assert code == 1
    assert err == "qpostcopy: error: stdout cannot be written: No space left on device\n"


def test_any_path_can_be_named(environment: dict[str, str], tmp_path: Path) -> None:
    line = "$Q profile validate $'/nowhere/\\xff\\u20ac.yaml'"
    for locale in ("C", "C.UTF-8"):
        code, _, err = shell(line, environment | {"LC_ALL": locale}, tmp_path)
        assert code == 2
        assert "cannot be read" in err
