"""What `--json` prints: one result for every kind of failure, and nothing after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from qpostcopy.cli import main
from qpostcopy.cli.signals import InterruptedEarlyError
from qpostcopy.cli.starter import ControllerStartError
from qpostcopy.cli.stream import Stream
from qpostcopy.cli.viewer import ControllerLostError, DisplayLeftAfterCommitError
from qpostcopy.config import load_plan
from qpostcopy.errors import (
    RefusedError,
    RolledBackError,
    StateLostError,
    UsageError,
)
from qpostcopy.process import Process
from qpostcopy.report import ResultStatus
from qpostcopy.state import StateDirectory
from tests.messages import documented_stream
from tests.test_report import result

PHASE = {"phase": "prepare", "vm_location": "source", "abort_safe": True, "message": ""}
DEAD = Process(pid=1, start_ticks=987_654_321)
FAILURES: list[tuple[BaseException, int, str, str]] = [
    (ControllerStartError("it broke", remedy="mend it"), 1, "error", "controller-start"),
    (ControllerLostError("it broke", remedy="mend it"), 1, "error", "controller-lost"),
    (UsageError("it broke", remedy="mend it"), 2, "error", "usage"),
    (RefusedError("it broke", remedy="mend it"), 3, "refused", "refused"),
    (RolledBackError("it broke", remedy="mend it"), 4, "rolled-back", "rolled-back"),
    (DisplayLeftAfterCommitError("it broke", remedy="mend it"), 10, "interrupted", "display-left"),
    (StateLostError("it broke", remedy="mend it"), 11, "failed", "state-lost"),
    (InterruptedEarlyError("it broke", remedy="mend it"), 130, "cancelled", "cancelled"),
]


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPOSTCOPY_RUN_DIR", str(tmp_path / "run"))


def create() -> StateDirectory:
    return StateDirectory.create(
        "web1",
        plan_text="version: 1\n",
        profile="sequential",
        source_qmp=Path("/run/a.qmp"),
        destination_qmp=Path("/run/b.qmp"),
    )


def verb(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    error: BaseException,
    directory: StateDirectory | None = None,
) -> None:
    """Make a verb say something and fail."""

    @click.command(name=name)
    @click.option("--json", is_flag=True, expose_value=False)
    @click.pass_obj
    def command(stream: Stream) -> int:
        stream.directory = directory
        stream.say("phase", PHASE)
        raise error

    monkeypatch.setattr(f"qpostcopy.cli.{name}.command", command)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return documented_stream(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["check", "migrate", "resume", "abort", "status"])
@pytest.mark.parametrize(("error", "rc", "status", "code"), FAILURES)
def test_every_failure_is_one_result(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    error: BaseException,
    rc: int,
    status: str,
    code: str,
) -> None:
    verb(monkeypatch, name, error)
    assert main.run([name, "--json"]) == rc
    phase, told = lines(capsys)
    assert (phase["type"], told["type"]) == ("phase", "result")
    assert (told["status"], told["rc"]) == (status, rc)
    expected = {"code": code, "message": "it broke", "remedy": "mend it", "findings": []}
    assert told["error"] == expected
    assert told["vm_location"] == "unknown"


@pytest.mark.parametrize("name", ["check", "migrate"])
def test_a_wrong_plan_does_not_tell_where_its_vm_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    """Earlier migrations do, once it is known which VM it is about."""
    moved = create()
    moved.update_side("source", qemu=DEAD)
    moved.update_side("destination", qemu=Process.of(1))
    moved.record_commit()
    plan = tmp_path / "plan.yaml"
    plan.write_text("version: 1\nsource: {qmp: /run/a.qmp}\n")
    assert main.run([name, str(plan), "--json"]) == 2
    assert lines(capsys)[-1]["vm_location"] == "unknown"
    stream = Stream(starts=True)
    for destination, place in (("b", "destination"), ("c", "unknown")):
        ends = f"source: {{qmp: /run/a.qmp}}\ndestination: {{qmp: /run/{destination}.qmp}}\n"
        plan.write_text(f"version: 1\nname: web1\n{ends}")
        stream.plan = load_plan(plan)
        assert stream.location == place


def test_our_own_bug_is_a_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb(monkeypatch, "migrate", ZeroDivisionError("oh"))
    assert main.run(["migrate", "--json"]) == 1
    told = lines(capsys)[-1]
    assert (told["error"]["code"], told["rc"]) == ("unexpected", 1)
    assert "ZeroDivisionError: oh" in told["error"]["message"]


@pytest.mark.parametrize("arguments", [[], ["plan.yaml", "--nonsense"]])
def test_wrong_arguments_are_a_result(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main.run(["migrate", "--json", *arguments]) == 2
    (told,) = lines(capsys)
    assert (told["type"], told["error"]["code"], told["rc"]) == ("result", "usage", 2)


def test_without_json_stdout_stays_empty(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb(monkeypatch, "migrate", StateLostError("oh"), create())
    assert main.run(["migrate"]) == 11
    said = capsys.readouterr()
    assert said.out == ""
    assert "the VM is at: source; abort is safe" in said.err


def test_nothing_follows_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    stream = Stream(on=True)
    stream.say("result", {"status": "completed", "rc": 0, "vm_location": "destination"})
    stream.say("log", {})
    stream.fail(ValueError("late"), 1, "late", None)
    (told,) = lines(capsys)
    assert told["status"] == "completed"


@pytest.mark.parametrize(
    ("committed", "dead", "place"),
    [
        (False, False, "source"),
        (True, False, "destination"),
        (False, True, "unknown"),
        (True, True, "unknown"),
    ],
)
def test_where_the_vm_is(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    committed: bool,
    dead: bool,
    place: str,
) -> None:
    directory = create()
    # What the controller wrote since is on disk only, as in life.
    other = StateDirectory.open(directory.path)
    for role in ("source", "destination"):
        other.update_side(role, qemu=DEAD if dead else Process.of(1))
    if committed:
        other.record_commit()
    verb(monkeypatch, "migrate", ControllerLostError("gone"), directory)
    assert main.run(["migrate", "--json"]) == 1
    told = lines(capsys)[-1]
    assert (told["vm_location"], told["migration_id"]) == (place, directory.migration_id)


def test_a_guest_that_ended_is_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    directory = create()
    directory.write_result(result().to_json() | {"vm_location": "ended"})
    stream = Stream(on=True)
    stream.directory = directory
    places = [stream.location]
    (directory.path / "state.json").write_text("{")
    assert [*places, stream.location] == ["ended", "unknown"]


def test_one_that_was_refused_knows_where_it_found_the_vm() -> None:
    directory = create()
    stream = Stream(on=True)
    stream.directory = directory
    directory.write_result(result(ResultStatus.REFUSED).to_json())
    assert stream.location == "destination"
    assert stream.place == "the VM is at: destination"
