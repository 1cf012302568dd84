"""Plans: the contract's example, the defaults, the shipped file, and round trips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qpostcopy.config import (
    ConfigError,
    FaultPolicy,
    Lanes,
    Limits,
    Plan,
    PlanError,
    Precopy,
    Profile,
    ProfileError,
    RangeStep,
    SequentialStep,
    SidePlan,
    SourcePlan,
    SwitchWhen,
    load_plan,
)
from qpostcopy.config.model import Model
from qpostcopy.config.profile import MAX_AROUND_BYTES, shipped_profiles

CONFIGS = Path(__file__).parents[2] / "configs"

SHORTEST = """
version: 1
name: web1
source: {qmp: /run/vm/web1.qmp}
destination: {qmp: /run/vm/web1-in.qmp}
"""

#: operator-contract.md, but for the profile, which this version does not ship
CONTRACT = """
version: 1
name: web1
source:      {host: local, qmp: /run/vm/web1.qmp, pid: auto, after: quit}
destination: {host: local, qmp: /run/vm/web1-in.qmp, pid: auto}
lanes:       {listen: 127.0.0.1, port: auto, push: 1, insecure: false}
profile:     sequential
precopy:     {mode: auto, max_passes: 8, max: 60s, switch_when: {missing_below: 64MiB, stalled: true}, bandwidth: unlimited}
limits:      {before_switch: 1h, push: unlimited}
"""  # noqa: E501


def load(folder: Path, text: str, profile: str | None = None) -> Plan:
    path = folder / "plan.yaml"
    path.write_text(text)
    return load_plan(path, profile=profile)


def test_the_defaults_are_those_of_the_contract(tmp_path: Path) -> None:
    assert load(tmp_path, SHORTEST) == load(tmp_path, CONTRACT)


def test_every_value_arrives(tmp_path: Path) -> None:
    text = """
version: 1
name: db-2.test_x
source: {qmp: /s, pid: 12, netns: west, after: keep}
destination: {qmp: /d, pid: 13, netns: e.1}
lanes: {listen: "fd00::7", port: 4444, push: 4, insecure: true}
profile: {version: 1, name: mine, push: [{range: {block: ram1, start: 4KiB}}], fault: {then: here}}
precopy:
  mode: never
  max_passes: 3
  max: 1500ms
  switch_when: {missing_below: 1GiB, stalled: false}
  bandwidth: 100MiB/s
