"""Migrations of real QEMUs from the command line, and what an operator sees of them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qpostcopy.qmp.monitor import Monitor
from tests.qmp.support import private_directory
from tests.vm.scene import (
    MIB,
    Ended,
    Scene,
    assert_clean,
    finish,
    finish_after,
    held_back,
    read_until_phase,
    resumes,
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
    with Scene(directory) as made:
        made.fill(1)
        yield made


@pytest.mark.parametrize("sizes", [(32 * MIB,), (22 * MIB,), (16 * MIB, 18 * MIB)])
def test_a_paused_vm_byte_for_byte(directory: Path, sizes: tuple[int, ...]) -> None:
    with Scene(directory, sizes=sizes, running=False) as scene:
        scene.fill(2)
        ended = scene.migrate()
        assert ended.ended == ("completed", 0, "destination"), scene.logs()
        scene.assert_same_ram(start=0)
        assert status(scene.destination) == "prelaunch"
        assert resumes(scene.destination) == 0
        assert ended.result["downtime_ms"] is None
        assert ended.result["ram_bytes"] == sum(sizes)
        assert_clean(scene.destination)
        scene.assert_nothing_left()


def test_a_running_vm(scene: Scene) -> None:
    ended = scene.migrate()
    assert ended.ended == ("completed", 0, "destination"), scene.logs()
    scene.assert_same_ram()
    scene.assert_moved()
    assert status(scene.source) == "postmigrate"
    result = ended.result
    assert 0 < result["downtime_ms"] < 1000
    pages = result["pages"]
    kinds = ("hole", "zero", "precopy", "push", "demand", "around")
    assert pages["total"] == 32 * MIB // 4096 == sum(pages[kind] for kind in kinds)
    assert pages["push"] > 0
    assert result["bytes"]["wire"] > result["bytes"]["push"] > 0
    assert [phase["name"] for phase in result["phases"]] == [
        "prepare",
        "switchover",
        "postcopy",
        "complete",
    ]
    assert "error" not in result
    assert result["warnings"] == []


def test_the_stream_begins_with_prepare_and_ends_with_the_result(scene: Scene) -> None:
    messages = scene.migrate().messages
    assert messages[0]["type"] == "phase"
    assert messages[0]["phase"] == "prepare"
    assert messages[-1]["type"] == "result"
    assert {message["migration_id"] for message in messages} == {scene.state.migration_id}


def test_for_people_there_are_plain_lines_and_a_report(scene: Scene) -> None:
    ended = scene.run("migrate", str(scene.plan))
    assert ended.rc == 0
    assert "completed; the VM is at the destination" in ended.out
    assert "prepare: VM at: source; abort is safe" in ended.err
    assert "\x1b" not in ended.out + ended.err
    told = scene.run("status", "t")
    assert told.rc == 0
    assert "VM at: destination" in told.out
    assert "completed" in told.out


def test_the_source_quits(directory: Path) -> None:
    with Scene(directory, after="quit") as scene:
        assert scene.migrate().ended == ("completed", 0, "destination"), scene.logs()
        assert scene.source.wait(5.0) == 0
        assert status(scene.destination) == "running"


def test_on_to_a_third_qemu(directory: Path) -> None:
    """A destination that was migrated to is a source like any other."""
    with Scene(directory) as scene:
        scene.fill(3)
        assert scene.migrate().ended == ("completed", 0, "destination"), scene.logs()
        content = scene.ram(scene.destination)
        scene.source.kill()
        scene.move_on()
        assert scene.migrate().ended == ("completed", 0, "destination"), scene.logs()
        assert scene.ram(scene.destination) == content
        assert status(scene.destination) == "running"


def test_a_state_directory_below_a_relative_path(scene: Scene, directory: Path) -> None:
    """Our processes work in `/`, and still mean the same place."""
    environment = scene.environment() | {"QPOSTCOPY_RUN_DIR": "run"}
    command = [sys.executable, "-m", "qpostcopy", "migrate", str(scene.plan), "--json"]
    done = subprocess.run(
        command, env=environment, cwd=directory, capture_output=True, text=True, timeout=90
    )
    ended = Ended(done.returncode, done.stdout, done.stderr)
    assert ended.ended == ("completed", 0, "destination"), scene.logs()
    scene.assert_moved()


# --- the eyes of these tests --------------------------------------------------------------


async def run_unseen(qmp: Path) -> None:
    """The guest runs, and its observer has read nothing of that."""
    monitor = await Monitor.connect(qmp)
    try:
        await monitor.execute("cont")
    finally:
        await monitor.close()


def test_a_dead_vm_is_still_known_to_have_run(directory: Path) -> None:
    """All the tests of "never both" rest on this: SIGKILL does not hide a RESUME."""
    with Scene(directory, running=False) as scene:
        asyncio.run(run_unseen(scene.source.qmp_path))
        scene.source.signal(signal.SIGKILL)
        wait_until(lambda: not scene.source.alive, "it is gone")
        assert resumes(scene.source) == 1
        assert status(scene.source) == "gone"


# --- refused ------------------------------------------------------------------------------


def test_check_and_dry_run_change_nothing(scene: Scene) -> None:
    for arguments in (["check"], ["migrate", "--dry-run"]):
        ended = scene.run(*arguments, str(scene.plan), "--json")
        assert ended.rc == 0, ended.err
        assert ended.result["status"] == "ready"
    assert not scene.run_directory.exists() or not list(scene.run_directory.iterdir())
    scene.assert_back()


def test_check_tells_of_a_profile_that_does_not_fit(scene: Scene) -> None:
    text = "profile: {version: 1, name: far, push: [{range: {start: 33MiB}}]}\n"
    scene.plan.write_text(scene.plan.read_text() + text)
    ended = scene.run("check", str(scene.plan), "--json")
    assert (ended.rc, ended.result["error"]["code"]) == (2, "schedule"), ended.out
    assert "push[0].range.start" in ended.err
    scene.assert_back()


def test_check_warns(scene: Scene) -> None:
    """Memory that the destination has already is only said."""
    os.pwrite(scene.destination.ram_fd("ram0"), b"x" * MIB, 8 * MIB)
    ended = scene.run("check", str(scene.plan), "--json")
    assert ended.ended == ("ready", 0, "source"), ended.err
    assert [w["code"] for w in ended.result["warnings"]] == ["destination-prealloc"]


@pytest.mark.slow
def test_a_second_migration_meanwhile_is_refused(directory: Path) -> None:
    with Scene(directory, push="2MiB/s") as scene:
        scene.fill(1)
        first = scene.start_migrate()
        read = read_until_phase(first, "postcopy")
        second = scene.run("migrate", str(scene.plan))
        assert second.rc == 3
        assert "refused; the VM is at the destination" in second.out
        assert f"qpostcopy status {read_id(read)}" in second.err
        told = scene.run("status", "t")
        assert told.out.startswith(read_id(read))
        assert "VM at: destination" in told.out
        assert "which came later, was refused" in told.err
        assert finish_after(first, read).ended == ("completed", 0, "destination"), scene.logs()
        scene.assert_moved()
        assert scene.migrate().ended == ("refused", 3, "destination")
        assert scene.run("check", str(scene.plan), "--json").ended == ("refused", 3, "destination")


def read_id(stream: str) -> str:
    return str(json.loads(stream.splitlines()[0])["migration_id"])


# --- interrupted by its operator ----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after_ms", [150, 250, 350, 450])
def test_a_signal_in_the_first_half_second(
    scene: Scene, number: signal.Signals, after_ms: int
) -> None:
    """Whatever the exit code says, it is so: nothing goes on that it does not tell of."""
    with held_back(scene):
        viewer = scene.start_migrate()
        time.sleep(after_ms / 1000)  # not a state: a moment is what this is about
        viewer.send_signal(number)
        ended = finish(viewer)
    assert ended.rc != 0
    if scene.run_directory.exists():  # else it was not we who died, but Python while it started
        assert ended.ended == ("cancelled", 128 + number, "source"), scene.logs()
    scene.assert_back()


def test_a_viewer_killed_in_the_first_moments(scene: Scene) -> None:
    """A controller that was not told to go never goes."""
    viewer = scene.start_migrate()
    wait_until(lambda: bool(list(scene.run_directory.glob("*/controller.log"))), "it begins")
    viewer.send_signal(signal.SIGKILL)
    finish(viewer)
    scene.assert_nothing_left()
    assert scene.state.read_result() is None, scene.logs()
    assert not (scene.state.path / "page-server.log").exists()
    scene.assert_back()


@pytest.mark.slow
def test_a_controller_that_hangs(directory: Path) -> None:
    """status says so, abort names the place, resume takes over and brings it to its end."""
    with Scene(directory, push="2MiB/s") as scene:
        scene.fill(1)
        viewer = scene.start_migrate()
        read_until_phase(viewer, "postcopy")
        controller = scene.state.state.controller
        assert controller is not None
        os.kill(controller.pid, signal.SIGSTOP)
        told = json.loads(scene.run("status", "t", "--json").out)
        assert (told["controller"], told["vm_location"]) == ("silent", "destination")
        assert "takes over" in told["message"]
        aborted = scene.run("abort", "t", "--json")
        assert aborted.ended == ("error", 1, "destination")
        assert "VM at: destination; abort is not possible" in aborted.err
        ended = scene.run("resume", "t", "--json")
        assert ended.ended == ("completed", 0, "destination"), scene.logs()
        assert not controller.alive()
        # Its viewer recovers at the same time: one of the two starts, the other one watches.
        assert finish(viewer).rc == 0
        scene.assert_same_ram()
        scene.assert_moved()


def test_abort_from_elsewhere(scene: Scene) -> None:
    with held_back(scene):
        viewer = scene.start_migrate()
        read = read_until_phase(viewer, "prepare")
        told = scene.run("status")
        assert "abort is safe" in told.out
        aborted = scene.run("abort", "t")
        assert aborted.rc == 0, aborted.err
    assert finish_after(viewer, read).ended == ("cancelled", 143, "source")
    scene.assert_back()
    assert scene.run("abort", "t").rc == 1


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_a_migration_outlives_its_viewer(directory: Path, number: signal.Signals) -> None:
    with Scene(directory, push="8MiB/s") as scene:
        scene.fill(1)
        viewer = scene.start_migrate()
        read_until_phase(viewer, "postcopy")
        viewer.send_signal(number)
        assert finish(viewer).rc == -number
        told = json.loads(scene.run("status", "t", "--json").out)
        assert told["phase"] in ("postcopy", "complete")
        assert told["vm_location"] == "destination"
        wait_until(lambda: scene.state.finished, "the migration ends")
        scene.assert_same_ram()
        scene.assert_moved()
