"""Memory that the guest gives back while its pages arrive: balloon, free page reporting.

What must hold is in docs/discards.md. Two kinds of tests: a real guest that
discards as hard as it can in a postcopy that takes seconds, and a QEMU that never
ran, in which a test puts discard, fault, copy and the death of the handler in
the order that it wants.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from qpostcopy.core import PAGE_BYTES, CoreError, inject_syscall, uffd_api, uffd_register_missing
from qpostcopy.lab.guest import find_image
from qpostcopy.lab.vm import Boot, Vm, VmSpec
from qpostcopy.qmp.monitor import Monitor
from qpostcopy.qmp.schema import BlockFacts
from qpostcopy.regions import discover_blocks, punch_empty
from qpostcopy.state import StateDirectory
from qpostcopy.uffd import attach
from tests.companions import memfd_backends
from tests.discards import Rig, fill_of
from tests.qmp.support import private_directory
from tests.vm.scene import MIB, finish_after, kill, read_until_phase, wait_until
from tests.vm.series import Series
from tests.vm.setups import PLAIN

pytestmark = [pytest.mark.vm, pytest.mark.root]
SLOW = pytest.mark.slow


@pytest.fixture
def directory() -> Iterator[Path]:
    with private_directory() as path:
        yield path


# --- every order, in a QEMU that stands still ---------------------------------------------

SYS_MADVISE = 28
MADV_DONTNEED = 4
DATA, ZERO, HOLE = 3003, 3004, 3005  # pages of a kind, as fill_of has them


class QemuMemory:
    """A real QEMU's RAM as tests/discards.py wants it."""

    pages = 4096

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self.ram_fd = vm.ram_fd("ram0")
        self.uffd = attach.obtain(vm.pid).uffd
        (block,) = asyncio.run(_blocks_of(vm))
        self.hva = min(mapping.hva for mapping in block.mappings)
        uffd_api(self.uffd)
        for mapping in block.mappings:
            uffd_register_missing(self.uffd, mapping.hva, mapping.length_bytes)
        punch_empty(self.ram_fd, block.size_bytes)

    def peek(self, page: int) -> int:
        """By QEMU's main loop, which hangs until the page is there."""
        line = {"command-line": f"xp /1xb {page * PAGE_BYTES:#x}"}
        return int(self._vm.observer.execute("human-monitor-command", line).split()[-1], 16)

    def drop(self, page: int, count: int) -> None:
        """In QEMU, as its balloon does. QEMU dies if that has to wait for somebody."""
        where = self.hva + page * PAGE_BYTES, count * PAGE_BYTES
        results: list[int] = []

        def madvise() -> None:
            with contextlib.suppress(CoreError):
                args = (*where, MADV_DONTNEED)
                results.append(inject_syscall(self._vm.pid, SYS_MADVISE, args, 5000))

        thread = threading.Thread(target=madvise)
        thread.start()
        thread.join(10)
        if thread.is_alive():  # an injected call that sleeps is not given up
            self._vm.kill()
            thread.join()
        assert results == [0]


async def _blocks_of(vm: Vm) -> tuple[BlockFacts, ...]:
    monitor = await Monitor.connect(vm.qmp_path)
    try:
        return await discover_blocks(monitor.execute, vm.pid)
    finally:
        await monitor.close()


@pytest.fixture
def rig(directory: Path) -> Iterator[Rig]:
    spec = VmSpec(memfd_backends(QemuMemory.pages * PAGE_BYTES), paused=True)
    with Vm("qemu", spec, directory) as vm:
        memory = QemuMemory(vm)
        made = Rig(memory, directory)
        try:
            yield made
        finally:
            made.close()
            os.close(memory.uffd)


