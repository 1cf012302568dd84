"""The plan: what moves where, over which lanes, in which order, within which limits.

One frozen model for each section of the file. `load_plan` resolves the profile
that the plan names, so that a plan in memory, and the `plan.yaml` that the state
directory keeps of it, depend on no other file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from qpostcopy.config.fields import (
    DUMP_DURATION,
    DUMP_SIZE,
    MAX_BYTES,
    Flag,
    Host,
    ListenAddress,
    Netns,
    Pid,
    Port,
    Rate,
    SocketPath,
    Version,
    choice,
    duration,
    is_loopback,
    safe_name,
    size,
    whole,
)
from qpostcopy.config.loader import Document, load_document
from qpostcopy.config.model import Model, by_line, finding, refusal, validate
from qpostcopy.config.problems import PlanError, Problem, ProfileError
from qpostcopy.config.profile import (
    NoProfileError,
    Profile,
    find_profile,
    keep_traces,
    load_profile,
    read_traces,
    trace_problems,
    with_traces_found,
)

DEFAULT_PROFILE = "sequential"
_SIDES = ("source", "destination")


class SidePlan(Model):
    """One QEMU: where it is and how to reach it."""

    host: Host = "local"
    qmp: SocketPath = Field(description="the absolute path of a QMP unix socket")
    pid: Pid = "auto"
    netns: Netns = None


class SourcePlan(SidePlan):
    """The QEMU that the guest leaves; `after` says what becomes of it."""

    after: Annotated[Literal["quit", "keep"], choice("quit", "keep")] = "quit"


class Lanes(Model):
    """The connections that carry pages: the handler listens, the page server connects."""

    insecure: Flag = False  # before `listen`, whose check needs it
    listen: ListenAddress = "127.0.0.1"
    port: Port = "auto"
    push: Annotated[int, whole(1, 64)] = 1

    @field_validator("listen", mode="after")
    @classmethod
    def _encrypted_or_told(cls, listen: str, info: ValidationInfo) -> str:
        if not info.data.get("insecure", True) and not is_loopback(listen):
            raise finding(
                f'"{listen}" is not on loopback, and this version has no TLS for the lanes',
                remedy="listen on 127.0.0.1, or write insecure: true, which lets anybody on the"
                " path read and change guest memory: only on a network of your own",
            )
        return listen


class SwitchWhen(Model):
    """When precopy has done enough."""

    missing_below_bytes: Annotated[int, size(0, MAX_BYTES), DUMP_SIZE] = Field(
        64 << 20, alias="missing_below"
    )
    stalled: Flag = True


_MODE_HINTS = {
    **dict.fromkeys(("off", "no", "false", "none", "disabled", "0"), "never"),
    **dict.fromkeys(("on", "yes", "true", "enabled", "1"), "auto"),
}


class Precopy(Model):
    """Passes over RAM before the switch. This version has none: see `mode`."""

    mode: Annotated[
        Literal["auto", "required", "never"],
        choice("auto", "required", "never", hints=_MODE_HINTS),
    ] = "auto"
    max_passes: Annotated[int, whole(1, 1000)] = 8
    max_seconds: Annotated[float, duration(0.1, 86_400), DUMP_DURATION] = Field(60.0, alias="max")
    switch_when: SwitchWhen = SwitchWhen()
    bandwidth_bytes_per_second: Rate = Field(None, alias="bandwidth")

    @field_validator("mode", mode="after")
    @classmethod
    def _not_yet(cls, mode: str) -> str:
        if mode == "required":
            text = '"required": precopy is not in this version'
            raise finding(text, remedy="write auto or never; both run pure post-copy for now")
        return mode


class Limits(Model):
    """What the migration may take."""

    before_switch_seconds: Annotated[float, duration(1, 30 * 86_400), DUMP_DURATION] = Field(
        3600.0, alias="before_switch"
    )
    push_bytes_per_second: Rate = Field(None, alias="push")


def _plan_name(value: object) -> str:
    """A safe name that cannot be taken for a migration's ID (name + UTC seconds)."""
    name = safe_name(value)
    if re.search(r"-[0-9]{8}T[0-9]{6}$", name):
        raise refusal(value, "a name that does not end like a migration's ID (-20261123T101500)")
    return name


def _is_profile(value: object) -> object:
    if not isinstance(value, Mapping | Profile):
        raise refusal(value, "a shipped profile's name, the path of a file, or the profile itself")
    return value


