"""The plugin that prints the table of set-ups."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.table import cell_of

ROOT = Path(__file__).parents[1]

_TESTS = """
import pytest

rows = pytest.mark.parametrize("row", ["plain", "kvm", "qemu-x"])

@rows
def test_bytes(row):
    assert row == "plain"

@rows
def test_guest(row):
    if row == "kvm":
        pytest.skip("no KVM")
    if row == "qemu-x":
        pytest.skip("Debian suite x is gone from the mirror")

def test_of_no_row():
    pass
"""


@pytest.mark.parametrize(
    ("node_id", "cell"),
    [
        ("tests/vm/test_setups.py::test_guest[two-nodes]", ("two-nodes", "guest")),
        ("tests/vm/test_setups.py::test_guest", None),
        ("tests/vm/test_bytes.py::test_guest[x]", None),
    ],
)
def test_a_cell_is_a_test(node_id: str, cell: tuple[str, str] | None) -> None:
    assert cell_of(node_id) == cell


def test_the_table_is_what_was_run(tmp_path: Path) -> None:
    (tmp_path / "test_setups.py").write_text(_TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "tests.table", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [*command, "test_setups.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    table = ran.stdout.partition("set-ups ")[2].splitlines()[1:5]
    assert table == [
        "        bytes    guest",
        "plain   ok       ok",
        "kvm     FAILED   skipped",
        "qemu-x  FAILED   gone",
    ]
