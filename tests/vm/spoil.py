"""Ways to make a set-up of two QEMUs wrong, and to make it right again; the table is in wrong.py.

Where this machine cannot have a situation (a VFIO device without an IOMMU, a
machine short of memory) only the file that tells of it is a false one, in a
mount namespace of that one process.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qpostcopy.core import inject_syscall, uffd_api, uffd_register_missing
from qpostcopy.lab.vm import Backend, Vm
from qpostcopy.uffd.attach import obtain
from qpostcopy.vmas import Vma, read_vmas
from tests.networks import namespace
from tests.vm.debian import qemu_of
from tests.vm.scene import Scene, wait_until

MIB = 1 << 20
RAM_BYTES = 8 * MIB
RAM = Backend("ram0", RAM_BYTES, mem_path=None)
RAM1 = Backend("ram1", RAM_BYTES, mem_path=None)
#: What the source has in memory, where a row is about room for it.
DATA_BYTES = 6 * MIB

_SYS_MADVISE = 28
_MADV_DOFORK = 11

Values = dict[str, Any]
#: Before the QEMUs start, in their directory; gives fields of the destination's VmSpec.
Before = Callable[[Path], AbstractContextManager[Values]]
#: While both run.
Meanwhile = Callable[[Scene], AbstractContextManager[None]]
#: What the command is run through.
Through = Callable[[Path], list[str]]

# --- before they start --------------------------------------------------------------------


@contextmanager
def on_tmpfs(directory: Path, options: str, more: str = "") -> Iterator[Values]:
    """The destination's RAM is in a tmpfs of its own."""
    place = directory / "tmpfs"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)
    try:
        yield {"backends": (replace(RAM, mem_path=place, more=more),)}
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@contextmanager
def huge_page_pool(_: Path) -> Iterator[Values]:
    """Enough huge pages for both."""
    setting = Path("/proc/sys/vm/nr_hugepages")
    before, wanted = int(setting.read_text()), 2 * RAM_BYTES // (2 * MIB)
    try:
        setting.write_text(str(before + wanted))
    except OSError:
        pytest.skip("no right to reserve huge pages (vm.nr_hugepages)")
    try:
        if int(setting.read_text()) < before + wanted:
            pytest.skip("no huge pages to reserve: memory is fragmented")
        yield {}
    finally:
        setting.write_text(str(before))


@contextmanager
def block_device_server(directory: Path) -> Iterator[Values]:
    """A disk that another process serves, in guest RAM: vhost-user-blk."""
    path = directory / "vhost-user"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        command = ["setpriv", "--pdeathsig", "KILL", "--", "qemu-storage-daemon"]
        command += ["--blockdev", "null-co,node-name=disk,size=1048576,read-zeroes=on", "--export"]
        export = f"vhost-user-blk,id=e,node-name=disk,addr.type=fd,addr.str={listener.fileno()}"
        daemon = subprocess.Popen([*command, export], pass_fds=[listener.fileno()])
    try:
        yield {
            "more": (
                *("-chardev", f"socket,id=disk,path={path}"),
                *("-device", "vhost-user-blk-pci,chardev=disk"),
            )
        }
    finally:
        daemon.kill()
        daemon.wait()


@contextmanager
def an_open_vfio_group(directory: Path) -> Iterator[Values]:
    """QEMU holds /dev/vfio/12 open: a mere file, for this machine has no IOMMU."""
    launcher = directory / "qemu-with-vfio"
    launcher.write_text(
        "#!/bin/sh\nexec unshare -m bash -c '"
        'mount -t tmpfs none /dev && mkdir /dev/vfio && exec {fd}<>/dev/vfio/12 && exec "$@"'
        '\' bash qemu-system-x86_64 "$@"\n'
    )
    launcher.chmod(0o755)
    yield {"qemu": str(launcher)}


@contextmanager
def one_file(directory: Path, blocks: int) -> Iterator[Values]:
    """Memory backends in one file."""
    path = Path(f"/dev/shm/{directory.name}")
    try:
        backends = tuple(replace(one, mem_path=path) for one in (RAM, RAM1)[:blocks])
        yield {"backends": backends}
    finally:
        path.unlink(missing_ok=True)


