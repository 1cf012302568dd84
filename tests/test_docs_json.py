"""docs/json.md names every key that is printed, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from qpostcopy.cli import main
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


def test_the_verbs() -> None:
    (verbs,) = re.findall(r"^(.*) take `--json`", TEXT, re.M)
    assert names(verbs) == set(main.JSON_VERBS)
