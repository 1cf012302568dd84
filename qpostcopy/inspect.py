"""The facts of one side: everything preflight wants to know, gathered without changing anything.

Works on a running source as on a destination that waits for a migration. Kernel
features are found by trying them on ourselves, never by comparing versions.
What cannot be seen is reported as missing or empty; preflight decides what that means.
Where the kernel does not let us look at QEMU's process, `attach_refusal` says so,
and what QEMU's monitor says is gathered all the same.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import platform
import re
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

from qpostcopy.cgroups import memory_limit
from qpostcopy.core import CoreError, uffd_api
from qpostcopy.errors import RefusedError
from qpostcopy.process import Process
from qpostcopy.qmp.connection import CommandError
from qpostcopy.qmp.schema import BlockFacts, OtherMapper, SideFacts
from qpostcopy.regions import (
    Execute,
    RegionsError,
    discover_blocks,
    discover_unshared_bytes,
    is_empty,
    open_ram,
    punch_empty,
)
from qpostcopy.uffd.attach import find_userfaultfds
from qpostcopy.uffd.rights import filter_refusal, way_to_userfaultfd

Found = TypeVar("Found")

#: Rights that some way of ours through the kernel asks for: bit in CapEff -> name.
RIGHTS = {
    5: "CAP_KILL",
    19: "CAP_SYS_PTRACE",
    21: "CAP_SYS_ADMIN",
    24: "CAP_SYS_RESOURCE",
    40: "CAP_CHECKPOINT_RESTORE",
}
#: QOM types that preflight has something to say about.
_NOTABLE = re.compile(
    r"^(vfio|vhost|virtio-mem|ivshmem|pvrdma|nvdimm|x-vfio-user|x-pci-proxy)"
    r"|.*vhost-user$"
)
_NOTABLE_FILES = (
    (re.compile(r"^/dev/vfio/"), "vfio"),
    (re.compile(r"^/dev/vhost-vdpa"), "vhost-vdpa"),
    (re.compile(r"^/dev/vhost-scsi"), "vhost-scsi"),
    (re.compile(r"^/dev/infiniband/"), "rdma"),
)
_SYS_USERFAULTFD = 323
_SYS_PIDFD_GETFD = 438
_YAMA = "/proc/sys/kernel/yama/ptrace_scope"


class QemuGoneError(RefusedError):
    """The QEMU process ended before all its facts were gathered."""


async def gather_facts(
    role: Literal["source", "destination"], execute: Execute, pid: int, greeting_version: str
) -> SideFacts:
    """All facts of one side.

    :param execute: runs a command of QEMU's, e.g. `Monitor.execute`.
    :param greeting_version: QEMU's version, from its greeting.
    :raise QemuGoneError: there is no such process, or it ended meanwhile.
    """
    process = Process.of(pid)
    if process is None:
        raise QemuGoneError(
            f"there is no process {pid}", remedy="leave `pid` out of the plan, or set it to `auto`"
        )
    gone = QemuGoneError(
        f"QEMU {pid} ended while it was looked at", remedy="start it again; its log says why"
    )
    try:
        facts = await _gather(role, execute, process, greeting_version)
    except OSError as error:
        if Process.of(pid) == process:
            raise
        raise gone from error
    if Process.of(pid) != process:
        raise gone
    return facts


async def _gather(
    role: Literal["source", "destination"],
    execute: Execute,
    process: Process,
    greeting_version: str,
) -> SideFacts:
    pid = process.pid
    status = await _object(execute, "query-status")
    migration = await _object(execute, "query-migrate")
    blocks = await discover_blocks(execute, pid)
    return SideFacts(
        role=role,
        host=socket.gethostname(),
        pid=pid,
        pid_start_ticks=process.start_ticks,
        uid=_uid(pid),
        machine=await _machine(execute),
        qemu_version=greeting_version,
        run_status=str(status.get("status")),
        running=bool(status.get("running")),
        migration_status=migration.get("status"),
        migration_blockers=tuple(migration.get("blocked-reasons", ())),
        listening=await _is_listening(execute, migration),
        capabilities=await _capabilities(execute),
        mem_lock=any(mapping.locked for block in blocks for mapping in block.mappings),
        blocks=blocks,
        unshared_bytes=await discover_unshared_bytes(execute, blocks),
        devices=await find_devices(execute, pid),
        other_mappers=tuple(await asyncio.to_thread(find_other_mappers, pid, blocks)),
        userfaults=await asyncio.to_thread(_if_allowed, find_userfaultfds, pid, ()),
        effective_rights=effective_rights(),
        userfaultfd=way_to_userfaultfd(pid),
        filter_refusal=filter_refusal(pid),
        attach_refusal=attach_refusal(pid),
        tracer=tracer(pid),
        kernel_release=platform.release(),
        kernel_missing=await asyncio.to_thread(missing_kernel_features),
        memory_available_bytes=memory_available_bytes(),
        tmpfs_available_bytes=await asyncio.to_thread(tmpfs_available_bytes, pid, blocks),
        memory_limit=memory_limit(pid),
        shmem_huge_pages=_selected("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        boot_id=_text("/proc/sys/kernel/random/boot_id"),
    )


def _if_allowed(look: Callable[[int], Found], pid: int, otherwise: Found) -> Found:
    with suppress(PermissionError):
        return look(pid)
    return otherwise


# --- QEMU ---------------------------------------------------------------------------------


async def _object(execute: Execute, command: str) -> dict[str, Any]:
    reply = await execute(command, {})
    if not isinstance(reply, dict):
        raise RegionsError(f"QEMU answered {command} with {reply!r}, not with an object")
    return reply


async def _list(execute: Execute, command: str, arguments: dict[str, object]) -> list[Any]:
    reply = await execute(command, arguments)
    return reply if isinstance(reply, list) else []


async def _machine(execute: Execute) -> str:
    kind = await execute("qom-get", {"path": "/machine", "property": "type"})
    return str(kind).removesuffix("-machine")


async def _is_listening(execute: Execute, migration: dict[str, Any]) -> bool:
    """Whether a destination was told where to listen: before 10.0 its status does not say so.

    Its address does (5.2 to 10.0); where that is no socket, what `yank` could end (6.0).
    """
    if migration.get("socket-address"):
        return True
    with suppress(CommandError):
        yankable = await _list(execute, "query-yank", {})
        return any(instance["type"] == "migration" for instance in yankable)
    return False


async def _capabilities(execute: Execute) -> dict[str, bool]:
    listed = await _list(execute, "query-migrate-capabilities", {})
    return {item["capability"]: item["state"] for item in listed}


async def find_devices(execute: Execute, pid: int) -> tuple[str, ...]:
    """Devices that matter: by QOM type, by network backend, by open device file."""
    found = set()
    for container in ("/machine/peripheral", "/machine/peripheral-anon", "/objects"):
        with suppress(CommandError):
            for item in await _list(execute, "qom-list", {"path": container}):
                kind = re.sub(r"^child<(.*)>$", r"\1", item["type"])
                if _NOTABLE.match(kind):
                    found.add(kind)
                if await _hints_free_pages(execute, kind, f"{container}/{item['name']}"):
                    found.add(f"{kind},free-page-hint=on")
    network = await execute("human-monitor-command", {"command-line": "info network"})
    found |= set(re.findall(r"type=(vhost-(?:user|vdpa))\b", str(network)))
    files = await asyncio.to_thread(_if_allowed, _device_files, pid, set[str]())
    return tuple(sorted(found | files))


async def _hints_free_pages(execute: Execute, kind: str, path: str) -> bool:
    with suppress(CommandError):
        return kind.startswith("virtio-balloon") and bool(
            await execute("qom-get", {"path": path, "property": "free-page-hint"})
        )
    return False


def _device_files(pid: int) -> set[str]:
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            link = str(entry.readlink())
            found |= {name for pattern, name in _NOTABLE_FILES if pattern.match(link)}
    return found


# --- other processes ----------------------------------------------------------------------


def find_other_mappers(pid: int, blocks: Iterable[BlockFacts]) -> list[OtherMapper]:
    """Processes besides `pid` that map a RAM file. Those that we may not look at are passed over.

    A mere open descriptor does no harm and is not reported.
    """
    names = {(block.device, block.inode): block.name for block in blocks if block.inode}
    found = []
    for other in _pids():
        if other == pid:
            continue
        with suppress(OSError):
            for file in _mapped_files(Path(f"/proc/{other}/maps").read_bytes()):
                if file in names:
                    command = _text(f"/proc/{other}/comm")
                    found.append(OtherMapper(pid=other, command=command, block=names[file]))
    return found


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _mapped_files(maps: bytes) -> set[tuple[int, int]]:
    files = set()
    for line in maps.splitlines():
        words = line.split(None, 5)
        if words[4] != b"0":
            major, _, minor = words[3].partition(b":")
            files.add((os.makedev(int(major, 16), int(minor, 16)), int(words[4])))
    return files


# --- ourselves and the kernel -------------------------------------------------------------


def effective_rights() -> tuple[str, ...]:
    """Of the rights that matter, those that this process has."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return tuple(right for bit, right in RIGHTS.items() if int(value, 16) >> bit & 1)
    return ()


