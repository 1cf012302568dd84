"""A profile: in what order pages are pushed, and what a fault brings along.

    push:    steps, the first that names a page wins; what none names comes last
    fault:   ahead/behind of the faulting page, and where pushing goes on

`source/schedule.py` compiles it against the RAM blocks of a VM. A profile knows
no VM, so everything that depends on one (block names, the end of RAM, whether a
trace is of this VM) is checked there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationInfo,
    model_serializer,
    model_validator,
)

import qpostcopy
from qpostcopy.config.fields import (
    DUMP_SIZE,
    MAX_BYTES,
    Name,
    Version,
    alternatives,
    choice,
    size,
    text,
)
from qpostcopy.config.loader import Document, load_document
from qpostcopy.config.model import Model, by_line, finding, from_file, refusal, shown, validate
from qpostcopy.config.problems import KeyPath, Problem, ProfileError, did_you_mean
from qpostcopy.config.units import format_bytes
from qpostcopy.errors import UsageError
from qpostcopy.trace import TraceError, encode, read_trace

PAGE_BYTES = 4096
#: The most that one fault may bring along on either side: the faulting thread
#: waits for its own page only, but every page sent around delays the next fault.
MAX_AROUND_BYTES = 2 << 20

KNOWN_STEPS = ("trace", "range", "sequential")
LATER_STEPS = ("written",)


_END = size(PAGE_BYTES, MAX_BYTES, PAGE_BYTES)


def _end(value: object, info: ValidationInfo) -> object:
    return None if value is None and not from_file(info) else _END.func(value)  # type: ignore[call-arg]


def _block_name(value: object, info: ValidationInfo) -> object:
    if value is None and not from_file(info):
        return None
    return text(value, "the name of a RAM block")


class Step(Model):
    """One entry of `push`: a mapping with one key, the step's name."""

    @model_serializer(mode="wrap")
    def _with_name(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        inner = {key: value for key, value in handler(self).items() if value is not None}
        return {step_name(self): inner}


class RangeStep(Step):
    """Pages from `start` to `end` (exclusive), in address order.

    Offsets count through all RAM blocks laid end to end in order of guest
    physical address; with `block`, within that one. No `end`: the end of RAM,
    or of the block. An end beyond it means the same.
    """

    block: Annotated[str | None, BeforeValidator(_block_name)] = None
    start_offset: Annotated[int, size(0, MAX_BYTES, PAGE_BYTES), DUMP_SIZE] = Field(
        0, alias="start"
    )
    end_offset: Annotated[int | None, BeforeValidator(_end), DUMP_SIZE] = Field(None, alias="end")

    @model_validator(mode="after")
    def _names_a_page(self) -> Self:
        if not self.model_fields_set:
            raise finding(
                "names no range: expected block, start or end",
                remedy="for all pages in address order write sequential: {}",
            )
        if self.end_offset is not None and self.end_offset <= self.start_offset:
            start, end = format_bytes(self.start_offset), format_bytes(self.end_offset)
            raise finding(f"{end} is not above start, {start}: expected start < end", at="end")
        return self


class SequentialStep(Step):
    """Every page, in address order."""


def _trace_path(value: object) -> object:
    return value if isinstance(value, Path) else text(value, "the path of a fault trace")


def _place(value: object, info: ValidationInfo) -> object:
    return text(value, "the place of this step") if value is not None or from_file(info) else None


class TraceStep(Step):
    """The pages of a fault trace (qpostcopy.trace), in the order in which they were asked for.

    :ivar file: absolute once the profile is loaded; what it is relative to is the profile's folder.
    :ivar named_in: where an operator wrote this step, for messages; set when it is loaded, and
        then the file was looked at.
    """

    file: Annotated[Path, BeforeValidator(_trace_path)] = Field(
        description="the path of a fault trace"
    )
    named_in: Annotated[str | None, BeforeValidator(_place)] = None


_STEPS: dict[str, type[Step]] = {
    "trace": TraceStep,
    "range": RangeStep,
    "sequential": SequentialStep,
}


def step_name(step: object) -> str:
    """The name of a step: its type's, or the one key of its mapping."""
    for name, kind in _STEPS.items():
        if isinstance(step, kind):
            return name
    assert isinstance(step, Mapping)
    return str(next(iter(step)))


def _is_step(value: object) -> object:
    """`value`, if it names one step that this version has."""
    if isinstance(value, Step):
        return value
    expected = f"one step, {alternatives(KNOWN_STEPS)}, with its settings in braces"
    if isinstance(value, str) and value in KNOWN_STEPS:
        settings = "{file: PATH}" if value == "trace" else "{}"
        raise refusal(value, expected, f"write {value}: {settings}")
    if not isinstance(value, Mapping) or len(value) != 1:
        remedy = "begin each step with its own dash" if isinstance(value, Mapping) else None
        raise refusal(value, expected, remedy)
    name = str(next(iter(value)))
    if name in LATER_STEPS:
        remedy = f"leave the step out; this version has {', '.join(KNOWN_STEPS)}"
        raise finding("this step is not in this version", remedy=remedy, at=name)
    if name not in KNOWN_STEPS:
        remedy = did_you_mean(name, KNOWN_STEPS) or f"the steps are {', '.join(KNOWN_STEPS)}"
        raise finding("no such step", remedy=remedy, at=name)
    return value


def _settings(value: object) -> object:
    """{"range": settings} -> settings"""
    return next(iter(value.values())) if isinstance(value, Mapping) else value


AnyStep = Annotated[
    Annotated[TraceStep, BeforeValidator(_settings), Tag("trace")]
    | Annotated[RangeStep, BeforeValidator(_settings), Tag("range")]
    | Annotated[SequentialStep, BeforeValidator(_settings), Tag("sequential")],
    Discriminator(step_name),
    BeforeValidator(_is_step),
]


def _is_list(value: object) -> object:
    if not isinstance(value, list | tuple):
        raise refusal(value, "a list of steps, each with a dash", "push: [] means address order")
    return value


_AROUND = size(0, MAX_AROUND_BYTES, PAGE_BYTES)


class FaultPolicy(Model):
    """What a fault brings along, and where pushing goes on after it."""

    ahead_bytes: Annotated[int, _AROUND, DUMP_SIZE] = Field(64 << 10, alias="ahead")
    behind_bytes: Annotated[int, _AROUND, DUMP_SIZE] = Field(0, alias="behind")
    then: Annotated[Literal["schedule", "here"], choice("schedule", "here")] = "schedule"


class Profile(Model):
    """The page order of a migration. `model_dump(mode="json")` validates to an equal one."""

    version: Version = Field(1, description="1")
    name: Name = Field(description="a name for this page order")
    push: Annotated[tuple[AnyStep, ...], BeforeValidator(_is_list)] = ()
    fault: FaultPolicy = FaultPolicy()


# --- files ----------------------------------------------------------------------------------


def load_profile(path: Path) -> Profile:
    """Read one profile file.

    :raise ProfileError: with every finding in the file.
    """
    document = load_document(path, ProfileError)
    profile, problems = validate(Profile, document.root, document)
    problems += trace_problems(document.root.get("push"), document)
    if "version" not in document.root:
        problems.insert(0, document.problem(("version",), "is missing: expected 1"))
    if problems or profile is None:
        raise ProfileError(by_line(problems))
    return with_traces_found(profile, document)


def trace_problems(push: object, document: Document, at: KeyPath = ()) -> list[Problem]:
    """What is wrong with the trace files that steps name, whatever else may be wrong.

    :param push: the steps as they are written. :param at: the profile's key in the document.
    """
    problems: list[Problem] = []
    for index, step in enumerate(push if isinstance(push, list) else ()):
        settings = step.get("trace") if isinstance(step, Mapping) and len(step) == 1 else None
        if not isinstance(settings, Mapping) or "named_in" in settings:
            continue  # something that the model refuses, or looked at before
        file = settings.get("file")
        if not isinstance(file, str) or not file.isprintable():
            continue
        try:
            read_trace(_beside(document, file))
        except TraceError as cause:
            key: KeyPath = (*at, "push", index, "trace", "file")
            problems.append(document.problem(key, f"{shown(file)}: {cause}", cause.remedy))
    return problems


def with_traces_found(profile: Profile, document: Document, at: KeyPath = ()) -> Profile:
    """The profile with its trace files by absolute paths, each step with its place."""
    steps: list[Step] = []
    for index, step in enumerate(profile.push):
        if isinstance(step, TraceStep) and step.named_in is None:
            place = str(document.problem((*at, "push", index, "trace", "file"), ""))
            found = {"file": _beside(document, step.file), "named_in": place}
            step = step.model_copy(update=found)
        steps.append(step)
    return profile.model_copy(update={"push": tuple(steps)})


def _beside(document: Document, file: str | Path) -> Path:
    return (Path(document.file).parent / file).absolute()


def read_traces(profile: Profile) -> dict[int, bytes]:
    """What the traces say that a profile names, by the index of their steps.

    :raise TraceError: one of them cannot be had any more.
    """
    return {
        index: encode(read_trace(step.file))
        for index, step in enumerate(profile.push)
        if isinstance(step, TraceStep)
    }


def keep_traces(profile: Profile, traces: Mapping[int, bytes], folder: Path) -> Profile:
    """The profile with copies of its traces, in `folder`, in place of what it names."""
    steps: list[Step] = list(profile.push)
    for index, content in traces.items():
        copy = folder / f"push-{index}.trace"
        copy.write_bytes(content)
        steps[index] = steps[index].model_copy(update={"file": copy})
    return profile.model_copy(update={"push": tuple(steps)})


def shipped_profiles() -> dict[str, Path]:
    """The profiles that come with qpostcopy, by name.

    They are the files of the top-level folder `configs/profiles`, which the
    package holds as `qpostcopy/configs` (a link in a checkout, files in a wheel).
    """
    assert qpostcopy.__file__
    folder = Path(qpostcopy.__file__).parent / "configs" / "profiles"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


class NoProfileError(UsageError):
    """There is no such profile. Its caller knows which line asked for it."""


def find_profile(reference: str, base: Path) -> Path:
    """The file that a plan or `--profile` names: a shipped name, or a path from `base`.

    What has a slash or ends in .yaml is a path.

    :raise NoProfileError: there is no such file, or no such shipped profile.
    """
    if "/" in reference or reference.endswith((".yaml", ".yml")):
        path = base / reference
        if not reference.isprintable() or not path.exists():
            remedy = "a path in a plan counts from the plan's folder"
            raise NoProfileError(f"{shown(reference)}: no such file", remedy=remedy)
        return path
    shipped = shipped_profiles()
    if reference not in shipped:
        names = (
            f"shipped are {', '.join(shipped)}; a file has a slash in its path, or ends in .yaml"
        )
        remedy = did_you_mean(reference, list(shipped)) or names
        raise NoProfileError(f"{shown(reference)}: no such shipped profile", remedy=remedy)
    return shipped[reference]
