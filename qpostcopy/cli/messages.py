"""The objects that `--json` prints, as models: what docs/json.md says, for machines.

Nothing is written through these models; the tests hold every object of every
real stream against them, and against messages.schema.json, which is made here:
`python -m qpostcopy.cli.messages > qpostcopy/cli/messages.schema.json`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from qpostcopy.phases import Phase
from qpostcopy.progress import Progress
from qpostcopy.qmp.schema import Model
from qpostcopy.report import ErrorReport, FindingReport, Location, Result, ResultStatus
from qpostcopy.takeover import ControllerState


class Head(Model):
    """What every object begins with."""

    v: Literal[1]
    ts: float
    migration_id: str | None


class PhaseMessage(Head):
    """A phase began."""

    type: Literal["phase"]
    phase: Phase
    previous: Phase | None = None
    vm_location: Location
    abort_safe: bool
    message: str


class LogMessage(Head):
    """Something to know."""

    type: Literal["log"]
    level: Literal["info", "warning"]
    message: str


class ProgressMessage(Head, Progress):
    """How far postcopy is."""

    type: Literal["progress"]


class SideReport(Model):
    """One side in words, where there is no controller to ask."""

    qemu: str
    status: str
    companion: Literal["alive", "dead"]


class StatusMessage(Head):
    """Where a migration is now."""

    type: Literal["status"]
    phase: Phase
    vm_location: Location
    abort_safe: bool
    message: str
    controller: ControllerState
    result: Result | None
    progress: Progress | None = None
    committed: bool | None = None
    source: SideReport | None = None
    destination: SideReport | None = None


class MigrationResult(Head, Result):
    """How a migration ended."""

    type: Literal["result"]
    migration_id: str


class CheckResult(Head):
    """What stands in the way of a migration."""

    type: Literal["result"]
    status: Literal["ready", "refused"]
    rc: int
    vm_location: Location
    profile: str
    qemu: dict[str, str]
    ram_bytes: int
    findings: tuple[FindingReport, ...]
    warnings: tuple[FindingReport, ...]


class AbortResult(Head):
    """What became of an abort."""

    type: Literal["result"]
    status: ResultStatus
    rc: int
    vm_location: Location
    error: ErrorReport | None = None


class FailureResult(Head):
    """A verb failed, and there is no migration's own result to tell."""

    type: Literal["result"]
    status: ResultStatus
    rc: Annotated[int, Field(ge=1)]
    vm_location: Location
    error: ErrorReport


Message = (
    PhaseMessage
    | LogMessage
    | ProgressMessage
    | StatusMessage
    | MigrationResult
    | CheckResult
    | FailureResult
    | AbortResult
)
MESSAGE: TypeAdapter[Message] = TypeAdapter(Message)

#: Keys that are not there if they have nothing to say; all others always are.
SOMETIMES = {
    "PhaseMessage": {"previous"},
    "StatusMessage": {"progress", "committed", "source", "destination"},
    "MigrationResult": {"error"},
    "Result": {"error"},
    "AbortResult": {"error"},
}


def json_schema(*, closed: bool = False) -> dict[str, Any]:
    """The JSON Schema of one line.

    :param closed: refuse keys that it does not know. A reader must not: some may come.
    """
    schema = MESSAGE.json_schema(mode="serialization")
    for name, definition in schema["$defs"].items():
        _drop_titles(definition)
        if not closed and definition.get("additionalProperties") is False:
            del definition["additionalProperties"]
        if "properties" in definition:
            absent = SOMETIMES.get(name, ())
            definition["required"] = [key for key in definition["properties"] if key not in absent]
    about = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "One line of `qpostcopy VERB --json`, version 1",
    }
    return about | schema


def _drop_titles(definition: dict[str, Any]) -> None:
    """Each only repeats a name."""
    definition.pop("title", None)
    for value in definition.values():
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                _drop_titles(inner)


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
