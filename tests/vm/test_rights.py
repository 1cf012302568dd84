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
from tests.vm.setups import UNPRIVILEGED

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
    for vm in (scene.source, scene.destination):
        status = Path(f"/proc/{vm.pid}/status").read_text()
        assert "\nUid:\t65534\t65534\t65534\t65534\n" in status
        assert "\nCapEff:\t0000000000000000\n" in status
        assert "\nSeccomp:\t2\n" in status


@pytest.mark.parametrize(
    ("at", "code"),
    [
        # Lent, and not used: the connection for device state, at both.
        ("serve_faults:before SIGTERM controller", 143),
        ("open_device_state:after SIGKILL page-server", 4),
        ("open_device_state:after SIGKILL handler", 4),
    ],
)
def test_turned_back(scene: Scene, at: str, code: int) -> None:
    before = [open_files(scene.source), open_files(scene.destination)]
    ended = scene.migrate(at=at)
    assert ended.rc == code, ended.err + scene.logs()
    scene.assert_back()
    assert [open_files(scene.source), open_files(scene.destination)] == before
    # And once more, from the start, with the same QEMUs.
    ended = scene.migrate()
    assert ended.rc == 0, ended.err + scene.logs()
    assert "lending it /dev/userfaultfd" in scene.logs()
    scene.assert_moved()
    assert find_devices(scene.destination.pid) == ()
