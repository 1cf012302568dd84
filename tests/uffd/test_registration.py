"""What is taken is taken wholly or not at all, and only what is ours is ever closed."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from qpostcopy.core import CoreSystemError, uffd_api
from qpostcopy.process import Process
from qpostcopy.qmp.schema import BlockFacts, MappingFacts
from qpostcopy.uffd import attach
from qpostcopy.uffd import registration as ram
from tests.uffd.victims import NO_LENDER, Victim, victim

pytestmark = pytest.mark.root


@pytest.fixture
def target() -> Iterator[Victim]:
    """Stands in for QEMU."""
    with victim("ppoll") as one:
        yield one
        one.process.send_signal(signal.SIGCONT)  # a test that failed may have left it stopped
        assert one.end().startswith("ok ")


def process_of(target: Victim) -> Process:
    process = Process.of(target.pid)
    assert process
    return process


def record(target: Victim, state_dir: Path, before: tuple[int, ...], fd: int | None) -> None:
    """What a handler that was killed has left."""
    left = ram.Record(process=process_of(target), userfaults_before=before, uffd_fd=fd, blocks=())
    ram._write_record(state_dir, left)
    (state_dir / "placed.ram0").touch()
    (state_dir / "counters").touch()


def open_one(target: Victim, *, initialized: bool) -> int:
    """A userfaultfd in the target, and there only."""
    obtained = attach.obtain(target.pid)
    if initialized:
        uffd_api(obtained.uffd)
    os.close(obtained.uffd)
    return obtained.fd_in_target


def unmappable_block() -> BlockFacts:
    """Nothing is mapped there: it cannot be registered."""
    mapping = MappingFacts(
        hva=0x10000,
        length_bytes=0x1000,
        offset_bytes=0,
        dontfork=False,
        huge_pages=False,
        uffd_registered=False,
        locked=False,
    )
    return BlockFacts(
        name="ram0",
        size_bytes=0x1000,
        page_bytes=0x1000,
        share=True,
        backend="memory-backend-memfd",
        mem_path=None,
        first_gpa=0,
        device=0,
        inode=1,
        filesystem="tmpfs",
        mappings=(mapping,),
    )


# --- what a predecessor left --------------------------------------------------------------


def test_qemus_own_userfaultfd_survives_the_closing_of_ours(target: Victim, tmp_path: Path) -> None:
    ours = open_one(target, initialized=True)
    record(target, tmp_path, (), ours)
    its_own = open_one(target, initialized=True)  # opened since
    ram.close_leftovers(target.pid, tmp_path, NO_LENDER)
    assert attach.find_userfaultfds(target.pid) == (its_own,)
    assert list(tmp_path.iterdir()) == []
    ram.close_leftovers(target.pid, tmp_path, NO_LENDER)
    assert attach.find_userfaultfds(target.pid) == (its_own,)


def test_of_unknown_ones_only_the_orphan_is_closed(target: Victim, tmp_path: Path) -> None:
    before = open_one(target, initialized=True)
    record(target, tmp_path, (before,), None)
    open_one(target, initialized=False)  # the handler was killed here
    since = open_one(target, initialized=True)
    ram.close_leftovers(target.pid, tmp_path, NO_LENDER)
    assert attach.find_userfaultfds(target.pid) == (before, since)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_closed_now_can_be_closed_later(target: Victim, tmp_path: Path) -> None:
    ours = open_one(target, initialized=True)
    record(target, tmp_path, (), ours)
    target.stop()
    with pytest.raises(attach.AttachRefusedError):
        ram.close_leftovers(target.pid, tmp_path, NO_LENDER)
    assert ram.read_record(tmp_path) is not None
    target.process.send_signal(signal.SIGCONT)
    ram.close_leftovers(target.pid, tmp_path, NO_LENDER)
    assert attach.find_userfaultfds(target.pid) == ()
    assert list(tmp_path.iterdir()) == []


# --- taking, in vain ----------------------------------------------------------------------


def test_a_failed_take_leaves_nothing(target: Victim, tmp_path: Path) -> None:
    (tmp_path / "zero.ram0").touch()
    with pytest.raises(CoreSystemError, match="UFFDIO_REGISTER"):
        ram.take(target.pid, (unmappable_block(),), tmp_path, (), NO_LENDER)
    assert attach.find_userfaultfds(target.pid) == ()
    assert list(tmp_path.iterdir()) == []


def test_a_take_that_cannot_be_undone_stays_on_record(
    target: Victim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_it(*_: object) -> None:
        target.stop()
        raise ram.RamNotEmptyError("somebody writes there")

    monkeypatch.setattr(ram, "_empty", stop_it)
    gc.collect()  # what earlier tests left to be closed is none of ours
    ours = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ram.LeftInQemuError, match="somebody writes there; and our") as caught:
        ram.take(target.pid, (), tmp_path, (), NO_LENDER)
    assert f"kill -CONT {target.pid}" in str(caught.value.remedy)
    left = ram.read_record(tmp_path)
    assert left is not None
    assert attach.find_userfaultfds(target.pid) == (left.uffd_fd,)
    assert len(list(Path("/proc/self/fd").iterdir())) == ours
    target.process.send_signal(signal.SIGCONT)
    ram.close_leftovers(target.pid, tmp_path, NO_LENDER)
    assert attach.find_userfaultfds(target.pid) == ()


@pytest.mark.parametrize(
    ("error", "stays"),
    [
        (attach.AttachTimeoutError, True),
        (attach.HelperLostError, True),
        (attach.AttachRefusedError, False),
    ],
)
def test_what_a_late_helper_may_still_create_is_on_record(
    target: Victim,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[attach.AttachError],
    stays: bool,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("no")

    with monkeypatch.context() as patch:
        patch.setattr(attach, "obtain", fail)
        with pytest.raises(error):
            ram.take(target.pid, (), tmp_path, (), NO_LENDER)
    assert (ram.read_record(tmp_path) is not None) is stays
    if stays:
        open_one(target, initialized=False)  # and so it did
        ram.close_leftovers(target.pid, tmp_path, NO_LENDER)
    assert attach.find_userfaultfds(target.pid) == ()


def test_what_a_helper_could_not_close_is_on_record(
    target: Victim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU created one; neither could we have a duplicate, nor would QEMU close it."""

    def create_only(*_: object, **__: object) -> None:
        os.close(obtain(target.pid).uffd)
        raise attach.AttachRefusedError("no", remedy="do")

    obtain = attach.obtain
    with monkeypatch.context() as patch:
        patch.setattr(attach, "obtain", create_only)
        with pytest.raises(ram.LeftInQemuError, match="no; and userfaultfd") as caught:
            ram.take(target.pid, (), tmp_path, (), NO_LENDER)
    assert caught.value.remedy == "do"
    assert ram.read_record(tmp_path) is not None
    ram.close_leftovers(target.pid, tmp_path, NO_LENDER)
    assert attach.find_userfaultfds(target.pid) == ()
    assert list(tmp_path.iterdir()) == []


# --- giving back --------------------------------------------------------------------------


def test_giving_back_can_be_tried_again(target: Victim, tmp_path: Path) -> None:
    def take_nothing(*_: object) -> None: ...

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ram, "_empty", take_nothing)
        taken = ram.take(target.pid, (), tmp_path, (), NO_LENDER)
    target.stop()
    for _ in range(2):
        with pytest.raises(attach.AttachRefusedError):
            ram.give_back(taken, tmp_path)
        assert ram.read_record(tmp_path) is not None
    target.process.send_signal(signal.SIGCONT)
    ram.give_back(taken, tmp_path)
    assert attach.find_userfaultfds(target.pid) == ()
    assert list(tmp_path.iterdir()) == []


def test_what_a_late_helper_closed_after_all_is_closed(target: Victim, tmp_path: Path) -> None:
    taken = ram.take(target.pid, (), tmp_path, (), NO_LENDER)
    attach.close_in_target(target.pid, taken.uffd_fd)
    ram.give_back(taken, tmp_path)
    assert list(tmp_path.iterdir()) == []
