"""What can be said of one side alone. See preflight.py.

Each check is a generator of findings over one SideFacts; it knows nothing of
the plan and nothing of the other side.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from qpostcopy.core.types import PAGE_BYTES
from qpostcopy.qmp.schema import BlockFacts, SideFacts

MIB = 1 << 20
#: What QEMU may carry itself without a word: ROMs, video memory, a small pflash.
UNSHARED_REMARK_BYTES = 64 * MIB

BACKEND_REMEDY = (
    "start QEMU with -object memory-backend-file,id=ram,size=...,mem-path=/dev/shm,share=on "
    "-machine ...,memory-backend=ram"
)
_NEEDED_RIGHTS = ("CAP_SYS_PTRACE",)
#: QEMU migration states in which nothing is under way.
_IDLE_MIGRATIONS = frozenset({None, "none", "completed", "failed", "cancelled"})
#: Run states of a source that can be moved: it runs, or somebody paused it.
_MOVABLE = frozenset({"running", "paused", "prelaunch", "suspended"})
_PINNING = re.compile(r"^(vfio|vhost-vdpa|rdma|pvrdma|x-vfio-user)")
_OUTSIDE = re.compile(r"^(ivshmem|x-pci-proxy|.*vhost-user)")
_HINTING = re.compile(r"^virtio-balloon.*,free-page-hint=on$")


class Severity(StrEnum):
    """`ERROR` refuses the migration, `WARNING` only says so."""

    ERROR = "error"
    WARNING = "warning"


Where = Literal["source", "destination", "both"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found, where, and what can be done about it."""

    code: str
    side: Where
    message: str
    remedy: str
    severity: Severity = Severity.ERROR


Findings = Iterator[Finding]


def warn(code: str, side: Where, message: str, remedy: str) -> Finding:
    return Finding(code, side, message, remedy, Severity.WARNING)


# --- each side by itself ------------------------------------------------------------------


def _blocks(facts: SideFacts) -> Findings:
    if not facts.blocks:
        yield Finding(
            "no-ram-block",
            facts.role,
            f"QEMU {facts.pid} has no memory backend of its own as guest RAM",
            BACKEND_REMEDY,
        )
    for block in facts.blocks:
        yield from _backend(facts, block)
        if block.share and block.device is not None:
            yield from _mapping(facts, block)
    files = Counter(file_of(block) for block in facts.blocks if block.inode)
    for block in facts.blocks:
        if files[file_of(block)] > 1:
            yield Finding(
                "blocks-share-a-file",
                facts.role,
                f"block {block.name} lies in the same file ({block.mem_path}) as another block",
                "give each memory backend a file of its own; a directory as mem-path does",
            )


def _backend(facts: SideFacts, block: BlockFacts) -> Findings:
    """Of what kind of memory is it made?"""
    what = f"block {block.name} ({block.backend}, mem-path {block.mem_path})"
    if not block.share:
        yield Finding(
            "ram-not-shared",
            facts.role,
            f"{what} is private to QEMU: share is off",
            f"add share=on; {BACKEND_REMEDY}",
        )
        return
    if _may_be_copied(facts, block):
        yield Finding(
            "backend-not-skipped",
            facts.role,
            f"{what}: QEMU {facts.qemu_version} may copy such a block itself, x-ignore-shared "
            "is sure to skip named files only",
            BACKEND_REMEDY,
        )
    if block.device is None:
        if not facts.attach_refusal:  # else nothing can be found, and that has its own finding
            yield Finding(
                "ram-file-not-found",
                facts.role,
                f"{what}: no mapping of process {facts.pid} leads to its file",
                f"if {facts.pid} is not QEMU, name QEMU's `pid` in the plan; else {BACKEND_REMEDY}",
            )
    elif block.page_bytes != PAGE_BYTES or block.filesystem == "hugetlbfs":
        yield Finding(
            "huge-pages",
            facts.role,
            f"{what} has pages of {block.page_bytes} bytes; this version moves {PAGE_BYTES}",
            "put guest RAM on tmpfs, without hugetlb",
        )
    elif block.filesystem != "tmpfs":
        yield Finding(
            "ram-not-on-tmpfs",
            facts.role,
            f"{what} is on {block.filesystem or 'an unknown file system'}; userfaultfd needs tmpfs",
            BACKEND_REMEDY,
        )


def _may_be_copied(facts: SideFacts, block: BlockFacts) -> bool:
    """Whether x-ignore-shared may pass over this shared block.

    5.2 sends memory-backend-ram, 10.0 all but named files (tests/vm/test_stream.py). No behaviour
    tells beforehand; for memfds the version does: qemu_ram_is_named_file() came to QEMU's
    migration/ram.c with 8.1.
    """
    if block.backend == "memory-backend-memfd":
        return version(facts) >= (8, 1)
    return block.backend != "memory-backend-file"


