"""Never do both run: real QEMUs, and somebody dies or hangs at the worst moment.

QEMU itself is asked: a second monitor of each counts its RESUME events. After a
rollback the destination has never had one; after a commit the source has none.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qpostcopy.prepare import PREPARE
from qpostcopy.switchover import COMMIT, SWITCHOVER
from tests.qmp.support import private_directory
from tests.vm.scene import (
    MIB,
    Scene,
    assert_clean,
    finish,
    resumes,
    status,
    wait_until,
)

pytestmark = [pytest.mark.vm, pytest.mark.root]

STEPS = [step.__name__ for step in (*PREPARE, *SWITCHOVER, *COMMIT)]
#: One place is enough between two steps; these few also in the quick run.
PLACES = [f"{step}:before" for step in STEPS] + ["start_push:after"]
QUICK = {"attach:before", "load_device_state:before", "announce_commit:before", "inspect"}
COMMITTED = {f"{step.__name__}:before" for step in COMMIT} | {"start_push:after"}
STALL_SECONDS = 3.0
LOADING = ["stop_source", "serve_loading", "load_device_state", "confirm"]


def places(names: list[str]) -> list[object]:
    return [
        pytest.param(name, marks=() if name in QUICK else (pytest.mark.slow,)) for name in names
    ]


@pytest.fixture
def directory() -> Iterator[Path]:
    with private_directory() as path:
        yield path


@pytest.fixture
def scene(directory: Path) -> Iterator[Scene]:
    with Scene(directory) as made:
        made.fill(1)
        yield made


@pytest.mark.parametrize("place", places(PLACES))
def test_a_controller_killed_at_any_step(scene: Scene, place: str) -> None:
    """status tells where the VM is, resume finishes: back, or on."""
    state = scene.run_controller(at=f"{place} SIGKILL controller")
    assert not state.controller_alive()
    assert state.read_result() is None
    assert state.committed is (place in COMMITTED)
    assert not (status(scene.source) == "running" and status(scene.destination) == "running")
    told = json.loads(scene.run("status", "t", "--json").out)
    assert told["controller"] == "dead"
    assert told["vm_location"] == ("destination" if state.committed else "source")
    assert told["abort_safe"] is not state.committed
    ended = scene.run("resume", "t", "--json")
    if state.committed:
        assert ended.ended == ("completed", 0, "destination"), scene.logs()
        scene.assert_same_ram()
        scene.assert_moved()
    else:
        assert ended.ended == ("rolled-back", 4, "source"), scene.logs()
        scene.assert_back()


@pytest.mark.parametrize("place", ["load_device_state:before", "announce_commit:before"])
def test_migrate_recovers_by_itself_if_its_controller_dies(scene: Scene, place: str) -> None:
    ended = scene.migrate(at=f"{place} SIGKILL controller")
    assert "recovering by itself" in ended.err
    if place in COMMITTED:
        assert ended.ended == ("completed", 0, "destination"), scene.logs()
        scene.assert_moved()
    else:
        assert ended.ended == ("rolled-back", 4, "source"), scene.logs()
        scene.assert_back()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["handler", "destination"])
def test_a_destination_that_hangs_while_loading(scene: Scene, target: str) -> None:
    """Its QMP is dead, SIGTERM would do nothing: it is killed, proven gone, the source runs."""
    ended = scene.migrate(at=f"load_device_state:before SIGSTOP {target}")
    assert ended.ended == ("rolled-back", 4, "source"), scene.logs()
    assert not scene.destination.alive
    scene.assert_back()


@pytest.mark.parametrize("step", places(LOADING))
def test_a_destination_killed_before_the_commit(scene: Scene, step: str) -> None:
    ended = scene.migrate(at=f"{step}:before SIGKILL destination")
    assert ended.ended == ("rolled-back", 4, "source"), scene.logs()
    scene.assert_back()


@pytest.mark.parametrize("target", ["handler", "page-server"])
@pytest.mark.parametrize("step", places(["set_capabilities", *LOADING]))
def test_a_companion_killed_before_the_commit(scene: Scene, step: str, target: str) -> None:
    ended = scene.migrate(at=f"{step}:before SIGKILL {target}")
    assert ended.ended == ("rolled-back", 4, "source"), scene.logs()
    scene.assert_back()


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("step", ["announce_commit", "start_guest"])
def test_a_handler_lost_between_the_record_and_cont(scene: Scene, step: str, number: str) -> None:
    """Whether `cont` went out is unknown: only the destination is asked, only it is told."""
    ended = scene.migrate(at=f"{step}:before {number} handler")
    assert ended.ended == ("completed", 0, "destination"), scene.logs()
    scene.assert_same_ram()
    scene.assert_moved()


@pytest.mark.parametrize(
    "place", places(["record_commit:before", "announce_commit:before", "start_guest:before"])
)
def test_a_destination_killed_around_the_record(scene: Scene, place: str) -> None:
    """Either it was proven that it never got its `cont`, or the source does not run again."""
    ended = scene.migrate(at=f"{place} SIGKILL destination")
    assert not scene.destination.alive
    if ended.rc == 4:
        assert ended.ended == ("rolled-back", 4, "source"), scene.logs()
        scene.assert_back()
    else:
        assert ended.ended == ("failed", 11, "ended"), scene.logs()
        assert scene.state.state.cont_sent
        assert resumes(scene.source) == 0
        assert status(scene.source) == "postmigrate"


@pytest.mark.parametrize("target", ["handler", "page-server"])
def test_a_companion_killed_at_the_record(scene: Scene, target: str) -> None:
    """Back if it was seen in time, else on: both are right."""
    ended = scene.migrate(at=f"record_commit:before SIGKILL {target}")
    if scene.state.committed:
        assert ended.ended == ("completed", 0, "destination"), scene.logs()
        scene.assert_moved()
    else:
        assert ended.ended == ("rolled-back", 4, "source"), scene.logs()
        scene.assert_back()


@pytest.mark.parametrize(
    "step", places(["inspect", "hold_destination", "attach", "open_lanes", "load_device_state"])
)
def test_a_source_that_is_killed_is_told(scene: Scene, step: str) -> None:
    """Whenever it happens: the VM is gone, and nobody says that it runs at the source."""
    ended = scene.migrate(at=f"{step}:before SIGKILL source")
    assert ended.ended == ("failed", 11, "ended"), scene.logs()
    if step == "load_device_state":
        assert not scene.destination.alive
    else:
        assert status(scene.destination) == "inmigrate", scene.logs()
        assert_clean(scene.destination)
    scene.assert_nothing_left()


@pytest.mark.slow
def test_a_page_server_killed_while_the_source_stalls(scene: Scene) -> None:
    """The new page server has no monitor for a while: the source is asked until it answers."""

    def wake() -> None:
        wait_until(lambda: is_stopped(scene.source.pid), "the source QEMU is stopped")
        time.sleep(STALL_SECONDS)  # nothing to wait for: this is the stall
        os.kill(scene.source.pid, signal.SIGCONT)

    waking = threading.Thread(target=wake)
    waking.start()
    try:
        ended = scene.migrate(
            at="load_device_state:before SIGSTOP source; load_device_state:before "
            "SIGKILL page-server"
        )
    finally:
        waking.join()
    assert ended.ended == ("rolled-back", 4, "source"), scene.logs()
    scene.assert_back()


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_cont_that_is_refused_goes_back(directory: Path) -> None:
    """Somebody else has the disk's lock: the guest never ran there, so it runs here again."""
    image = directory / "disk.img"
    with image.open("wb") as file:
        file.truncate(MIB)
    scene = Scene(directory)
    disk = f"driver=raw,node-name=disk,file.driver=file,file.filename={image}"
    for vm in (scene.source, scene.destination):
        more = (*vm.spec.more, "-blockdev", disk, "-device", "virtio-blk-pci,drive=disk")
        vm.spec = dataclasses.replace(vm.spec, more=more)
    with scene, image.open("rb") as other:
        scene.fill(1)
        forbid_writers(other.fileno())
        viewer = scene.start_migrate()
        wait_until(lambda: not scene.destination.alive, "the destination QEMU is given up")
        other.close()
        ended = finish(viewer)
        assert ended.ended == ("rolled-back", 4, "source"), scene.logs()
        assert ended.result["error"]["code"] == "cont-refused"
        assert not scene.state.committed
        scene.assert_back()


def forbid_writers(fd: int) -> None:
    """As a QEMU that does not share writing: a read lock on byte 200 + 1 (file-posix.c)."""
    lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 201, 1, 0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
