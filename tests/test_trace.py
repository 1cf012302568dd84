"""Trace files: what is written is read back, and nothing that is read is trusted."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpostcopy.errors import ExitCode
from qpostcopy.trace import (
    MAX_BLOCKS,
    MAX_RECORDS,
    PAGE_BITS,
    PAGE_BYTES,
    Trace,
    TracedBlock,
    TraceError,
    decode,
    encode,
    encode_head,
    read_blocks,
    read_trace,
)

BLOCKS = (TracedBlock("ram0", 8 * PAGE_BYTES), TracedBlock("/objects/ram 1", 1 << 40))
TRACE = Trace(BLOCKS, (7, 0, 1 << PAGE_BITS | (1 << 28) - 1, 7), (0, 0, 12, 4_000_000_000), 5)


def plain(trace: Trace) -> Trace:
    return replace(trace, locations=tuple(trace.locations), times_us=tuple(trace.times_us))


def test_the_bytes_are_those_of_the_document() -> None:
    blocks = (TracedBlock("ram0", 8192),)
    assert encode(Trace(blocks, (1,), (258,), 3)) == (
        b"QPTRACE\n" + b"\1\0" + b"\1\0" + b"\0\x10\0\0" + b"\x48\0\0\0" + bytes(4)
        + b"\1" + bytes(7) + b"\3" + bytes(7) + bytes(16)
        + b"\0\x20" + bytes(6) + b"\4\0" + b"ram0" + bytes(2)
        + b"\1" + bytes(7) + b"\2\1\0\0"
    )  # fmt: skip


names = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x2FF).filter(str.isprintable),
    min_size=1,
    max_size=60,
)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    sizes = draw(st.dictionaries(names, st.integers(1, 1 << 40), min_size=1, max_size=4))
    blocks = tuple(TracedBlock(name, pages * PAGE_BYTES) for name, pages in sizes.items())
    records = [
        (index << PAGE_BITS | page % (blocks[index].size_bytes // PAGE_BYTES), time_us)
        for index, page, time_us in draw(
            st.lists(
                st.tuples(
                    st.integers(0, len(blocks) - 1),
                    st.integers(0, (1 << 40) - 1),
                    st.integers(0, (1 << 32) - 1),
                ),
                max_size=20,
            )
        )
    ]
    return Trace(
        blocks,
        tuple(location for location, _ in records),
        tuple(time_us for _, time_us in records),
        draw(st.integers(0, (1 << 64) - 1)),
    )


@given(trace=traces(), unused=st.integers(0, 40))
def test_what_is_written_is_read_back(trace: Trace, unused: int) -> None:
    """Behind the last record may be room: the file of a handler that was killed."""
    assert plain(decode(encode(trace) + b"\xff" * unused)) == trace


@pytest.mark.fuzz
@given(trace=traces(), data=st.data())
def test_a_cut_off_trace_is_refused(trace: Trace, data: st.DataObject) -> None:
    whole = encode(trace)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(TraceError, match=r"is cut off|is no fault trace"):
        decode(cut)


@pytest.mark.fuzz
@given(st.binary(max_size=200), st.booleans())
def test_garbage_is_refused(garbage: bytes, our_magic: bool) -> None:
    with pytest.raises(TraceError):
        decode((b"QPTRACE\n" if our_magic else b"") + garbage)


@pytest.mark.fuzz
@settings(deadline=None)
@given(trace=traces())
def test_a_damaged_trace_is_a_trace_or_an_error(trace: Trace) -> None:
    """Each byte in turn: what is read keeps what its users rely on, or it is refused."""
    whole = encode(trace)
    for at, value in enumerate(whole):
        for damage in (0x01, 0x80, 0xFF):
            damaged = whole[:at] + bytes([value ^ damage]) + whole[at + 1 :]
            try:
                read = decode(damaged)
            except TraceError as error:
                assert error.exit_code == ExitCode.USAGE
                continue
            assert len(read.locations) == len(read.times_us)
            assert len({block.name for block in read.blocks}) == len(read.blocks)
            for location in read.locations:
                block = read.blocks[location >> PAGE_BITS]
                assert location & (1 << PAGE_BITS) - 1 < block.size_bytes // PAGE_BYTES


def head(**changes: int) -> bytes:
    """The head of a good file, with fields of others' making, and its table."""
    fields = {
        "version": 1,
        "blocks": 2,
        "page": 4096,
        "offset": len(encode_head(BLOCKS)),
        "count": 0,
    }
    fields |= changes
    order = ("version", "blocks", "page", "offset")
    packed = struct.pack(
        "<8sHHIIIQ", b"QPTRACE\n", *(fields[key] for key in order), 0, fields["count"]
    )
    return packed + encode_head(BLOCKS)[len(packed) :]


@pytest.mark.parametrize(
    ("data", "said", "remedy"),
    [
        (b"", "is no fault trace of qpostcopy", "a migration wrote"),
        (b"QPTRACE\n", "is cut off", "copy the file again"),
        (head(version=2), "is of version 2: expected 1", "record a new one"),
        (head(page=16384), "pages of 16384 bytes: expected 4096", "record a new one"),
        (head(blocks=0), "has 0 RAM blocks", "a migration wrote"),
        (head(blocks=MAX_BLOCKS + 1), "RAM blocks: expected 1 to", "a migration wrote"),
        (head(blocks=3), "table of blocks that is cut off", "a migration wrote"),
        (head(blocks=1), "something between its blocks", "a migration wrote"),
        (head(count=MAX_RECORDS + 1), "records: expected at most", "a migration wrote"),
        (head(count=1), "is cut off", "copy the file again"),
        (head(offset=0), "where they cannot", "a migration wrote"),
        (head(offset=1 << 31), "where they cannot", "a migration wrote"),
        (encode(replace(TRACE, blocks=BLOCKS[:1])), "block 1, which it has not", "a migration"),
        (encode(replace(TRACE, locations=(8, 0, 0, 0))), "on page 8 of RAM block 0", "a migration"),
        (encode_head((BLOCKS[0], BLOCKS[0])), 'block "ram0" that cannot be', "a migration"),
        (encode_head((TracedBlock("a", 4097),)), 'block "a" that cannot be', "a migration"),
        (encode_head((TracedBlock("a\x1b[2J", 4096),)), r"of the name 'a\x1b[2J'", "a migration"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(data: bytes, said: str, remedy: str) -> None:
    with pytest.raises(TraceError) as caught:
        decode(data)
    assert said in str(caught.value)
    assert remedy in str(caught.value.remedy)


def test_a_huge_count_allocates_nothing(tmp_path: Path) -> None:
    """The file is read no further than it is long."""
    path = tmp_path / "t"
    path.write_bytes(head(count=MAX_RECORDS))
    with pytest.raises(TraceError, match="is cut off"):
        read_trace(path)


def test_the_blocks_of_a_file_whose_records_nobody_reads(tmp_path: Path) -> None:
    path = tmp_path / "t"
    whole = encode(TRACE)
    path.write_bytes(whole[:-1] + b"\xff")
    assert read_blocks(path) == BLOCKS
    path.write_bytes(whole[:-1])
    with pytest.raises(TraceError, match="is cut off"):
        read_blocks(path)


def test_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "web.trace"
    path.write_bytes(encode(TRACE) + bytes(1 << 20))
    assert plain(read_trace(path)) == TRACE


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # to open one would wait for its writer
    for name, said in [("fifo", "is not a file"), ("none", "no such file"), ("", "cannot be read")]:
        with pytest.raises(TraceError, match=said):
            read_trace(tmp_path / name)
