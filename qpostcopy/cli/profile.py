"""`qpostcopy profile`: look at page orders without a VM."""

from __future__ import annotations

from pathlib import Path

import click

from qpostcopy.config import Problem, Profile, ProfileError, TraceStep, load_profile
from qpostcopy.config.profile import PAGE_BYTES, find_profile
from qpostcopy.config.units import UnitError, format_bytes, parse_bytes
from qpostcopy.errors import UsageError
from qpostcopy.trace import MAX_BLOCKS, TracedBlock, read_trace

#: More than any QEMU has.
MAX_BYTES = 1 << 50


@click.group(name="profile")
def command() -> None:
    """Work with profiles, the files that set the order of pages."""


@command.command()
@click.argument(
    "files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
def validate(files: tuple[Path, ...]) -> None:
    """Check profile files; print one line for each good one.

    Every finding in every file is reported, with file, line, key and what was
    expected; the exit code is then 2. Traces that they name are read, too. What
    depends on a VM (the names of its RAM blocks, the end of its RAM, whether a trace
    is of this VM) is checked by `check` and `migrate`.
    """
    problems: list[Problem] = []
    for file in files:
        try:
            click.echo(f"{file}: {_summary(load_profile(file))}")
        except ProfileError as error:
            problems += error.problems
    if problems:
        raise ProfileError(problems)


def _summary(profile: Profile) -> str:
    steps = f"{len(profile.push)} step{'' if len(profile.push) == 1 else 's'}"
    ahead, behind = profile.fault.ahead_bytes, profile.fault.behind_bytes
    around = f"{format_bytes(ahead)} ahead, {format_bytes(behind)} behind"
    return f"ok: {profile.name}, {steps}, a fault brings {around}, then {profile.fault.then}"


@command.command()
@click.argument("profile", metavar="PROFILE")
@click.option("--memory", metavar="SIZE", help="Of the VM, in one RAM block named ram0: 16GiB.")
@click.option("--blocks", metavar="NAME=SIZE,...", help="Its RAM blocks by guest physical address.")
def show(profile: str, memory: str | None, blocks: str | None) -> None:
    """Print what PROFILE will do to a VM's RAM.

    PROFILE is a shipped name, or a file. A table has what each step adds, a picture
    when each part of RAM arrives if nothing faults. Without --memory and --blocks,
    the VM is that of the profile's first trace.
    """
    from qpostcopy.cli.heatmap import look_at
    from qpostcopy.cli.show import ROWS, cells_in_a_row, make_console
    from qpostcopy.cli.show import show as print_it

    loaded = load_profile(find_profile(profile, Path()))
    ram = _ram(loaded, memory, blocks)
    console = make_console()
    shares, picture = look_at(loaded, ram, cells_in_a_row(console) * ROWS)
    print_it(console, loaded, ram, shares, picture)


def _ram(profile: Profile, memory: str | None, blocks: str | None) -> tuple[TracedBlock, ...]:
    """The RAM blocks that the options give, or a trace.

    :raise UsageError: neither does, or they make no sense.
    """
    if memory is not None and blocks is not None:
        raise UsageError("--memory and --blocks exclude each other", remedy="give one of them")
    if memory is not None:
        return (TracedBlock("ram0", _size(memory, "--memory")),)
    if blocks is not None:
        return _parse_blocks(blocks)
    for step in profile.push:
        if isinstance(step, TraceStep):
            return read_trace(step.file).blocks
    raise UsageError(
        "what the profile does depends on the VM's RAM, and no trace in it says what that is",
        remedy="give --memory 16GiB, or --blocks ram0=3GiB,ram1=13GiB",
    )


def _parse_blocks(text: str) -> tuple[TracedBlock, ...]:
    found: dict[str, TracedBlock] = {}
    for part in text.split(","):
        name, equals, size = part.rpartition("=")
        if not equals or not name or not name.isprintable() or name in found:
            raise UsageError(
                f"--blocks: {part!r}: expected NAME=SIZE, each name once",
                remedy="write --blocks ram0=3GiB,ram1=13GiB",
            )
        found[name] = TracedBlock(name, _size(size, "--blocks"))
    if len(found) > MAX_BLOCKS:
        raise UsageError(f"--blocks: {len(found)} blocks: expected at most {MAX_BLOCKS}")
    return tuple(found.values())


def _size(text: str, option: str) -> int:
    expected = "a multiple of 4KiB up to 1024TiB, such as 16GiB"
    try:
        size_bytes = parse_bytes(text)
    except UnitError as cause:
        raise UsageError(f"{option}: {text!r}: expected {expected}", remedy=cause.remedy) from cause
    if not 0 < size_bytes <= MAX_BYTES or size_bytes % PAGE_BYTES:
        raise UsageError(f"{option}: {text!r}: expected {expected}", remedy="write 16GiB")
    return size_bytes
