"""`qpostcopy resume`: go on with a migration that was interrupted, or whose controller died."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from qpostcopy.cli.completing import migrations

if TYPE_CHECKING:
    from qpostcopy.cli.stream import Stream


@click.command(name="resume", epilog="Example: qpostcopy resume web1")
@click.argument("migration", metavar="ID", shell_complete=migrations)
@click.option("--json", is_flag=True, expose_value=False, help="One JSON object a line on stdout.")
@click.pass_obj
def command(stream: Stream, migration: str) -> int:
    """Go on with a migration; roll back what was not committed.

    ID may be a plan's name: its latest. A migration whose controller works is
    only watched; a controller that does not answer for some seconds is killed and
    replaced; a migration that has ended is only reported.
    """
    from qpostcopy.cli.signals import Signals

    signals = Signals.install()
    from qpostcopy.cli.display import make_display
    from qpostcopy.cli.lookup import find
    from qpostcopy.cli.viewer import conclude, result_message, start_and_conclude, watch_living
    from qpostcopy.takeover import ControllerState, end_silent_controller

    directory = stream.directory = find(migration)
    state = asyncio.run(end_silent_controller(directory))
    signals.cancel_if_any()
    if state is ControllerState.ALIVE:
        return watch_living(directory, stream, signals)
    result = directory.read_result()
    if result is not None and directory.finished:
        message = result_message(directory.migration_id, result)
        with make_display(stream) as display:
            display.show(message)
        return conclude(message, stream)
    return start_and_conclude(directory, stream, signals, resume=True)
