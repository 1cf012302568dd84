"""Where a VM is that a migration did not touch: earlier ones may have moved it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qpostcopy.history import moved_before
from qpostcopy.process import Process
from qpostcopy.state import StateDirectory


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


def moved(source: str, destination: str, *, source_qemu: int, alive: bool = True) -> Process:
    """A migration that moved a VM from one monitor to another; the source's QEMU."""
    made = begun(source, destination)
    qemu = Process(source_qemu, 987_654_321)
    made.update_side("source", qemu=qemu)
    made.update_side("destination", qemu=Process.of(os.getpid()) if alive else qemu)
    made.record_commit()
    return qemu


def test_a_vm_that_was_never_moved_is_at_its_source() -> None:
    assert moved_before("/a", "/b", None) == "source"
    moved("/other", "/b", source_qemu=7)
    begun("/a", "/b")
    assert moved_before("/a", "/b", None) == "source"


def test_a_vm_that_was_moved_is_not_said_to_be_at_its_source() -> None:
    left = moved("/a", "/b", source_qemu=7)
    assert moved_before("/a", "/b", left) == "destination"
    assert moved_before("/a", "/b", None) == "destination"
    assert moved_before("/a", "/c", left) == "unknown"
    assert moved_before("/a", "/b", Process(8, 1)) == "source", "it was started anew since"


def test_a_vm_that_was_moved_and_is_gone() -> None:
    left = moved("/a", "/b", source_qemu=7, alive=False)
    assert moved_before("/a", "/b", left) == "unknown"


def test_a_vm_that_came_back() -> None:
    moved("/a", "/b", source_qemu=7)
    moved("/b", "/a", source_qemu=os.getpid())
    assert moved_before("/a", "/b", None) == "source"
    assert moved_before("/b", "/a", None) == "destination"
