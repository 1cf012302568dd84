"""What a migration builds on in QEMU's devices, and that a guest's load on them finds mistakes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qpostcopy.lab.vm import Vm
from tests.qmp.support import private_directory
from tests.vm import peers
from tests.vm.scene import CHUNK_BYTES, MIB, wait_until
from tests.vm.series import Series
from tests.vm.setups import PLAIN, ROWS

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.slow]

DIRECT = next(row for row in ROWS if row.name == "devices-direct")
STREAM = {"uri": "exec:cat >/dev/null"}


@pytest.fixture
def directory() -> Iterator[Path]:
    with private_directory() as path:
        yield path


@pytest.fixture
def series(directory: Path) -> Iterator[Series]:
    with Series(directory, DIRECT) as made:
        yield made


def set_capabilities(vm: Vm, *names: str) -> None:
    listed = [{"capability": name, "state": True} for name in names]
    vm.observer.execute("migrate-set-capabilities", {"capabilities": listed})


def wait_migration(vm: Vm, status: str) -> None:
    wait_until(lambda: vm.observer.execute("query-migrate").get("status") == status, status)


def digests(vm: Vm) -> list[bytes]:
    """Of each part of guest RAM."""
    (backend,) = vm.spec.backends
    fd = vm.ram_fd(backend.name)
    return [
        hashlib.sha256(os.pread(fd, CHUNK_BYTES, offset)).digest()
        for offset in range(0, backend.size_bytes, CHUNK_BYTES)
    ]


def test_nothing_is_written_after_the_source_has_stopped(series: Series) -> None:
    """Whatever disks and network had under way, guest RAM is final at pre-switchover."""
    vm = series.here
    set_capabilities(vm, "x-ignore-shared", "pause-before-switchover", "late-block-activate")
    running = digests(vm)
    vm.observer.execute("migrate", STREAM)
    wait_migration(vm, "pre-switchover")
    stopped = digests(vm)
    vm.observer.execute("migrate-continue", {"state": "pre-switchover"})
    wait_migration(vm, "completed")
    assert vm.observer.status() == "postmigrate"
    assert digests(vm) == stopped
    assert running != stopped  # it could have been seen


@pytest.mark.parametrize("skipped", [True, False])
def test_qemu_says_how_much_ram_it_carries(directory: Path, skipped: bool) -> None:
    """What the last look before the commit asks for (switchover.confirm)."""
    with Vm("vm", PLAIN.source((64 * MIB,), paused=True), directory) as vm:
        if skipped:
            set_capabilities(vm, "x-ignore-shared")
        vm.observer.execute("migrate", STREAM)
        wait_migration(vm, "completed")
        carried = vm.observer.execute("query-migrate")["ram"]["total"]
        assert (carried < 4 * MIB) if skipped else (carried > 64 * MIB)


def test_wrong_content_is_found(series: Series, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that says something else, an echo with one bit changed."""
    assert series.host
    right = peers.sent_back
    monkeypatch.setattr(peers, "sent_back", lambda frame: right(frame)[:-1] + b"\xff")
    with (series.host.disks / "0.raw").open("r+b", buffering=0) as disk:
        for offset in range(0, 2 * MIB, 16384):
            disk.seek(offset + 100)
            disk.write(b"spoilt")
    wanted = {"/dev/vda direct", "/dev/vda cached", "network echo"}
    wait_until(lambda: wanted <= set(series.guest.corrupt_lines), "all are found")
    assert series.guest.reports[-1].corrupt >= len(wanted)


@pytest.mark.parametrize("in_order", [True, False])
def test_echoes_know_what_they_must_get(directory: Path, in_order: bool) -> None:
    echo = peers.Echo(directory / "echo.sock")
    try:
        for sequence in (1, 2, 3):
            echo.check(peers.make_message(sequence), in_order=in_order)
        assert (echo.messages, echo.wrong) == (3, [])
        echo.check(peers.make_message(3), in_order=in_order)
        assert len(echo.wrong) == 1
        echo.check(peers.make_message(7), in_order=in_order)
        assert len(echo.wrong) == (2 if in_order else 1)
        echo.check(peers.make_message(8)[:-1] + b"\0", in_order=in_order)
        assert len(echo.wrong) == (3 if in_order else 2)
    finally:
        echo.close()
