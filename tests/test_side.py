"""What a side knows of its QEMU without asking anybody."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from qpostcopy.process import Process
from qpostcopy.side import EventBook, Side
from qpostcopy.state import StateDirectory


@pytest.fixture
def side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Side:
    monkeypatch.setenv("QPOSTCOPY_RUN_DIR", str(tmp_path))
    directory = StateDirectory.create(
        "web1",
        plan_text="version: 1\n",
        profile="sequential",
        source_qmp=Path("/run/a.qmp"),
        destination_qmp=Path("/run/b.qmp"),
    )
    return Side("destination", directory, EventBook(), None)


def test_the_command_line_of_a_qemu(side: Side) -> None:
    assert side.qemu_arguments() == ()
    child = subprocess.Popen(["sleep", "60"])
    try:
        side._directory.update_side("destination", qemu=Process.of(child.pid))
        assert side.qemu_arguments() == ("sleep", "60")
    finally:
        child.kill()
        child.wait()
    assert side.qemu_arguments() == (), "it cannot be read any more: nothing is guessed"


def test_no_connection_is_no_answer(side: Side) -> None:
    assert asyncio.run(side.answers(1.0)) is False
