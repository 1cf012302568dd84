"""The trace of a real handler between two real QEMUs, and what such a handler holds.

What the destination's QEMU reads in its main loop stands for the guest that faults.
"""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest

from qpostcopy.qmp import schema
from qpostcopy.state import FAULT_TRACE
from qpostcopy.trace import Trace, read_trace
from tests.companions import (
    MIB,
    PAGE,
    CompanionProcess,
    Pair,
    connected,
    memfd_backends,
    until,
    vm_pair,
)
from tests.qmp.support import private_directory
from tests.uffd.test_handler import peek, run

pytestmark = [pytest.mark.vm, pytest.mark.root]


def trace_of(pair: Pair) -> Trace:
    return read_trace(pair.state_dir / FAULT_TRACE)


async def begin(pair: Pair) -> int:
    """Both companions, attached and serving, every page data; the userfaultfd's number."""
    await pair.start()
    for backend in pair.source_vm.spec.backends:
        fd = pair.source_vm.ram_fd(backend.name)
        chunk = random.Random(1).randbytes(MIB)
        for offset in range(0, backend.size_bytes, MIB):
            os.pwrite(fd, chunk, offset)
    attached = await pair.attach()
    assert attached.untraced is None
    return attached.uffd_fd


async def commit(pair: Pair) -> None:
    (pair.state_dir / "committed").touch()
    await pair.handler.client.call("qpc-committed", schema.Committed(), schema.Empty)


async def touch(pair: Pair, pages: list[int]) -> None:
    for page in pages:
        await peek(pair.destination_vm, pair.handler.client.execute, page * PAGE)


def test_the_trace_survives_its_handler_and_ends_with_the_migration() -> None:
    """Pages below 3 GiB: guest physical addresses are offsets."""
    first, second = [4000, 256, 9000], [777, 12000, 2500]

    async def body(pair: Pair) -> None:
        async with connected(pair):
            uffd_fd = await begin(pair)
            await pair.open_lanes()
            await pair.serve(push_bytes_per_second=MIB // 4)
            await commit(pair)
            await touch(pair, first)
            await pair.handler.kill()
            # The file has all of its room still; what is in it can be read as it is.
            assert list(trace_of(pair).locations) == first
            assert (pair.state_dir / FAULT_TRACE).stat().st_size > 12 * MIB

            pair.handler = CompanionProcess("handler", pair.destination_vm, pair.state_dir)
            await pair.handler.start("--pid", str(pair.destination_vm.pid))
            assert (await pair.adopt(uffd_fd)).untraced is None
            await pair.open_lanes()
            await pair.serve(push_bytes_per_second=MIB // 4)
            await touch(pair, second)
            stats = await pair.handler_stats()
            assert (stats.traced_faults, stats.untraced_faults) == (6, 0)
            await pair.open_lanes()
            await pair.serve()
            await until(pair, lambda stats: stats.remaining_pages == 0)
            await pair.detach()
            trace = trace_of(pair)
            assert list(trace.locations) == first + second
            assert list(trace.times_us) == sorted(trace.times_us)
            assert (pair.state_dir / FAULT_TRACE).stat().st_size < 1000

    with private_directory() as directory, vm_pair(directory, memfd_backends(64 * MIB)) as pair:
        run(body(pair))


def test_without_a_commit_no_trace_is_left() -> None:
    async def body(pair: Pair) -> None:
        async with connected(pair):
            await begin(pair)
            assert trace_of(pair).blocks[0].name == "ram0"
            await pair.detach()
            assert not (pair.state_dir / FAULT_TRACE).exists()
            assert (await pair.attach()).untraced is None  # and a second time
            await pair.handler.kill()
            pair.handler = CompanionProcess("handler", pair.destination_vm, pair.state_dir)
            await pair.handler.start("--pid", str(pair.destination_vm.pid))
            await pair.detach()
            assert not (pair.state_dir / FAULT_TRACE).exists()

    with private_directory() as directory, vm_pair(directory, memfd_backends(32 * MIB)) as pair:
        run(body(pair))


def held_kib(pid: int) -> int:
    """Resident memory that is its own or shared: not the text that the kernel can drop."""
    status = Path(f"/proc/{pid}/status").read_text()
    return sum(int(kib) for kib in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.M))


def test_what_a_handler_holds_does_not_grow_with_what_it_has_served() -> None:
    """Hundreds of faults answered, then most of 160 MiB pushed, within a megabyte."""
    pages = 160 * MIB // PAGE
    at_the_end = range(pages - 1, pages - 12000, -20)  # far apart: each faults

    async def body(pair: Pair) -> None:
        async with connected(pair):
            await begin(pair)
            assert pair.handler.process is not None
            pid = pair.handler.process.pid
            await pair.open_lanes()
            await pair.serve(push_bytes_per_second=32 * MIB)
            await commit(pair)
            await touch(pair, list(at_the_end[:20]))
            await until(pair, lambda stats: stats.remaining_pages < 0.95 * pages)
            before_kib, before = held_kib(pid), await pair.handler_stats()
            await pair.open_lanes()
            await pair.serve(push_bytes_per_second=MIB // 4)
            await touch(pair, list(at_the_end[20:]))
            faulted = await pair.handler_stats()
            assert faulted.faults.count - before.faults.count > 500
            await pair.open_lanes()
            await pair.serve()
            await until(pair, lambda stats: stats.remaining_pages == 0)
            assert (await pair.handler_stats()).push_bytes - before.push_bytes > 60 * MIB
            growth_kib = held_kib(pid) - before_kib
            assert growth_kib < 1024, f"{growth_kib} KiB more than {before_kib}"
            await pair.detach()

    with private_directory() as directory, vm_pair(directory, memfd_backends(160 * MIB)) as pair:
        run(body(pair))
