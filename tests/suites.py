"""A pytest plugin of scripts/test: the time of each suite, and no unseen skips in CI.

A suite is a folder of tests. With CI set, a test that skips because a capability
is missing fails instead: the machine lost something, or the project's set-up did.
Only a Debian suite that is gone from the mirror may still skip.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Generator

import pytest

#: What a skip's reason begins with when it may skip even in CI.
MAY_SKIP = "Debian suite"

_seconds: defaultdict[str, float] = defaultdict(float)
_tests: Counter[str] = Counter()


def suite_of(node_id: str) -> str:
    """`tests/qmp/test_client.py::test_x` belongs to `qmp`; a file right in tests/ to its name."""
    parts = node_id.partition("::")[0].split("/")
    return parts[1] if len(parts) > 1 else parts[0]


def reason_of(skipped: pytest.TestReport) -> str:
    """Why that test was skipped."""
    told = skipped.longrepr
    # A skip's is (file, line, reason).
    return (told[2] if isinstance(told, tuple) else str(told)).removeprefix("Skipped: ")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI"):
        reason = reason_of(report)
        if not reason.startswith(MAY_SKIP):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: skipped in CI: {reason}"
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    suite = suite_of(report.nodeid)
    _seconds[suite] += report.duration
    _tests[suite] += report.when == "call"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("time of each suite")
    for suite in sorted(_seconds):
        terminalreporter.write_line(f"{suite:20} {_seconds[suite]:7.1f} s  {_tests[suite]} tests")
