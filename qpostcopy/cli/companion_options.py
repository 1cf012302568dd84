"""The options that `page-server` and `handler` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from qpostcopy.companion import Options

_PATH = click.Path(path_type=Path)


def companion_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options to a click command; see `options_of`."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--qmp", type=_PATH, required=True, help="QMP socket of the QEMU beside us."),
    click.option("--pid", type=click.IntRange(min=1), help="QEMU's pid [default: who listens]."),
    click.option("--id", "migration_id", required=True, help="The migration's ID."),
    click.option(
        "--state-dir",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        required=True,
        help="The migration's state directory (mode 0700).",
    ),
    click.option("--control", type=_PATH, required=True, help="Our own QMP socket: made, 0600."),
    click.option(
        "--ready-fd",
        type=click.IntRange(min=0),
        help="Write one line there once we serve, or the reason why not, and close it.",
    ),
    click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        default="info",
        show_default=True,
        help="Of the log on stderr.",
    ),
)


def options_of(
    *,
    qmp: Path,
    pid: int | None,
    migration_id: str,
    state_dir: Path,
    control: Path,
    ready_fd: int | None,
) -> Options:
    """The options as the companions take them."""
    return Options(qmp, pid, migration_id, state_dir, control, ready_fd)