@contextlib.contextmanager
def reading(rig: Rig, page: int) -> Iterator[Callable[[], int]]:
    """QEMU reads the page all the while; gives what it read, once it has."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(rig.memory.peek(page)))
    thread.start()

    def end() -> int:
        thread.join(20)
        return found[0]

    try:
        yield end
    finally:
        thread.join(20)


def is_hole(rig: Rig, page: int) -> bool:
    try:
        return os.lseek(rig.memory.ram_fd, page * PAGE_BYTES, os.SEEK_DATA) != page * PAGE_BYTES
    except OSError:  # ENXIO: no data at all from here on
        return True


def test_discarded_after_it_was_placed(rig: Rig) -> None:
    """Zeroes, and never again what it held; nobody is asked for it."""
    rig.answer()
    rig.push(DATA, 1)
    assert rig.memory.peek(DATA) == fill_of(DATA)
    rig.discard(DATA)
    rig.push(0, rig.memory.pages)
    assert is_hole(rig, DATA)
    asked = rig.source.stats().requests
    assert rig.memory.peek(DATA) == 0
    assert rig.handler.stats().discarded_pages == 1
    assert rig.source.stats().requests == asked
    rig.discard(DATA)
    assert rig.memory.peek(DATA) == 0
    assert rig.finish()[DATA] == 0


def test_discarded_before_it_was_placed(rig: Rig) -> None:
    """It comes as it was: whoever gave it up may find it so (docs/discards.md)."""
    rig.answer()
    rig.discard(DATA)
    rig.discard(DATA + 3)
    rig.push(DATA, 1)
    assert not is_hole(rig, DATA)
    assert rig.memory.peek(DATA) == fill_of(DATA)
    assert rig.memory.peek(DATA + 3) == fill_of(DATA + 3)
    rig.finish()


def test_a_copy_between_the_two_halves_of_a_discard(rig: Rig) -> None:
    rig.answer()
    rig.punch(DATA)
    rig.push(DATA, 1)
    rig.memory.drop(DATA, 1)
    assert rig.memory.peek(DATA) == fill_of(DATA)
    rig.punch(DATA)
    rig.memory.drop(DATA, 1)
    assert rig.memory.peek(DATA) == 0
    rig.finish()


def test_each_half_alone(rig: Rig) -> None:
    """A discard that failed half way: the file decides."""
    rig.answer()
    rig.push(DATA, 10)
    rig.memory.drop(DATA, 1)
    assert rig.memory.peek(DATA) == fill_of(DATA)
    rig.punch(DATA + 3)
    assert rig.memory.peek(DATA + 3) == 0
    rig.finish()


def test_discarded_while_it_is_asked_for(rig: Rig) -> None:
    """QEMU's main loop waits for the page: the discard goes through another thread."""
    with reading(rig, DATA) as read:
        wait_until(lambda: rig.handler.stats().faults == 1, "the fault")
        rig.discard(DATA)
        rig.answer()
        assert read() == fill_of(DATA)
    rig.finish()


@pytest.mark.parametrize("page", [ZERO, HOLE])
def test_discarded_zero_pages(rig: Rig, page: int) -> None:
    """Known, not placed, until somebody touches it: zeroes before and after."""
    rig.answer()
    rig.push(page, 1)
    assert is_hole(rig, page)
    rig.discard(page)
    assert rig.memory.peek(page) == 0
    rig.discard(page)
    assert rig.memory.peek(page) == 0
    assert rig.finish()[page] == 0


def test_discarded_over_what_is_there_and_what_is_not(rig: Rig) -> None:
    rig.answer()
    rig.push(DATA, 30)
    rig.discard(DATA - 30, 90)
    for page in range(DATA - 30, DATA + 60):
        expected = 0 if DATA <= page < DATA + 30 else fill_of(page)
        assert rig.memory.peek(page) == expected
    rig.finish()


def test_the_next_handler_knows_what_was_discarded(rig: Rig) -> None:
    """A hole like those that are missing; the bit of the dead handler tells them apart."""
    rig.answer()
    rig.push(DATA, 30)
    rig.discard(DATA, 15)
    before = rig.handler.stats()
    rig.replace_handler()
    after = rig.handler.stats()
    assert (after.remaining_pages, after.push_pages) == (before.remaining_pages, before.push_pages)
    with reading(rig, DATA) as read:
        assert read() == 0
    assert rig.memory.peek(DATA + 15) == fill_of(DATA + 15)
    assert rig.memory.peek(DATA + 30) == fill_of(DATA + 30)
    final = rig.finish()
    assert not any(final[DATA : DATA + 15])
    assert rig.handler.stats().duplicate_pages == 0


def test_without_a_handler_a_discard_does_not_wait(rig: Rig) -> None:
    """QEMU's main loop discards under its big lock: it must never wait for us."""
    rig.answer()
    rig.push(DATA, 3)
    rig.end_session()
    rig.discard(DATA, 1000)  # the injection would time out
    rig.replace_handler()
    assert rig.memory.peek(DATA) == 0
    assert rig.memory.peek(DATA + 3) == fill_of(DATA + 3)
    rig.finish()


# --- a guest at work ----------------------------------------------------------------------

BALLOON_BYTES = 24 * MIB


class Discarding(Series):
    """A guest with a balloon device and free memory that had content once."""

    def __init__(self, directory: Path, guest_bytes: int, device: str, *words: str) -> None:
        boot = Boot(*find_image(), words=("workload=service", "rate=300", "drivers=on", *words))
        vm = VmSpec((), more=("-device", device))
        setup = replace(PLAIN, vm=vm, boot=lambda: boot, guest_sizes=(guest_bytes,))
        self.guest_bytes = guest_bytes
        super().__init__(directory, setup)

    def begin(self, push: str) -> InPostcopy:
        there = self.next_destination()
        viewer = self.start(there, profile="sequential", push=push)
        return InPostcopy(self, there, viewer, read_until_phase(viewer, "postcopy"))


