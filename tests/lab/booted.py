"""A guest at work, looked at from outside: through the file under its RAM."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qpostcopy.core import PAGE_BYTES
from qpostcopy.lab.guest import Guest, Ready
from qpostcopy.lab.vm import Backend, Boot, Vm, VmSpec

#: What each word of a data page's body adds to the one before (scripts/guest/pages.c).
FILLER_STEP = 0x9E3779B97F4A7C15
_WORDS = struct.Struct("<4Q")
_MASK = (1 << 64) - 1


class Booted:
    """A guest, the VM it is in, and what it said when it was ready."""

    def __init__(self, vm: Vm, guest: Guest, ready: Ready) -> None:
        self.vm = vm
        self.guest = guest
        self.ready = ready
        self.ram_fd = vm.ram_fd("ram")

    @property
    def corrupt(self) -> int:
        return self.guest.verify(30).corrupt

    def read(self, offset: int) -> bytes:
        """The page at that offset."""
        return os.pread(self.ram_fd, PAGE_BYTES, offset)

    def pages(self, start: int = 0) -> Iterator[tuple[int, bytes]]:
        """(offset, content) of every page of RAM that is there."""
        end = start
        while True:
            try:
                start = os.lseek(self.ram_fd, end, os.SEEK_DATA)
            except OSError:
                return
            end = os.lseek(self.ram_fd, start, os.SEEK_HOLE)
            for offset in range(start, end, PAGE_BYTES):
                yield offset, self.read(offset)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The VM stands meanwhile: what is read is of one moment."""
        self.vm.observer.execute("stop")
        try:
            yield
        finally:
            self.vm.observer.execute("cont")


@contextmanager
def booted_guest(boot: Boot, ram_bytes: int, directory: Path) -> Iterator[Booted]:
    """Boot it, and wait until it is at work."""
    spec = VmSpec((Backend("ram", ram_bytes, None),), boot=boot)
    with Vm("vm", spec, directory) as vm, Guest(vm.serial) as guest:
        yield Booted(vm, guest, guest.wait_ready(60))


def is_data(page: bytes) -> bool:
    """Whether a page is one that the Linux guest's workload filled."""
    _, first, second, third = _WORDS.unpack_from(page)
    steps = {(second - first) % 2**64, (third - second) % 2**64}
    return steps == {FILLER_STEP}


def generation(page: bytes) -> int:
    """How often the guest has written that data page: its first word says it, mixed."""
    sealed, first, _, _ = _WORDS.unpack_from(page)
    number = _unmix((first - FILLER_STEP) & _MASK) - 1
    return _unmix(sealed) - (number << 32) - 1


def _unmix(value: int) -> int:
    """The inverse of `mix` in scripts/guest/pages.c."""
    value ^= value >> 31 ^ value >> 62
    value = value * pow(0x94D049BB133111EB, -1, 1 << 64) & _MASK
    value ^= value >> 27 ^ value >> 54
    value = value * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & _MASK
    return value ^ value >> 30 ^ value >> 60
