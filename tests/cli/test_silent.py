"""A controller that lives and does not answer, and one that has just ended."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qpostcopy import takeover
from qpostcopy.cli import main, status, watch
from qpostcopy.process import Process
from qpostcopy.report import ResultStatus
from qpostcopy.state import CONTROL_SOCKET, StateDirectory
from qpostcopy.takeover import ControllerState
from tests.messages import documented, documented_stream
from tests.qmp.support import private_directory
from tests.test_report import result


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[StateDirectory]:
    with private_directory() as path:
        monkeypatch.setenv("QPOSTCOPY_RUN_DIR", str(path / "run"))
        yield StateDirectory.create(
            "web1",
            plan_text="version: 1\n",
            profile="sequential",
            source_qmp=Path("/run/a.qmp"),
            destination_qmp=Path("/run/b.qmp"),
        )


@pytest.fixture
def silent(directory: StateDirectory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    """It accepts and says nothing."""
    code = "import signal; signal.sigwait([signal.SIGUSR1])"
    with (
        socket.socket(socket.AF_UNIX) as listener,
        subprocess.Popen([sys.executable, "-c", code]) as child,
    ):
        listener.bind(str(directory.path / CONTROL_SOCKET))
        listener.listen()
        process = Process.of(child.pid)
        assert process is not None
        directory.update(controller=process, source=with_qemu(directory))
        monkeypatch.setattr(status, "ASK_SECONDS", 0.3)
        whole = takeover.controller_state
        monkeypatch.setattr(takeover, "controller_state", lambda found, _=0: whole(found, 0.3))
        yield process
        child.kill()


def with_qemu(directory: StateDirectory) -> Any:
    return directory.state.source.model_copy(update={"qemu": Process.of(os.getpid())})


def test_status_says_so(
    directory: StateDirectory, silent: Process, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["status", "--json"]) == 0
    told = documented(capsys.readouterr().out)
    assert (told["controller"], told["vm_location"]) == ("silent", "source")
    assert (told["v"], told["type"], told["migration_id"]) == (1, "status", directory.migration_id)
    assert told["ts"] > 0
    assert f"controller (pid {silent.pid}) does not answer" in told["message"]
    assert f"`qpostcopy resume {directory.migration_id}` takes over" in told["message"]


def test_watch_says_so_and_gives_up(
    directory: StateDirectory,
    silent: Process,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "ASK_SECONDS", 0.2)
    monkeypatch.setattr(watch, "SUCCESSOR_SECONDS", 0.3)
    assert main.run(["status", "web1", "--watch", "--json"]) == 1
    said = capsys.readouterr()
    told, result = documented_stream(said.out)
    assert (told["controller"], told["vm_location"]) == ("silent", "source")
    assert (result["error"]["code"], result["vm_location"]) == ("nobody-at-work", "source")
    assert f"qpostcopy resume {directory.migration_id}" in result["error"]["remedy"]
    assert "the VM is at: source; abort is safe" in said.err
    assert silent.alive()


@pytest.mark.parametrize("committed", [False, True])
def test_abort_names_place_and_remedy(
    directory: StateDirectory,
    silent: Process,
    capsys: pytest.CaptureFixture[str],
    committed: bool,
) -> None:
    if committed:
        directory.update_side("destination", qemu=Process.of(os.getpid()))
        directory.record_commit()
    assert main.run(["abort", "web1", "--json"]) == 1
    error = documented(capsys.readouterr().out)["error"]
    assert error["code"] == "controller-silent"
    place = "destination; abort is not possible" if committed else "source; abort is safe"
    assert f"VM at: {place}" in error["message"]
    assert f"qpostcopy resume {directory.migration_id} takes over" in error["remedy"]
    assert silent.alive()


def ends(monkeypatch: pytest.MonkeyPatch, status: ResultStatus, location: str) -> None:
    """The controller ends right after it was found to be alive."""

    async def state(directory: StateDirectory, _: float = 0) -> ControllerState:
        directory.write_result(result(status).to_json() | {"vm_location": location})
        return ControllerState.ALIVE

    monkeypatch.setattr(takeover, "controller_state", state)


@pytest.mark.parametrize(
    ("status", "location", "rc"),
    [
        (ResultStatus.CANCELLED, "source", 0),
        (ResultStatus.ROLLED_BACK, "source", 0),
        (ResultStatus.TIMED_OUT, "source", 0),
        (ResultStatus.REFUSED, "source", 0),
        (ResultStatus.COMPLETED, "destination", 1),
        (ResultStatus.FAILED, "unknown", 1),
    ],
)
def test_abort_succeeds_if_the_vm_stays(
    directory: StateDirectory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: ResultStatus,
    location: str,
    rc: int,
) -> None:
    """Whatever sent it back; and a controller that has just ended is no error of its own."""
    ends(monkeypatch, status, location)
    assert main.run(["abort", "web1", "--json"]) == rc
    told = documented(capsys.readouterr().out)
    assert (told["type"], told["rc"]) == ("result", rc)
    assert (told["status"], told["vm_location"]) == (status, location)
