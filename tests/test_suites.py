"""The plugin of scripts/test: times of suites, and skips that may not pass unseen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.suites import suite_of

ROOT = Path(__file__).parents[1]

_TESTS = """
import pytest

def test_passes():
    pass

def test_lacks_something():
    pytest.skip("userfaultfd is missing")

@pytest.mark.skipif(True, reason="no QEMU")
def test_is_marked():
    pass

def test_may_skip():
    pytest.skip("Debian suite bullseye is gone from the mirror")

@pytest.mark.xfail(reason="known", strict=False)
def test_fails_as_expected():
    raise AssertionError
"""


@pytest.mark.parametrize(
    ("node_id", "suite"),
    [
        ("tests/qmp/test_client.py::test_x[a/b]", "qmp"),
        ("tests/test_errors.py::test_x", "test_errors.py"),
        ("tests/vm/deep/test_x.py::T::test_x", "vm"),
        ("test_x.py::test_x", "test_x.py"),
    ],
)
def test_a_suite_is_a_folder(node_id: str, suite: str) -> None:
    assert suite_of(node_id) == suite


def run_pytest(directory: Path, *, ci: bool) -> subprocess.CompletedProcess[str]:
    (directory / "test_made.py").write_text(_TESTS)
    environment = {key: value for key, value in os.environ.items() if key != "CI"}
    environment |= {"PYTHONPATH": str(ROOT)} | ({"CI": "true"} if ci else {})
    command = [sys.executable, "-m", "pytest", "-p", "tests.suites", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "test_made.py"],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_skips_are_skips_outside_of_ci(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, ci=False)
    assert done.returncode == 0
    assert "1 passed, 3 skipped, 1 xfailed" in done.stdout.splitlines()[-1]


def test_in_ci_a_missing_capability_fails(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, ci=True)
    assert done.returncode == 1
    assert "skipped in CI: userfaultfd is missing" in done.stdout
    assert "skipped in CI: no QEMU" in done.stdout
    # A skip that comes from a mark is one of setup: pytest calls it an error.
    assert "1 failed, 1 passed, 1 skipped, 1 xfailed, 1 error" in done.stdout.splitlines()[-1]


def test_each_suite_has_its_time_and_pytest_the_last_word(tmp_path: Path) -> None:
    lines = run_pytest(tmp_path, ci=False).stdout.splitlines()
    (row,) = [line for line in lines if line.startswith("test_made.py ") and " s " in line]
    assert row.split()[2:] == ["s", "4", "tests"]
    assert " passed" in lines[-1]