SAME_FILE = Path(f"/dev/shm/qpc-same-{os.getpid()}")


@contextmanager
def same_file(_: Path) -> Iterator[Values]:
    try:
        yield {}
    finally:
        SAME_FILE.unlink(missing_ok=True)


@contextmanager
def of_trixie(_: Path, backend: Backend) -> Iterator[Values]:
    """The destination is QEMU 10.0, with RAM of another kind."""
    machine = ("-machine", "pc-q35-7.2")
    try:
        yield {"qemu": qemu_of("trixie"), "backends": (backend,), "more": machine}
    finally:
        SAME_FILE.unlink(missing_ok=True)


# --- while they run -----------------------------------------------------------------------


def ram_of(vm: Vm) -> Vma:
    """QEMU's mapping of its only RAM block."""
    vmas = [vma for vma in read_vmas(vm.pid) if f"{vm.name}-ram0" in vma.path]
    assert len(vmas) == 1
    return vmas[0]


@contextmanager
def mapped_by_another(vm: Vm) -> Iterator[None]:
    """As a debugger or a vhost-user back-end maps it; not a page of it is touched."""
    code = (
        "import mmap, sys\n"
        f"m = mmap.mmap({vm.ram_fd('ram0')}, mmap.PAGESIZE, prot=mmap.PROT_READ)\n"
        "print(flush=True); sys.stdin.read()"
    )
    with helper(code, pass_fds=[vm.ram_fd("ram0")]):
        yield


@contextmanager
def traced(vm: Vm) -> Iterator[None]:
    """As by a debugger: PTRACE_SEIZE, which does not stop it."""
    code = (
        "import ctypes, sys\n"
        f"assert ctypes.CDLL(None).ptrace(0x4206, {vm.pid}, None, None) == 0\n"
        "print(flush=True); sys.stdin.read()"
    )
    with helper(code):
        yield


@contextmanager
def helper(code: str, pass_fds: tuple[int, ...] | list[int] = ()) -> Iterator[None]:
    """A Python process that says when it is ready, and ends with its standard input."""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=pass_fds,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"\n"
        yield
        process.communicate()


@contextmanager
def in_another_userfaultfd(vm: Vm) -> Iterator[None]:
    """As a background snapshot of QEMU's leaves it."""
    obtained, mapping = obtain(vm.pid), ram_of(vm)
    try:
        uffd_api(obtained.uffd)
        uffd_register_missing(obtained.uffd, mapping.start, mapping.length_bytes)
        yield
    finally:
        os.close(obtained.uffd)


@contextmanager
def inherited_by_children(vm: Vm) -> Iterator[None]:
    """MADV_DONTFORK taken back: QEMU makes the call, we put it into its mouth."""
    mapping = ram_of(vm)
    args = [mapping.start, mapping.length_bytes, _MADV_DOFORK]
    assert inject_syscall(vm.pid, _SYS_MADVISE, args, 5000) == 0
    yield


@contextmanager
def held(vm: Vm) -> Iterator[None]:
    """Another client has the monitor."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(vm.qmp_path))
        assert client.recv(4096).startswith(b'{"QMP"')
        yield


@contextmanager
def both_held(scene: Scene) -> Iterator[None]:
    with held(scene.source), held(scene.destination):
        yield


@contextmanager
def migrated_already(scene: Scene) -> Iterator[None]:
    """By QEMU's own migration."""
    uri = f"unix:{scene.directory / 'native'}"
    scene.destination.observer.execute("migrate-incoming", {"uri": uri})
    scene.source.observer.execute("migrate", {"uri": uri})
    for vm in (scene.destination, scene.source):
        wait_until(lambda vm=vm: migration_of(vm) == "completed", "the migration ends")  # type: ignore[misc]
    yield


def migration_of(vm: Vm) -> str | None:
    status: str | None = vm.observer.execute("query-migrate").get("status")
    return status


