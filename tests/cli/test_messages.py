"""The JSON Schema that is shipped is that of the models, and knows right from wrong."""

from __future__ import annotations

import json

import pytest
from jsonschema import ValidationError
from pydantic import ValidationError as ModelError

from qpostcopy.cli import messages
from qpostcopy.cli.viewer import result_message
from qpostcopy.progress import Progress
from qpostcopy.report import ErrorReport, ResultStatus
from tests.messages import SCHEMA_FILE, documented, documented_stream
from tests.test_report import result

HEAD = {"v": 1, "ts": 1.5, "migration_id": "web1-20261123T101500"}
PROGRESS = HEAD | {"type": "progress"} | Progress(phase="postcopy").model_dump()
FAILED = result(ResultStatus.FAILED, ErrorReport(code="x", message="y"))


def test_the_shipped_file_is_the_models() -> None:
    remedy = "python -m qpostcopy.cli.messages > qpostcopy/cli/messages.schema.json"
    assert json.loads(SCHEMA_FILE.read_text()) == messages.json_schema(), remedy


@pytest.mark.parametrize(
    "message",
    [PROGRESS, result_message("x", result().to_json()), result_message("x", FAILED.to_json())],
    ids=["progress", "completed", "failed"],
)
def test_what_is_printed_is_known_key_by_key(message: dict[str, object]) -> None:
    told = documented(json.dumps(message))
    for key in told.keys() - {"error"}:
        less = {name: value for name, value in told.items() if name != key}
        with pytest.raises((ValidationError, ModelError)):
            documented(json.dumps(less))
    with pytest.raises(ModelError):
        documented(json.dumps(told | {"surprise": 1}))


@pytest.mark.parametrize("wrong", [{"v": 2}, {"type": "other"}, {"percent": "half"}, {"ts": None}])
def test_wrong_values_are_seen(wrong: dict[str, object]) -> None:
    with pytest.raises((ValidationError, ModelError)):
        documented(json.dumps(PROGRESS | wrong))


def test_a_reader_may_meet_a_key_of_a_later_release() -> None:
    text = json.dumps(messages.json_schema())
    assert '"additionalProperties": false' not in text


def test_nothing_comes_after_the_result() -> None:
    lines = [json.dumps(result_message("x", result().to_json())), json.dumps(PROGRESS)]
    assert documented_stream("\n".join(reversed(lines)))
    with pytest.raises(AssertionError):
        documented_stream("\n".join(lines))