class Plan(Model):
    """One migration, as its operator wants it. See docs/plan-and-profile.md."""

    version: Version = Field(description="1")
    name: Annotated[str, BeforeValidator(_plan_name)] = Field(description="a name for the VM")
    source: SourcePlan = Field(description="the source's QMP socket: {qmp: PATH}")
    destination: SidePlan = Field(description="the destination's QMP socket: {qmp: PATH}")
    lanes: Lanes = Field(Lanes(), validate_default=True)
    profile: Annotated[Profile, BeforeValidator(_is_profile)]
    precopy: Precopy = Precopy()
    limits: Limits = Limits()

    @property
    def profile_name(self) -> str:
        return self.profile.name

    @field_validator("destination", mode="after")
    @classmethod
    def _two_qemus(cls, destination: SidePlan, info: ValidationInfo) -> SidePlan:
        source = info.data.get("source")
        if source is None:
            return destination
        if os.path.realpath(source.qmp) == os.path.realpath(destination.qmp):
            text = f'"{destination.qmp}" is the source\'s socket too: expected another QEMU'
            raise finding(text, remedy="give the QMP socket of the waiting QEMU", at="qmp")
        if destination.pid != "auto" and source.pid == destination.pid:
            text = f"{destination.pid} is the source's pid too: expected another QEMU"
            raise finding(text, remedy="write auto", at="pid")
        return destination

    @field_validator("lanes", mode="after")
    @classmethod
    def _within_reach(cls, lanes: Lanes, info: ValidationInfo) -> Lanes:
        spaces = {side.netns for name in _SIDES if (side := info.data.get(name)) is not None}
        if len(spaces) > 1 and is_loopback(lanes.listen):
            raise finding(
                f'"{lanes.listen}": the two sides are in different network namespaces, and each '
                "has a loopback of its own",
                remedy="listen on an address of the destination's namespace that the source's has "
                "a route to, with insecure: true",
                at="listen",
            )
        return lanes

    def read_traces(self) -> dict[int, bytes]:
        """What the traces say that its profile names, by the index of their steps.

        :raise TraceError: one of them cannot be had any more.
        """
        return read_traces(self.profile)

    def with_traces_in(self, folder: Path, traces: Mapping[int, bytes]) -> Self:
        """This plan with copies of those traces, in `folder`, in place of what it names."""
        return self.model_copy(update={"profile": keep_traces(self.profile, traces, folder)})

    def to_yaml(self) -> str:
        """The plan with nothing left to default or to look up; loads as an equal plan."""
        document = self.model_dump(mode="json", by_alias=True)
        return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)


_OPTION = Problem("--profile", None, None, "", "")


def load_plan(path: Path, *, profile: str | None = None) -> Plan:
    """Read a plan and the profile it names.

    :param profile: of `--profile`: a shipped name, or a path from the current
        directory; takes the place of the plan's own.
    :raise PlanError: with every finding in the plan, and in its profile's file.
    :raise ProfileError: when only the profile's file is wrong.
    """
    document = load_document(path, PlanError)
    root, profile_problems = _with_profile(document, profile)
    plan, problems = validate(Plan, root, document)
    inline = root.get("profile")
    if isinstance(inline, Mapping):
        problems += trace_problems(inline.get("push"), document, ("profile",))
    in_profile = [problem for problem in profile_problems if problem.file != document.file]
    in_plan = [problem for problem in profile_problems if problem.file == document.file]
    if problems or in_plan:
        raise PlanError([*by_line([*problems, *in_plan]), *in_profile])
    if in_profile or plan is None:
        raise ProfileError(in_profile)
    written = with_traces_found(plan.profile, document, ("profile",))
    return plan.model_copy(update={"profile": written})


def _with_profile(document: Document, option: str | None) -> tuple[dict[str, Any], list[Problem]]:
    """The plan's root with its profile in place of a name, and what is wrong with that."""
    root = dict(document.root)
    reference = root.get("profile", DEFAULT_PROFILE) if option is None else option
    if not isinstance(reference, str):
        return root, []  # inline, or something that the model refuses
    stand_in = root | {"profile": Profile(name="none")}
    try:
        file = find_profile(reference, Path() if option else Path(document.file).parent)
        return root | {"profile": load_profile(file)}, []
    except NoProfileError as cause:
        place = document.problem(("profile",), "") if option is None else _OPTION
        return stand_in, [replace(place, text=str(cause), remedy=cause.remedy)]
    except ProfileError as cause:
        return stand_in, list(cause.problems)
