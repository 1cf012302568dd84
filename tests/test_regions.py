"""Finding guest RAM: the text that QEMU prints, and real QEMUs with every kind of backend."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from qpostcopy.lab.vm import Backend, Vm, VmSpec
from qpostcopy.qmp.monitor import Monitor
from qpostcopy.qmp.schema import BlockFacts
from qpostcopy.regions import (
    RegionsError,
    discover_blocks,
    discover_unshared_bytes,
    is_empty,
    open_ram,
    parse_first_gpas,
    parse_ramblocks,
    punch_empty,
)
from qpostcopy.vmas import parse_vmas

MIB = 1 << 20

RAMBLOCKS_7_2 = """\
              Block Name    PSize              Offset               Used              Total\r
                     ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000\r
    /rom@etc/acpi/tables    4 KiB  0x0000000010080000 0x0000000000020000 0x0000000000200000\r
            name of two    2 MiB  0x0000000010000000 0x0000000000040000 0x0000000000040000\r
"""
RAMBLOCKS_8 = """\
              Block Name    PSize              Offset               Used              Total\
                HVA  RO
                  pc.ram    4 KiB  0x0000000000000000 0x0000000008000000 0x0000000008000000\
 0x00007f1b47e00000  rw
"""
MTREE = """\
FlatView #0
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): /objects/low KVM
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  0000000000100000-000000007fffffff (prio 0, ram): /objects/low @0000000000100000 KVM
  0000000100000000-000000017fffffff (prio 0, ram): high space @0000000000000000
  0000000180000000-00000001ffffffff (prio 0, ram): /objects/low @0000000080000000

FlatView #1
 AS "cpu-smm-0", root: memory
 Root memory region: memory
  0000000000000000-00000000000bffff (prio 0, ram): high space
  00000000000f0000-00000000000fffff (prio 0, ram): smram only

FlatView #2
 AS "bus", root: bus master container
 Root memory region: (none)
  No rendered FlatView
