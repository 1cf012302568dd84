"""After the commit: processes are killed, the guest waits a moment, nothing is lost."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qpostcopy.takeover import ControllerState, controller_state, end_silent_controller
from tests.qmp.support import private_directory
from tests.vm.scene import (
    Ended,
    Scene,
    finish_after,
    kill,
    read_until_phase,
    status,
    wait_until,
)

pytestmark = [pytest.mark.vm, pytest.mark.root]


@pytest.fixture
def directory() -> Iterator[Path]:
    with private_directory() as path:
        yield path


@pytest.fixture
def scene(directory: Path) -> Iterator[Scene]:
    """One whose postcopy takes some seconds."""
    with Scene(directory, push="8MiB/s") as made:
        made.fill(1)
        yield made


def in_postcopy(scene: Scene) -> tuple[subprocess.Popen[str], str]:
    viewer = scene.start_migrate()
    return viewer, read_until_phase(viewer, "postcopy")


def assert_completed(scene: Scene, ended: Ended) -> None:
    assert ended.ended == ("completed", 0, "destination"), scene.logs()
    scene.assert_same_ram()
    scene.assert_moved()


@pytest.mark.parametrize("victims", [("handler",), ("page-server",), ("handler", "page-server")])
def test_dead_companions_are_replaced(scene: Scene, victims: tuple[str, ...]) -> None:
    viewer, read = in_postcopy(scene)
    state = scene.state.state
    if "handler" in victims:
        kill(state.destination.companion)
    if "page-server" in victims:
        kill(state.source.companion)
    ended = finish_after(viewer, read)
    assert_completed(scene, ended)
    pages = ended.result["pages"]
    kinds = ("hole", "zero", "precopy", "push", "demand", "around")
    assert pages["total"] == sum(pages[kind] for kind in kinds)


@pytest.mark.slow
def test_a_paused_vm_too(directory: Path) -> None:
    """Every byte, the first megabyte too, with the handler killed in between."""
    with Scene(directory, push="8MiB/s", running=False) as scene:
        scene.fill(2)
        viewer, read = in_postcopy(scene)
        kill(scene.state.state.destination.companion)
        assert finish_after(viewer, read).ended == ("completed", 0, "destination"), scene.logs()
        scene.assert_same_ram(start=0)
        assert status(scene.destination) == "prelaunch"


@pytest.mark.parametrize("others", [(), ("handler",), ("handler", "page-server")])
def test_resume_after_the_controllers_death(scene: Scene, others: tuple[str, ...]) -> None:
    viewer, _ = in_postcopy(scene)
    viewer.kill()  # it would resume by itself
    viewer.communicate()
    state = scene.state.state
    kill(state.controller)
    if "handler" in others:
        kill(state.destination.companion)
    if "page-server" in others:
        kill(state.source.companion)
    wait_until(lambda: not scene.state.controller_alive(), "the controller's end")
    told = json.loads(scene.run("status", "t", "--json").out)
    assert told["controller"] == "dead"
    assert told["vm_location"] == "destination"
    assert "never `cont` the source" in told["message"]
    assert told["destination"]["companion"] == ("dead" if "handler" in others else "alive")
    assert_completed(scene, scene.run("resume", "t", "--json"))


@pytest.mark.slow
def test_repairs_are_bounded_and_resume_goes_on(directory: Path) -> None:
    with Scene(directory, push="1MiB/s") as scene:
        scene.fill(1)
        viewer, read = in_postcopy(scene)
        dead = None
        while viewer.poll() is None and scene.state.read_result() is None:
            handler = scene.state.state.destination.companion
            if handler == dead or handler is None or not handler.alive():
                wait_until(lambda: viewer.poll() is not None or _next_handler(scene), "a handler")
                continue
            kill(handler)
            dead = handler
        ended = finish_after(viewer, read)
        assert ended.ended == ("interrupted", 10, "destination"), scene.logs()
        assert "resume" in ended.result["error"]["remedy"]
        assert scene.state.state.phase == "interrupted"
        assert "go on with: qpostcopy resume" in scene.run("status", "t").out
        assert_completed(scene, scene.run("resume", "t", "--json"))


def _next_handler(scene: Scene) -> bool:
    handler = scene.state.state.destination.companion
    return handler is not None and handler.alive()


def test_a_destination_that_ends_by_itself(scene: Scene) -> None:
    """A guest that powers off is no failure. The firmware has put q35's PM1a at port 0x604."""
    viewer, read = in_postcopy(scene)
    power_off = {"command-line": "o/w 0x604 0x2000"}  # ACPI: SLP_EN of S5
    scene.destination.observer.execute("human-monitor-command", power_off)
    ended = finish_after(viewer, read)
    assert ended.ended == ("completed", 0, "ended"), scene.logs()
    scene.assert_nothing_left()


def test_a_destination_that_somebody_quits_is_told(scene: Scene) -> None:
    """That is not the guest's doing: the source keeps what it has."""
    viewer, read = in_postcopy(scene)
    scene.destination.observer.execute("quit")
    ended = finish_after(viewer, read)
    assert ended.ended == ("failed", 11, "ended"), scene.logs()
    assert "host-qmp-quit" in ended.result["error"]["message"]
    assert status(scene.source) == "postmigrate"
    scene.assert_nothing_left()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["handler", "page-server"])
def test_a_companion_that_hangs_is_replaced(scene: Scene, victim: str) -> None:
    """It lives and holds its lanes, and no event will ever tell: it is asked."""
    viewer, read = in_postcopy(scene)
    state = scene.state.state
    hung = state.destination.companion if victim == "handler" else state.source.companion
    assert hung is not None
    os.kill(hung.pid, signal.SIGSTOP)
    ended = finish_after(viewer, read)
    assert_completed(scene, ended)
    assert not hung.alive()


def test_a_handler_that_is_dead_when_all_is_placed(scene: Scene) -> None:
    """Killed at the last step: nothing of ours stays in the destination QEMU."""
    viewer, read = in_postcopy(scene)
    read += read_until_phase(viewer, "complete")
    kill(scene.state.state.destination.companion)
    ended = finish_after(viewer, read)
    assert_completed(scene, ended)


@pytest.mark.slow
def test_a_controller_that_hangs_is_taken_over(scene: Scene) -> None:
    viewer, _ = in_postcopy(scene)
    controller = scene.state.state.controller
    assert controller is not None
    os.kill(controller.pid, signal.SIGSTOP)
    viewer.kill()
    viewer.communicate()

    async def take_over() -> tuple[ControllerState, ControllerState]:
        seen = await controller_state(scene.state, 1.0)
        return seen, await end_silent_controller(scene.state, 1.0)

    assert asyncio.run(take_over()) == (ControllerState.SILENT, ControllerState.DEAD)
    assert not controller.alive()
    assert_completed(scene, scene.run("resume", "t", "--json"))


def test_a_destination_that_dies_is_told_and_the_source_is_not_started(scene: Scene) -> None:
    viewer, read = in_postcopy(scene)
    scene.destination.kill()
    ended = finish_after(viewer, read)
    assert ended.ended == ("failed", 11, "ended"), scene.logs()
    assert "source" in ended.result["error"]["message"]
    assert status(scene.source) == "postmigrate"
    scene.assert_nothing_left()
