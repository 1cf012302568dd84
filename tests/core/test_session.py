"""The two cores against each other over a real userfaultfd of another process.

No QEMU: the victim process stands in for it. Random schedules and contents are
moved while the victim touches pages; what it reads must be what the source had.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qpostcopy.core import (
    PAGE_BYTES,
    HandlerCore,
    LaneEnd,
    Mapping,
    RamBlock,
    SourceCore,
    TargetGoneError,
    uffd_api,
    uffd_register_missing,
    uffd_unregister,
)

pytestmark = pytest.mark.root
VICTIM = Path(__file__).with_name("victim.py")


class Victim:
    """A process with registered memory; `read`, `write`, `discard` happen in it."""

    def __init__(self, pages: int) -> None:
        size = pages * PAGE_BYTES
        self.ram_fd = os.memfd_create("destination")
        os.truncate(self.ram_fd, size)
        self.control, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, str(VICTIM), str(theirs.fileno()), str(self.ram_fd), str(size)],
                pass_fds=[theirs.fileno(), self.ram_fd],
            )
        message, fds, _, _ = socket.recv_fds(self.control, 100, 1)
        self.hva, self.uffd = int(message), fds[0]
        self._answers = self.control.makefile()
        self.initialize()
        uffd_register_missing(self.uffd, self.hva, size)

    def initialize(self) -> None:
        uffd_api(self.uffd)

    def send(self, *words: object) -> None:
        self.control.sendall((" ".join(str(word) for word in words) + "\n").encode())

    def answer(self) -> str:
        return self._answers.readline().strip()

    def do(self, *words: object) -> str:
        self.send(*words)
        return self.answer()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._answers.close()
        self.control.close()
        os.close(self.uffd)
        os.close(self.ram_fd)


class Session:
    """Lanes between a handler and a page server, their loops in threads."""

    def __init__(self, handler: HandlerCore, source: SourceCore, push_lanes: int = 1) -> None:
        self.handler, self.source = handler, source
        self.lanes = [socket.socketpair() for _ in range(1 + push_lanes)]
        self.ends: list[object] = []
        demand = self.lanes[0]
        handler.send_have(demand[0].fileno())
        source.receive_have(demand[1].fileno(), 5000)
        self.threads: list[threading.Thread] = []
        self._run(handler.run_demand, demand[0].fileno())
        self._run(source.run_demand, demand[1].fileno())

    def push(self) -> None:
        self._run(self.source.run_scan)
        for index, lane in enumerate(self.lanes[1:]):
            self._run(self.handler.run_push, lane[0].fileno())
            self._run(self.source.run_push, lane[1].fileno(), index)

    def _run(self, loop: Callable[..., LaneEnd], *arguments: int) -> None:
        def body() -> None:
            try:
                self.ends.append(loop(*arguments))
            except Exception as error:
                self.ends.append(error)

        self.threads.append(threading.Thread(target=body))
        self.threads[-1].start()

    def close(self) -> None:
        self.handler.stop()
        self.source.stop()
        for thread in self.threads:
            thread.join()
        self.handler.reset()
        self.source.reset()
        for lane in self.lanes:
            for end in lane:
                end.close()


def fill(fd: int, pages: int, seed: int) -> None:
    """Data, zero pages and holes by turns of random length."""
    rng = random.Random(seed)
    at = 0
    while at < pages:
        run = min(rng.choice([1, 2, 7, 64, 300]), pages - at)
        kind = rng.randrange(3)
        if kind:
            data = bytes(run * PAGE_BYTES) if kind == 1 else rng.randbytes(run * PAGE_BYTES)
            os.pwrite(fd, data, at * PAGE_BYTES)
        at += run


def digest(fd: int, first: int, count: int) -> str:
    return hashlib.sha256(os.pread(fd, count * PAGE_BYTES, first * PAGE_BYTES)).hexdigest()


class Rig:
    """A source memfd, a victim, and the two cores over them."""

    def __init__(self, directory: Path, pages: int, seed: int = 1, *, here: bool = False) -> None:
        self.pages, self.directory = pages, directory
        self.block = RamBlock("ram", pages * PAGE_BYTES)
        self.source_fd = os.memfd_create("source")
        os.truncate(self.source_fd, pages * PAGE_BYTES)
        fill(self.source_fd, pages, seed)
        self.victim = Victim(pages)
        self.handler = self.make_handler(fresh=True)
        self.source = SourceCore(
            [self.source_fd], [self.block], push_from_fault=here, push_bytes_per_second=None
        )
        self.source.set_schedule([(0, 0, pages)])

    def make_handler(self, *, fresh: bool) -> HandlerCore:
        mapping = Mapping(0, self.victim.hva, self.block.size_bytes, 0)
        return HandlerCore(
            self.victim.uffd, [self.block], [mapping], self.directory,
            ahead_pages=4, behind_pages=2, fresh=fresh,
        )  # fmt: skip

    def wait_done(self) -> None:
        assert select.select([self.handler.done_fd], [], [], 30)[0], self.handler.stats()

    def unregister(self) -> None:
        """As `complete` does: from now on nobody serves a fault, and nobody need."""
        uffd_unregister(self.victim.uffd, self.victim.hva, self.block.size_bytes)

    def check(self) -> None:
        self.unregister()
        assert self.victim.do("read", 0, self.pages) == digest(self.source_fd, 0, self.pages)
        stats = self.handler.stats()
        assert stats.remaining_pages == 0
        assert stats.stray_pages == 0
        assert stats.total_pages == sum(
            (stats.hole_pages, stats.zero_pages, stats.push_pages, stats.demand_pages,
             stats.around_pages)
        )  # fmt: skip

    def close(self) -> None:
        self.victim.close()
        self.handler.close()
        self.source.close()
        os.close(self.source_fd)


@contextmanager
def rig(directory: Path, pages: int, seed: int = 1, *, here: bool = False) -> Iterator[Rig]:
    made = Rig(directory, pages, seed, here=here)
    try:
        yield made
    finally:
        made.close()


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    pages=st.integers(1, 3000),
    seed=st.integers(0, 1 << 30),
    lanes=st.integers(1, 3),
    here=st.booleans(),
    split=st.floats(0, 1),
)
def test_every_page_arrives_while_they_are_touched(
    tmp_path_factory: pytest.TempPathFactory,
    pages: int,
    seed: int,
    lanes: int,
    here: bool,
    split: float,
) -> None:
    with rig(tmp_path_factory.mktemp("maps"), pages, seed, here=here) as moved:
        middle = int(split * pages)
        extents = [(0, middle, pages - middle), (0, 0, middle)]
        moved.source.set_schedule(extent for extent in extents if extent[2])
        session = Session(moved.handler, moved.source, lanes)
        rng = random.Random(seed)
        touched = [rng.randrange(pages) for _ in range(20)]
        for page in touched[:10]:
            assert moved.victim.do("read", page, 1) == digest(moved.source_fd, page, 1)
        session.push()
        for page in touched[10:]:
            assert moved.victim.do("read", page, 1) == digest(moved.source_fd, page, 1)
        moved.wait_done()
        session.close()
        moved.check()
        assert set(session.ends) <= {LaneEnd.DONE, LaneEnd.STOPPED}


def test_a_page_that_the_guest_wrote_is_never_written_again(tmp_path: Path) -> None:
    with rig(tmp_path, 2000) as moved:
        session = Session(moved.handler, moved.source)
        for page in range(0, 2000, 50):
            assert moved.victim.do("write", page, 0xEE) == "ok"
        session.push()
        moved.wait_done()
        session.close()
        moved.unregister()
        for page in range(0, 2000, 50):
            expected = b"\xee" + os.pread(moved.source_fd, PAGE_BYTES - 1, page * PAGE_BYTES + 1)
            assert moved.victim.do("read", page, 1) == hashlib.sha256(expected).hexdigest()


def test_a_fault_waits_over_the_loss_of_lanes_and_of_the_handler(tmp_path: Path) -> None:
    """The page asked for when the lanes were lost arrives by the next session's."""
    with rig(tmp_path, 500, seed=3) as moved:
        page = next(n for n in range(500) if any(os.pread(moved.source_fd, 8, n * PAGE_BYTES)))
        lanes = socket.socketpair()
        moved.handler.send_have(lanes[0].fileno())
        ends: list[LaneEnd] = []
        loop = threading.Thread(
            target=lambda: ends.append(moved.handler.run_demand(lanes[0].fileno()))
        )
        loop.start()
        moved.victim.send("read", page, 1)  # read by the handler, and never answered
        request = b""
        while len(request) < 48:  # START, then the request
            request += lanes[1].recv(48 - len(request))
        lanes[1].close()
        loop.join()
        assert ends == [LaneEnd.CLOSED]
        lanes[0].close()
        moved.handler.close()

        moved.handler = moved.make_handler(fresh=False)
        moved.handler.adopt([moved.victim.ram_fd])
        session = Session(moved.handler, moved.source)
        moved.handler.wake_all()
        assert moved.victim.answer() == digest(moved.source_fd, page, 1)
        session.push()
        moved.wait_done()
        session.close()
        moved.check()


