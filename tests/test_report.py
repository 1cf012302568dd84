"""The result object: the contract's names, its codes, and what people read."""

from __future__ import annotations

import pytest

from qpostcopy.errors import ExitCode
from qpostcopy.report import (
    EXIT_CODES,
    ErrorReport,
    FindingReport,
    Result,
    ResultStatus,
    error_lines,
    page_counts,
    summary,
)
from tests.test_progress import stats

#: operator-contract.md, "Result object"; `guest` is added by demo and bench, `error` if any.
CONTRACT = {
    "status": None,
    "rc": None,
    "vm_location": None,
    "migration_id": None,
    "profile": None,
    "qemu": {"source", "destination"},
    "ram_bytes": None,
    "downtime_ms": None,
    "total_ms": None,
    "phases": None,
    "pages": {"total", "hole", "zero", "precopy", "push", "demand", "around", "duplicate"},
    "bytes": {"precopy", "push", "demand", "wire"},
    "faults": {"count", "local", "p50_us", "p90_us", "p99_us", "max_us", "histogram"},
    "push_bytes_per_second": None,
}


def result(
    status: ResultStatus = ResultStatus.COMPLETED, error: ErrorReport | None = None
) -> Result:
    return Result(
        status=status,
        rc=EXIT_CODES[status],
        vm_location="destination",
        migration_id="web1-20261123T101500",
        profile="sequential",
        qemu={"source": "7.2.22", "destination": "7.2.22"},
        ram_bytes=1 << 29,
        downtime_ms=12.5,
        total_ms=812.0,
        phases=(),
        error=error,
    )


def test_the_names_are_the_contracts() -> None:
    data = result().to_json()
    assert data.keys() >= CONTRACT.keys()
    for name, members in CONTRACT.items():
        if members is not None:
            inner = data[name]
            assert isinstance(inner, dict)
            assert inner.keys() == members
    assert data.keys() - CONTRACT.keys() == {"trace", "warnings"}


def test_error_is_there_only_if_there_is_one() -> None:
    assert "error" not in result().to_json()
    error = ErrorReport(code="lane-lost", message="lost", remedy="resume")
    data = result(ResultStatus.INTERRUPTED, error).to_json()["error"]
    assert isinstance(data, dict)
    assert {"code", "message", "remedy"} <= data.keys()


def test_every_status_has_the_contracts_code() -> None:
    assert {status.value: int(code) for status, code in EXIT_CODES.items()} == {
        "completed": 0,
        "error": 1,
        "refused": 3,
        "rolled-back": 4,
        "timed-out": 5,
        "interrupted": 10,
        "failed": 11,
        "cancelled": 143,
    }
    assert EXIT_CODES.keys() == set(ResultStatus)
    assert int(ExitCode.SIGINT) == 130


def test_pages_come_from_the_handlers_counters() -> None:
    counted = stats(100, 0).model_copy(
        update={"hole_pages": 40, "zero_pages": 10, "push_pages": 45, "demand_pages": 5}
    )
    pages = page_counts(counted)
    parts = pages.hole + pages.zero + pages.precopy + pages.push + pages.demand + pages.around
    assert parts == pages.total == 100


def test_all_findings_are_told_with_their_remedies() -> None:
    findings = tuple(
        FindingReport(code=code, side="source", message=f"{code} is bad", remedy=f"fix {code}")
        for code in ("a", "b")
    )
    text = "\n".join(
        error_lines(ErrorReport(code="refused", message="2 findings", findings=findings))
    )
    assert all(word in text for word in ("a is bad", "b is bad", "fix a", "fix b"))


@pytest.mark.parametrize("location", ["source", "destination", "ended", "unknown"])
def test_the_summary_says_where_the_vm_is(location: str) -> None:
    text = summary(result().model_copy(update={"vm_location": location}))
    assert location in text
