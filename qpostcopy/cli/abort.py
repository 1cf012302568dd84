"""`qpostcopy abort`: cancel a migration that is not committed yet."""

from __future__ import annotations

import asyncio

import click

from qpostcopy.errors import ExitCode, QpostcopyError


class TooLateError(QpostcopyError):
    """The VM is at the destination already, or the migration has ended."""


@click.command(name="abort")
@click.argument("migration", metavar="ID")
def command(migration: str) -> int:
    """Cancel a migration and leave the VM at its source.

    Refused after the commit: then the VM is at the destination. If the controller
    is dead, the migration is rolled back by a new one.
    """
    from qpostcopy.cli.viewer import run_controller
    from qpostcopy.state import StateDirectory

    directory = StateDirectory.find(migration)
    if directory.finished:
        raise TooLateError(
            f"{directory.migration_id} has ended already",
            remedy=f"qpostcopy status {directory.migration_id}",
        )
    if directory.controller_alive():
        return asyncio.run(_abort(directory.migration_id))
    if directory.committed:
        raise TooLateError(
            f"{directory.migration_id} is committed: the VM is at the destination",
            remedy=f"its controller is dead; qpostcopy resume {directory.migration_id}",
        )
    code = run_controller(directory, resume=True, as_json=False)
    return ExitCode.COMPLETED if code == ExitCode.ROLLED_BACK else code


async def _abort(migration_id: str) -> int:
    """Ask, and wait for the result."""
    from qpostcopy.cli.viewer import PlainDisplay, Viewer
    from qpostcopy.controller import CONTROL_SOCKET
    from qpostcopy.qmp import schema
    from qpostcopy.qmp.client import EndpointClient
    from qpostcopy.state import StateDirectory

    directory = StateDirectory.find(migration_id)
    client = await EndpointClient.connect(directory.path / CONTROL_SOCKET)
    try:
        await client.call("qpc-abort", schema.Abort(), schema.Empty)
    finally:
        await client.close()
    result = await Viewer(directory, PlainDisplay()).watch()
    click.echo(f"{migration_id}: {result['status']}; VM at: {result['vm_location']}")
    cancelled = result["status"] == "cancelled"
    return ExitCode.COMPLETED if cancelled else ExitCode.UNEXPECTED
