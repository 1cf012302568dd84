"""`qpostcopy resume`: go on with a migration that was interrupted, or whose controller died."""

from __future__ import annotations

import click


@click.command(name="resume")
@click.argument("migration", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line on stdout.")
def command(migration: str, as_json: bool) -> int:
    """Go on with a migration, or roll it back if it was not committed.

    ID may be a plan's name: its latest. A migration whose controller lives is
    only watched; one that has ended is only reported.
    """
    from qpostcopy.cli.viewer import (
        conclude,
        make_display,
        result_message,
        run_controller,
        watch_living,
    )
    from qpostcopy.state import StateDirectory

    directory = StateDirectory.find(migration)
    if directory.controller_alive():
        return watch_living(directory, as_json=as_json)
    result = directory.read_result()
    if result is not None and directory.finished:
        message = result_message(directory.migration_id, result)
        with make_display(as_json) as display:
            display.show(message)
        return conclude(message, as_json=as_json)
    return run_controller(directory, resume=True, as_json=as_json)
