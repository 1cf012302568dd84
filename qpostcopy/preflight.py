"""Is it safe to begin? Everything that speaks against it, all at once, each with its remedy.

Pure: two SideFacts in, findings out; nothing is looked up here. Codes
are stable: scripts and tests rely on them. `judge` gives what refuses, `remark`
what an operator should know and may ignore.

Why so much is asked: what could make a page wrong, hang a fault or run a guest
twice is refused *before* anything is touched, for after the switch there is no
way back. What can be said of one side alone is in sidechecks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from qpostcopy.errors import QpostcopyError
from qpostcopy.qmp.schema import SideFacts
from qpostcopy.sidechecks import (
    EACH_SIDE,
    MIB,
    Finding,
    Findings,
    Severity,
    Where,
    destination_state,
    file_of,
    mib,
    source_state,
    version,
    warn,
)

__all__ = [
    "Finding",
    "Severity",
    "already_migrating",
    "codes",
    "examine",
    "examine_side",
    "is_error",
    "judge",
    "remark",
    "unreachable",
]

#: Memory at the destination beyond the guest's own: page maps, buffers, tables.
_MEMORY_SLACK_BYTES = 64 * MIB


def judge(source: SideFacts, destination: SideFacts) -> list[Finding]:
    """What refuses this migration; empty: go ahead."""
    return [found for found in examine(source, destination) if is_error(found)]


def remark(source: SideFacts, destination: SideFacts) -> list[Finding]:
    """What does not refuse it, and should still be known."""
    return [found for found in examine(source, destination) if not is_error(found)]


def is_error(finding: Finding) -> bool:
    return finding.severity is Severity.ERROR


def examine(source: SideFacts, destination: SideFacts) -> list[Finding]:
    """Everything that was found, in the order of the checks."""
    found = [
        *examine_side(_without_each_other(source, destination)),
        *examine_side(_without_each_other(destination, source)),
    ]
    found += [finding for check in _BOTH for finding in check(source, destination)]
    return found


def examine_side(facts: SideFacts) -> list[Finding]:
    """What can be said of one side, though the other cannot be reached."""
    state = source_state if facts.role == "source" else destination_state
    return [finding for check in (*EACH_SIDE, state) for finding in check(facts)]


def _without_each_other(facts: SideFacts, other: SideFacts) -> SideFacts:
    """The other side's QEMU is no stranger where their RAM is the same file: `same-file` it is."""
    theirs = {file_of(block) for block in other.blocks if _same_machine(facts, other)}
    shared = {block.name for block in facts.blocks if block.inode and file_of(block) in theirs}
    strangers = tuple(
        mapper
        for mapper in facts.other_mappers
        if not (mapper.pid == other.pid and mapper.block in shared)
    )
    return facts.model_copy(update={"other_mappers": strangers})


def unreachable(role: Where, code: str, error: QpostcopyError) -> Finding:
    """A side of which nothing is known.

    :param code: the error's fixed name.
    """
    remedy = error.remedy or "start that QEMU with a -qmp socket for qpostcopy alone"
    return Finding(code, role, str(error), remedy)


def already_migrating(migration_id: str, phase: str) -> Finding:
    """Another migration has one of these QEMUs, and their monitors with it."""
    return Finding(
        "already-migrating",
        "both",
        f"another migration of this VM is unfinished: {migration_id} ({phase})",
        f"watch it with `qpostcopy status {migration_id}`; if its controller is dead: "
        f"`qpostcopy resume {migration_id}`",
    )


# --- both together ------------------------------------------------------------------------


def _same_qemu(source: SideFacts, destination: SideFacts) -> Findings:
    if _same_machine(source, destination) and source.pid == destination.pid:
        yield Finding(
            "same-qemu",
            "both",
            f"source and destination are one QEMU process, {source.pid}",
            "give the QMP socket of another QEMU, one that was started with -incoming defer",
        )


def _same_file(source: SideFacts, destination: SideFacts) -> Findings:
    if not _same_machine(source, destination) or source.pid == destination.pid:
        return
    files = {file_of(block): block.name for block in source.blocks if block.inode}
    for block in destination.blocks:
        of_source = files.get(file_of(block))
        if block.inode and of_source is not None:
            yield Finding(
                "same-file",
                "both",
                f"block {block.name} of the destination is the same file as block {of_source} of "
                f"the source ({block.mem_path}): emptying it would destroy the running guest",
                "give the destination a mem-path of its own; a directory such as /dev/shm is "
                "enough, each QEMU makes its own file there",
            )


