"""docs/your-vm.md names every code that preflight can find, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from qpostcopy.inspect import QemuGoneError
from qpostcopy.migration import error_code
from qpostcopy.netns import NetnsAbsentError, NetnsClosedError
from qpostcopy.qmp.monitor import (
    MonitorAbsentError,
    MonitorConnectError,
    MonitorForeignError,
    MonitorHeldError,
)

ROOT = Path(__file__).parents[1]
RAISED = (
    MonitorAbsentError,
    MonitorConnectError,
    MonitorForeignError,
    MonitorHeldError,
    NetnsAbsentError,
    NetnsClosedError,
    QemuGoneError,
)


def found_by(path: str) -> set[str]:
    """The first argument of each `Finding(...)` and `warn(...)` in a file."""
    tree = ast.parse((ROOT / path).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    firsts = [
        call.args[0]
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id in ("Finding", "warn") and call.args
    ]
    return {str(first.value) for first in firsts if isinstance(first, ast.Constant)}


def test_every_code_is_documented() -> None:
    text = (ROOT / "docs/your-vm.md").read_text()
    (section,) = re.findall(r"^## What `check` looks for\n(.*?)^## ", text, re.S | re.M)
    cells = re.findall(r"^\| (`.*?) \|", section, re.M)
    warnings = section[section.index("Warnings, ") :]
    told = set(re.findall(r"`([a-z-]+)`", " ".join(cells)))
    told |= set(re.findall(r"`([a-z-]+)` \(", warnings))
    files = ("qpostcopy/preflight.py", "qpostcopy/sidechecks.py", "qpostcopy/cli/check.py")
    codes = set().union(*(found_by(file) for file in files))
    assert told == codes | {error_code(kind("x")) for kind in RAISED}
