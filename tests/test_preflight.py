"""Preflight: one set of facts that is good, and everything that can be wrong with it."""

from __future__ import annotations

from typing import Any

import pytest

from qpostcopy.preflight import Finding, Severity, codes, examine, judge, remark
from qpostcopy.qmp.schema import BlockFacts, MappingFacts, MemoryLimit, OtherMapper, SideFacts

MIB = 1 << 20

MAPPING = MappingFacts(
    hva=0x7F0000000000,
    length_bytes=256 * MIB,
    offset_bytes=0,
    dontfork=True,
    huge_pages=False,
    uffd_registered=False,
)
BLOCK = BlockFacts(
    name="ram",
    size_bytes=256 * MIB,
    first_gpa=0,
    page_bytes=4096,
    share=True,
    backend="memory-backend-file",
    mem_path="/dev/shm",
    device=27,
    inode=4,
    filesystem="tmpfs",
    allocated_bytes=100 * MIB,
    mappings=(MAPPING,),
)
SOURCE = SideFacts(
    role="source",
    host="here",
    pid=100,
    pid_start_ticks=1,
    uid=0,
    machine="pc-q35-7.2",
    qemu_version="7.2.22",
    run_status="running",
    running=True,
    migration_status=None,
    migration_blockers=(),
    capabilities={"x-ignore-shared": False, "events": False},
    mem_lock=False,
    blocks=(BLOCK,),
    unshared_bytes=MIB,
    other_mappers=(),
    devices=("vhost-vsock-pci",),
    userfaults=(),
    effective_rights=("CAP_SYS_PTRACE", "CAP_SYS_ADMIN"),
    kernel_release="6.1.0",
    kernel_missing=(),
    memory_available_bytes=1024 * MIB,
    tmpfs_available_bytes=512 * MIB,
    shmem_huge_pages="never",
    boot_id="one",
)
DESTINATION = SOURCE.model_copy(
    update={
        "role": "destination",
        "pid": 200,
        "run_status": "inmigrate",
        "running": False,
        "blocks": (BLOCK.model_copy(update={"inode": 5, "allocated_bytes": 0}),),
    }
)


def changed(facts: SideFacts, **values: Any) -> SideFacts:
    """`block_X` changes X of every block, `mapping_X` of every mapping, X of the side."""
    blocks = values.pop("blocks", facts.blocks)
    of_mapping = {key[8:]: values.pop(key) for key in list(values) if key.startswith("mapping_")}
    of_block = {key[6:]: values.pop(key) for key in list(values) if key.startswith("block_")}
    blocks = tuple(
        block.model_copy(
            update={
                "mappings": tuple(one.model_copy(update=of_mapping) for one in block.mappings),
                **of_block,
            }
        )
        for block in blocks
    )
    return facts.model_copy(update={"blocks": blocks, **values})


def test_nothing_speaks_against_good_facts() -> None:
    assert examine(SOURCE, DESTINATION) == []


SECOND = BLOCK.model_copy(update={"name": "ram1", "first_gpa": 256 * MIB, "inode": 6})
MAPPER = OtherMapper(pid=7, command="gdb", block="ram")

