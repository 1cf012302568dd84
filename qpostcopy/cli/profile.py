"""`qpostcopy profile`: look at page orders without a VM."""

from __future__ import annotations

from pathlib import Path

import click

from qpostcopy.config import Problem, Profile, ProfileError, load_profile
from qpostcopy.config.units import format_bytes


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
    expected; the exit code is then 2. What depends on a VM (the names of its RAM
    blocks, the end of its RAM) is checked by `check` and `migrate`.
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
