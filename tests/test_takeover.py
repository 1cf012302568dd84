"""A controller that is dead, at work, or silent; and one that comes too late."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qpostcopy.phases import Phase
from qpostcopy.process import Process
from qpostcopy.state import StateDirectory
from qpostcopy.takeover import ControllerState, controller_state, end_silent_controller
from tests.fake_world import write_plan
from tests.qmp.support import private_directory

SECONDS = 30.0
SOON_SECONDS = 0.5


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[StateDirectory]:
    with private_directory() as path:
        monkeypatch.setenv("QPOSTCOPY_RUN_DIR", str(path / "run"))
        yield StateDirectory.create(
            "web1",
            plan_text=write_plan(path / "plan.yaml").read_text(),
            profile="sequential",
            source_qmp=Path("/run/a.qmp"),
            destination_qmp=Path("/run/b.qmp"),
        )


class Started:
    """A controller that is up and waits for its `go`."""

    def __init__(self, directory: StateDirectory, *options: str) -> None:
        read, write = os.pipe2(os.O_CLOEXEC)
        command = [sys.executable, "-m", "qpostcopy.controller", str(directory.path)]
        self.child = subprocess.Popen(
            [*command, "--ready-fd", str(write), *options],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[write],
        )
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            self.ready = pipe.readline()

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.kill()
        self.child.communicate()


def look(directory: StateDirectory, within_seconds: float = SECONDS) -> ControllerState:
    return asyncio.run(controller_state(StateDirectory.open(directory.path), within_seconds))


def end(directory: StateDirectory) -> ControllerState:
    fresh = StateDirectory.open(directory.path)
    return asyncio.run(end_silent_controller(fresh, SOON_SECONDS))


def test_no_controller_is_a_dead_one(directory: StateDirectory) -> None:
    assert look(directory) is ControllerState.DEAD
    assert end(directory) is ControllerState.DEAD


def test_one_that_answers_is_left_alone(directory: StateDirectory) -> None:
    with Started(directory) as controller:
        assert controller.ready == b"ready\n"
        assert look(directory) is ControllerState.ALIVE
        assert asyncio.run(end_silent_controller(StateDirectory.open(directory.path), SECONDS)) is (
            ControllerState.ALIVE
        )
        assert controller.child.poll() is None


def test_one_that_hangs_is_silent_and_is_ended(directory: StateDirectory) -> None:
    with Started(directory) as controller:
        os.kill(controller.child.pid, signal.SIGSTOP)
        assert look(directory, SOON_SECONDS) is ControllerState.SILENT
        assert controller.child.poll() is None, "looking changes nothing"
        assert end(directory) is ControllerState.DEAD
        assert controller.child.wait(SECONDS) == -signal.SIGKILL
        with directory.lock():
            pass


def test_a_living_process_that_never_listens_is_silent(directory: StateDirectory) -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        directory.update(controller=Process.of(child.pid))
        assert look(directory, SOON_SECONDS) is ControllerState.SILENT
    finally:
        child.kill()
        child.wait()
    assert look(directory) is ControllerState.DEAD


@pytest.mark.parametrize("options", [(), ("--resume",)])
def test_who_comes_after_the_end_changes_nothing(
    directory: StateDirectory, options: tuple[str, ...]
) -> None:
    directory.update(phase=Phase.COMPLETE)
    directory.write_result({"status": "completed", "rc": 5})
    before = files_of(directory)
    with Started(directory, *options) as controller:
        assert controller.ready == b"ready\n", "its starter finds the result on disk"
        assert controller.child.wait(SECONDS) == 5
    assert files_of(directory) == before


def test_a_resumed_one_that_is_never_told_to_go_keeps_the_result(
    directory: StateDirectory,
) -> None:
    directory.write_result({"status": "interrupted", "rc": 10})
    with Started(directory, "--resume") as controller:
        controller.child.communicate(timeout=SECONDS)
    assert json.loads((directory.path / "result.json").read_text())["status"] == "interrupted"


def files_of(directory: StateDirectory) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in directory.path.iterdir() if path.name != "lock"
    }
