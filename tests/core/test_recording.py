"""The recorder over real faults of another process; on the rig of test_session.py."""

from __future__ import annotations

import os
import random
import subprocess
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from qpostcopy.core import PAGE_BYTES, RamBlock
from qpostcopy.trace import TracedBlock, encode_head, read_trace
from qpostcopy.uffd.recording import record
from tests.core.test_session import Rig, Session, rig

pytestmark = pytest.mark.root

#: What a recorder takes at most (core/trace.h).
MAX_FAULTS = 1 << 20


@pytest.fixture
def moved(tmp_path: Path) -> Iterator[Rig]:
    with rig(tmp_path, 2000) as made:
        yield made


def begin(moved: Rig, *, fresh: bool = True) -> None:
    assert record(moved.handler, [moved.block], moved.directory, fresh=fresh) is None


def recorded(moved: Rig) -> list[int]:
    """The pages in the trace, in its order."""
    trace = read_trace(moved.directory / "faults.trace")
    assert [(block.name, block.size_bytes) for block in trace.blocks] == [
        (moved.block.name, moved.block.size_bytes)
    ]
    assert list(trace.times_us) == sorted(trace.times_us)
    return list(trace.locations)


def test_faults_in_the_order_of_their_arrival(moved: Rig) -> None:
    os.pwrite(moved.source_fd, random.Random(1).randbytes(2000 * PAGE_BYTES), 0)  # all is data
    begin(moved)
    moved.handler.commit()
    session = Session(moved.handler, moved.source)
    # Far apart: what one brings along (Rig: 2 behind, 4 ahead) is none of the others.
    touched = random.Random(2).sample(range(0, 2000, 10), 60)
    for page in touched + touched:
        moved.victim.do("read", page, 1)
    assert moved.handler.stats().traced_faults == len(recorded(moved))
    session.push()
    moved.wait_done()
    moved.victim.do("read", 0, 2000)  # nothing faults any more
    session.close()
    assert recorded(moved) == touched
    times_us = read_trace(moved.directory / "faults.trace").times_us
    assert 0 < times_us[0] < times_us[-1] < 60_000_000
    moved.handler.close()
    offset = len(encode_head(read_trace(moved.directory / "faults.trace").blocks))
    used_bytes = offset + 12 * len(times_us)
    assert (moved.directory / "faults.trace").stat().st_size == used_bytes


def test_a_successor_goes_on_with_the_trace(moved: Rig) -> None:
    os.pwrite(moved.source_fd, random.Random(1).randbytes(2000 * PAGE_BYTES), 0)
    touched = [1500, 20, 700, 5, 1990, 1000]
    begin(moved)
    moved.handler.commit()
    for page in touched[:3]:
        session = Session(moved.handler, moved.source)
        moved.victim.do("read", page, 1)
        session.close()
    moved.handler.close()
    moved.handler = moved.make_handler(fresh=False)
    begin(moved, fresh=False)
    moved.handler.adopt([moved.victim.ram_fd])
    moved.handler.commit()
    session = Session(moved.handler, moved.source)
    for page in touched[3:]:
        moved.victim.do("read", page, 1)
    session.close()
    assert recorded(moved) == touched


def test_a_successor_does_not_read_what_a_million_faults_have_left(moved: Rig) -> None:
    """A guest waits meanwhile; to decode them took half a second and 44 MiB."""
    begin(moved)
    moved.handler.close()
    head = encode_head([TracedBlock(moved.block.name, moved.block.size_bytes)], MAX_FAULTS)
    (moved.directory / "faults.trace").write_bytes(head + bytes(12 * MAX_FAULTS))
    moved.handler = moved.make_handler(fresh=False)
    tracemalloc.start()
    try:
        begin(moved, fresh=False)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert moved.handler.stats().traced_faults == MAX_FAULTS


def test_a_damaged_trace_is_told_and_all_else_goes_on(moved: Rig) -> None:
    begin(moved)
    moved.handler.close()
    path = moved.directory / "faults.trace"
    path.write_bytes(path.read_bytes()[:40])
    moved.handler = moved.make_handler(fresh=False)
    told = record(moved.handler, [moved.block], moved.directory, fresh=False)
    assert told is not None and "is cut off" in told
    session = Session(moved.handler, moved.source)
    session.push()
    moved.wait_done()
    session.close()
    moved.check()
    assert path.stat().st_size == 40


def test_a_trace_of_other_blocks_is_not_gone_on_with(moved: Rig) -> None:
    begin(moved)
    other = [RamBlock("ram", moved.block.size_bytes + PAGE_BYTES)]
    told = record(moved.handler, other, moved.directory, fresh=False)
    assert told is not None and "other RAM blocks" in told


def test_without_room_there_is_no_trace(moved: Rig, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(full)], check=True)
    try:
        told = record(moved.handler, [moved.block], full, fresh=True)
        assert told is not None and "No space left" in told
        assert list(full.iterdir()) == []
    finally:
        subprocess.run(["umount", str(full)], check=True)
