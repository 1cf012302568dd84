"""status, resume and abort when there is no controller: what the disk tells is enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qpostcopy.cli import main
from qpostcopy.phases import Phase
from qpostcopy.process import Process
from qpostcopy.state import StateDirectory
from tests.test_report import result


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPOSTCOPY_RUN_DIR", str(tmp_path / "run"))


@pytest.fixture
def directory() -> StateDirectory:
    """A migration whose processes are all dead."""
    made = StateDirectory.create(
        "web1",
        plan_text="version: 1\n",
        profile="sequential",
        source_qmp=Path("/run/a.qmp"),
        destination_qmp=Path("/run/b.qmp"),
    )
    dead = Process(pid=1, start_ticks=987_654_321)
    made.update(controller=dead)
    for role in ("source", "destination"):
        made.update_side(role, companion=dead)
    return made


def status(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main.run(["status", *arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert isinstance(told, dict)
    return told


def alive(directory: StateDirectory, role: Any) -> None:
    process = Process.of(1)
    assert process is not None
    directory.update_side(role, qemu=process)


def test_before_the_commit_the_vm_is_at_the_source(
    directory: StateDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    alive(directory, "source")
    told = status(capsys, "web1")
    assert told["vm_location"] == "source"
    assert told["abort_safe"] is True
    assert f"qpostcopy resume {directory.migration_id}" in told["message"]


def test_after_the_commit_it_is_at_the_destination(
    directory: StateDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    alive(directory, "source")
    alive(directory, "destination")
    directory.update(phase=Phase.SWITCHOVER)  # killed right after the record
    directory.record_commit()
    told = status(capsys)
    assert told["vm_location"] == "destination"
    assert told["abort_safe"] is False
    assert "never `cont` the source" in told["message"]


@pytest.mark.parametrize("committed", [False, True])
def test_where_its_qemu_is_gone_nothing_is_claimed(
    directory: StateDirectory, capsys: pytest.CaptureFixture[str], committed: bool
) -> None:
    dead = Process(pid=1, start_ticks=987_654_321)
    for role in ("source", "destination"):
        directory.update_side(role, qemu=dead)
    if committed:
        directory.record_commit()
    assert status(capsys)["vm_location"] == "unknown"


def test_a_result_is_told_again(
    directory: StateDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    directory.write_result(result().to_json())
    assert status(capsys)["vm_location"] == "destination"
    assert main.run(["resume", "web1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["type"], told["status"]) == ("result", "completed")
    assert main.run(["status", "web1"]) == 0
    assert "ended: completed" in capsys.readouterr().out


def test_abort_comes_too_late(
    directory: StateDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    directory.record_commit()
    assert main.run(["abort", "web1"]) == 1
    said = capsys.readouterr().err
    assert "VM is at the destination" in said
    assert "qpostcopy resume" in said
    directory.write_result(result().to_json())
    assert main.run(["abort", "web1"]) == 1
    assert "has ended already" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["status", "resume", "abort"])
def test_an_unknown_id(
    directory: StateDirectory, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    assert main.run([verb, "nothing"]) == 2
    assert directory.migration_id in capsys.readouterr().err


def test_a_state_that_cannot_be_read(
    directory: StateDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory.path / "state.json").write_text("{")
    assert main.run(["status", directory.migration_id]) == 11
    assert "never `cont` the source" in capsys.readouterr().err
