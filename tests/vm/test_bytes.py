"""Byte for byte: whatever the RAM, its contents and the profile, both sides are equal at the end.

QEMU is started with `-S` and stays paused, so nobody but us writes: every byte
of the destination is compared, the first megabyte too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.qmp.support import private_directory
from tests.vm.bytes_case import move_and_compare
from tests.vm.scene import MIB, PAGE

pytestmark = [pytest.mark.vm, pytest.mark.root]

KIB = 1 << 10
SHIPPED = sorted(path.stem for path in Path("configs/profiles").glob("*.yaml"))


@pytest.fixture
def directory() -> Iterator[Path]:
    with private_directory() as path:
        yield path


@pytest.mark.parametrize("sizes", [(34 * MIB,), (18 * MIB, 22 * MIB)])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_profile(directory: Path, name: str, sizes: tuple[int, ...]) -> None:
    move_and_compare(directory, sizes, name, seed=len(name))


def test_all_shipped_profiles_are_here() -> None:
    assert {"sequential", "low-memory-first"} <= set(SHIPPED)


@st.composite
def profiles(draw: st.DrawFn, total_bytes: int) -> dict[str, object]:
    """A profile of any steps that fit this RAM."""
    pages = total_bytes // PAGE
    steps: list[dict[str, object]] = []
    for _ in range(draw(st.integers(0, 5))):
        start = draw(st.integers(0, pages - 1))
        end = draw(st.integers(start + 1, pages))
        steps.append({"range": {"start": start * PAGE, "end": end * PAGE}})
    if draw(st.booleans()):
        steps.insert(draw(st.integers(0, len(steps))), {"sequential": {}})
    fault = {
        "ahead": draw(st.integers(0, 40)) * PAGE,
        "behind": draw(st.integers(0, 40)) * PAGE,
        "then": draw(st.sampled_from(["schedule", "here"])),
    }
    return {"version": 1, "name": "drawn", "push": steps or [{"sequential": {}}], "fault": fault}


#: QEMU wants whole multiples of 8 KiB for -m; nothing here is a power of two but by chance.
SIZES = st.lists(st.integers(160, 640).map(lambda n: n * 64 * KIB), min_size=1, max_size=2)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), sizes=SIZES, seed=st.integers(0, 1 << 30), push_lanes=st.integers(1, 3))
def test_any_profile_over_any_ram(
    data: st.DataObject, sizes: list[int], seed: int, push_lanes: int
) -> None:
    profile = data.draw(profiles(sum(sizes)))
    with private_directory() as directory:
        move_and_compare(directory, tuple(sizes), profile, seed, push_lanes)
