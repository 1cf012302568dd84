"""status, resume and abort when there is no controller: what the disk tells is enough."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qpostcopy.cli import main, watch
from qpostcopy.phases import Phase
from qpostcopy.process import Process
from qpostcopy.report import ResultStatus
from qpostcopy.state import StateDirectory
from tests.config.test_profile import write_trace
from tests.messages import documented, documented_stream
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
    return documented(capsys.readouterr().out)


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
    told = documented(capsys.readouterr().out)
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


@pytest.mark.parametrize("status", [ResultStatus.COMPLETED, ResultStatus.INTERRUPTED])
def test_watch_tells_an_end_that_was(
    directory: StateDirectory, capsys: pytest.CaptureFixture[str], status: ResultStatus
) -> None:
    """However it ended: that it could be told is this verb's success."""
    directory.write_result(result(status).to_json())
    assert main.run(["status", "--watch", "--json"]) == 0
    (told,) = documented_stream(capsys.readouterr().out)
    assert (told["type"], told["status"]) == ("result", status)
    assert main.run(["status", "web1", "--watch"]) == 0
    assert f"{status}; the VM is at the destination" in capsys.readouterr().out


def test_watch_gives_up_if_nobody_works_on_it(
    directory: StateDirectory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive(directory, "destination")
    directory.record_commit()
    monkeypatch.setattr(watch, "SUCCESSOR_SECONDS", 0.1)
    assert main.run(["status", "--watch"]) == 1
    said = capsys.readouterr().err
    assert "the controller died after the commit" in said
    assert "never `cont` the source" in said
    assert "the VM is at: destination; abort is not possible" in said


def later(directory: StateDirectory, status: ResultStatus) -> StateDirectory:
    """One that was begun after it, and ended so."""
    made = StateDirectory.create(
        "web1",
        plan_text="version: 1\n",
        profile="sequential",
        source_qmp=Path("/run/a.qmp"),
        destination_qmp=Path("/run/b.qmp"),
    )
    assert made.migration_id != directory.migration_id
    made.write_result(result(status).to_json() | {"vm_location": "source"})
    return made


@pytest.mark.parametrize("verb", ["status", "resume", "abort"])
def test_an_earlier_one_that_has_not_ended_is_not_forgotten(
    directory: StateDirectory, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    latest = later(directory, ResultStatus.FAILED)
    main.run([verb, "web1"])
    said = capsys.readouterr()
    assert latest.migration_id in said.out + said.err
    assert f"{directory.migration_id} has not ended either" in said.err
    main.run([verb, latest.migration_id])
    assert "note:" not in capsys.readouterr().err
    directory.write_result(result().to_json())
    main.run([verb, "web1"])
    assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "name"),
    [("status", []), ("status", ["web1"]), ("resume", ["web1"]), ("abort", ["web1"])],
)
def test_a_name_does_not_mean_one_that_was_refused(
    directory: StateDirectory, capsys: pytest.CaptureFixture[str], verb: str, name: list[str]
) -> None:
    """It touched nothing: where the VM is, only the one before it knows."""
    refused = later(directory, ResultStatus.REFUSED)
    directory.record_commit()
    directory.write_result(result().to_json())
    main.run([verb, *name])
    said = capsys.readouterr()
    assert directory.migration_id in said.out + said.err
    assert "destination" in said.out + said.err
    assert f"{refused.migration_id}, which came later, was refused" in said.err
    main.run([verb, refused.migration_id])
    said = capsys.readouterr()
    assert "source" in said.out + said.err
    assert "note:" not in said.err


def test_if_all_were_refused_the_latest_is_told(
    directory: StateDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    directory.write_result(result(ResultStatus.ERROR).to_json())
    latest = later(directory, ResultStatus.REFUSED)
    assert status(capsys, "web1")["migration_id"] == latest.migration_id


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


# --- the run directory --------------------------------------------------------------------


PLAN = "version: 1\nname: web1\nsource: {qmp: /nowhere/a}\ndestination: {qmp: /nowhere/b}\n"


@pytest.mark.parametrize("verb", ["status", "resume", "abort"])
def test_a_run_directory_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    assert main.run([verb, "web1"]) == 2
    assert f"no migration 'web1' in {tmp_path}/run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("where", "place"),
    [("file", "unknown"), ("file/below", "unknown"), ("/proc/nowhere", "source")],
)
def test_a_run_directory_that_cannot_be(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    place: str,
) -> None:
    """What cannot be looked at may know of a migration that took the VM elsewhere."""
    (tmp_path / "file").write_text("")
    (tmp_path / "plan.yaml").write_text(PLAN)
    monkeypatch.setenv("QPOSTCOPY_RUN_DIR", str(tmp_path / where))
    assert main.run(["migrate", str(tmp_path / "plan.yaml"), "--json"]) == 3
    said = capsys.readouterr()
    told = documented(said.out)
    assert (told["error"]["code"], told["vm_location"]) == ("run-directory", place)
    assert str(tmp_path / where) in told["error"]["message"]
    assert "QPOSTCOPY_RUN_DIR" in told["error"]["remedy"]
    assert "nothing was touched" in said.err


@pytest.mark.parametrize("failing", ["plan.yaml", "push-0.trace"])
def test_a_migration_that_cannot_be_written_down_leaves_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
) -> None:
    """A directory without a controller and a result would be taken for the plan's latest."""
    write_trace(tmp_path / "web.trace")
    profile = "profile:\n  name: p\n  push:\n    - trace: {file: web.trace}\n"
    (tmp_path / "plan.yaml").write_text(PLAN + profile)

    def full(path: Path, _: object) -> None:
        if path.name == failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr("qpostcopy.state.write_durably", full)
    assert main.run(["migrate", str(tmp_path / "plan.yaml"), "--json"]) == 3
    told = documented(capsys.readouterr().out)
    assert (told["error"]["code"], told["migration_id"]) == ("run-directory", None)
    assert "No space left on device" in told["error"]["message"]
    assert StateDirectory.known() == []


@pytest.mark.root
def test_without_rights(directory: StateDirectory) -> None:
    """Somebody who may not look is told so, not that the VM is lost."""

    def ask() -> tuple[int, str]:
        rights = "--bounding-set=-dac_override,-dac_read_search"
        command = ["setpriv", rights, sys.executable, "-m", "qpostcopy", "status", "web1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr

    (directory.path / "state.json").chmod(0)
    code, said = ask()
    assert code == 1, said
    assert "may not be read by you: Permission denied" in said
    assert "as root" in said
    directory.path.parent.chmod(0)
    code, said = ask()
    directory.path.parent.chmod(0o700)
    assert code == 3, said
    assert "state directories cannot be kept there: Permission denied" in said
