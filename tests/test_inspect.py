"""Gathering facts of real QEMUs. Those set up wrongly: tests/vm/test_wrong.py."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from qpostcopy import inspect
from qpostcopy.core import CoreError
from qpostcopy.lab.vm import Backend, Vm, VmSpec
from qpostcopy.preflight import codes, judge, remark
from qpostcopy.qmp.monitor import Monitor
from qpostcopy.qmp.schema import SideFacts
from qpostcopy.regions import open_ram

pytestmark = [pytest.mark.vm, pytest.mark.root]

MIB = 1 << 20
RAM = Backend("ram0", 64 * MIB)
SOURCE = VmSpec((RAM,), paused=True)
DESTINATION = VmSpec((RAM,), incoming=True)


def gather(vm: Vm, role: Literal["source", "destination"]) -> SideFacts:
    async def ask() -> SideFacts:
        monitor = await Monitor.connect(vm.qmp_path)
        try:
            return await inspect.gather_facts(role, monitor.execute, vm.pid, "7.2.22")
        finally:
            await monitor.close()

    return asyncio.run(ask())


def state_of(vm: Vm) -> tuple[list[str], str]:
    """What an observer could see change: descriptors (but those of monitors), and mappings."""
    process = Path(f"/proc/{vm.pid}")
    links = [str(entry.readlink()) for entry in (process / "fd").iterdir()]
    files = sorted(link for link in links if "socket" not in link)
    return files, (process / "maps").read_text()


def test_two_good_sides(tmp_path: Path) -> None:
    with Vm("a", SOURCE, tmp_path) as a, Vm("b", DESTINATION, tmp_path) as b:
        before = state_of(b)
        source, destination = gather(a, "source"), gather(b, "destination")
        assert judge(source, destination) == []
        assert remark(source, destination) == []
        again = gather(b, "destination")
        of_machine = {"memory_available_bytes": 0, "tmpfs_available_bytes": None}
        assert dict(again) | of_machine == dict(destination) | of_machine
        assert state_of(b) == before
    assert (source.run_status, destination.run_status) == ("prelaunch", "inmigrate")
    assert source.machine.startswith("pc-q35-")
    assert source.uid == os.geteuid()
    assert destination.blocks[0].allocated_bytes == 0
    assert destination.kernel_missing == ()
    assert "CAP_SYS_PTRACE" in destination.effective_rights
    assert source.boot_id == destination.boot_id != ""


def test_a_running_source(tmp_path: Path) -> None:
    with Vm("a", replace(SOURCE, paused=False), tmp_path) as vm:
        facts = gather(vm, "source")
        assert facts.running
        assert facts.run_status == "running"
        assert facts.blocks[0].allocated_bytes > 0  # the firmware ran


def test_a_device_that_shares_memory_with_others(tmp_path: Path) -> None:
    more = (
        *("-object", "memory-backend-file,id=shared,size=1M,mem-path=/dev/shm,share=on"),
        *("-device", "ivshmem-plain,memdev=shared"),
    )
    with Vm("a", replace(SOURCE, more=more), tmp_path) as vm:
        assert gather(vm, "source").devices == ("ivshmem-plain",)


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        (",free-page-hint=on,iothread=io", ("virtio-balloon-pci,free-page-hint=on",)),
        (",free-page-reporting=on", ()),
    ],
)
def test_a_balloon_whose_guest_hints_free_pages(
    tmp_path: Path, options: str, seen: tuple[str, ...]
) -> None:
    more = ("-object", "iothread,id=io", "-device", f"virtio-balloon-pci{options}")
    with Vm("a", replace(SOURCE, more=more), tmp_path) as vm:
        assert gather(vm, "source").devices == seen


def test_prealloc_is_seen(tmp_path: Path) -> None:
    spec = replace(DESTINATION, backends=(replace(RAM, more="prealloc=on"),))
    with Vm("a", SOURCE, tmp_path) as a, Vm("b", spec, tmp_path) as b:
        destination = gather(b, "destination")
        assert destination.blocks[0].allocated_bytes == 64 * MIB
        source = gather(a, "source")
        assert judge(source, destination) == []
        assert codes(remark(source, destination)) == ["destination-prealloc"]


@contextmanager
def mapping_process(fd: int, length_bytes: int) -> Iterator[int]:
    """A process, not QEMU, that maps a RAM file (without touching it)."""
    code = (
        "import mmap, sys\n"
        f"m = mmap.mmap({fd}, {length_bytes}, mmap.MAP_SHARED, mmap.PROT_READ)\n"
        "print('mapped', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[fd],
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"mapped\n"
        yield process.pid
        process.communicate()


def test_another_process_that_maps_the_ram(tmp_path: Path) -> None:
    with Vm("b", DESTINATION, tmp_path) as vm:
        facts = gather(vm, "destination")
        fd = open_ram(vm.pid, facts.blocks[0], False)
        try:
            # an open descriptor alone is harmless
            assert gather(vm, "destination").other_mappers == ()
            with mapping_process(fd, mmap.PAGESIZE) as pid:
                (found,) = gather(vm, "destination").other_mappers
                assert (found.pid, found.block) == (pid, "ram0")
                assert found.command.startswith("python")
            assert gather(vm, "destination").other_mappers == ()
        finally:
            os.close(fd)


def test_a_qemu_that_has_ended(tmp_path: Path) -> None:
    async def execute(command: str, arguments: dict[str, object]) -> object:
        raise AssertionError(f"{command} was sent to nobody")

    with Vm("a", SOURCE, tmp_path) as vm:
        pid = vm.pid
    with pytest.raises(inspect.QemuGoneError):
        asyncio.run(inspect.gather_facts("source", execute, pid, "7.2.22"))


ENOSYS = -errno.ENOSYS


@pytest.mark.parametrize(
    ("name", "stand_in", "missing"),
    [
        ("_syscall", lambda number, *_: ENOSYS if number == inspect._SYS_USERFAULTFD else -1,
         "userfaultfd (CONFIG_USERFAULTFD)"),
        ("_syscall", lambda number, *_: ENOSYS if number == inspect._SYS_PIDFD_GETFD else -1,
         "pidfd_getfd (Linux 5.6)"),
        ("is_empty", lambda _: True, "SEEK_DATA on shared memory"),
        ("punch_empty", lambda *_: None, "FALLOC_FL_PUNCH_HOLE on shared memory"),
    ],
)  # fmt: skip
def test_a_kernel_that_lacks_something(
    monkeypatch: pytest.MonkeyPatch, name: str, stand_in: Callable[..., object], missing: str
) -> None:
    """This one lacks nothing, so one answer of its is a false one."""
    assert inspect.missing_kernel_features() == ()
    monkeypatch.setattr(inspect, name, stand_in)
    assert inspect.missing_kernel_features() == (missing,)


def test_a_kernel_without_userfaultfd_on_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(_: int) -> None:
        raise CoreError("UFFDIO_API", errno.EINVAL, 0, 0)

    monkeypatch.setattr(inspect, "uffd_api", refuses)
    (missing,) = inspect.missing_kernel_features()
    assert "UFFD_FEATURE_MISSING_SHMEM" in missing


def test_a_kernel_that_does_not_let_us_attach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Yama is not built into every kernel: its file is a false one, and so is the refusal."""

    def refused(path: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(inspect, "_text", lambda path: {inspect._YAMA: "3"}.get(path, ""))
    assert inspect.attach_refusal(os.getpid()) == ""
    monkeypatch.setattr(os, "open", refused)
    told = inspect.attach_refusal(os.getpid())
    assert told == "Permission denied, kernel.yama.ptrace_scope is 3"
