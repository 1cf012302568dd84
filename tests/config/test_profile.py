"""Profiles: what the design's example means, and those that are shipped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from qpostcopy.config import (
    FaultPolicy,
    Profile,
    RangeStep,
    SequentialStep,
    load_profile,
    shipped_profiles,
)
from qpostcopy.source.schedule import compile_schedule

CHECKOUT = Path(__file__).parents[2] / "configs" / "profiles"


@dataclass(frozen=True)
class Block:
    name: str
    size_bytes: int


def test_the_steps_and_the_fault_block(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        """
version: 1
name: p
push:
  - range: {start: 0, end: 1MiB}
  - range: {block: ram1, start: 0x1000, end: 8192}
  - range: {block: ram0}
  - sequential: {}
fault: {ahead: 2MiB, behind: 4KiB, then: here}
"""
    )
    assert load_profile(path) == Profile(
        name="p",
        push=(
            RangeStep(start_offset=0, end_offset=1 << 20),
            RangeStep(block="ram1", start_offset=4096, end_offset=8192),
            RangeStep(block="ram0"),
            SequentialStep(),
        ),
        fault=FaultPolicy(ahead_bytes=2 << 20, behind_bytes=4096, then="here"),
    )


def test_all_but_version_and_name_has_a_default(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("version: 1\nname: p\n")
    profile = load_profile(path)
    assert profile.push == ()
    assert profile.fault == FaultPolicy(ahead_bytes=65536, behind_bytes=0, then="schedule")


def test_the_shipped_profiles_are_those_of_the_checkout() -> None:
    """The package finds the files of the top-level folder, whichever way it is installed."""
    texts = {name: path.read_text() for name, path in shipped_profiles().items()}
    assert texts == {path.stem: path.read_text() for path in CHECKOUT.glob("*.yaml")}
    assert {"sequential", "low-memory-first"} <= texts.keys()


@pytest.mark.parametrize("name", sorted(shipped_profiles()))
@pytest.mark.parametrize("sizes", [[4096], [1 << 20], [3 << 20, 12288], [512 << 20], [1 << 40]])
def test_a_shipped_profile_fits_every_vm(name: str, sizes: list[int]) -> None:
    profile = load_profile(shipped_profiles()[name])
    assert profile.name == name
    blocks = [Block(f"ram{index}", size) for index, size in enumerate(sizes)]
    extents = compile_schedule(profile, blocks)
    assert sum(extent.page_count for extent in extents) == sum(sizes) // 4096
