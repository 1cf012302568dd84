"""Fault traces: the file in which a migration leaves what its guest asked for, and when.

    head, table of RAM blocks, records (block, page, microseconds)

docs/trace.md has the format. The core's recorder (core/trace.c) appends records
behind a head that is written here; everything is read here. Nothing that is read
is trusted: a file is a whole trace of this version, each record on a page of a
block of its table, or a `TraceError` says what it is not. What is allocated is
bounded before it is.
"""

from __future__ import annotations

import os
import stat
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from qpostcopy.errors import UsageError

VERSION = 1
PAGE_BYTES = 4096
MAGIC = b"QPTRACE\n"
#: Of the recorder's bound, with room for what other tools merge.
MAX_RECORDS = 1 << 22
MAX_BLOCKS = 1024
MAX_NAME_BYTES = 255
#: A record's location is one number: the block above, the page in the block below.
PAGE_BITS = 48

_HEAD = struct.Struct("<8sHHIII QQQQ")
_BLOCK = struct.Struct("<QH")
_RECORD = struct.Struct("<QI")
_ALIGNMENT = 8
_MAX_HEAD_BYTES = _HEAD.size + MAX_BLOCKS * (_BLOCK.size + MAX_NAME_BYTES) + _ALIGNMENT

_ANOTHER = "give a trace that a migration wrote: faults.trace in its state directory"
_WHOLE = "copy the file again, as a whole"
_AGAIN = "record a new one: every migration leaves a trace in its state directory"


class TraceError(UsageError):
    """This is no trace that can be used."""


