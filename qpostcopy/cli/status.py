"""`qpostcopy status`: what a migration does, or, without a controller, what is known of it."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Literal

import click

from qpostcopy.errors import ExitCode, QpostcopyError

if TYPE_CHECKING:
    from qpostcopy.qmp.schema import Status
    from qpostcopy.state import StateDirectory

#: A QEMU whose main loop waits for a page does not answer, and need not.
ASK_SECONDS = 2.0


@click.command(name="status")
@click.argument("migration", metavar="[ID]", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(migration: str | None, as_json: bool) -> int:
    """Tell where a migration is: ID, or a plan's name (its latest), or the latest of all.

    Works after the death of the controller, and while a QEMU hangs.
    """
    from qpostcopy.state import StateDirectory

    directory = StateDirectory.find(migration)
    status = asyncio.run(_look(directory))
    if as_json:
        click.echo(json.dumps({"v": 1, "type": "status"} | status))
    else:
        _print(status)
    return ExitCode.COMPLETED


async def _look(directory: StateDirectory) -> dict[str, object]:
    from qpostcopy.qmp.client import EndpointConnectError
    from qpostcopy.qmp.connection import ConnectionLostError

    if directory.controller_alive():
        try:
            return _from_controller(await _ask_controller(directory))
        except (EndpointConnectError, ConnectionLostError):
            pass  # it has just ended
    return await _without_controller(directory)


async def _ask_controller(directory: StateDirectory) -> Status:
    from qpostcopy.controller import CONTROL_SOCKET
    from qpostcopy.qmp import schema
    from qpostcopy.qmp.client import EndpointClient

    client = await EndpointClient.connect(directory.path / CONTROL_SOCKET)
    try:
        return await client.call("qpc-status", schema.Empty(), schema.Status)
    finally:
        await client.close()


def _from_controller(status: Status) -> dict[str, object]:
    return status.model_dump(mode="json") | {"controller": "alive"}


async def _without_controller(directory: StateDirectory) -> dict[str, object]:
    """From what is on disk, and from what still answers."""
    source = await _side(directory, "source")
    destination = await _side(directory, "destination")
    result = directory.read_result()
    known: dict[str, object] = {
        "migration_id": directory.migration_id,
        "phase": directory.state.phase.value,
        "controller": "dead",
        "committed": directory.committed,
        "source": source,
        "destination": destination,
        "result": result,
    }
    if result is not None:
        return known | _from_result(directory, result)
    return known | _guess(directory, source, destination)


def _from_result(directory: StateDirectory, result: dict[str, object]) -> dict[str, object]:
    message = f"ended: {result.get('status')}"
    if not directory.finished:
        message += f"; go on with: qpostcopy resume {directory.migration_id}"
    return {"vm_location": result.get("vm_location"), "abort_safe": False, "message": message}


def _guess(
    directory: StateDirectory, source: dict[str, object], destination: dict[str, object]
) -> dict[str, object]:
    """Where the VM must be: `committed` decides, living processes confirm."""
    resume = f"qpostcopy resume {directory.migration_id}"
    if not directory.committed:
        alive = source["qemu"] != "gone"
        return {
            "vm_location": "source" if alive else "unknown",
            "abort_safe": True,
            "message": "the controller died before the commit: the VM is at the source "
            f"({source['status']}), the destination cannot have run; roll back with: {resume}"
            if alive
            else f"the controller died before the commit and the source QEMU is gone; {resume} "
            "tidies up",
        }
    alive = destination["qemu"] != "gone"
    return {
        "vm_location": "destination" if alive else "unknown",
        "abort_safe": False,
        "message": "the controller died after the commit: the VM is at the destination "
        f"({destination['status']}); never `cont` the source; go on with: {resume}"
        if alive
        else f"the destination QEMU is gone after the commit; {resume} says what is left",
    }


async def _side(
    directory: StateDirectory, role: Literal["source", "destination"]
) -> dict[str, object]:
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


def _print(status: dict[str, object]) -> None:
    from qpostcopy.progress import Progress, line

    click.echo(f"{status['migration_id']}: {status['phase']}; VM at: {status['vm_location']}")
    click.echo(f"  {status['message']}")
    progress = status.get("progress")
    if isinstance(progress, dict) and progress.get("total_bytes"):
        click.echo(f"  {line(Progress.model_validate(progress))}")
    for role in ("source", "destination"):
        side = status.get(role)
        if isinstance(side, dict):
            click.echo(
                f"  {role}: QEMU {side['qemu']}, {side['status']}; companion {side['companion']}"
            )