#: what is different at the source -> the one code that comes of it
AT_SOURCE: list[tuple[dict[str, Any], str]] = [
    ({"run_status": "inmigrate", "running": False}, "source-not-movable"),
    ({"run_status": "postmigrate", "running": False}, "source-not-movable"),
    ({"run_status": "guest-panicked", "running": False}, "source-not-movable"),
    ({"devices": ("virtio-balloon-pci,free-page-hint=on",)}, "free-page-hint"),
    ({"migration_status": "active"}, "migration-under-way"),
    ({"migration_status": "postcopy-active"}, "migration-under-way"),
    ({"block_backend": "memory-backend-memfd", "qemu_version": "7.2.22"}, ""),
    ({"block_backend": "memory-backend-ram"}, "backend-not-skipped"),
    ({"block_backend": "memory-backend-shm"}, "backend-not-skipped"),
]
#: the same at the destination
AT_DESTINATION: list[tuple[dict[str, Any], str]] = [
    ({"run_status": "prelaunch"}, "destination-not-waiting"),
    ({"userfaultfd": "lent"}, ""),
    ({"userfaultfd": "none"}, "userfaultfd-not-permitted"),
    ({"filter_refusal": "we run without CAP_SYS_ADMIN"}, "filter-in-the-way"),
    ({"run_status": "running", "running": True}, "destination-not-waiting"),
    ({"run_status": "paused"}, "destination-not-waiting"),
    ({"mem_lock": True}, "memory-locked"),
    ({"mapping_huge_pages": True}, "shared-huge-pages"),
    ({"tmpfs_available_bytes": 200 * MIB}, "tmpfs-too-small"),
    ({"tmpfs_available_bytes": None}, ""),
    ({"memory_available_bytes": 120 * MIB}, "memory-too-small"),
    ({"memory_limit": MemoryLimit(path="g", available_bytes=99 * MIB)}, "memory-limit-too-low"),
    ({"memory_limit": MemoryLimit(path="g", available_bytes=100 * MIB)}, ""),
    ({"listening": True}, "migration-under-way"),
    ({"tracer": "7 (gdb)"}, "traced"),
    ({"machine": "pc-q35-8.0"}, "machine-differs"),
    ({"pid": 100, "block_inode": 4}, "same-qemu"),
    ({"block_inode": 4}, "same-file"),
    ({"block_inode": 4, "boot_id": "other"}, ""),
    ({"pid": 100, "boot_id": "other"}, ""),
    ({"block_size_bytes": 255 * MIB, "mapping_length_bytes": 255 * MIB}, "blocks-differ"),
    ({"block_first_gpa": 4096}, "blocks-differ"),
]
#: wrong wherever it is
ON_BOTH: list[tuple[dict[str, Any], str]] = [
    ({"block_share": False}, "ram-not-shared"),
    ({"block_device": None, "block_inode": None, "block_mappings": ()}, "ram-file-not-found"),
    ({"block_filesystem": "ext4"}, "ram-not-on-tmpfs"),
    ({"block_filesystem": None}, "ram-not-on-tmpfs"),
    ({"block_filesystem": "hugetlbfs", "block_page_bytes": 2 * MIB}, "huge-pages"),
    ({"mapping_offset_bytes": 4096}, "mapping-incomplete"),
    ({"mapping_length_bytes": 128 * MIB}, "mapping-incomplete"),
    ({"mapping_dontfork": False}, "fork-may-copy"),
    ({"mapping_uffd_registered": True, "userfaults": (9,)}, "userfaultfd-present"),
    ({"effective_rights": ("CAP_SYS_ADMIN",)}, "rights-missing"),
    ({"effective_rights": ("CAP_SYS_PTRACE",)}, "rights-missing"),
    ({"effective_rights": ("CAP_SYS_PTRACE", "CAP_CHECKPOINT_RESTORE")}, ""),
    ({"attach_refusal": "Permission denied"}, "attach-refused"),
    # One cause, one finding: what cannot be seen is not called absent.
    (
        {
            "attach_refusal": "Permission denied",
            "effective_rights": ("CAP_SYS_ADMIN",),
            "block_device": None,
            "block_inode": None,
            "block_mappings": (),
        },
        "rights-missing",
    ),
    ({"kernel_missing": ("userfaultfd",)}, "kernel-feature-missing"),
    ({"other_mappers": (MAPPER,)}, "other-mapper"),
    ({"devices": ("vfio-pci",)}, "device-pins-ram"),
    ({"devices": ("vhost-vdpa",)}, "device-pins-ram"),
    ({"devices": ("vhost-user-blk-pci",)}, "device-outside-qemu"),
    ({"devices": ("ivshmem-plain",)}, "device-outside-qemu"),
    ({"devices": ("cryptodev-vhost-user",)}, "device-outside-qemu"),
    ({"devices": ("x-pci-proxy-dev",)}, "device-outside-qemu"),
    ({"migration_blockers": ("The qcow format used by node 'x' does not",)}, "migration-blocked"),
    ({"capabilities": {"events": False}}, "capability-missing"),
]
EVERYTHING = (
    [("source", *case) for case in AT_SOURCE + ON_BOTH]
    + [("destination", *case) for case in AT_DESTINATION + ON_BOTH]
)  # fmt: skip


@pytest.mark.parametrize(("side", "values", "code"), EVERYTHING)
def test_each_thing_that_is_wrong(side: str, values: dict[str, Any], code: str) -> None:
    source, destination = SOURCE, DESTINATION
    if side == "source":
        source = changed(source, **values)
    else:
        destination = changed(destination, **values)
    found = judge(source, destination)
    # A page size that differs makes the blocks differ too.
    others = {"blocks-differ"} if "block_page_bytes" in values else set()
    assert {one.code for one in found} - others == ({code} if code else set())
    for one in found:
        assert one.side in (side, "both")
        assert one.remedy
        assert one.message
        assert "\n" not in one.message + one.remedy


@pytest.mark.parametrize(
    ("backend", "version", "is_refused"),
    [
        ("memory-backend-memfd", "8.0.5", False),
        ("memory-backend-memfd", "8.1.0", True),
        ("memory-backend-memfd", "10.0.0 (Debian)", True),
        ("memory-backend-shm", "10.0.0 (Debian)", True),
        ("memory-backend-ram", "5.2.0", True),
    ],
)
def test_a_backend_that_qemu_copies_itself(backend: str, version: str, is_refused: bool) -> None:
    values: dict[str, Any] = {"block_backend": backend, "qemu_version": version}
    found = judge(SOURCE, changed(DESTINATION, **values))
    assert codes(found) == (["backend-not-skipped"] if is_refused else [])


