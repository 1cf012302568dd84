"""Two network namespaces and a wire between them: the pages and device state go over it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from qpostcopy.process import Process
from qpostcopy.uffd.inject_helper import is_stopped
from tests.networks import (
    Link,
    ip,
    link,
    namespace,
    namespace_named,
    namespace_of,
    remove_namespace,
)
from tests.qmp.support import private_directory
from tests.vm.bytes_case import write_runs
from tests.vm.scene import MIB, Scene, finish_after, kill, read_until_phase, status, wait_until

pytestmark = [pytest.mark.vm, pytest.mark.root]

SIZES = (34 * MIB,)


@pytest.fixture
def wire() -> Iterator[Link]:
    with link() as made:
        yield made


@pytest.fixture
def directory() -> Iterator[Path]:
    with private_directory() as path:
        yield path


def put_apart(scene: Scene, wire: Link) -> None:
    """Each companion into a namespace of its own; both QEMUs stay in ours."""
    text = scene.plan.read_text()
    for vm, name in ((scene.source, wire.west), (scene.destination, wire.east)):
        text = text.replace(f"qmp: {vm.qmp_path}", f"qmp: {vm.qmp_path}, netns: {name}")
    scene.plan.write_text(f"{text}lanes: {{listen: {wire.east_address}, insecure: true}}\n")


def companions(scene: Scene) -> list[Process]:
    state = scene.state.state
    return [one for one in (state.source.companion, state.destination.companion) if one]


def wait_until_at_home(scene: Scene, wire: Link) -> None:
    """One that was written down just now may be about to enter."""
    homes = [namespace_named(wire.west), namespace_named(wire.east)]
    wait_until(
        lambda: [namespace_of(one.pid) for one in companions(scene)] == homes,
        "each companion in its namespace",
    )


def test_every_byte_crosses_the_wire(directory: Path, wire: Link) -> None:
    with Scene(directory, sizes=SIZES, running=False) as scene:
        put_apart(scene, wire)
        write_runs(scene, seed=7, hole_factor=1)
        result = scene.run_controller_here()
        assert result["status"] == "completed", f"{result}\n{scene.logs()}"
        scene.assert_same_ram(start=0)
        assert status(scene.destination) == "prelaunch"
        assert wire.received_bytes(wire.east) > result["bytes"]["wire"] > 4 * MIB
        scene.assert_nothing_left()


def test_device_state_crosses_it_too(directory: Path, wire: Link) -> None:
    """RAM that was never touched: nearly all that crosses is QEMU's own stream."""
    with Scene(directory, sizes=SIZES, running=False) as scene:
        put_apart(scene, wire)
        result = scene.run_controller_here()
        assert result["status"] == "completed", f"{result}\n{scene.logs()}"
        carried = scene.source.observer.execute("query-migrate")["ram"]["transferred"]
        assert wire.received_bytes(wire.east) > carried > 2 * result["bytes"]["wire"]


def test_a_loopback_that_is_down(directory: Path) -> None:
    """As each new namespace has it; whoever sees the message learns whose, and the way out."""
    with namespace("alone") as name, Scene(directory, sizes=SIZES) as scene:
        text = scene.plan.read_text()
        for vm in (scene.source, scene.destination):
            text = text.replace(f"qmp: {vm.qmp_path}", f"qmp: {vm.qmp_path}, netns: {name}")
        scene.plan.write_text(text)
        ended = scene.migrate()
        assert ended.ended == ("rolled-back", 4, "source"), scene.logs()
        assert "127.0.0.1" in ended.result["error"]["message"]
        assert f"ip -n {name} link set lo up" in ended.result["error"]["remedy"]
        ip("-n", name, "link", "set", "lo", "up")
        assert scene.migrate().ended == ("completed", 0, "destination"), scene.logs()


@pytest.mark.slow
def test_a_link_that_is_cut_under_device_state(directory: Path, wire: Link) -> None:
    """The source QEMU hangs in what it sends, and must be let go before it can run again."""
    with Scene(directory, sizes=SIZES) as scene:
        put_apart(scene, wire)
        scene.fill(1)
        wire.buffer_little()
        viewer = scene.start_migrate(at="load_device_state:before SIGSTOP controller")
        read = read_until_phase(viewer, "switchover")
        controller = scene.state.state.controller
        assert controller is not None
        wait_until(lambda: is_stopped(controller.pid), "the controller is stopped")
        wire.cut()
        os.kill(controller.pid, signal.SIGCONT)
        ended = finish_after(viewer, read)
        assert ended.ended == ("rolled-back", 4, "source"), scene.logs()
        # Whichever is first: our deadline, or the end of QEMU's own patience with the link.
        codes = {"switchover-timeout", "migration-failed"}
        assert ended.result["error"]["code"] in codes, ended.result
        scene.assert_back()


def test_a_teardown_while_the_guest_stands_still(directory: Path, wire: Link) -> None:
    """Namespaces and companions go at once: the guest runs on where it was."""
    with Scene(directory, sizes=SIZES) as scene:
        put_apart(scene, wire)
        viewer = scene.start_migrate(at="load_device_state:before SIGSTOP controller")
        read = read_until_phase(viewer, "switchover")
        controller = scene.state.state.controller
        assert controller is not None
        wait_until(lambda: is_stopped(controller.pid), "the controller is stopped")
        for name in (wire.west, wire.east):
            remove_namespace(name)
        for companion in companions(scene):
            kill(companion)
        os.kill(controller.pid, signal.SIGCONT)
        assert finish_after(viewer, read).ended == ("rolled-back", 4, "source"), scene.logs()
        scene.assert_back()


def test_a_handler_that_is_killed_comes_back_in_its_namespace(directory: Path, wire: Link) -> None:
    with Scene(directory, sizes=SIZES, push="8MiB/s") as scene:
        put_apart(scene, wire)
        scene.fill(1)
        viewer = scene.start_migrate()
        read_until_phase(viewer, "postcopy")
        wait_until_at_home(scene, wire)
        _, dead = companions(scene)
        kill(dead)
        wait_until(lambda: dead not in companions(scene), "another handler")
        wait_until_at_home(scene, wire)
        viewer.communicate(timeout=60)
        assert viewer.returncode == 0, scene.logs()
        scene.assert_same_ram()
        scene.assert_moved()


@pytest.mark.slow
def test_resume_starts_them_in_their_namespaces(directory: Path, wire: Link) -> None:
    with Scene(directory, sizes=SIZES, push="4MiB/s") as scene:
        put_apart(scene, wire)
        scene.fill(1)
        viewer = scene.start_migrate()
        read_until_phase(viewer, "postcopy")
        viewer.kill()  # it would resume by itself
        viewer.communicate()
        dead = companions(scene)
        for process in (scene.state.state.controller, *dead):
            kill(process)
        wait_until(lambda: not scene.state.controller_alive(), "the controller's end")
        scene.plan.unlink()
        resumed = scene.popen("resume", "t", "--json")
        wait_until(lambda: not {*dead} & {*companions(scene)}, "other companions")
        wait_until_at_home(scene, wire)
        resumed.communicate(timeout=60)
        assert resumed.returncode == 0, scene.logs()
        scene.assert_same_ram()
        scene.assert_moved()
