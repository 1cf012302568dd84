"""Both cores over one memory, so that a test decides what comes first: a push, a fault, a discard.

Nothing happens by itself: pages are pushed when `push` says so, faults are
answered from the moment that `answer` is called. The memory is a victim process
or a real QEMU; QEMU discards in two steps, and both are at hand: it punches the
file (that no userfaultfd tells of), then drops the range from its page tables.

A page of the source is all of one byte, its *fill*: `fill_of` says which one.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from qpostcopy.core import (
    PAGE_BYTES,
    HandlerCore,
    LaneEnd,
    Mapping,
    RamBlock,
    SourceCore,
    uffd_unregister,
)

WAIT_SECONDS = 30
_PUNCH_HOLE_KEEP_SIZE = 3


class Memory(Protocol):
    """RAM at the destination, registered for missing pages."""

    uffd: int
    ram_fd: int
    hva: int
    pages: int

    def peek(self, page: int) -> int:
        """The first byte of a page, read by its owner: a fault if the page is missing."""

    def drop(self, page: int, count: int) -> None:
        """madvise(MADV_DONTNEED), called by its owner."""


def fill_of(page: int) -> int:
    """A third of the source's pages are data; of the others half are zeroes, half are holes."""
    return 1 + page % 250 if page % 3 == 0 else 0


def is_hole(page: int) -> bool:
    return page % 3 == 2


class Rig:
    """A source in a memfd, and the cores between it and a memory."""

    def __init__(self, memory: Memory, directory: Path) -> None:
        self.memory = memory
        self._directory = directory
        self._block = RamBlock("ram", memory.pages * PAGE_BYTES)
        self._source_fd = os.memfd_create("source")
        os.truncate(self._source_fd, self._block.size_bytes)
        for page in range(memory.pages):
            if not is_hole(page):
                content = bytes([fill_of(page)]) * PAGE_BYTES
                os.pwrite(self._source_fd, content, page * PAGE_BYTES)
        self.source = SourceCore(
            [self._source_fd], [self._block], push_from_fault=False, push_bytes_per_second=None
        )
        self.handler = self._make_handler(fresh=True)
        self._threads: list[threading.Thread] = []
        self._open_session()

    def _make_handler(self, *, fresh: bool) -> HandlerCore:
        """Without neighbours: what a fault brings along would be one more order of things."""
        mapping = Mapping(0, self.memory.hva, self._block.size_bytes, 0)
        return HandlerCore(
            self.memory.uffd, [self._block], [mapping], self._directory,
            ahead_pages=0, behind_pages=0, fresh=fresh,
        )  # fmt: skip

    # --- what a test does -----------------------------------------------------------------

    def answer(self) -> None:
        """From now on the page server answers."""
        self._run(self.source.run_demand, self._demand[1].fileno())

    def push(self, first: int, count: int) -> None:
        """Push what of these pages was not sent yet; returns when they are placed."""
        self.source.set_schedule([(0, first, count)])
        lane = socket.socketpair()
        with lane[0], lane[1]:
            sender = threading.Thread(target=self.source.run_push, args=(lane[1].fileno(), 0))
            sender.start()
            assert self.handler.run_push(lane[0].fileno()) is LaneEnd.DONE
            sender.join()

    def discard(self, first: int, count: int = 1) -> None:
        """As QEMU does it (ram_block_discard_range)."""
        self.punch(first, count)
        self.memory.drop(first, count)

    def punch(self, first: int, count: int = 1) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        where = first * PAGE_BYTES, count * PAGE_BYTES
        assert libc.fallocate(self.memory.ram_fd, _PUNCH_HOLE_KEEP_SIZE, *where) == 0

    def replace_handler(self) -> None:
        """As good as SIGKILL: nothing is written at the end. The next one takes over."""
        self.end_session()
        self.handler.close()
        self.handler = self._make_handler(fresh=False)
        self.handler.adopt([self.memory.ram_fd])
        self._open_session()
        self.answer()
        self.handler.wake_all()

    def finish(self) -> list[int]:
        """The rest is pushed, nobody serves any more; the first byte of every page."""
        self.push(0, self.memory.pages)
        assert select.select([self.handler.done_fd], [], [], WAIT_SECONDS)[0], self.handler.stats()
        uffd_unregister(self.memory.uffd, self.memory.hva, self._block.size_bytes)
        stats = self.handler.stats()
        assert (stats.remaining_pages, stats.stray_pages) == (0, 0)
        assert stats.total_pages == sum(
            (stats.hole_pages, stats.zero_pages, stats.push_pages, stats.demand_pages,
             stats.around_pages)
        )  # fmt: skip
        return [
            os.pread(self.memory.ram_fd, 1, page * PAGE_BYTES)[0]
            for page in range(self.memory.pages)
        ]

    def close(self) -> None:
        self.end_session()
        self.handler.close()
        self.source.close()
        os.close(self._source_fd)

    # --- sessions -------------------------------------------------------------------------

    def _open_session(self) -> None:
        self._demand = socket.socketpair()
        self.handler.send_have(self._demand[0].fileno())
        self.source.receive_have(self._demand[1].fileno(), WAIT_SECONDS * 1000)
        self._run(self.handler.run_demand, self._demand[0].fileno())

    def _run(self, loop: Callable[[int], LaneEnd], lane_fd: int) -> None:
        self._threads.append(threading.Thread(target=loop, args=(lane_fd,)))
        self._threads[-1].start()

    def end_session(self) -> None:
        """The loops end: nobody reads a fault. Idempotent."""
        self.handler.stop()
        self.source.stop()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self.handler.reset()
        self.source.reset()
        for end in self._demand:
            end.close()


class Model:
    """What each page must read as, whatever the order.

    A page that was placed once never gets the source's content again. One that was
    discarded before still does: its owner gave the content up, and unchanged is as good
    as any (virtio 1.2, 5.5.6.7).
    """

    def __init__(self, pages: int) -> None:
        self.there: list[int | None] = [None] * pages
        self.placed = [False] * pages

    def place(self, page: int, fill: int) -> int:
        self.there[page], self.placed[page] = fill, True
        return fill

    def touch(self, page: int) -> int:
        there = self.there[page]
        if there is not None:
            return there
        return self.place(page, 0 if self.placed[page] else fill_of(page))

    def push(self, first: int, count: int) -> None:
        for page in range(first, first + count):
            if fill_of(page) and not self.placed[page]:
                self.place(page, fill_of(page))

    def punch(self, first: int, count: int) -> None:
        for page in range(first, first + count):
            self.there[page] = None

    def finish(self) -> list[int]:
        self.push(0, len(self.there))
        return [fill or 0 for fill in self.there]
