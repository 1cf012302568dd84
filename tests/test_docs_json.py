"""docs/json.md names every key that is printed, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qpostcopy.cli import main, messages, watch
from qpostcopy.lab.measure import GuestCost
from qpostcopy.migration import error_code
from qpostcopy.phases import Phase
from qpostcopy.progress import Progress
from qpostcopy.qmp.schema import FaultStats, Model
from qpostcopy.report import (
    ByteCounts,
    ErrorReport,
    FindingReport,
    PageCounts,
    PhaseTime,
    Result,
    ResultStatus,
    TraceReport,
)
from qpostcopy.takeover import ControllerState

TEXT = (Path(__file__).parents[1] / "docs" / "json.md").read_text()
#: Only in the table of keys does it matter that nothing is said twice, or too much.
INNER: dict[str, type[Model]] = {
    "phases": PhaseTime,
    "pages": PageCounts,
    "bytes": ByteCounts,
    "faults": FaultStats,
    "trace": TraceReport,
}


def section(title: str) -> str:
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, re.S | re.M)
    return str(found)


def rows(text: str) -> dict[str, str]:
    """First cell's names -> second cell, of the table in a section."""
    found = {}
    for first, second in re.findall(r"^\| (`.*?) \|(.*?)\|$", text, re.M):
        for name in re.findall(r"`([\w-]+)`", first):
            assert name not in found, f"twice: {name}"
            found[name] = second
    return found


def names(text: str) -> set[str]:
    return set(re.findall(r"`([\w-]+)`", text))


def test_the_result_of_a_migration() -> None:
    table = rows(section("`result` of a migration"))
    assert table.keys() == Result.model_fields.keys()
    for name, model in INNER.items():
        assert names(table[name]) >= set(model.model_fields), name
        braced = re.search(r"\{(.*?)\}", table[name])
        assert braced is not None
        assert names(braced[1]) == set(model.model_fields), name
    assert names(table["error"]) == {*ErrorReport.model_fields, *FindingReport.model_fields}
    assert names(table["status"]) == {str(status) for status in ResultStatus}
    assert names(table["vm_location"]) == {"source", "destination", "ended", "unknown"}
    assert names(table["qemu"]) == {"source", "destination"}


def test_progress_and_phases() -> None:
    part = section("`phase`, `log`, `progress`")
    assert rows(part).keys() == Progress.model_fields.keys()
    (phases,) = re.findall(r"`phase` \((.*?)\)", part)
    assert names(phases) == {str(phase) for phase in Phase} - {"precopy"}


def test_states_of_a_controller() -> None:
    assert names(rows(section("`status`"))["controller"]) == {
        *(str(state) for state in ControllerState),
        "resume",
    }


def test_status() -> None:
    part = section("`status`")
    assert rows(part).keys() | set(messages.Head.model_fields) | {"type"} == set(
        messages.StatusMessage.model_fields
    )
    assert names(rows(part)["source"]) == set(messages.SideReport.model_fields)


@pytest.mark.parametrize(
    ("title", "model"),
    [
        ("`result` of `check` and of `migrate --dry-run`", messages.CheckResult),
        ("`result` of `abort`", messages.AbortResult),
        ("`result` of a failure without a migration's own", messages.FailureResult),
        ("`phase`, `log`, `progress`", messages.PhaseMessage),
        ("`phase`, `log`, `progress`", messages.LogMessage),
    ],
    ids=lambda what: getattr(what, "__name__", ""),
)
def test_the_other_objects(title: str, model: type[Model]) -> None:
    own = set(model.model_fields) - set(messages.Head.model_fields) - {"type"}
    assert own <= names(section(title)), own - names(section(title))


def test_the_head_of_every_object() -> None:
    head = TEXT[: TEXT.index("\n## ")]
    assert rows(head).keys() == {*messages.Head.model_fields, "type"}
    kinds = {"phase", "progress", "log", "status", "result"}
    assert names(rows(head)["type"]) == kinds


def test_what_watch_may_end_in() -> None:
    part = section("`status --watch`")
    assert names(part) >= {error_code(watch.NobodyAtWorkError("")), "watch-left"}
    assert f"within {watch.SUCCESSOR_SECONDS:g} seconds" in part


def test_the_guest_of_the_demo() -> None:
    assert set(GuestCost.model_fields) <= names(section("`demo --json FILE`"))


def test_the_verbs() -> None:
    (verbs,) = re.findall(r"^(.*) take `--json`", TEXT, re.M)
    assert names(verbs) == set(main.JSON_VERBS)
