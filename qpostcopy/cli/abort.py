"""`qpostcopy abort`: cancel a migration that is not committed yet."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from qpostcopy.cli.completing import migrations
from qpostcopy.errors import ExitCode, QpostcopyError

if TYPE_CHECKING:
    from qpostcopy.cli.signals import Signals
    from qpostcopy.cli.stream import Message, Stream
    from qpostcopy.state import StateDirectory


class TooLateError(QpostcopyError):
    """The VM is at the destination already, or the migration has ended."""


class ControllerSilentError(QpostcopyError):
    """The controller lives and does not answer: it can be asked nothing."""


@click.command(name="abort", epilog="Example: qpostcopy abort web1")
@click.argument("migration", metavar="ID", shell_complete=migrations)
@click.option("--json", is_flag=True, expose_value=False, help="One JSON object on stdout.")
@click.pass_obj
def command(stream: Stream, migration: str) -> int:
    """Cancel a migration and leave the VM at its source.

    ID may be a plan's name: its latest. Refused after the commit: then the VM is at
    the destination. If the controller is dead, a new one rolls back.
    """
    from qpostcopy.cli.signals import Signals

    signals = Signals.install()
    from qpostcopy.cli.lookup import find
    from qpostcopy.state import StateDirectory
    from qpostcopy.takeover import ControllerState, controller_state

    directory = stream.directory = find(migration)
    if directory.finished:
        raise TooLateError(
            f"{directory.migration_id} has ended already",
            remedy=f"qpostcopy status {directory.migration_id}",
        )
    state = asyncio.run(controller_state(directory))
    signals.cancel_if_any()
    if state is ControllerState.SILENT:
        raise _silent(directory, stream)
    result = _ask(directory, signals) if state is ControllerState.ALIVE else None
    if result is None:
        directory = StateDirectory.open(directory.path)  # it may have ended since
        result = directory.read_result()
        if result is None or not directory.finished:
            result = _roll_back(directory, signals)
    return _conclude(result, stream)


def _silent(directory: StateDirectory, stream: Stream) -> ControllerSilentError:
    controller = directory.state.controller
    assert controller is not None
    safe = "is not possible any more" if directory.committed else "is safe"
    return ControllerSilentError(
        f"the controller (pid {controller.pid}) does not answer, so it cannot be asked to abort; "
        f"VM at: {stream.location}; abort {safe}",
        remedy=f"qpostcopy resume {directory.migration_id} takes over: it rolls back if nothing is "
        "committed, else it goes on",
    )


def _ask(directory: StateDirectory, signals: Signals) -> Message | None:
    """Ask, and wait for the result. None: the controller ended before it could be asked."""
    from qpostcopy.cli.display import PlainDisplay
    from qpostcopy.cli.viewer import Viewer
    from qpostcopy.qmp.client import EndpointConnectError
    from qpostcopy.qmp.connection import ConnectionLostError

    try:
        asyncio.run(_request(directory))
    except (EndpointConnectError, ConnectionLostError):
        return None
    return asyncio.run(Viewer(directory, PlainDisplay(), signals).watch())


async def _request(directory: StateDirectory) -> None:
    from qpostcopy.qmp import schema
    from qpostcopy.qmp.client import EndpointClient
    from qpostcopy.state import CONTROL_SOCKET

    client = await EndpointClient.connect(directory.path / CONTROL_SOCKET)
    try:
        await client.call("qpc-abort", schema.Abort(), schema.Empty)
    finally:
        await client.close()


def _roll_back(directory: StateDirectory, signals: Signals) -> Message:
    """Without its controller. Refused after the commit."""
    from qpostcopy.cli.display import PlainDisplay
    from qpostcopy.cli.viewer import run_controller

    if directory.committed:
        raise TooLateError(
            f"{directory.migration_id} is committed: the VM is at the destination",
            remedy=f"its controller is dead; qpostcopy resume {directory.migration_id}",
        )
    return run_controller(directory, PlainDisplay(), signals, resume=True)


def _conclude(result: Message, stream: Stream) -> int:
    """Whoever ended it, and why: an abort has succeeded if the VM stays at the source."""
    code = ExitCode.COMPLETED if result["vm_location"] == "source" else ExitCode.UNEXPECTED
    told: Message = {
        "status": result["status"],
        "rc": int(code),
        "vm_location": result["vm_location"],
    }
    if code and "error" in result:
        told["error"] = result["error"]
    if stream.on:
        stream.say("result", told)
    else:
        stream.out(f"{stream.migration_id}: {told['status']}; VM at: {told['vm_location']}")
    return code
