"""Any order of pushes, faults, writes, discards and handlers: what does every page read as?

The two halves of a discard come apart here, as they do in QEMU, where anything
can happen between them. The memory is a victim process; tests/vm/test_discards.py
has QEMUs.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import select
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qpostcopy.core import PAGE_BYTES
from tests.core.test_session import Victim
from tests.discards import Model, Rig, fill_of

pytestmark = pytest.mark.root

PAGES = 96
DATA = 3  # a page with content, as fill_of has it


class ProcessMemory(Victim):
    """A victim as tests/discards.py wants it."""

    def __init__(self, pages: int) -> None:
        super().__init__(pages)
        self.control.settimeout(30)  # one that waits for a page for ever fails its test
        self.pages = pages

    def peek(self, page: int) -> int:
        return int(self.do("peek", page, 0))

    def drop(self, page: int, count: int) -> None:
        assert self.do("drop", page, count) == "ok"


@contextlib.contextmanager
def rig_of(directory: Path, pages: int = PAGES) -> Iterator[Rig]:
    memory = ProcessMemory(pages)
    rig = Rig(memory, directory)
    try:
        yield rig
    finally:
        rig.close()
        memory.close()


def play(rig: Rig, memory: ProcessMemory, chance: random.Random, steps: int) -> None:
    model = Model(PAGES)
    for _ in range(steps):
        first = chance.randrange(PAGES)
        count = min(chance.choice([1, 1, 3, 40]), PAGES - first)
        match chance.choice(
            ["push", "touch", "touch", "write", "discard", "punch", "drop", "next"]
        ):
            case "push":
                rig.push(first, count)
                model.push(first, count)
            case "touch":
                assert memory.peek(first) == model.touch(first), (first, model.placed[first])
            case "write":
                model.touch(first)
                fill = model.place(first, 251 + chance.randrange(5))
                assert memory.do("write", first, fill) == "ok"
            case "discard":
                rig.discard(first, count)
                model.punch(first, count)
            case "punch":
                rig.punch(first, count)
                model.punch(first, count)
            case "drop":
                memory.drop(first, count)  # only the page tables: the file has it still
            case "next" if chance.random() < 0.3:
                rig.replace_handler()
    assert rig.finish() == model.finish()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 1 << 30), steps=st.integers(1, 60))
def test_any_order(tmp_path_factory: pytest.TempPathFactory, seed: int, steps: int) -> None:
    with rig_of(tmp_path_factory.mktemp("maps")) as rig:
        assert isinstance(rig.memory, ProcessMemory)
        rig.answer()
        play(rig, rig.memory, random.Random(seed), steps)


def test_discards_at_the_same_time(tmp_path: Path) -> None:
    """Punches fall into copies, faults and zero pages: no page is a mixture or a stranger's."""
    pages = 12000
    with rig_of(tmp_path, pages) as rig:
        rig.answer()
        over = threading.Event()

        def punch_all_over() -> None:
            chance = random.Random(1)
            while not over.is_set():
                rig.punch(chance.randrange(pages - 8), chance.randrange(1, 8))

        thread = threading.Thread(target=punch_all_over)
        thread.start()
        try:
            chance = random.Random(2)
            for first in range(0, pages, 500):
                rig.push(first, 500)
                for _ in range(20):
                    page = chance.randrange(pages)
                    assert rig.memory.peek(page) in (0, fill_of(page))
        finally:
            over.set()
            thread.join()
        for page, fill in enumerate(rig.finish()):
            assert fill in (0, fill_of(page))
        assert rig.handler.stats().discarded_pages > 0


def test_a_discard_while_the_page_is_asked_for(tmp_path: Path) -> None:
    """The owner has given up what it waits for: it gets it nevertheless, and does not hang."""
    with rig_of(tmp_path) as rig:
        assert isinstance(rig.memory, ProcessMemory)
        rig.memory.send("peek", DATA, 0)
        rig.punch(DATA)
        rig.answer()
        assert int(rig.memory.answer()) == fill_of(DATA)
        rig.finish()


# --- why UFFD_EVENT_REMOVE is not asked for (docs/discards.md) ----------------------------

_FEATURE_EVENT_REMOVE, _FEATURE_MISSING_SHMEM = 1 << 3, 1 << 5
_EVENT_REMOVE = 0x15
_UFFDIO_API, _UFFDIO_COPY = 0xC018AA3F, 0xC028AA03
_MESSAGE_BYTES = 32


class TellingMemory(ProcessMemory):
    """One whose userfaultfd tells of dropped ranges."""

    def initialize(self) -> None:
        features = _FEATURE_MISSING_SHMEM | _FEATURE_EVENT_REMOVE
        fcntl.ioctl(self.uffd, _UFFDIO_API, struct.pack("QQQ", 0xAA, features, 0))

    def copy(self, page: int, fill: int) -> None:
        content = ctypes.create_string_buffer(bytes([fill]) * PAGE_BYTES, PAGE_BYTES)
        target, source = self.hva + page * PAGE_BYTES, ctypes.addressof(content)
        request = struct.pack("QQQQq", target, source, PAGE_BYTES, 0, 0)
        fcntl.ioctl(self.uffd, _UFFDIO_COPY, request)

    def read_event(self) -> tuple[int, int]:
        """Its kind, and the page that it begins at."""
        message = os.read(self.uffd, _MESSAGE_BYTES)
        return message[0], (struct.unpack_from("Q", message, 8)[0] - self.hva) // PAGE_BYTES

    def answers_within(self, seconds: float) -> bool:
        return bool(select.select([self.control], [], [], seconds)[0])


@pytest.fixture
def telling() -> Iterator[TellingMemory]:
    memory = TellingMemory(PAGES)
    yield memory
    memory.close()


def test_the_event_stops_its_thread_and_every_copy_until_it_is_read(
    telling: TellingMemory,
) -> None:
    """The thread that discards is QEMU's main loop; one that reads may be dead."""
    telling.send("drop", 7, 1)
    assert select.select([telling.uffd], [], [], 10)[0]
    with pytest.raises(BlockingIOError):  # EAGAIN, for any page
        telling.copy(50, 1)
    assert not telling.answers_within(0.2)
    assert telling.read_event() == (_EVENT_REMOVE, 7)
    assert telling.answer() == "ok"
    telling.copy(50, 1)


def test_the_event_cannot_tell_whether_the_page_is_empty(telling: TellingMemory) -> None:
    """Nothing tells of the punch before it: a copy in between stays."""
    assert telling.do("discard", 7, 1) == "ok"
    telling.copy(7, 99)
    telling.send("drop", 7, 1)
    assert select.select([telling.uffd], [], [], 10)[0]
    assert telling.read_event() == (_EVENT_REMOVE, 7)
    assert telling.answer() == "ok"
    assert telling.peek(7) == 99
