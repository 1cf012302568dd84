"""docs/support.md names tests: they exist, and no set-up is left out."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.vm.setups import ROWS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/support.md"

_NODE_ID = re.compile(r"tests/[\w/]+\.py(?:::\w+(?:\[[^\]\s]*\])?)?")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_TABLE_ROW = re.compile(r"^\| `([\w.-]+)` \|", re.MULTILINE)
_ROW_NAMES = re.compile(r"\brows? ((?:`[\w.-]+`(?:, | and )?)+)")


def collected(files: set[str]) -> set[str]:
    """Node ids of all tests in these files, each also without its parameters; and the files."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    listed = subprocess.run(
        [*command, *sorted(files)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert listed.returncode == 0, listed.stdout + listed.stderr
    ids = {line for line in listed.stdout.splitlines() if "::" in line}
    return ids | {one.partition("[")[0] for one in ids} | files


def test_every_test_that_is_named_exists() -> None:
    page = PAGE.read_text().replace("[ROW]", "")
    named = set(_NODE_ID.findall(page))
    assert len(named) > 10
    missing = named - collected({one.partition("::")[0] for one in named})
    assert missing == set(), "docs/support.md names tests that are not there"


def test_every_set_up_has_its_line() -> None:
    table = PAGE.read_text().partition("## The set-ups")[2].partition("\n## ")[0]
    assert _TABLE_ROW.findall(table) == [row.name for row in ROWS], "docs/support.md: one line each"


def test_every_set_up_that_is_named_exists() -> None:
    prose = _FENCE.sub("", PAGE.read_text())
    named = {name for names in _ROW_NAMES.findall(prose) for name in re.findall("`(.*?)`", names)}
    assert "plain" in named
    assert named <= {row.name for row in ROWS}