def _mapping(facts: SideFacts, block: BlockFacts) -> Findings:
    """How does QEMU map it?"""
    maps = block.mappings
    ends = [mapping.offset_bytes + mapping.length_bytes for mapping in maps]
    if sum(mapping.length_bytes for mapping in maps) < block.size_bytes or (
        max(ends, default=0) > block.size_bytes
    ):
        yield Finding(
            "mapping-incomplete",
            facts.role,
            f"block {block.name}: QEMU maps bytes {min((m.offset_bytes for m in maps), default=0)}"
            f"..{max(ends, default=0)} of its file, not 0..{block.size_bytes}",
            "give the block a file of its own, without an offset",
        )
    if not all(mapping.dontfork for mapping in maps):
        yield Finding(
            "fork-may-copy",
            facts.role,
            f"block {block.name} is not marked MADV_DONTFORK: a child that QEMU forks would "
            "read missing pages as zeroes",
            "use a QEMU of Linux that marks its RAM (all of 5.2 to 10.0 do)",
        )
    if any(mapping.uffd_registered for mapping in maps):
        yield Finding(
            "userfaultfd-present",
            facts.role,
            f"block {block.name} is registered with a userfaultfd already (QEMU's descriptors: "
            f"{', '.join(map(str, facts.userfaults)) or 'none'})",
            "end the other post-copy, snapshot or migration of this QEMU first, or restart it",
        )


def _rights(facts: SideFacts) -> Findings:
    missing = [right for right in _NEEDED_RIGHTS if right not in facts.effective_rights]
    if not {"CAP_SYS_ADMIN", "CAP_CHECKPOINT_RESTORE"} & set(facts.effective_rights):
        missing.append("CAP_SYS_ADMIN")
    if missing:
        yield Finding(
            "rights-missing",
            facts.role,
            f"we run without {', '.join(missing)}, and need it to reach QEMU {facts.pid}'s memory",
            "run qpostcopy as root",
        )
    elif facts.attach_refusal:
        yield Finding(
            "attach-refused",
            facts.role,
            f"the kernel does not let us reach into QEMU {facts.pid}: {facts.attach_refusal}",
            "run qpostcopy outside of containers and user namespaces, set kernel.yama.ptrace_scope "
            "below 3, and look what a security module (SELinux, AppArmor) forbids",
        )


def _kernel(facts: SideFacts) -> Findings:
    for missing in facts.kernel_missing:
        yield Finding(
            "kernel-feature-missing",
            facts.role,
            f"Linux {facts.kernel_release} on {facts.host} lacks {missing}",
            "boot a kernel that has it (Debian 12's has all that is needed)",
        )


def _neighbours(facts: SideFacts) -> Findings:
    for other in facts.other_mappers:
        yield Finding(
            "other-mapper",
            facts.role,
            f"process {other.pid} ({other.command}) maps block {other.block}: a page that it "
            "touches appears as zeroes, unseen by us",
            "a vhost-user backend, a debugger: end it; another VM: give each VM RAM files of its "
            "own",
        )


def _devices(facts: SideFacts) -> Findings:
    for device in facts.devices:
        if _PINNING.match(device):
            yield Finding(
                "device-pins-ram",
                facts.role,
                f"{device} pins guest RAM: its DMA goes past page faults",
                "unplug it before the migration",
            )
        elif _OUTSIDE.match(device):
            yield Finding(
                "device-outside-qemu",
                facts.role,
                f"{device}: another process works in guest RAM, past QEMU",
                "use a device that QEMU or the kernel serves (virtio-net with vhost is fine)",
            )
        elif _HINTING.match(device) and facts.role == "source":
            # qemu_guest_free_page_hint() in QEMU's migration/ram.c clears bits of a bitmap that
            # blocks left out by x-ignore-shared do not have: seen with 5.2, 7.2 and 10.0.
            yield Finding(
                "free-page-hint",
                facts.role,
                f"{device}: the first hint of the guest during a migration with x-ignore-shared "
                "crashes the source QEMU, and the VM with it",
                "unplug the balloon (device_del), or start QEMU without free-page-hint=on; "
                "free-page-reporting=on is fine",
            )