def test_blocks_that_are_not_on_both_sides() -> None:
    two = SOURCE.model_copy(update={"blocks": (BLOCK, SECOND)})
    (found,) = judge(two, DESTINATION)
    assert found.code == "blocks-differ"
    assert "ram1 is at the source, and not at the destination" in found.message
    more = DESTINATION.model_copy(
        update={"blocks": (*DESTINATION.blocks, SECOND), "tmpfs_available_bytes": None}
    )
    (found,) = judge(SOURCE, more)
    assert "ram1 is at the destination, and not at the source" in found.message


def test_a_destination_may_hint_free_pages() -> None:
    """Only a QEMU that sends clears the bits of what its guest hints."""
    device = "virtio-balloon-pci,free-page-hint=on"
    assert judge(SOURCE, changed(DESTINATION, devices=(device,))) == []


def test_two_blocks_in_one_file() -> None:
    twin = SECOND.model_copy(update={"inode": 5})
    destination = DESTINATION.model_copy(
        update={"blocks": (*DESTINATION.blocks, twin), "tmpfs_available_bytes": None}
    )
    source = SOURCE.model_copy(update={"blocks": (BLOCK, SECOND)})
    found = judge(source, destination)
    assert codes(found) == ["blocks-share-a-file"] * 2


def test_no_memory_backend_at_all() -> None:
    nothing: dict[str, Any] = {"blocks": ()}
    found = judge(SOURCE.model_copy(update=nothing), DESTINATION.model_copy(update=nothing))
    assert codes(found) == ["no-ram-block", "no-ram-block"]


def test_swapped_sides_are_suspected() -> None:
    source = SOURCE.model_copy(update={"run_status": "inmigrate", "running": False})
    destination = DESTINATION.model_copy(update={"run_status": "running", "running": True})
    found = judge(source, destination)
    assert codes(found) == ["source-not-movable", "destination-not-waiting"]
    assert "swap" in found[0].remedy


@pytest.mark.parametrize("status", ["running", "paused", "prelaunch"])
def test_a_paused_source_can_be_moved(status: str) -> None:
    source = SOURCE.model_copy(update={"run_status": status, "running": status == "running"})
    assert judge(source, DESTINATION) == []


@pytest.mark.parametrize(
    ("source_values", "destination_values", "code"),
    [
        ({}, {"block_allocated_bytes": 256 * MIB}, "destination-prealloc"),
        ({}, {"qemu_version": "5.2.0"}, "older-qemu"),
        ({"unshared_bytes": 65 * MIB}, {}, "much-unshared-ram"),
    ],
)
def test_what_is_said_and_does_not_refuse(
    source_values: dict[str, Any], destination_values: dict[str, Any], code: str
) -> None:
    source = changed(SOURCE, **source_values)
    destination = changed(DESTINATION, **destination_values)
    assert judge(source, destination) == []
    (found,) = remark(source, destination)
    assert (found.code, found.severity) == (code, Severity.WARNING)


def test_prealloc_needs_no_more_memory() -> None:
    """What the destination holds already is given back before it is needed."""
    full: dict[str, Any] = {
        "block_allocated_bytes": 256 * MIB,
        "tmpfs_available_bytes": 0,
        "memory_available_bytes": 80 * MIB,
    }
    assert judge(SOURCE, changed(DESTINATION, **full)) == []


def test_all_findings_come_at_once() -> None:
    source = changed(SOURCE, block_share=False, devices=("vfio-pci",))
    destination = changed(DESTINATION, run_status="running", mem_lock=True, machine="pc-i440fx-7.2")
    assert set(codes(judge(source, destination))) == {
        "ram-not-shared",
        "device-pins-ram",
        "destination-not-waiting",
        "memory-locked",
        "machine-differs",
    }


def test_the_case_that_would_destroy_the_guest_says_so() -> None:
    (found,) = judge(SOURCE, changed(DESTINATION, block_inode=4))
    assert isinstance(found, Finding)
    assert "destroy the running guest" in found.message
    assert "/dev/shm" in found.message


def test_the_other_qemu_is_no_stranger_in_the_same_file() -> None:
    """Nobody is told to end it; but it is a stranger in a file that is not its own RAM."""
    other = OtherMapper(pid=SOURCE.pid, command="qemu-system-x86", block="ram")
    shared = changed(DESTINATION, block_inode=4, other_mappers=(other,))
    assert codes(judge(SOURCE, shared)) == ["same-file"]
    alone = changed(DESTINATION, other_mappers=(other,))
    assert codes(judge(SOURCE, alone)) == ["other-mapper"]