@dataclass(frozen=True, slots=True)
class TracedBlock:
    """A RAM block of the VM that was recorded; whole pages."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Trace:
    """What one migration recorded, in the order of arrival.

    :ivar locations: `block << PAGE_BITS | page` of each fault; the block is an index.
    :ivar times_us: of each, microseconds since the commit.
    :ivar left_out: faults that the recorder's bounds have left out.
    """

    blocks: tuple[TracedBlock, ...]
    locations: Sequence[int]
    times_us: Sequence[int]
    left_out: int = 0


# --- writing ----------------------------------------------------------------------------------


def encode_head(blocks: Sequence[TracedBlock], record_count: int = 0, left_out: int = 0) -> bytes:
    """All that is before the records; its length is where they begin."""
    table = b"".join(
        _BLOCK.pack(block.size_bytes, len(name)) + name
        for block, name in ((block, block.name.encode()) for block in blocks)
    )
    end = -(-(_HEAD.size + len(table)) // _ALIGNMENT) * _ALIGNMENT
    fields = (VERSION, len(blocks), PAGE_BYTES, end, 0, record_count, left_out, 0, 0)
    return (_HEAD.pack(MAGIC, *fields) + table).ljust(end, b"\0")


def encode(trace: Trace) -> bytes:
    """The file of a trace."""
    records = zip(trace.locations, trace.times_us, strict=True)
    packed = b"".join(_RECORD.pack(location, time_us) for location, time_us in records)
    return encode_head(trace.blocks, len(trace.locations), trace.left_out) + packed


# --- reading ----------------------------------------------------------------------------------


def read_trace(path: Path) -> Trace:
    """Read a trace file.

    :raise TraceError: it cannot be read, or it is no whole trace of this version.
    """
    with _opened(path) as file:
        head = file.read(_MAX_HEAD_BYTES)
        offset, count = _layout(head)
        file.seek(offset)
        return _decode(head, file.read(count * _RECORD.size))


def read_blocks(path: Path) -> tuple[TracedBlock, ...]:
    """The RAM blocks of a trace file that has room for its records; none of those is looked at.

    :raise TraceError: as `read_trace`.
    """
    with _opened(path) as file:
        head = file.read(_MAX_HEAD_BYTES)
        offset, count = _layout(head)
        blocks = _blocks_of(head, offset)
        if os.fstat(file.fileno()).st_size < offset + count * _RECORD.size:
            raise _cut()
        return blocks


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # of a FIFO: do not wait
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise TraceError("is not a file", remedy=_ANOTHER)
            yield file
    except FileNotFoundError as error:
        remedy = "a path counts from the folder of the file that names it"
        raise TraceError("no such file", remedy=remedy) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise TraceError(f"cannot be read: {reason}") from error


def decode(data: bytes) -> Trace:
    """The trace in a file's bytes.

    :raise TraceError: it is none.
    """
    offset, count = _layout(data[:_MAX_HEAD_BYTES])
    return _decode(data[:_MAX_HEAD_BYTES], data[offset : offset + count * _RECORD.size])


def _layout(head: bytes) -> tuple[int, int]:
    """Where the records begin, and how many there are; both within bounds."""
    if head[: len(MAGIC)] != MAGIC:
        raise TraceError("is no fault trace of qpostcopy", remedy=_ANOTHER)
    if len(head) < _HEAD.size:
        raise _cut()
    _, version, block_count, page_bytes, offset, _, count, *_ = _HEAD.unpack_from(head)
    if version != VERSION:
        raise TraceError(f"is of version {version}: expected {VERSION}", remedy=_AGAIN)
    if page_bytes != PAGE_BYTES:
        text = f"counts in pages of {page_bytes} bytes: expected {PAGE_BYTES}"
        raise TraceError(text, remedy=_AGAIN)
    if not 0 < block_count <= MAX_BLOCKS:
        raise _broken(f"has {block_count} RAM blocks: expected 1 to {MAX_BLOCKS}")
    if count > MAX_RECORDS:
        raise _broken(f"has {count} records: expected at most {MAX_RECORDS}")
    if not _HEAD.size < offset <= _MAX_HEAD_BYTES:
        raise _broken("says that its records begin where they cannot")
    return offset, count


def _decode(head: bytes, packed: bytes) -> Trace:
    _, _, _, _, offset, _, count, left_out, *_ = _HEAD.unpack_from(head)
    blocks = _blocks_of(head, offset)
    if len(packed) != count * _RECORD.size:
        raise _cut()
    flat = array("Q", chain.from_iterable(_RECORD.iter_unpack(packed)))
    locations = flat[::2]
    _check_locations(locations, blocks)
    return Trace(blocks, locations, flat[1::2], left_out)


def _blocks_of(head: bytes, offset: int) -> tuple[TracedBlock, ...]:
    """The table of blocks, which ends where the records begin."""
    head, at = head[:offset], _HEAD.size
    _, _, block_count, *_ = _HEAD.unpack_from(head)
    found: dict[str, TracedBlock] = {}
    for _ in range(block_count):
        if at + _BLOCK.size > len(head):
            raise _cut() if len(head) < offset else _broken("has a table of blocks that is cut off")
        size_bytes, name_bytes = _BLOCK.unpack_from(head, at)
        at += _BLOCK.size + name_bytes
        if name_bytes > MAX_NAME_BYTES or at > len(head):
            raise _cut() if len(head) < offset else _broken("has a RAM block with an endless name")
        block = TracedBlock(_name(head[at - name_bytes : at]), size_bytes)
        if block.name in found or not 0 < size_bytes < 1 << 60 or size_bytes % PAGE_BYTES:
            raise _broken(f'has a RAM block "{block.name}" that cannot be')
        found[block.name] = block
    if len(head) < offset:
        raise _cut()
    if offset - at >= _ALIGNMENT or any(head[at:]):
        raise _broken("has something between its blocks and its records")
    return tuple(found.values())


def _name(raw: bytes) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError as error:
        raise _broken("has a RAM block whose name is not UTF-8") from error
    if not name or not name.isprintable():
        raise _broken(f"has a RAM block of the name {name!a}")
    return name


def _check_locations(locations: Iterable[int], blocks: Sequence[TracedBlock]) -> None:
    """Each on a page of a block."""
    pages = [block.size_bytes // PAGE_BYTES for block in blocks]
    for location in locations:
        index, page = location >> PAGE_BITS, location & (1 << PAGE_BITS) - 1
        if index >= len(pages) or page >= pages[index]:
            raise _broken(f"has a fault on page {page} of RAM block {index}, which it has not")


def _cut() -> TraceError:
    return TraceError("is cut off", remedy=_WHOLE)


def _broken(text: str) -> TraceError:
    return TraceError(f"{text}: the file is damaged", remedy=_ANOTHER)
