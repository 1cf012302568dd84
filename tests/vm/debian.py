"""QEMUs of other Debian suites, fetched by scripts/get-qemu when a test first wants one."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache/qemu"

_GONE = 3
_FETCH_SECONDS = 300.0


@functools.cache
def qemu_of(suite: str) -> str:
    """Path of that suite's QEMU. A test of a suite that the mirror no longer has is skipped."""
    got = subprocess.run(
        [ROOT / "scripts/get-qemu", suite, CACHE / suite],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_FETCH_SECONDS,
        check=False,
    )
    if got.returncode == _GONE:
        pytest.skip(f"Debian suite {suite} is gone from the mirror")
    assert got.returncode == 0, got.stderr
    return got.stdout.strip()