"""
SMAPS = """\
7ff70ffff000-7ff71ffff000 rw-s 00001000 00:1b 4                          /dev/shm/a b (deleted)
Size:             262144 kB
KernelPageSize:        4 kB
THPeligible:           1
VmFlags: rd wr sh mr mw me ms um dc hg lo
7ff71ffff000-7ff720000000 ---p 00000000 00:00 0
Size:                  4 kB
KernelPageSize:     2048 kB
THPeligible:           0
VmFlags: mr mw me sd
"""


def test_ramblocks_of_7_2() -> None:
    rows = parse_ramblocks(RAMBLOCKS_7_2)
    assert [(row.name, row.page_bytes, row.used_bytes, row.hva) for row in rows] == [
        ("ram", 4096, 256 * MIB, None),
        ("/rom@etc/acpi/tables", 4096, 128 << 10, None),
        ("name of two", 2 * MIB, 256 << 10, None),
    ]


def test_ramblocks_of_8_and_later_have_an_address() -> None:
    (row,) = parse_ramblocks(RAMBLOCKS_8)
    assert (row.name, row.used_bytes, row.hva) == ("pc.ram", 128 * MIB, 0x7F1B47E00000)


def test_first_gpas_are_those_of_the_memory_view() -> None:
    gpas = parse_first_gpas(MTREE)
    assert gpas["/objects/low"] == 0
    assert gpas["high space"] == 0x100000000  # not where SMM sees it
    assert "smram only" not in gpas


def test_memory_view_that_is_not_the_first() -> None:
    first, second, _ = MTREE.split("\n\n")
    assert parse_first_gpas(f"{second}\n\n{first}\n") == parse_first_gpas(MTREE)


def test_vmas() -> None:
    ram, guard = parse_vmas(SMAPS)
    assert ram.path == "/dev/shm/a b (deleted)"
    assert (ram.length_bytes, ram.offset_bytes, ram.inode) == (256 * MIB, 4096, 4)
    assert ram.device == os.makedev(0, 0x1B)
    facts = ram.facts()
    assert (facts.dontfork, facts.huge_pages, facts.uffd_registered, facts.locked) == (True,) * 4
    facts = guard.facts()
    assert (facts.dontfork, facts.huge_pages, facts.uffd_registered, facts.locked) == (False,) * 4
    assert guard.page_bytes == 2 * MIB


def test_punching_a_file_empty() -> None:
    fd = os.memfd_create("test")
    try:
        os.truncate(fd, MIB)
        assert is_empty(fd)
        os.pwrite(fd, b"x", MIB - 1)
        assert not is_empty(fd)
        punch_empty(fd, MIB)
        assert is_empty(fd)
        assert os.fstat(fd).st_size == MIB
    finally:
        os.close(fd)


def test_what_cannot_be_punched(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    try:
        with pytest.raises(RegionsError, match="punching"):
            punch_empty(write_end, MIB)
    finally:
        os.close(read_end)
        os.close(write_end)


# --- real QEMUs ---------------------------------------------------------------------------


def look(vm: Vm) -> tuple[tuple[BlockFacts, ...], int]:
    async def ask() -> tuple[tuple[BlockFacts, ...], int]:
        monitor = await Monitor.connect(vm.qmp_path)
        try:
            blocks = await discover_blocks(monitor.execute, vm.pid)
            return blocks, await discover_unshared_bytes(monitor.execute, blocks)
        finally:
            await monitor.close()

    return asyncio.run(ask())


def backend_of(kind: str, size_bytes: int) -> Backend:
    match kind:
        case "directory":
            return Backend("ram0", size_bytes)
        case "file":
            return Backend("ram0", size_bytes, own_file=True)
        case "fd":
            return Backend("ram0", size_bytes, mem_path=None)
        case _:
            return Backend("ram0", size_bytes, kind="memory-backend-memfd")


@pytest.mark.vm
@pytest.mark.root
@pytest.mark.parametrize("incoming", [False, True])
@pytest.mark.parametrize("kind", ["directory", "file", "fd", "memfd"])
def test_every_kind_of_shared_backend(kind: str, incoming: bool, tmp_path: Path) -> None:
    backend = backend_of(kind, 66 * MIB + 8192)  # no power of two
    spec = VmSpec((backend,), incoming=incoming, paused=not incoming)
    with Vm("qemu", spec, tmp_path) as vm:
        (block,), unshared_bytes = look(vm)
        assert (block.name, block.first_gpa, block.page_bytes) == ("ram0", 0, 4096)
        assert (block.share, block.filesystem) == (True, "tmpfs")
        (mapping,) = block.mappings
        assert (mapping.offset_bytes, mapping.length_bytes) == (0, block.size_bytes)
        assert mapping.dontfork
        assert not mapping.uffd_registered
        assert 0 < unshared_bytes < 4 * MIB  # ROMs and ACPI tables
        # The laboratory and the product find it independently of each other.
        found = os.fstat(vm.ram_fd("ram0"))
        assert (found.st_dev, found.st_ino) == (block.device, block.inode)
        check_open(vm, block)


def check_open(vm: Vm, block: BlockFacts) -> None:
    """The file that we open is the one that QEMU maps: what we write, its memory shows."""
    fd = open_ram(vm.pid, block, True)
    try:
        assert is_empty(fd)
        os.pwrite(fd, b"qpostcopy was here", 8192)
        with Path(f"/proc/{vm.pid}/mem").open("rb") as memory:
            memory.seek(block.mappings[0].hva + 8192)
            assert memory.read(18) == b"qpostcopy was here"
        punch_empty(fd, block.size_bytes)
        assert is_empty(fd)
    finally:
        os.close(fd)


@pytest.mark.vm
@pytest.mark.root
def test_blocks_come_in_the_order_of_their_addresses(tmp_path: Path) -> None:
    backends = (
        Backend("zz", 48 * MIB),
        Backend("aa", 32 * MIB, mem_path=None),
        Backend("mm", 64 * MIB, kind="memory-backend-memfd"),
    )
    with Vm("qemu", VmSpec(backends, incoming=True), tmp_path) as vm:
        blocks, _ = look(vm)
        assert [(block.name, block.first_gpa) for block in blocks] == [
            ("zz", 0),
            ("aa", 48 * MIB),
            ("mm", 80 * MIB),
        ]
        assert len({(block.device, block.inode) for block in blocks}) == 3


@pytest.mark.vm
@pytest.mark.root
def test_ram_above_the_hole_is_still_one_block(tmp_path: Path) -> None:
    """q35 puts what does not fit below 4 GiB above it: one file, one block, first at 0."""
    more = ("-machine", "max-ram-below-4g=64M")
    spec = VmSpec((Backend("ram0", 160 * MIB),), paused=True, more=more)
    with Vm("qemu", spec, tmp_path) as vm:
        (block,), _ = look(vm)
        assert (block.first_gpa, block.size_bytes) == (0, 160 * MIB)
        assert sum(mapping.length_bytes for mapping in block.mappings) == 160 * MIB


@pytest.mark.vm
@pytest.mark.root
def test_private_ram_has_no_file_to_move_and_travels_in_the_stream(tmp_path: Path) -> None:
    backends = (Backend("ram0", 64 * MIB, kind="memory-backend-ram", share=False),)
    with Vm("qemu", VmSpec(backends, paused=True), tmp_path) as vm:
        (block,), unshared_bytes = look(vm)
        assert (block.share, block.device, block.mappings) == (False, None, ())
        assert unshared_bytes > 64 * MIB


@pytest.mark.vm
@pytest.mark.root
def test_a_file_that_qemu_does_not_hold_is_not_opened(tmp_path: Path) -> None:
    with Vm("qemu", VmSpec((Backend("ram0", 64 * MIB),), paused=True), tmp_path) as vm:
        (block,), _ = look(vm)
        other = block.model_copy(update={"inode": (block.inode or 0) + 100_000})
        with pytest.raises(RegionsError, match="does not hold that file"):
            open_ram(vm.pid, other, True)
        vm.kill()
        with pytest.raises(RegionsError):
            open_ram(vm.pid, block, True)
