"""Which part of RAM arrives when, seen from outside, for any engine.

While a guest moves, its RAM file at the destination is asked again and again where
it has data (`lseek`, SEEK_DATA): that touches no page and maps nothing. It takes
milliseconds each time, so such a run is for the picture only.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from qpostcopy.core import PAGE_BYTES
from qpostcopy.lab.vm import Vm

PARTS = 256
_EVERY_SECONDS = 0.025


class Painter:
    """Looks at one RAM file until told to stop.

    :ivar arrivals: (ms since the start, part, pages more than at the last look).
    """

    def __init__(self) -> None:
        self.arrivals: list[tuple[float, int, int]] = []
        self._pages = [0] * PARTS
        self._done = threading.Event()

    @contextmanager
    def watching(self, vm: Vm, started_s: float) -> Iterator[None]:
        """Watch the RAM of a VM with one backend meanwhile.

        :param started_s: what times are counted from, of `time.monotonic()`.
        """
        fd = vm.ram_fd(vm.spec.backends[0].name)
        size_bytes = vm.spec.ram_bytes
        self._pages = pages_by_part(fd, size_bytes)
        thread = threading.Thread(
            target=self._watch, args=(fd, size_bytes, started_s), name="painter"
        )
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()
            self._look(fd, size_bytes, started_s)

    def _watch(self, fd: int, size_bytes: int, started_s: float) -> None:
        while not self._done.wait(_EVERY_SECONDS):
            self._look(fd, size_bytes, started_s)

    def _look(self, fd: int, size_bytes: int, started_s: float) -> None:
        now_ms = round((time.monotonic() - started_s) * 1e3, 1)
        pages = pages_by_part(fd, size_bytes)
        for part, (before, after) in enumerate(zip(self._pages, pages, strict=True)):
            if after > before:
                self.arrivals.append((now_ms, part, after - before))
        self._pages = pages


def pages_by_part(fd: int, size_bytes: int) -> list[int]:
    """How many pages each part of a sparse file has."""
    pages = [0] * PARTS
    part_bytes = -(-size_bytes // PARTS)
    for start, end in _extents(fd, size_bytes):
        while start < end:
            part = start // part_bytes
            upto = min(end, (part + 1) * part_bytes)
            pages[part] += (upto - start) // PAGE_BYTES
            start = upto
    return pages


def _extents(fd: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Where a file has data; ends are exclusive."""
    end = 0
    with suppress(OSError):  # ENXIO: nothing follows
        while end < size_bytes:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
            yield start, end