def attach_refusal(pid: int) -> str:
    """Why we may not reach into that process; empty: we may.

    Opening /proc/PID/mem asks the kernel just what ptrace(2) and pidfd_getfd(2) will ask
    (PTRACE_MODE_ATTACH), security modules and user namespaces included, and changes nothing.

    :raise OSError: it has ended.
    """
    try:
        os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC))
    except PermissionError as error:
        scope = _text(_YAMA)
        return f"{error.strerror}" + (f", kernel.yama.ptrace_scope is {scope}" if scope else "")
    return ""


def tracer(pid: int) -> str:
    """Who traces that process: `4711 (gdb)`; empty: nobody."""
    found = re.search(r"^TracerPid:\s+(\d+)", _text(f"/proc/{pid}/status"), re.MULTILINE)
    if found is None or found[1] == "0":
        return ""
    return f"{found[1]} ({_text(f'/proc/{found[1]}/comm')})"


def missing_kernel_features() -> tuple[str, ...]:
    """What we need of the kernel and did not find, in an operator's words."""
    probes: tuple[Callable[[], str | None], ...] = (
        _probe_userfaultfd,
        _probe_pidfd_getfd,
        _probe_punching,
        _probe_map_files,
    )
    return tuple(missing for probe in probes if (missing := probe()))


