"""The trace of a real handler between two real QEMUs, and what such a handler holds.

What the destination's QEMU reads in its main loop stands for the guest that faults.
"""

from __future__ import annotations

import os
import random
import re
from pathlib import Path
from typing import Any

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


#: Less than glibc's smallest allocation.
LEAST_BYTES = 16


def trace_of(pair: Pair) -> Trace:
    return read_trace(pair.state_dir / FAULT_TRACE)


async def begin(pair: Pair, **changes: Any) -> int:
    """Both companions, attached and serving, every page data; the userfaultfd's number."""
    await pair.start()
    for backend in pair.source_vm.spec.backends:
        fd = pair.source_vm.ram_fd(backend.name)
        chunk = random.Random(1).randbytes(MIB)
        for offset in range(0, backend.size_bytes, MIB):
            os.pwrite(fd, chunk, offset)
    attached = await pair.attach(**changes)
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


@pytest.mark.slow
def test_what_a_handler_holds_does_not_grow_with_what_it_has_served() -> None:
    """Thousands of faults answered, then the rest of 160 MiB pushed: no allocation for each."""
    pages = 160 * MIB // PAGE
    at_the_end = range(pages - 1, pages - 1 - 6 * 6000, -6)

    async def body(pair: Pair) -> None:
        async with connected(pair):
            await begin(pair, ahead_bytes=0)
            assert pair.handler.process is not None
            pid = pair.handler.process.pid
            await pair.open_lanes()
            await pair.serve(push_bytes_per_second=32 * MIB)
            await commit(pair)
            await until(pair, lambda stats: stats.remaining_pages < 0.95 * pages)
            await pair.open_lanes()
            await pair.serve(push_bytes_per_second=MIB // 4)
            await touch(pair, list(at_the_end[:400]))
            before_kib, before = held_kib(pid), await pair.handler_stats()
            await touch(pair, list(at_the_end[400:]))
            faulted_kib, faulted = held_kib(pid), await pair.handler_stats()
            faults = faulted.faults.count - before.faults.count
            assert faults > 5000
            await pair.open_lanes()
            await pair.serve()
            await until(pair, lambda stats: stats.remaining_pages == 0)
            pushed = (await pair.handler_stats()).push_pages - faulted.push_pages
            assert pushed > 15_000
            assert faulted_kib - before_kib < faults * LEAST_BYTES / 1024
            # A lane at full speed fills its buffers, half a megabyte, once.
            assert held_kib(pid) - faulted_kib < 512 + pushed * LEAST_BYTES / 1024
            await pair.detach()

    with private_directory() as directory, vm_pair(directory, memfd_backends(160 * MIB)) as pair:
        run(body(pair))
