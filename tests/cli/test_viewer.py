"""What a viewer shows: messages in words, one plain line an interval, JSON verbatim."""

from __future__ import annotations

import json

import pytest

from qpostcopy.cli.display import JsonDisplay, PlainDisplay, describe
from qpostcopy.cli.stream import Stream
from qpostcopy.cli.viewer import conclude, result_message
from qpostcopy.progress import Progress
from qpostcopy.report import ErrorReport, ResultStatus
from tests.test_report import result

PROGRESS = {"v": 1, "type": "progress", "ts": 1.5, "migration_id": "x"} | Progress(
    phase="postcopy", percent=50, placed_bytes=1 << 20, total_bytes=1 << 21, left_bytes=1 << 20
).model_dump()


def test_messages_in_words() -> None:
    phase: dict[str, object] = {
        "type": "phase",
        "phase": "prepare",
        "message": "VM at: source; abort is safe",
    }
    assert describe(phase) == "prepare: VM at: source; abort is safe"
    assert describe({"type": "log", "level": "warning", "message": "oh"}) == "warning: oh"
    assert describe(PROGRESS).startswith("postcopy 50% 1.0/2.0 MiB")
    assert describe({"type": "result"}) == ""


def test_plain_progress_comes_once_an_interval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("qpostcopy.cli.display.time.monotonic", lambda: now)
    display = PlainDisplay()
    for now in (100.0, 100.5, 101.0, 102.1, 102.2):  # noqa: B007 (the clock reads it)
        display.show(PROGRESS)
    said = capsys.readouterr()
    assert said.err.count("postcopy 50%") == 2
    assert said.out == ""


def test_json_is_verbatim_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    JsonDisplay(Stream(on=True)).show(PROGRESS)
    said = capsys.readouterr()
    assert json.loads(said.out) == PROGRESS
    assert said.err == ""


@pytest.mark.parametrize("as_json", [True, False])
def test_a_result_ends_in_its_code(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    error = ErrorReport(code="lane-lost", message="lanes lost", remedy="mend them")
    data = result(ResultStatus.ROLLED_BACK, error).to_json()
    assert conclude(result_message("x", data), Stream(on=as_json)) == 4
    said = capsys.readouterr()
    if as_json:
        assert said.out + said.err == ""
    else:
        assert "lanes lost [lane-lost]" in said.err
        assert "mend them" in said.err
        assert "rolled-back" in said.out
