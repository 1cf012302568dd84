"""`qpostcopy demo`: the whole scenario, and what it refuses before it starts anything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qpostcopy.lab.guest import Ready, Verified
from qpostcopy.lab.leftovers import processes_naming
from qpostcopy.lab.scenario import (
    PAGE_KINDS,
    WORKLOADS,
    _check_content,
    _check_downtime,
    _check_page_counts,
)
from qpostcopy.report import PageCounts, Result, ResultStatus

LIMIT_SECONDS = 120


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the demo makes its directory; pytest's own is too long for a socket's address."""
    with tempfile.TemporaryDirectory(prefix="qpc-lab-") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        yield Path(directory)


def demo(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qpostcopy", "demo", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )


def result_of(**changes: object) -> Result:
    """A result whose counts add up, with changes."""
    fields: dict[str, object] = {
        "status": ResultStatus.COMPLETED,
        "rc": 0,
        "vm_location": "destination",
        "migration_id": "demo-20260101T000000",
        "profile": "sequential",
        "qemu": {},
        "ram_bytes": 10 * 4096,
        "downtime_ms": 12.0,
        "total_ms": 100.0,
        "phases": (),
        "pages": PageCounts(total=10, hole=1, zero=2, push=4, demand=2, around=1),
    }
    return Result.model_validate(fields | changes)


@pytest.mark.parametrize(
    ("verified", "holds"),
    [(Verified(12, 0), True), (Verified(12, 1), False), (Verified(11, 0), False)],
)
def test_content_holds_if_every_page_was_checked_and_right(verified: Verified, holds: bool) -> None:
    ready = Ready("service", 2000, data_pages=8, zero_pages=4, total_pages=20)
    check = _check_content(verified, ready, ["3 body"])
    assert (check.holds, check.decides) == (holds, True)
    assert "3 body" in check.detail


def test_page_counts_that_add_up_hold() -> None:
    assert _check_page_counts(result_of()).holds


@pytest.mark.parametrize(
    "pages",
    [
        PageCounts(total=10, hole=1, zero=2, push=4, demand=2, around=2),
        PageCounts(total=9, hole=1, zero=2, push=4, demand=2),
        PageCounts(total=11, hole=1, zero=2, push=4, demand=2, around=2),
    ],
)
def test_page_counts_that_do_not_add_up_are_told(pages: PageCounts) -> None:
    assert not _check_page_counts(result_of(pages=pages)).holds


@pytest.mark.parametrize(("downtime_ms", "holds"), [(49.9, True), (50.0, False), (None, False)])
def test_downtime_has_a_limit_that_does_not_decide(downtime_ms: float | None, holds: bool) -> None:
    check = _check_downtime(result_of(downtime_ms=downtime_ms))
    assert check.holds is holds
    assert not check.decides


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--qemu", "/nowhere/qemu"], "/nowhere/qemu"),
        (["--kernel", "/nowhere/vmlinuz"], "scripts/setup"),
        (["--profile", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--memory", "16"], "--memory"),
        (["--workload", "sleep"], "service"),
    ],
)
def test_what_cannot_be_played_is_refused_at_once(
    scratch: Path, arguments: list[str], told: str
) -> None:
    done = demo(*arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert list(scratch.iterdir()) == []


@pytest.mark.vm
@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_guest_is_moved_and_proves_its_memory(scratch: Path, workload: str) -> None:
    file = scratch / "result.json"
    done = demo("--memory", "192", "--workload", workload, "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(file.read_text())
    assert result["status"] == "completed"
    assert result["vm_location"] == "destination"
    assert result["ram_bytes"] == 192 << 20
    assert sum(result["pages"][kind] for kind in PAGE_KINDS) == result["pages"]["total"]
    assert result["guest"]["workload"] == workload
    assert result["guest"]["corrupt_pages"] == 0
    assert result["guest"]["baseline_ops_per_second"] > 0
    paced = workload in ("service", "idle")
    assert (result["guest"]["late_ms"] is not None) == paced
    assert ("as fast as it can" not in done.stdout) == paced
    assert not {"v", "type", "ts"} & result.keys()
    assert "FAILED" not in done.stdout
    assert "\x1b" not in done.stdout + done.stderr, "no terminal, no escape codes"
    assert [path.name for path in scratch.iterdir()] == ["result.json"]
    assert processes_naming(scratch) == []


@pytest.mark.vm
@pytest.mark.slow
def test_an_interrupted_demo_leaves_no_qemu(scratch: Path) -> None:
    command = [sys.executable, "-m", "qpostcopy", "demo", "--memory", "192"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
    ) as child:
        assert child.stderr
        while "at work" not in child.stderr.readline():
            assert child.poll() is None
        assert processes_naming(scratch)
        os.killpg(child.pid, signal.SIGINT)
        child.communicate(timeout=LIMIT_SECONDS)
    assert child.returncode == 130
    assert processes_naming(scratch) == []
    assert list(scratch.iterdir()) == []
