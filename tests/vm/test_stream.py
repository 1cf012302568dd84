"""QEMU's own stream: it carries device state, and guest RAM it must not carry (design: trap 1).

Preflight refuses what QEMU would copy. Here it is made to look away, so that the
last judge is seen at work: the stream itself, on every QEMU and kind of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qpostcopy import prepare
from qpostcopy.lab.vm import Backend
from qpostcopy.switchover import STREAM_SLACK_BYTES
from tests.qmp.support import private_directory
from tests.vm.scene import MIB, Scene
from tests.vm.setups import Setup

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.slow]

SIZES = (34 * MIB,)


@pytest.fixture
def directory() -> Iterator[Path]:
    with private_directory() as path:
        yield path


def setup_of(suite: str, kind: str) -> Setup:
    """Both sides with that suite's QEMU, RAM in that kind of backend; files in a directory."""

    def backends(sizes: tuple[int, ...]) -> tuple[Backend, ...]:
        return tuple(Backend(f"ram{n}", size, kind=kind) for n, size in enumerate(sizes))

    return Setup(kind, suite=suite, suite_there=suite, backends=backends)


@pytest.mark.parametrize(
    ("suite", "kind"),
    [
        ("", "memory-backend-memfd"),
        ("", "memory-backend-file"),
        ("bullseye", "memory-backend-memfd"),
        ("bullseye", "memory-backend-file"),
        ("trixie", "memory-backend-file"),
    ],
)
def test_ram_that_qemu_leaves_to_us(directory: Path, suite: str, kind: str) -> None:
    """What the stream carried, by QEMU's own account."""
    with Scene(directory, setup=setup_of(suite, kind), sizes=SIZES) as scene:
        result = scene.run_controller_here()
        assert result["status"] == "completed", scene.logs()
        carried = scene.source.observer.execute("query-migrate")["ram"]["transferred"]
        unshared = scene.state.state.unshared_bytes
        assert 0 < carried < unshared + STREAM_SLACK_BYTES < sum(SIZES)


@pytest.mark.parametrize(
    ("suite", "kind"),
    [
        ("bullseye", "memory-backend-ram"),
        ("trixie", "memory-backend-ram"),
        ("trixie", "memory-backend-memfd"),
        ("trixie", "memory-backend-shm"),
    ],
)
def test_ram_that_qemu_sends_itself(
    directory: Path, monkeypatch: pytest.MonkeyPatch, suite: str, kind: str
) -> None:
    """Preflight refuses it. If it did not, the guest would go on at the source."""
    with Scene(directory, setup=setup_of(suite, kind), sizes=SIZES) as scene:
        refused = scene.run_controller_here()
        assert refused["rc"] == 3
        assert {found["code"] for found in refused["error"]["findings"]} == {"backend-not-skipped"}
        monkeypatch.setattr(prepare, "judge", lambda *_: [])
        result = scene.run_controller_here()
        assert (result["status"], result["vm_location"]) == ("rolled-back", "source")
        assert result["error"]["code"] == "ram-in-stream", scene.logs()
        scene.assert_back()
