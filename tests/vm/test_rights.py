"""What a migration leaves in QEMUs without rights, however it ends: nothing.

That it works at all for them, test_setups.py shows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qpostcopy.lab.vm import Vm
from qpostcopy.uffd.attach import find_devices
from tests.qmp.support import private_directory
from tests.vm.scene import Scene
from tests.vm.setups import NOBODY, NOBODY_ELSE, UNPRIVILEGED

pytestmark = [pytest.mark.vm, pytest.mark.root]


@pytest.fixture
def scene() -> Iterator[Scene]:
    with private_directory() as path, Scene(path, setup=UNPRIVILEGED) as made:
        yield made


def open_files(vm: Vm) -> set[str]:
    """What QEMU has open, but for the monitor connection that it has while we look."""
    vm.observer.status()
    entries = Path(f"/proc/{vm.pid}/fd")
    return {f"{entry.name} {os.readlink(entry)}" for entry in entries.iterdir()}  # noqa: PTH115


def test_it_has_no_right_and_is_filtered(scene: Scene) -> None:
    """Else this file tests nothing."""
    for vm, user in ((scene.source, NOBODY), (scene.destination, NOBODY_ELSE)):
        status = Path(f"/proc/{vm.pid}/status").read_text()
        assert f"\nUid:\t{user}\t{user}\t{user}\t{user}\n" in status
        assert "\nCapEff:\t0000000000000000\n" in status
        assert "\nSeccomp:\t2\n" in status


def turn_back(scene: Scene, at: str, code: int, *, too_late: bool = False) -> None:
    """:param too_late: the trouble may be seen after the destination was told
    `migrate-incoming`, which is then ended.
    """
    before = {vm: open_files(vm) for vm in (scene.source, scene.destination)}
    ended = scene.migrate(at=at)
    assert ended.rc == code, ended.err + scene.logs()
    scene.assert_back()
    assert too_late or scene.destination.alive, scene.logs()
    for vm, files in before.items():
        assert not vm.alive or open_files(vm) == files


@pytest.mark.parametrize(("companion", "too_late"), [("page-server", True), ("handler", False)])
def test_a_companion_killed_with_everything_lent(
    scene: Scene, companion: str, too_late: bool
) -> None:
    """Lent, and not used: the connection for device state, at both."""
    turn_back(scene, f"open_device_state:after SIGKILL {companion}", 4, too_late=too_late)


def test_cancelled_and_tried_again(scene: Scene) -> None:
    """Three calls before `migrate-incoming`: however slowly the signal is seen, it is in time."""
    turn_back(scene, "open_device_state:before SIGTERM controller", 143)
    ended = scene.migrate()
    assert ended.rc == 0, ended.err + scene.logs()
    assert "lending it /dev/userfaultfd" in scene.logs()
    scene.assert_moved()
    assert find_devices(scene.destination.pid) == ()