limits: {before_switch: 10m, push: 1Gbit/s}
"""
    expected = Plan(
        version=1,
        name="db-2.test_x",
        source=SourcePlan(qmp=Path("/s"), pid=12, netns="west", after="keep"),
        destination=SidePlan(qmp=Path("/d"), pid=13, netns="e.1"),
        lanes=Lanes(listen="fd00::7", port=4444, push=4, insecure=True),
        profile=Profile(
            name="mine",
            push=(RangeStep(block="ram1", start_offset=4096),),
            fault=FaultPolicy(then="here"),
        ),
        precopy=Precopy(
            mode="never",
            max_passes=3,
            max_seconds=1.5,
            switch_when=SwitchWhen(missing_below_bytes=1 << 30, stalled=False),
            bandwidth_bytes_per_second=100 << 20,
        ),
        limits=Limits(before_switch_seconds=600, push_bytes_per_second=125_000_000),
    )
    assert load(tmp_path, text) == expected
    assert expected.profile_name == "mine"


def test_a_plan_is_frozen(tmp_path: Path) -> None:
    plan = load(tmp_path, SHORTEST)
    with pytest.raises(ValidationError, match="frozen"):
        plan.lanes.push = 2  # type: ignore[misc]


def test_python_names_are_no_keys_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r":6: limits\.push_bytes_per_second: no such key"):
        load(tmp_path, SHORTEST + "limits: {push_bytes_per_second: 1Gbit/s}\n")


def test_two_namespaces_need_an_address_between_them(tmp_path: Path) -> None:
    apart = SHORTEST.replace("web1.qmp", "web1.qmp, netns: west")
    with pytest.raises(PlanError, match="has a loopback of its own"):
        load(tmp_path, apart)
    together = apart.replace("web1-in.qmp", "web1-in.qmp, netns: west")
    assert load(tmp_path, together).destination.netns == "west"
    lanes = "lanes: {listen: 10.9.0.2, insecure: true}\n"
    plan = load(tmp_path, apart + lanes)
    assert (plan.source.netns, plan.destination.netns) == ("west", None)


# --- the shipped plan -----------------------------------------------------------------------


def test_the_shipped_plan_shows_the_defaults(tmp_path: Path) -> None:
    assert load_plan(CONFIGS / "plan.yaml") == load(tmp_path, SHORTEST)


def keys_of(model: type[Model]) -> dict[str, Any]:
    """The keys of a section in a file, nested."""
    kinds = {name: field.annotation for name, field in model.model_fields.items()}
    return {
        key: keys_of(kind) if isinstance(kind, type) and issubclass(kind, Model) else None
        for key, kind in zip(model.keys_in_file(), kinds.values(), strict=True)
        if kind is not Profile
    }


def test_the_shipped_plan_has_every_key_with_a_comment() -> None:
    text = (CONFIGS / "plan.yaml").read_text()
    shown = yaml.safe_load(text)

    def nested(value: object) -> object:
        if not isinstance(value, dict):
            return None
        return {key: nested(inner) for key, inner in value.items() if key != "profile"}

    assert nested(shown) == keys_of(Plan)
    with_a_key = [line for line in text.splitlines() if line.lstrip()[:1] not in ("", "#")]
    assert [line for line in with_a_key if "  # " not in line] == []


def test_the_shipped_plan_names_the_shipped_profiles() -> None:
    text = (CONFIGS / "plan.yaml").read_text()
    assert all(name in text for name in shipped_profiles())


# --- which profile --------------------------------------------------------------------------

MINE = "{version: 1, name: mine, push: []}\n"


def test_profile_by_file_counts_from_the_plan(tmp_path: Path) -> None:
    (tmp_path / "orders").mkdir()
    (tmp_path / "orders" / "mine").write_text(MINE)
    (tmp_path / "mine.yaml").write_text(MINE)
    for reference in ("orders/mine", "./mine.yaml", "mine.yaml", str(tmp_path / "mine.yaml")):
        plan = load(tmp_path, f"{SHORTEST}profile: {reference}\n")
        assert plan.profile == Profile(name="mine")


def test_the_option_takes_the_place_of_the_plans_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "mine.yaml").write_text(MINE)
    monkeypatch.chdir(here)
    broken = f"{SHORTEST}profile: does-not-exist\n"
    assert load(tmp_path, broken, "mine.yaml").profile_name == "mine"
    assert load(tmp_path, broken, "low-memory-first").profile_name == "low-memory-first"


def test_a_wrong_option_says_that_it_is_the_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, SHORTEST, "seqential")
    assert str(caught.value) == '--profile: "seqential": no such shipped profile'
    assert caught.value.remedy == "did you mean sequential?"


def test_only_the_profiles_file_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("version: 1\nname: mine\nfault: {ahead: 1}\n")
    with pytest.raises(ProfileError) as caught:
        load(tmp_path, SHORTEST + "profile: mine.yaml\n")
    assert str(caught.value).startswith(f"{tmp_path}/mine.yaml:3: fault.ahead: 1: expected")


def test_the_same_socket_through_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/run/vm/web1.qmp")
    with pytest.raises(PlanError, match=r"destination\.qmp: .* is the source's socket too"):
        load(tmp_path, SHORTEST.replace("/run/vm/web1-in.qmp", f"{tmp_path}/link"))


# --- round trips ----------------------------------------------------------------------------

PAGES = st.integers(0, 1 << 40)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
RATES = st.none() | st.integers(125_000, 10**11)
PRINTABLE = st.text(
    st.characters(exclude_categories=["Cs", "C", "Z"], include_characters=" "), max_size=20
).filter(str.isprintable)
SOCKETS = PRINTABLE.map(lambda text: Path("/" + text))


def milliseconds(low_ms: int, high_ms: int) -> st.SearchStrategy[float]:
    return st.integers(low_ms, high_ms).map(lambda value: value / 1000)


@st.composite
def ranges(draw: st.DrawFn) -> RangeStep:
    start, pages = draw(PAGES), draw(st.none() | st.integers(1, 1 << 40))
    end = None if pages is None else (start + pages) * 4096
    block = draw(st.none() | PRINTABLE.filter(bool))
    return RangeStep(block=block, start_offset=start * 4096, end_offset=end)


AROUND = st.integers(0, MAX_AROUND_BYTES // 4096).map(lambda pages: pages * 4096)
PROFILES = st.builds(
    Profile,
    name=NAMES,
    push=st.lists(ranges() | st.just(SequentialStep()), max_size=5).map(tuple),
    fault=st.builds(
        FaultPolicy,
        ahead_bytes=AROUND,
        behind_bytes=AROUND,
        then=st.sampled_from(["schedule", "here"]),
    ),
)


def plans(netns: str | None) -> st.SearchStrategy[Plan]:
    """Lanes on loopback: so both sides are in one network namespace."""
    return st.builds(
        Plan,
        version=st.just(1),
        name=NAMES,
        source=st.builds(
            SourcePlan,
            qmp=SOCKETS.map(lambda path: Path(f"/s{path}")),
            pid=st.integers(2, 1 << 22) | st.just("auto"),
            netns=st.just(netns),
            after=st.sampled_from(["quit", "keep"]),
        ),
        destination=st.builds(
            SidePlan, qmp=SOCKETS.map(lambda path: Path(f"/d{path}")), netns=st.just(netns)
        ),
        lanes=st.builds(
            Lanes,
            listen=st.ip_addresses(v=4, network="127.0.0.0/8").map(str) | st.just("::1"),
            port=st.integers(1, 65535) | st.just("auto"),
            push=st.integers(1, 64),
            insecure=st.booleans(),
        ),
        profile=PROFILES,
        precopy=st.builds(
            Precopy,
            mode=st.sampled_from(["auto", "never"]),
            max_passes=st.integers(1, 1000),
            max_seconds=milliseconds(100, 86_400_000),
            switch_when=st.builds(
                SwitchWhen, missing_below_bytes=st.integers(0, 1 << 62), stalled=st.booleans()
            ),
            bandwidth_bytes_per_second=RATES,
        ),
        limits=st.builds(
            Limits,
            before_switch_seconds=milliseconds(1000, 2_592_000_000),
            push_bytes_per_second=RATES,
        ),
    )


PLANS = (st.none() | NAMES.filter(lambda name: name != "none")).flatmap(plans)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(plan=PLANS)
def test_a_resolved_plan_loads_as_itself(tmp_path: Path, plan: Plan) -> None:
    assert load(tmp_path, plan.to_yaml()) == plan


@given(plan=PLANS)
def test_a_dumped_plan_validates_to_itself(plan: Plan) -> None:
    assert Plan.model_validate(plan.model_dump(mode="json")) == plan


@given(profile=PROFILES)
def test_a_dumped_profile_validates_to_itself(profile: Profile) -> None:
    """This is how the controller hands it to the page server (`qpc-serve`)."""
    assert Profile.model_validate(profile.model_dump(mode="json")) == profile


def test_a_resolved_plan_needs_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    plan = load(tmp_path, SHORTEST + "profile: mine.yaml\n")
    (tmp_path / "mine.yaml").unlink()
    assert load(tmp_path, plan.to_yaml()) == plan