@contextmanager
def other_pid_in_plan(scene: Scene) -> Iterator[None]:
    """The plan's `pid` is not QEMU's, but of whoever started it, say."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:
        socket_of_source = f"qmp: {scene.source.qmp_path}"
        text = scene.plan.read_text()
        scene.plan.write_text(
            text.replace(socket_of_source, f"{socket_of_source}, pid: {other.pid}")
        )
        yield
        other.communicate()


@contextmanager
def netns_in_plan(scene: Scene, name: str) -> Iterator[None]:
    """The handler is to live there."""
    socket = f"qmp: {scene.destination.qmp_path}"
    text = scene.plan.read_text().replace(socket, f"{socket}, netns: {name}")
    scene.plan.write_text(f"{text}lanes: {{listen: 10.9.0.2, insecure: true}}\n")
    yield


@contextmanager
def netns_of_another(scene: Scene) -> Iterator[None]:
    with namespace("east") as name, netns_in_plan(scene, name):
        yield


@contextmanager
def told_where_to_listen(scene: Scene) -> Iterator[None]:
    """`migrate-incoming` was sent to the destination: it waits for QEMU's own migration."""
    uri = f"unix:{scene.directory / 'native'}"
    scene.destination.observer.execute("migrate-incoming", {"uri": uri})
    yield


@contextmanager
def saving(scene: Scene) -> Iterator[None]:
    """A migration of QEMU's own goes out of the source, slowly."""
    observer = scene.source.observer
    with filled(scene):
        observer.execute("migrate-set-parameters", {"max-bandwidth": 4096})
        observer.execute("migrate", {"uri": "exec:cat > /dev/null"})
        wait_until(lambda: migration_of(scene.source) == "active", "it has begun")
        try:
            yield
        finally:
            observer.execute("migrate_cancel")


@contextmanager
def filled(scene: Scene) -> Iterator[None]:
    """The source has data that need room."""
    os.pwrite(scene.source.ram_fd("ram0"), os.urandom(DATA_BYTES), 0)
    yield


@contextmanager
def in_a_small_cgroup(scene: Scene) -> Iterator[None]:
    """The destination may have a little less than the source's data."""
    top, limit = memory_cgroup()
    group = top / scene.directory.name
    with filled(scene):
        group.mkdir()
        (group / limit).write_text(str(DATA_BYTES - MIB))
        (group / "cgroup.procs").write_text(str(scene.destination.pid))
        try:
            yield
        finally:
            scene.destination.kill()
            wait_until(lambda: not (group / "cgroup.procs").read_text(), "it is empty")
            group.rmdir()


def memory_cgroup() -> tuple[Path, str]:
    """Where a memory cgroup can be made, and how its limit is called: v1 or v2."""
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory" and (own := v1 / path.lstrip("/")).is_dir():
            return own, "memory.limit_in_bytes"
    control = v2 / "cgroup.subtree_control"
    if control.exists() and "memory" in control.read_text().split():
        return v2, "memory.max"
    pytest.skip("no memory cgroup can be made here")


# --- what the command is run through ------------------------------------------------------


def without(*rights: str) -> Through:
    """Capabilities that not even root gets back."""
    dropped = ",".join(f"-{right}" for right in rights)
    return lambda _: ["setpriv", f"--bounding-set={dropped}", f"--inh-caps={dropped}", "--"]


def in_user_namespace(_: Path) -> list[str]:
    """Root with every capability, over nothing but its own."""
    return ["unshare", "--user", "--map-root-user", "--"]


def without_userfaultfd_device(_: Path) -> list[str]:
    """/dev/userfaultfd cannot be opened, as in a container that was not given it."""
    device = "/dev/userfaultfd"
    closed = f"mount --bind {device} {device} && mount -o remount,bind,nodev {device}"
    return ["unshare", "-m", "sh", "-c", f'{closed} && exec "$@"', "sh"]


def with_little_memory(directory: Path) -> list[str]:
    """/proc/meminfo tells of less than there is, in a mount namespace of the command's own."""
    told = directory / "meminfo"
    told.write_text(f"MemTotal: 65536 kB\nMemAvailable: {(DATA_BYTES + 60 * MIB) >> 10} kB\n")
    return ["unshare", "-m", "sh", "-c", f'mount --bind {told} /proc/meminfo && exec "$@"', "sh"]
