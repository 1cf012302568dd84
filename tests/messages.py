"""Holds what `--json` prints against the models and against the shipped JSON Schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from qpostcopy.cli import messages

SCHEMA_FILE = Path(messages.__file__).with_name("messages.schema.json")
#: The shipped one, and the same without room for what is not documented.
_VALIDATORS = (
    Draft202012Validator(json.loads(SCHEMA_FILE.read_text())),
    Draft202012Validator(messages.json_schema(closed=True)),
)


def documented(line: str) -> dict[str, Any]:
    """One line of a stream. No key may be missing, or be one that the models do not know."""
    message = json.loads(line)
    messages.MESSAGE.validate_json(line)
    for validator in _VALIDATORS:
        validator.validate(message)
    assert isinstance(message, dict)
    return message


def documented_stream(text: str) -> list[dict[str, Any]]:
    """A whole stream: nothing comes after its one `result`; a lone `status` has none."""
    told = [documented(line) for line in text.splitlines()]
    ends = [place for place, message in enumerate(told, 1) if message["type"] == "result"]
    assert ends in ([], [len(told)]), text
    return told