def _equal_blocks(source: SideFacts, destination: SideFacts) -> Findings:
    theirs = {block.name: block for block in destination.blocks}
    ours = {block.name: block for block in source.blocks}
    for name in sorted(ours.keys() ^ theirs.keys()):
        has, lacks = ("source", "destination") if name in ours else ("destination", "source")
        yield _unequal(f"block {name} is at the {has}, and not at the {lacks}")
    for name in sorted(ours.keys() & theirs.keys()):
        here, there = ours[name], theirs[name]
        for what, at_source, at_destination in (
            ("bytes", here.size_bytes, there.size_bytes),
            ("bytes a page", here.page_bytes, there.page_bytes),
        ):
            if at_source != at_destination:
                yield _unequal(
                    f"block {name} has {at_source} {what} at the source, {at_destination} at the "
                    "destination"
                )
        if here.first_gpa != there.first_gpa:
            yield _unequal(
                f"block {name} is at guest address {here.first_gpa:#x} at the source, "
                f"{there.first_gpa:#x} at the destination"
            )


def _unequal(message: str) -> Finding:
    remedy = "start both QEMUs with the same -m, -object memory-backend-*, -numa and -machine"
    return Finding("blocks-differ", "both", message, remedy)


def _same_machine_type(source: SideFacts, destination: SideFacts) -> Findings:
    if source.machine != destination.machine:
        yield Finding(
            "machine-differs",
            "both",
            f"the machine is {source.machine} at the source, {destination.machine} at the "
            "destination",
            f"start the destination with -machine {source.machine}",
        )


def _versions(source: SideFacts, destination: SideFacts) -> Findings:
    if version(destination) < version(source):
        yield warn(
            "older-qemu",
            "both",
            f"QEMU {source.qemu_version} to {destination.qemu_version}: an older QEMU may not "
            "understand the device state of a newer one",
            "move to the same or a newer version",
        )


def _memory(source: SideFacts, destination: SideFacts) -> Findings:
    """Room for what the source has in memory now; what the destination holds already is reused."""
    held = sum(block.allocated_bytes for block in destination.blocks)
    needed = max(0, sum(block.allocated_bytes for block in source.blocks) - held)
    whole = max(0, sum(block.size_bytes for block in destination.blocks) - held)
    tmpfs = destination.tmpfs_available_bytes
    if tmpfs is not None and tmpfs < whole:
        # Not only what is needed now: a full tmpfs is SIGBUS in QEMU whenever the guest grows.
        yield Finding(
            "tmpfs-too-small",
            "destination",
            f"the tmpfs under guest RAM has {mib(tmpfs)} left, {mib(whole)} are needed",
            "mount -o remount,size=... it, or use another directory",
        )
    if destination.memory_available_bytes < needed + _MEMORY_SLACK_BYTES:
        yield Finding(
            "memory-too-small",
            "destination",
            f"{destination.host} has {mib(destination.memory_available_bytes)} of memory "
            f"available, the guest's data take {mib(needed)}",
            "free memory there: a guest that cannot be placed cannot run",
        )
    limit = destination.memory_limit
    if limit is not None and limit.available_bytes < needed:
        yield Finding(
            "memory-limit-too-low",
            "destination",
            f"{limit.path} leaves QEMU {destination.pid} {mib(limit.available_bytes)} of memory, "
            f"the guest's data take {mib(needed)}: the kernel would kill it",
            "raise that limit (systemd: MemoryMax=) to the guest's RAM and some more",
        )


_BOTH: tuple[Callable[[SideFacts, SideFacts], Findings], ...] = (
    _same_qemu,
    _same_file,
    _equal_blocks,
    _same_machine_type,
    _versions,
    _memory,
)


# --- helpers ------------------------------------------------------------------------------


def _same_machine(source: SideFacts, destination: SideFacts) -> bool:
    """Two kernels never share a file or a pid; when in doubt, they are one."""
    return source.boot_id == destination.boot_id


def codes(findings: Iterable[Finding]) -> list[str]:
    """Their codes, in order."""
    return [finding.code for finding in findings]