def test_a_successor_does_not_ask_for_what_is_there(tmp_path: Path) -> None:
    with rig(tmp_path, 3000, seed=5) as moved:
        session = Session(moved.handler, moved.source)
        moved.victim.do("read", 0, 1500)
        session.close()
        duplicates = moved.handler.stats().duplicate_pages  # faults overtook what came along
        moved.handler.close()
        placed = sum(
            1
            for page in range(1500)
            if any(os.pread(moved.source_fd, PAGE_BYTES, page * PAGE_BYTES))
        )
        moved.handler = moved.make_handler(fresh=False)
        moved.handler.adopt([moved.victim.ram_fd])
        session = Session(moved.handler, moved.source)
        moved.handler.wake_all()
        session.push()
        moved.wait_done()
        session.close()
        moved.check()
        data = sum(
            1
            for page in range(3000)
            if any(os.pread(moved.source_fd, PAGE_BYTES, page * PAGE_BYTES))
        )
        assert moved.handler.stats().duplicate_pages == duplicates
        assert moved.source.stats().push_pages <= data - placed


def test_a_discarded_page_reads_as_zeroes_not_as_old_content(tmp_path: Path) -> None:
    with rig(tmp_path, 500, seed=3) as moved:
        page = next(n for n in range(500) if any(os.pread(moved.source_fd, 8, n * PAGE_BYTES)))
        session = Session(moved.handler, moved.source)
        assert moved.victim.do("read", page, 1) == digest(moved.source_fd, page, 1)
        assert moved.victim.do("discard", page, 1) == "ok"
        assert moved.victim.do("read", page, 1) == hashlib.sha256(bytes(PAGE_BYTES)).hexdigest()
        session.push()
        moved.wait_done()
        assert moved.victim.do("read", page, 1) == hashlib.sha256(bytes(PAGE_BYTES)).hexdigest()
        session.close()
        assert moved.handler.stats().discarded_pages == 1


