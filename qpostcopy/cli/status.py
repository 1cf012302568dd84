"""`qpostcopy status`: what a migration does, or, without a controller, what is known of it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal

import click

from qpostcopy.cli.completing import migrations
from qpostcopy.errors import ExitCode, OutcomeUnknownError, QpostcopyError

if TYPE_CHECKING:
    from qpostcopy.cli.stream import Message, Stream
    from qpostcopy.qmp.schema import Status
    from qpostcopy.state import StateDirectory
    from qpostcopy.takeover import ControllerState

#: A QEMU whose main loop waits for a page does not answer, and need not.
ASK_SECONDS = 2.0


@click.command(
    name="status",
    epilog="\b\nqpostcopy status\nqpostcopy status web1 --watch\n"
    "qpostcopy status web1-20261123T101500 --json | jq -r .vm_location",
)
@click.argument("migration", metavar="[ID]", required=False, shell_complete=migrations)
@click.option("--watch", is_flag=True, help="Follow it to its end; Ctrl-C ends only that.")
@click.option("--json", is_flag=True, expose_value=False, help="One JSON object a line on stdout.")
@click.pass_obj
def command(stream: Stream, migration: str | None, watch: bool) -> int:
    """Tell where a migration is, and whether abort is safe.

    ID may be a plan's name: its latest. Without one it is the latest of all.
    Works after the death of the controller, and while it, or a QEMU, hangs.
    """
    if watch:
        from qpostcopy.cli.watch import watch_to_the_end

        return watch_to_the_end(stream, migration)
    from qpostcopy.cli.lookup import find

    stream.directory = find(migration)
    status = asyncio.run(look(stream.directory))
    if stream.on:
        stream.say("status", status)
    else:
        _print(stream, status)
    return ExitCode.COMPLETED


async def look(directory: StateDirectory) -> Message:
    """All that can be told of a migration now, by whoever can tell it."""
    from qpostcopy.qmp.client import EndpointConnectError
    from qpostcopy.qmp.connection import ConnectionLostError
    from qpostcopy.state import StateDirectory
    from qpostcopy.takeover import ControllerState, controller_state

    state = await controller_state(directory, ASK_SECONDS)
    if state is ControllerState.ALIVE:
        try:
            return from_controller(await _ask_controller(directory))
        except (EndpointConnectError, ConnectionLostError):
            state = ControllerState.DEAD  # it has just ended
        except OutcomeUnknownError:
            state = ControllerState.SILENT
    # It may have written more since we read it.
    return await _without_controller(StateDirectory.open(directory.path), state)


async def _ask_controller(directory: StateDirectory) -> Status:
    from qpostcopy.qmp import schema
    from qpostcopy.qmp.client import EndpointClient
    from qpostcopy.state import CONTROL_SOCKET

    client = await EndpointClient.connect(directory.path / CONTROL_SOCKET, ASK_SECONDS)
    try:
        return await client.call("qpc-status", schema.Empty(), schema.Status, ASK_SECONDS)
    finally:
        await client.close()


def from_controller(status: Status) -> Message:
    """A living controller's own word."""
    return status.model_dump(mode="json") | {"controller": "alive"}


async def _without_controller(directory: StateDirectory, state: ControllerState) -> Message:
    """From what is on disk, and from what still answers."""
    source = await _side(directory, "source")
    destination = await _side(directory, "destination")
    result = directory.read_result()
    known: Message = {
        "migration_id": directory.migration_id,
        "phase": directory.state.phase.value,
        "controller": state.value,
        "committed": directory.committed,
        "source": source,
        "destination": destination,
        "result": result,
    }
    if result is not None:
        return known | _from_result(directory, result)
    return known | _guess(directory, state, source, destination)


def _from_result(directory: StateDirectory, result: Message) -> Message:
    message = f"ended: {result.get('status')}"
    if not directory.finished:
        message += f"; go on with: qpostcopy resume {directory.migration_id}"
    return {"vm_location": result.get("vm_location"), "abort_safe": False, "message": message}


def _guess(
    directory: StateDirectory, state: ControllerState, source: Message, destination: Message
) -> Message:
    """Where the VM must be: `committed` decides, living processes confirm."""
    committed = directory.committed
    role: Literal["source", "destination"] = "destination" if committed else "source"
    side = destination if committed else source
    alive = side["qemu"] != "gone"
    return {
        "vm_location": role if alive else "unknown",
        "abort_safe": not committed,
        "message": f"{_trouble(directory, state)}; {_place(role, side, alive)}; "
        f"{_advice(directory, state, alive)}",
    }


def _trouble(directory: StateDirectory, state: ControllerState) -> str:
    when = "after" if directory.committed else "before"
    if state.value == "dead":
        return f"the controller died {when} the commit"
    controller = directory.state.controller
    assert controller is not None, "only a recorded process can be silent"
    return f"controller (pid {controller.pid}) does not answer; it is {when} the commit"


def _place(role: str, side: Message, alive: bool) -> str:
    if not alive:
        return f"the {role} QEMU is gone"
    place = f"the VM is at the {role} ({side['status']})"
    if role == "destination":
        return f"{place}; never `cont` the source"
    return f"{place}, the destination cannot have run"


def _advice(directory: StateDirectory, state: ControllerState, alive: bool) -> str:
    resume = f"`qpostcopy resume {directory.migration_id}`"
    if state.value == "silent":
        return f"{resume} takes over"
    if directory.committed:
        return f"{resume} goes on" if alive else f"{resume} says what is left"
    return f"{resume} rolls back" if alive else f"{resume} tidies up"


async def _side(directory: StateDirectory, role: Literal["source", "destination"]) -> Message:
    from qpostcopy.side import COMPANIONS

    state = directory.state.side(role)
    companion_alive = state.companion is not None and state.companion.alive()
    if state.qemu is None:
        qemu = "not known yet"
    else:
        qemu = f"pid {state.qemu.pid}" if state.qemu.alive() else "gone"
    status = await _run_status(directory, COMPANIONS[role]) if companion_alive else "not asked"
    return {
        "qemu": qemu,
        "status": status,
        "companion": "alive" if companion_alive else "dead",
    }


async def _run_status(directory: StateDirectory, companion: str) -> str:
    """QEMU's own word, through its companion."""
    from qpostcopy.qmp.client import EndpointClient

    try:
        client = await EndpointClient.connect(directory.path / f"{companion}.sock", ASK_SECONDS)
        try:
            reply = await client.execute("query-status", None, ASK_SECONDS)
        finally:
            await client.close()
    except QpostcopyError:
        return "does not answer"
    return str(reply.get("status")) if isinstance(reply, dict) else "unknown"


def _print(stream: Stream, status: Message) -> None:
    from qpostcopy.progress import Progress, line

    stream.out(f"{status['migration_id']}: {status['phase']}; VM at: {status['vm_location']}")
    stream.out(f"  {status['message']}")
    progress = status.get("progress")
    if isinstance(progress, dict) and progress.get("total_bytes"):
        stream.out(f"  {line(Progress.model_validate(progress))}")
    for role in ("source", "destination"):
        side = status.get(role)
        if isinstance(side, dict):
            stream.out(
                f"  {role}: QEMU {side['qemu']}, {side['status']}; companion {side['companion']}"
            )
