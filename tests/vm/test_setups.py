"""The main scenario of a migration, for every set-up that operators have (setups.py)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.qmp.support import private_directory
from tests.vm.bytes_case import move_and_compare
from tests.vm.series import Series
from tests.vm.setups import ROWS, Setup

#: Those that are played in the quick run, too.
QUICK = {"plain", "unprivileged-sandbox"}

pytestmark = [
    pytest.mark.vm,
    pytest.mark.root,
    pytest.mark.parametrize(
        "setup",
        [
            pytest.param(row, id=row.name, marks=() if row.name in QUICK else (pytest.mark.slow,))
            for row in ROWS
        ],
    ),
]


@pytest.fixture
def directory() -> Iterator[Path]:
    with private_directory() as path:
        yield path


def test_bytes(directory: Path, setup: Setup) -> None:
    """Paused, with any contents: every byte is equal."""
    move_and_compare(directory, setup.sizes, "low-memory-first", seed=3, setup=setup)


def test_guest(directory: Path, setup: Setup) -> None:
    """A guest at work arrives, goes on, and finds every page right."""
    with Series(directory, setup) as series:
        series.plain(random.Random(setup.name))
        series.verify()


def test_handler_killed(directory: Path, setup: Setup) -> None:
    """In the midst of postcopy: the guest waits for the next handler, and nothing is lost."""
    with Series(directory, setup) as series:
        series.handler_killed(random.Random(setup.name))
        series.verify()
