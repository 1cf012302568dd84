"""`check` without a QEMU: what it says of sides that cannot be reached, and of facts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qpostcopy.cli import check, main
from qpostcopy.qmp.schema import SideFacts
from tests.messages import documented
from tests.qmp.support import private_directory
from tests.test_preflight import DESTINATION, SOURCE

PLAN = "version: 1\nname: web1\nsource: {qmp: /nowhere/a}\ndestination: {qmp: /nowhere/b}\n"
MISFIT = "profile: {version: 1, name: far, push: [{range: {start: 4096GiB}}]}\n"


@pytest.fixture
def plan() -> Iterator[Path]:
    with private_directory() as path:
        (path / "plan.yaml").write_text(PLAN)
        yield path / "plan.yaml"


def facts(monkeypatch: pytest.MonkeyPatch, source: SideFacts, destination: SideFacts) -> None:
    async def look(role: str, _: object) -> tuple[SideFacts, None]:
        return (source if role == "source" else destination), None

    monkeypatch.setattr(check, "_facts", look)


def run(
    plan: Path, capsys: pytest.CaptureFixture[str], rc: int, place: str = "source"
) -> dict[str, Any]:
    assert main.run(["check", str(plan), "--json"]) == rc
    told = documented(capsys.readouterr().out)
    assert (told["type"], told["rc"], told["vm_location"]) == ("result", rc, place)
    return told


def test_both_sides_that_cannot_be_reached_are_told(
    plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = run(plan, capsys, 3)
    found = told["findings"]
    assert [(f["side"], f["code"]) for f in found] == [
        ("source", "monitor-absent"),
        ("destination", "monitor-absent"),
    ]
    assert "/nowhere/b" in found[1]["message"]
    assert found[1]["remedy"]
    assert main.run(["check", str(plan)]) == 3
    said = capsys.readouterr()
    assert "/nowhere/a" in said.err
    assert "/nowhere/b" in said.err
    assert "2 finding(s)" in said.out


def test_a_side_that_can_be_reached_is_judged_alone(
    plan: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = check._facts

    async def look(role: Any, side: Any) -> Any:
        if role == "source":
            return SOURCE.model_copy(update={"run_status": "inmigrate"}), None
        return await whole(role, side)

    monkeypatch.setattr(check, "_facts", look)
    found = run(plan, capsys, 3, "unknown")["findings"]
    assert {f["code"] for f in found} == {"monitor-absent", "source-not-movable"}


def test_a_profile_that_does_not_fit_is_wrong(
    plan: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts(monkeypatch, SOURCE, DESTINATION)
    assert run(plan, capsys, 0)["status"] == "ready"
    plan.write_text(PLAN + MISFIT)
    error = run(plan, capsys, 2)["error"]
    assert error["code"] == "schedule"
    assert "push[0].range.start" in error["message"]
    assert error["remedy"]
    # with a finding of another kind it is one finding more
    facts(monkeypatch, SOURCE, DESTINATION.model_copy(update={"run_status": "running"}))
    codes = {f["code"] for f in run(plan, capsys, 3)["findings"]}
    assert codes == {"destination-not-waiting", "profile-does-not-fit"}


def test_warnings_are_told_and_refuse_nothing(
    plan: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    older = DESTINATION.model_copy(update={"qemu_version": "5.2.0"})
    facts(monkeypatch, SOURCE, older)
    told = run(plan, capsys, 0)
    assert told["status"] == "ready"
    assert told["findings"] == []
    (warning,) = told["warnings"]
    assert (warning["code"], warning["side"]) == ("older-qemu", "both")
    assert main.run(["check", str(plan)]) == 0
    assert "warning: both: QEMU" in capsys.readouterr().err
