"""Every exit code of the contract, by the real command and real QEMUs.

One row a code: how it comes about, the `status` and the place of the VM that go
with it, and that the VM is really there. `status` must agree afterwards.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from qpostcopy.errors import ExitCode
from tests.messages import documented
from tests.qmp.support import private_directory
from tests.vm.scene import (
    Ended,
    Scene,
    finish_after,
    held_back,
    read_stderr_until,
    read_until_phase,
    status,
    wait_until,
)

pytestmark = [pytest.mark.vm, pytest.mark.root]

#: Slow enough to act in the midst of postcopy.
SLOW = "4MiB/s"


# --- how they come about ------------------------------------------------------------------


def complete(scene: Scene) -> Ended:
    return scene.migrate()


def abort_too_late(scene: Scene) -> Ended:
    assert scene.migrate().rc == 0
    return scene.run("abort", "t", "--json")


def give_a_wrong_plan(scene: Scene) -> Ended:
    with changed_plan(scene, "limits: {", "limits: {pull: 3, "):
        return scene.migrate()


def name_a_socket_that_is_not_there(scene: Scene) -> Ended:
    with changed_plan(scene, "destination.qmp", "nowhere.qmp"):
        return scene.migrate()


def kill_the_handler_before_the_commit(scene: Scene) -> Ended:
    return scene.migrate(at="attach:before SIGKILL handler")


def let_the_time_limit_pass(scene: Scene) -> Ended:
    with changed_plan(scene, "limits: {", "limits: {before_switch: 1s, "), held_back(scene):
        return scene.migrate()


def hang_the_destination_for_good(scene: Scene) -> Ended:
    """It is told `cont` and never says whether it ran."""
    return scene.migrate(at="start_guest:before SIGSTOP destination")


def kill_the_destination_after_the_commit(scene: Scene) -> Ended:
    return scene.migrate(at="start_guest:after SIGKILL destination")


def signalled(number: signal.Signals) -> Callable[[Scene], Ended]:
    def cancel(scene: Scene) -> Ended:
        with held_back(scene):
            viewer = scene.start_migrate()
            read = read_until_phase(viewer, "prepare")
            viewer.send_signal(number)
            return finish_after(viewer, read)

    return cancel


def leave_the_display(scene: Scene) -> Ended:
    """Two signals after the commit; the migration goes on."""
    viewer = scene.start_migrate()
    read = read_until_phase(viewer, "postcopy")
    viewer.send_signal(signal.SIGINT)
    read_stderr_until(viewer, "once more leaves this display")
    viewer.send_signal(signal.SIGTERM)
    return finish_after(viewer, read)


@contextmanager
def changed_plan(scene: Scene, old: str, new: str) -> Iterator[None]:
    """The plan with a text in it replaced, for a while."""
    text = scene.plan.read_text()
    assert old in text
    scene.plan.write_text(text.replace(old, new))
    yield
    scene.plan.write_text(text)


# --- where the VM is then -----------------------------------------------------------------


def is_untouched(scene: Scene) -> None:
    """There never was a migration."""
    assert not scene.run_directory.exists()
    stays(scene)


def stays(scene: Scene) -> None:
    scene.assert_back()


def is_there(scene: Scene) -> None:
    scene.assert_same_ram()
    scene.assert_moved()


def arrives(scene: Scene) -> None:
    wait_until(lambda: scene.state.finished, "the migration ends")
    is_there(scene)


def resumes(scene: Scene) -> None:
    scene.destination.signal(signal.SIGCONT)
    assert scene.run("resume", "t", "--json").ended == ("completed", 0, "destination")
    is_there(scene)


def is_lost(scene: Scene) -> None:
    """The destination is dead; the source is never started again."""
    assert status(scene.source) == "postmigrate"
    assert not scene.destination.alive


# --- the table ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """How a code comes about, and all that goes with it."""

    code: int
    act: Callable[[Scene], Ended]
    status: str
    location: str
    then: Callable[[Scene], None]
    push: str = "unlimited"
    slow: bool = False


ROWS = (
    Row(0, complete, "completed", "destination", is_there),
    Row(1, abort_too_late, "error", "destination", is_there),
    Row(2, give_a_wrong_plan, "error", "unknown", is_untouched),
    Row(3, name_a_socket_that_is_not_there, "refused", "source", stays),
    Row(4, kill_the_handler_before_the_commit, "rolled-back", "source", stays),
    Row(5, let_the_time_limit_pass, "timed-out", "source", stays),
    Row(10, leave_the_display, "interrupted", "destination", arrives, push=SLOW),
    Row(10, hang_the_destination_for_good, "interrupted", "destination", resumes, slow=True),
    Row(11, kill_the_destination_after_the_commit, "failed", "ended", is_lost, push=SLOW),
    Row(130, signalled(signal.SIGINT), "cancelled", "source", stays),
    Row(143, signalled(signal.SIGTERM), "cancelled", "source", stays),
)


def test_no_code_is_missing() -> None:
    assert {row.code for row in ROWS} == {int(code) for code in ExitCode}


@pytest.fixture
def directory() -> Iterator[Path]:
    with private_directory() as path:
        yield path


#: Those that are reached in the quick run, too.
QUICK = {0, 3, 4, 130}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            row,
            id=f"{row.code}-{row.status}",
            marks=(pytest.mark.slow,) if row.slow or row.code not in QUICK else (),
        )
        for row in ROWS
    ],
)
def test_exit_code(directory: Path, row: Row) -> None:
    with Scene(directory, push=row.push) as scene:
        scene.fill(1)
        ended = row.act(scene)
        assert ended.ended == (row.status, row.code, row.location), scene.logs()
        if row.code:
            error = ended.result["error"]
            assert error["code"]
            assert error["message"]
        if scene.run_directory.exists():
            told = documented(scene.run("status", "t", "--json").out)
            assert told["vm_location"] == row.location
        row.then(scene)