@dataclass
class InPostcopy:
    """A migration whose guest discards."""

    series: Discarding
    there: Vm
    viewer: subprocess.Popen[str]
    read: str

    def wait_given_back(self, pages: int) -> None:
        """Until so many pages that were placed are holes again."""
        while self._given_back() < pages:
            assert self.viewer.poll() is None, "it ended before the guest gave memory back"
            time.sleep(0.1)  # they have no event

    def _given_back(self) -> int:
        ram_fd = self.there.ram_fd("ram0")
        try:
            placed = (self._state_dir / "placed.ram0").read_bytes()
        except FileNotFoundError:  # the migration is over
            return 0
        return sum(
            placed[page // 8] >> page % 8 & 1
            for first, end in holes_of(ram_fd, self.series.guest_bytes // PAGE_BYTES)
            for page in range(first, end)
        )

    @property
    def _state_dir(self) -> Path:
        return max(self.series.run_directory.iterdir())

    def kill_handler(self) -> None:
        kill(StateDirectory.open(self._state_dir).state.destination.companion)


def holes_of(fd: int, pages: int) -> Iterator[tuple[int, int]]:
    """First page and end of each hole of a file."""
    at = 0
    while at < pages:
        hole = os.lseek(fd, at * PAGE_BYTES, os.SEEK_HOLE) // PAGE_BYTES
        try:
            at = os.lseek(fd, hole * PAGE_BYTES, os.SEEK_DATA) // PAGE_BYTES
        except OSError:  # ENXIO: no more data
            at = pages
        if hole < at:
            yield hole, at


class Balloon:
    """Inflates and deflates as fast as the guest follows, in a thread, until it is left."""

    def __init__(self, vm: Vm) -> None:
        self.rounds = 0
        self._all_bytes = vm.spec.ram_bytes
        self._observer = vm.observer
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Balloon:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._move(self._all_bytes - BALLOON_BYTES)
            self._move(self._all_bytes)
            self.rounds += 1

    def _move(self, target_bytes: int) -> None:
        self._observer.execute("balloon", {"value": target_bytes})
        while self._observer.execute("query-balloon")["actual"] != target_bytes:
            if self._stop.wait(0.01):
                return


@SLOW
@pytest.mark.parametrize(("init_on_alloc", "killed"), [(0, True), (0, False), (1, True)])
def test_a_balloon_at_work(directory: Path, init_on_alloc: int, killed: bool) -> None:
    """With init_on_alloc the guest's kernel writes a page before it gives it away, so that
    it was placed; without it most were never there."""
    words = "spare=32", f"init_on_alloc={init_on_alloc}"
    with Discarding(directory, 224 * MIB, "virtio-balloon-pci", *words) as series:
        moving = series.begin(push="20MiB/s")
        with Balloon(moving.there) as balloon:
            moving.wait_given_back(100)
            if killed:
                moving.kill_handler()
            ended = finish_after(moving.viewer, moving.read)
        assert balloon.rounds > 1
        series.arrive(moving.there, ended)
        series.verify()


@SLOW
@pytest.mark.parametrize("init_on_free", [0, 1])
def test_free_page_reporting(directory: Path, init_on_free: int) -> None:
    """With init_on_free the guest's kernel hands out free pages as they are: they must be zero.

    Linux reports nothing while less than 64 MiB are free (its watermark for page reporting).
    """
    words = "spare=64", "freeing=48", f"init_on_free={init_on_free}"
    device = "virtio-balloon-pci,free-page-reporting=on"
    with Discarding(directory, 320 * MIB, device, *words) as series:
        moving = series.begin(push="8MiB/s")
        moving.wait_given_back(1000)
        moving.kill_handler()
        series.arrive(moving.there, finish_after(moving.viewer, moving.read))
        series.verify()
        rounds = freeing_rounds(series)
        series.guest.wait_for(
            lambda: freeing_rounds(series) > rounds or None, "free its memory again", 60
        )


def freeing_rounds(series: Series) -> int:
    """Of the process that uses and frees memory (scripts/guest/spare.c); none found it wrong."""
    told = [line.split() for line in series.guest.other_lines if line.startswith("@f ")]
    rounds, wrong = told[-1][1:3] if told else (0, 0)
    assert int(wrong) == 0, told
    return int(rounds)
