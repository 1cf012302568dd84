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
    TraceStep,
    load_plan,
    load_profile,
    shipped_profiles,
)
from qpostcopy.source.schedule import compile_schedule
from qpostcopy.trace import Trace, TracedBlock, encode

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


def write_trace(path: Path, *, size_bytes: int = 1 << 20) -> Path:
    path.write_bytes(encode(Trace((TracedBlock("ram0", size_bytes),), (3, 1), (0, 9))))
    return path


def test_a_trace_is_found_beside_its_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = write_trace(tmp_path / "web.trace")
    (tmp_path / "p.yaml").write_text(
        "version: 1\nname: p\npush:\n  - sequential: {}\n  - trace: {file: web.trace}\n"
    )
    monkeypatch.chdir(tmp_path)
    step = load_profile(Path("p.yaml")).push[1]
    assert step == TraceStep(file=trace, named_in="p.yaml:5: push[1].trace.file")


def test_a_plan_keeps_what_its_traces_say(tmp_path: Path) -> None:
    """Deleting them during a migration changes nothing; loading its plan asks for no file."""
    trace = write_trace(tmp_path / "web.trace")
    state = tmp_path / "state"
    state.mkdir()
    path = tmp_path / "plan.yaml"
    path.write_text(
        "version: 1\nname: web1\nsource: {qmp: /a}\ndestination: {qmp: /b}\n"
        "profile:\n  name: p\n  push:\n    - trace: {file: web.trace}\n"
    )
    plan = load_plan(path)
    place = f"{path}:8: profile.push[0].trace.file"
    assert plan.profile.push == (TraceStep(file=trace, named_in=place),)
    kept = plan.with_traces_in(state, plan.read_traces())
    content = trace.read_bytes()
    trace.unlink()
    (state / "plan.yaml").write_text(kept.to_yaml())
    loaded = load_plan(state / "plan.yaml")
    assert loaded == kept
    (step,) = loaded.profile.push
    assert isinstance(step, TraceStep)
    assert step.named_in == place
    assert step.file.parent == state
    assert step.file.read_bytes() == content
    again = Profile.model_validate(loaded.profile.model_dump(mode="json"))
    assert again == loaded.profile


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
