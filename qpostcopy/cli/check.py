"""`qpostcopy check`: everything that is needed to start safely, looked at, nothing changed."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from qpostcopy.errors import ExitCode, QpostcopyError

if TYPE_CHECKING:
    from qpostcopy.config import Plan
    from qpostcopy.config.plan import SidePlan
    from qpostcopy.preflight import Finding
    from qpostcopy.qmp.schema import SideFacts


@click.command(name="check")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(plan: Path, as_json: bool) -> int:
    """Look whether PLAN could be carried out now, and say what is in the way."""
    return run_check(plan, None, as_json=as_json, dry_run=False)


def run_check(path: Path, profile: str | None, *, as_json: bool, dry_run: bool) -> int:
    """Check, print, and return the exit code."""
    from qpostcopy.config import load_plan

    try:
        plan = load_plan(path, profile=profile)
        source, destination, findings = asyncio.run(_look(plan))
    except QpostcopyError as error:
        if as_json:
            from qpostcopy.cli.viewer import print_error_result

            print_error_result(error)
        raise
    if as_json:
        _print_json(plan, source, destination, findings)
    else:
        _print_text(plan, source, findings, dry_run=dry_run)
    return ExitCode.REFUSED if findings else ExitCode.COMPLETED


async def _look(plan: Plan) -> tuple[SideFacts, SideFacts, list[Finding]]:
    from qpostcopy.migration import together
    from qpostcopy.preflight import judge

    source, destination = await together(
        _facts("source", plan.source), _facts("destination", plan.destination)
    )
    findings = judge(plan, source, destination)
    return source, destination, findings


async def _facts(role: Literal["source", "destination"], side: SidePlan) -> SideFacts:
    """The facts of one side, through its monitor, which is given back at once."""
    from qpostcopy.inspect import gather_facts
    from qpostcopy.qmp.monitor import Monitor

    monitor = await Monitor.connect(side.qmp)
    try:
        pid = monitor.peer_pid if side.pid == "auto" else side.pid
        return await gather_facts(role, monitor.execute, pid, monitor.version)
    finally:
        await monitor.close()


def _print_text(plan: Plan, source: SideFacts, findings: list[Finding], *, dry_run: bool) -> None:
    for finding in findings:
        click.echo(f"{finding.side}: {finding.message} [{finding.code}]", err=True)
        click.echo(f"  remedy: {finding.remedy}", err=True)
    if findings:
        click.echo(f"{plan.name}: cannot be migrated: {len(findings)} findings")
        return
    click.echo(f"{plan.name}: ready; {_what(plan, source)}")
    if dry_run:
        click.echo("dry run: nothing was changed")


def _what(plan: Plan, source: SideFacts) -> str:
    from qpostcopy.progress import human_bytes

    ram = human_bytes(sum(block.size_bytes for block in source.blocks))
    lanes = f"1 demand and {plan.lanes.push} push lane{'s' if plan.lanes.push > 1 else ''}"
    state = "running" if source.running else f"not running ({source.run_status})"
    return (
        f"{ram} of RAM in {len(source.blocks)} block(s), guest {state}, profile "
        f"{plan.profile_name}, {lanes}, then the source QEMU is "
        f"{'ended' if plan.source.after == 'quit' else 'kept, paused'}"
    )


def _print_json(
    plan: Plan, source: SideFacts, destination: SideFacts, findings: list[Finding]
) -> None:
    result = {
        "v": 1,
        "type": "result",
        "status": "refused" if findings else "ready",
        "rc": int(ExitCode.REFUSED if findings else ExitCode.COMPLETED),
        "vm_location": "source",
        "profile": plan.profile_name,
        "qemu": {"source": source.qemu_version, "destination": destination.qemu_version},
        "ram_bytes": sum(block.size_bytes for block in source.blocks),
        "findings": [
            {
                "code": finding.code,
                "side": finding.side,
                "message": finding.message,
                "remedy": finding.remedy,
            }
            for finding in findings
        ],
    }
    click.echo(json.dumps(result))
