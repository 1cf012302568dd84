"""Where a VM is that a migration did not touch: earlier ones may have moved it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qpostcopy.history import moved_before
from qpostcopy.process import Process
from qpostcopy.state import StateDirectory

#: More than a pid can be.
NOBODY = 1 << 30


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPOSTCOPY_RUN_DIR", str(tmp_path / "run"))


def begun(source: str, destination: str) -> StateDirectory:
    return StateDirectory.create(
        "t",
        plan_text="",
        profile="p",
        source_qmp=Path(source),
        destination_qmp=Path(destination),
    )


def moved(
    source: str, destination: str, *, source_qemu: int, to: int | None = None, alive: bool = True
) -> Process:
    """A migration that moved a VM from one monitor to another; the source's QEMU.

    :param to: the pid of the destination's QEMU, if it is not this process.
    """
    made = begun(source, destination)
    qemu = Process.of(source_qemu) or Process(source_qemu, 987_654_321)
    made.update_side("source", qemu=qemu)
    there = Process.of(to or os.getpid()) if alive else Process(NOBODY, 1)
    made.update_side("destination", qemu=there)
    made.record_commit()
    return qemu


def test_a_vm_that_was_never_moved_is_at_its_source() -> None:
    assert moved_before("/a", "/b", None) == "source"
    moved("/other", "/b", source_qemu=NOBODY)
    begun("/a", "/b")
    assert moved_before("/a", "/b", None) == "source"


def test_a_vm_that_was_moved_is_not_said_to_be_at_its_source() -> None:
    left = moved("/a", "/b", source_qemu=NOBODY)
    assert moved_before("/a", "/b", left) == "destination"
    assert moved_before("/a", "/b", None) == "destination"
    assert moved_before("/a", "/c", left) == "unknown"
    assert moved_before("/a", "/b", Process(8, 1)) == "source", "it was started anew since"


def test_a_vm_that_was_moved_and_is_gone() -> None:
    left = moved("/a", "/b", source_qemu=NOBODY, alive=False)
    assert moved_before("/a", "/b", left) == "unknown"


def test_a_vm_that_came_back() -> None:
    moved("/a", "/b", source_qemu=NOBODY)
    moved("/b", "/a", source_qemu=os.getpid())
    assert moved_before("/a", "/b", None) == "source"
    assert moved_before("/b", "/a", None) == "destination"
    assert moved_before("/b", "/c", None) == "unknown"


def test_a_vm_that_was_moved_on() -> None:
    """Its first destination still lives, paused, and waits for nothing."""
    left = moved("/a", "/b", source_qemu=NOBODY)
    moved("/b2", "/c", source_qemu=os.getpid(), to=os.getppid())
    for qemu in (left, None):
        assert moved_before("/a", "/b", qemu) == "unknown"
        assert moved_before("/a", "/c", qemu) == "destination"
    assert moved_before("/b", "/c", None) == "destination", "by another monitor of that QEMU"


def test_a_socket_may_be_written_in_many_ways() -> None:
    left = moved("/nowhere/../a", "/b", source_qemu=NOBODY)
    for qemu in (left, None):
        assert moved_before("/a", "/nowhere/../b", qemu) == "destination"


@pytest.mark.parametrize("status", ["postmigrate", "inmigrate"])
def test_a_source_without_its_vm_is_not_where_it_is(status: str) -> None:
    """Moved by somebody else, or remembered elsewhere."""
    assert moved_before("/a", "/b", None, status) == "unknown"
    assert moved_before("/a", "/b", None, "running") == "source"