@pytest.mark.slow
def test_a_dead_target_is_told_as_such(tmp_path: Path) -> None:
    with rig(tmp_path, 3000, seed=7) as moved:
        session = Session(moved.handler, moved.source)
        moved.victim.process.kill()
        moved.victim.process.wait()
        session.push()
        for thread in session.threads[2:]:
            thread.join(10)
        session.close()
        assert any(isinstance(end, TargetGoneError) for end in session.ends), session.ends


def test_what_faults_bring_along_does_not_fill_the_demand_lane() -> None:
    """The next fault's page must not wait behind megabytes of neighbours of earlier ones."""
    unsent_ioctl = 0x894B  # SIOCOUTQNSD: bytes that TCP has not sent yet
    pages = 8192
    with socket.create_server(("127.0.0.1", 0)) as listener:
        source_fd = os.memfd_create("source")
        for offset in range(0, pages * PAGE_BYTES, 1 << 20):
            os.pwrite(source_fd, random.Random(offset).randbytes(1 << 20), offset)
        block = RamBlock("ram", pages * PAGE_BYTES)
        server = SourceCore([source_fd], [block], push_from_fault=False, push_bytes_per_second=None)
        server.set_schedule([])
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
        with ours, theirs:
            loop = threading.Thread(target=server.run_demand, args=(theirs.fileno(),))
            loop.start()
            for first in range(0, pages, 64):  # REQUEST of 64 pages, none of the answers is read
                ours.sendall(struct.pack("<BBHIQQ", 1, 0, 0, 0, first, 64))
            most = 0
            for _ in range(100):
                time.sleep(0.005)
                answer = fcntl.ioctl(theirs, unsent_ioctl, struct.pack("i", 0))
                most = max(most, struct.unpack("i", answer)[0])
            server.stop()
            loop.join()
        server.close()
        os.close(source_fd)
        assert 0 < most < 512 * 1024