def _blockers(facts: SideFacts) -> Findings:
    for reason in facts.migration_blockers:
        yield Finding(
            "migration-blocked",
            facts.role,
            f"QEMU says that it cannot be migrated: {reason}",
            "remove what it names",
        )
    if "x-ignore-shared" not in facts.capabilities:
        yield Finding(
            "capability-missing",
            facts.role,
            f"QEMU {facts.qemu_version} does not know the capability x-ignore-shared",
            "use QEMU 5.2 or later",
        )
    status = facts.migration_status
    if facts.listening and status in _IDLE_MIGRATIONS and facts.run_status == "inmigrate":
        status = "setup"
    if status not in _IDLE_MIGRATIONS:
        yield Finding(
            "migration-under-way",
            facts.role,
            f"QEMU {facts.pid} has a migration of its own that is in state {status}",
            "wait for it to end, or cancel it with migrate_cancel"
            if facts.role == "source"
            else "start it anew with -incoming defer, and send it no migrate-incoming",
        )


def _unshared(facts: SideFacts) -> Findings:
    if facts.unshared_bytes > UNSHARED_REMARK_BYTES:
        yield warn(
            "much-unshared-ram",
            facts.role,
            f"{mib(facts.unshared_bytes)} of RAM blocks are not ours to move: QEMU sends them "
            "while the guest stands still",
            "make large video memory or NVDIMMs smaller, or back them with shared files",
        )


EACH_SIDE: tuple[Callable[[SideFacts], Findings], ...] = (
    _blocks,
    _rights,
    _kernel,
    _neighbours,
    _devices,
    _blockers,
    _unshared,
)


# --- the source, the destination ----------------------------------------------------------


def source_state(source: SideFacts) -> Findings:
    if source.run_status not in _MOVABLE:
        yield Finding(
            "source-not-movable",
            "source",
            f"the source QEMU {source.pid} is {source.run_status}",
            "a source must be running or paused"
            + ("; did you swap source and destination?" if source.run_status == "inmigrate" else "")
            + (
                "; it was migrated away: never `cont` it while its guest runs elsewhere"
                if source.run_status == "postmigrate"
                else ""
            ),
        )


def _userfaultfd(destination: SideFacts) -> Findings:
    """Can this QEMU be made to create one?"""
    who = f"QEMU {destination.pid} (uid {destination.uid})"
    if destination.userfaultfd == "none":
        yield Finding(
            "userfaultfd-not-permitted",
            "destination",
            f"{who} may not create a userfaultfd, and there is no /dev/userfaultfd that we could "
            "lend it",
            "run qpostcopy as root on Linux 6.1 or later (a container must be given the device); "
            "or sysctl vm.unprivileged_userfaultfd=1",
        )
    if destination.filter_refusal:
        yield Finding(
            "filter-in-the-way",
            "destination",
            f"{who} has a seccomp filter that we cannot suspend for the calls that we have it "
            f"make: {destination.filter_refusal}",
            "run qpostcopy as root and outside of containers; or start QEMU without -sandbox",
        )


def destination_state(destination: SideFacts) -> Findings:
    yield from _userfaultfd(destination)
    if destination.run_status != "inmigrate":
        yield Finding(
            "destination-not-waiting",
            "destination",
            f"the destination QEMU {destination.pid} is {destination.run_status}, not inmigrate",
            "start it with -incoming defer; a QEMU that ran a guest cannot be filled",
        )
    if destination.tracer:
        yield Finding(
            "traced",
            "destination",
            f"process {destination.tracer} traces QEMU {destination.pid}; a process can have one "
            "tracer only, and we must be it for a moment",
            "end or detach that debugger or tracer",
        )
    if destination.mem_lock:
        yield Finding(
            "memory-locked",
            "destination",
            f"QEMU {destination.pid} locks its memory: every page would be filled at once",
            "start the destination without -overcommit mem-lock=on",
        )
    for block in destination.blocks:
        if any(mapping.huge_pages for mapping in block.mappings):
            yield Finding(
                "shared-huge-pages",
                "destination",
                f"block {block.name} may be backed by transparent huge pages (shmem_enabled is "
                f"{destination.shmem_huge_pages or 'unknown'}): one placed page looks like 512",
                "echo never > /sys/kernel/mm/transparent_hugepage/shmem_enabled, mount the tmpfs "
                "without huge=, and start the destination anew",
            )
        if block.allocated_bytes:
            yield warn(
                "destination-prealloc",
                "destination",
                f"{mib(block.allocated_bytes)} of block {block.name} are allocated already and "
                "will be given back first",
                "start the destination without prealloc=on",
            )


def file_of(block: BlockFacts) -> tuple[int | None, int | None]:
    """What tells one RAM file from another, on one machine."""
    return block.device, block.inode


def version(facts: SideFacts) -> tuple[int, ...]:
    """Leading numbers: `7.2.22 (Debian ...)` -> (7, 2). Unknown: (0,)."""
    found = re.match(r"(\d+)\.(\d+)", facts.qemu_version)
    return tuple(map(int, found.groups())) if found else (0,)


def mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:.1f} MiB"
