"""Real migrations in a real terminal: its keys, its size, and streams that are closed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.messages import documented_stream
from tests.qmp.support import private_directory
from tests.terminal import CTRL_C, Terminal
from tests.vm.scene import (
    SECONDS,
    Scene,
    finish,
    finish_after,
    held_back,
    kill,
    read_stderr_until,
    read_until_phase,
    wait_until,
)

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.slow]


@pytest.fixture
def directory() -> Iterator[Path]:
    with private_directory() as path:
        yield path


def terminal(scene: Scene, *arguments: str, columns: int = 80, **more: str) -> Terminal:
    command = [sys.executable, "-m", "qpostcopy", *arguments]
    return Terminal(command, scene.environment() | more, columns)


@contextmanager
def after(shown: Terminal, text: str) -> Iterator[None]:
    """What follows begins when it has said that."""
    shown.read_until(text)
    yield


def assert_fits(shown: Terminal, columns: int, since: int = 0) -> None:
    """Nothing wraps; only a path, which is one word, may be longer."""
    wide = [line for line in shown.lines(since) if len(line) > columns]
    assert [line for line in wide if "/" not in line] == [], shown.text


def test_ctrl_c_before_the_commit_cancels(directory: Path) -> None:
    with Scene(directory) as scene:
        scene.fill(1)
        with held_back(scene), terminal(scene, "migrate", str(scene.plan)) as shown:
            shown.read_until("prepare: VM at: source; abort is safe")
            shown.press(CTRL_C)
            shown.read_until("cancelling; the VM stays at the source")
            assert shown.end() == 130, shown.text
        assert "cancelled by SIGINT before the commit" in shown.text
        assert "the VM is at: source" in shown.text
        assert_fits(shown, 80)
        scene.assert_back()


def test_ctrl_c_after_the_commit_leaves_the_display(directory: Path) -> None:
    """The first warns, the second leaves; the migration goes on, and others watch it."""
    with Scene(directory, push="2MiB/s") as scene:
        scene.fill(1)
        with (
            terminal(scene, "migrate", str(scene.plan)) as shown,
            after(shown, "postcopy: VM at: destination; abort is not possible"),
            terminal(scene, "status", "--watch") as left,
            terminal(scene, "status", "t", "--watch", columns=40, LC_ALL="C") as narrow,
        ):
            shown.read_until("MiB/s")
            shown.press(CTRL_C)
            shown.read_until("once more leaves this display")
            shown.press(CTRL_C)
            assert shown.end() == 10, shown.text
            left.read_until("postcopy: VM at: destination")
            left.press(CTRL_C)
            assert left.end() == 130
            narrow.read_until("MiB")
            narrow.resize(64)
            narrow.read_until("MiB/s")
            assert narrow.end() == 0, narrow.text
        said = " ".join(shown.text.split())
        assert "display left; the VM is at the destination and the migration goes on" in said
        assert "the VM is at: destination; abort is not possible" in said
        assert "no longer watching" in left.text
        assert "completed; the VM is at the destination" in narrow.text
        assert narrow.text.isascii()
        assert_fits(shown, 80)
        assert_fits(narrow, 64)
        scene.assert_same_ram()
        scene.assert_moved()


def test_a_terminal_that_is_closed_ends_nothing(directory: Path) -> None:
    with Scene(directory, push="8MiB/s") as scene:
        scene.fill(1)
        with terminal(scene, "migrate", str(scene.plan), TERM="dumb", NO_COLOR="1") as shown:
            shown.read_until("postcopy: VM at: destination")
            assert shown.hang_up() == -signal.SIGHUP
        assert "\x1b" not in shown.text
        wait_until(lambda: scene.state.finished, "the migration ends")
        scene.assert_same_ram()
        scene.assert_moved()


def test_a_reader_that_leaves_and_a_closed_stderr_end_nothing(directory: Path) -> None:
    """`migrate --json 2>&- | head -1`: the exit code is still the migration's."""
    with Scene(directory, push="8MiB/s") as scene:
        scene.fill(1)
        line = 'set -o pipefail; "$0" -m qpostcopy migrate "$1" --json 2>&- | head -n 1'
        done = subprocess.run(
            ["bash", "-c", line, sys.executable, str(scene.plan)],
            env=scene.environment(),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert (done.returncode, done.stderr) == (0, ""), scene.logs()
        assert json.loads(done.stdout)["phase"] == "prepare"
        scene.assert_same_ram()
        scene.assert_moved()


def test_watch_survives_the_controller(directory: Path) -> None:
    """It says where the VM is, and goes on with the next controller."""
    with Scene(directory, push="2MiB/s") as scene:
        scene.fill(1)
        viewer = scene.start_migrate()
        read_until_phase(viewer, "postcopy")
        watched = scene.popen("status", "t", "--watch", "--json")
        plain = scene.popen("status", "t", "--watch")
        assert watched.stdout is not None
        first = watched.stdout.readline()
        read_stderr_until(plain, "postcopy: VM at: destination")
        viewer.kill()  # it would resume by itself
        viewer.communicate()
        kill(scene.state.state.controller)
        read_stderr_until(plain, "the VM is at the destination")
        assert scene.run("resume", "t", "--json").ended == ("completed", 0, "destination")
        told = finish_after(watched, first)
        assert told.rc == 0, told.err
        messages = documented_stream(told.out)
        states = [message["controller"] for message in messages if message["type"] == "status"]
        assert states[0] == "alive"
        assert "dead" in states
        assert messages[-1]["status"] == "completed"
        assert "completed; the VM is at the destination" in finish(plain).out
        scene.assert_same_ram()
        scene.assert_moved()