def _syscall(number: int, *args: int) -> int:
    """Result, or -errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(number, *args))
    return result if result >= 0 else -ctypes.get_errno()


def _probe_userfaultfd() -> str | None:
    fd = _syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd == -errno.ENOSYS:
        return "userfaultfd (CONFIG_USERFAULTFD)"
    if fd < 0:
        return None  # not allowed is a matter of rights, not of the kernel
    try:
        uffd_api(fd)
    except CoreError:
        return "userfaultfd on shared memory (UFFD_FEATURE_MISSING_SHMEM)"
    finally:
        os.close(fd)
    return None


def _probe_pidfd_getfd() -> str | None:
    pidfd = os.pidfd_open(os.getpid())
    try:
        copy = _syscall(_SYS_PIDFD_GETFD, pidfd, pidfd, 0)
    finally:
        os.close(pidfd)
    if copy >= 0:
        os.close(copy)
    return "pidfd_getfd (Linux 5.6)" if copy == -errno.ENOSYS else None


def _probe_punching() -> str | None:
    """A page written, punched out and looked for: what `qpc-attach` does to RAM."""
    fd = os.memfd_create("qpostcopy-probe", os.MFD_CLOEXEC)
    try:
        os.truncate(fd, 8192)
        os.pwrite(fd, b"x", 4096)
        if is_empty(fd):
            return "SEEK_DATA on shared memory"
        punch_empty(fd, 8192)
        return None if is_empty(fd) else "FALLOC_FL_PUNCH_HOLE on shared memory"
    except (RegionsError, OSError):
        return "FALLOC_FL_PUNCH_HOLE on shared memory"
    finally:
        os.close(fd)


def _probe_map_files() -> str | None:
    there = Path("/proc/self/map_files").is_dir()
    return None if there else "/proc/PID/map_files"


def memory_available_bytes() -> int:
    """What the kernel thinks can be had without swapping (MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def tmpfs_available_bytes(pid: int, blocks: Iterable[BlockFacts]) -> int | None:
    """Free space of the fullest file system under a block; None: none of them has a limit."""
    available = []
    for block in blocks:
        if block.device is None:
            continue
        with suppress(RegionsError):
            fd = open_ram(pid, block, False)
            try:
                found = os.fstatvfs(fd)
            finally:
                os.close(fd)
            if found.f_blocks:  # a memfd's file system has no size
                available.append(found.f_bavail * found.f_frsize)
    return min(available, default=None)


def _uid(pid: int) -> int:
    """Effective user id (proc(5): Uid is real, effective, saved, file system)."""
    found = re.search(r"^Uid:\s+\d+\s+(\d+)", _text(f"/proc/{pid}/status"), re.MULTILINE)
    if found is None:
        raise ProcessLookupError(errno.ESRCH, f"no process {pid}")
    return int(found[1])


def _text(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _selected(path: str) -> str:
    """Of a sysfs setting like `always [never] force`: never."""
    found = re.search(r"\[(\w+)\]", _text(path))
    return found[1] if found else ""
