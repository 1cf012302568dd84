"""Real QEMUs: started, looked at, and gone when they have to be."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from qpostcopy.lab.vm import Backend, Vm, VmError, VmSpec
from tests.qmp.support import private_directory

pytestmark = pytest.mark.vm

MIB = 1 << 20


def test_a_started_vm_answers(tmp_path: Path) -> None:
    with Vm("vm", VmSpec((Backend("ram", 64 * MIB),), paused=True), tmp_path) as vm:
        assert vm.observer.status() == "prelaunch"
        assert vm.observer.version["major"] >= 7


def test_the_plans_monitor_is_qemus_own(tmp_path: Path) -> None:
    with (
        Vm("vm", VmSpec((Backend("ram", 64 * MIB),), incoming=True), tmp_path) as vm,
        socket.socket(socket.AF_UNIX) as sock,
    ):
        sock.connect(str(vm.qmp_path))
        peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        assert struct.unpack("3i", peer)[0] == vm.pid
        assert b'"QMP"' in sock.recv(4096)
        assert vm.observer.status() == "inmigrate"


def test_two_backends_of_odd_sizes(tmp_path: Path) -> None:
    sizes = (32 * MIB + 8192, 48 * MIB)
    backends = (Backend("ram0", sizes[0], None), Backend("ram1", sizes[1], None))
    with Vm("vm", VmSpec(backends, paused=True), tmp_path) as vm:
        found = vm.observer.execute("query-memdev")
        assert {dev["id"]: dev["size"] for dev in found} == {"ram0": sizes[0], "ram1": sizes[1]}
        assert all(dev["share"] for dev in found)
        mapped = Path(f"/proc/{vm.pid}/maps").read_text()
        for name, size in zip(("ram0", "ram1"), sizes, strict=True):
            status = os.fstat(vm.ram_fd(name))
            assert status.st_size == size
            assert f" {status.st_ino} " in mapped


@pytest.mark.parametrize(
    ("backend", "shared"),
    [
        (Backend("ram", 64 * MIB, kind="memory-backend-ram"), True),
        (Backend("ram", 64 * MIB, kind="memory-backend-memfd"), True),
        (Backend("ram", 64 * MIB, share=False), False),
    ],
)
def test_backends_that_cannot_be_migrated_start_too(
    tmp_path: Path, backend: Backend, shared: bool
) -> None:
    with Vm("vm", VmSpec((backend,), paused=True), tmp_path) as vm:
        (found,) = vm.observer.execute("query-memdev")
        assert found["share"] is shared


def test_a_vm_that_cannot_start_says_why(tmp_path: Path) -> None:
    spec = VmSpec((Backend("ram", 64 * MIB),), more=("-bogus",))
    with pytest.raises(VmError, match="-bogus: invalid option"):
        Vm("vm", spec, tmp_path).start()
    assert [path.name for path in tmp_path.iterdir()] == ["vm.log"]


def test_a_qemu_that_does_not_exist_is_named(tmp_path: Path) -> None:
    spec = VmSpec((Backend("ram", 64 * MIB),), qemu="/nowhere/qemu")
    with pytest.raises(VmError, match="/nowhere/qemu"):
        Vm("vm", spec, tmp_path).start()


_STARTS_ONE = """
import sys, threading
from pathlib import Path
from qpostcopy.lab.vm import Backend, Vm, VmSpec
user = int(sys.argv[2]) or None
vm = Vm("vm", VmSpec((Backend("ram", 64 << 20),), paused=True, user=user), Path(sys.argv[1]))
# In a thread that ends: the death signal of prctl(2) belongs to the thread that forked.
thread = threading.Thread(target=vm.start)
thread.start()
thread.join()
vm.observer.status()
print(vm.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.root
@pytest.mark.parametrize("user", [0, 65534])
def test_qemu_dies_with_the_process_that_started_it(user: int) -> None:
    """As another user, too: a change of user makes the kernel forget the death signal."""
    with (
        private_directory() as directory,
        subprocess.Popen(
            [sys.executable, "-c", _STARTS_ONE, str(directory), str(user)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as owner,
    ):
        assert owner.stdout
        pid = int(owner.stdout.readline())
        assert Path(f"/proc/{pid}").stat().st_uid == user
        pidfd = os.pidfd_open(pid)
        try:
            owner.send_signal(signal.SIGKILL)
            assert select.select([pidfd], [], [], 10)[0], "QEMU outlives its owner"
        finally:
            os.close(pidfd)
