"""`qpostcopy check`: everything that is needed to start safely, looked at, nothing changed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from qpostcopy.cli.words import tell
from qpostcopy.errors import ExitCode

if TYPE_CHECKING:
    from qpostcopy.cli.stream import Message, Stream
    from qpostcopy.config import Plan
    from qpostcopy.config.plan import SidePlan
    from qpostcopy.preflight import Finding
    from qpostcopy.process import Process
    from qpostcopy.qmp.schema import SideFacts


@dataclass(frozen=True, slots=True)
class Seen:
    """What was found; the facts of a side that cannot be reached are None."""

    source: SideFacts | None
    destination: SideFacts | None
    findings: list[Finding]
    warnings: list[Finding]


@click.command(name="check", epilog="Example: qpostcopy check web1.yaml")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--json", is_flag=True, expose_value=False, help="One JSON object on stdout.")
@click.pass_obj
def command(stream: Stream, plan: Path) -> int:
    """Say what stands in the way of PLAN. Nothing is changed.

    All findings are listed, each with its remedy; then the exit code is 3.
    """
    return run_check(stream, plan, None, dry_run=False)


def run_check(stream: Stream, path: Path, profile: str | None, *, dry_run: bool) -> int:
    """Check, print, and return the exit code.

    :raise UsageError: the plan is wrong, or its profile does not fit this RAM.
    """
    from qpostcopy.config import load_plan

    plan = stream.plan = load_plan(path, profile=profile)
    seen = asyncio.run(_look(plan, stream))
    if stream.on:
        stream.say("result", _result(stream, plan, seen))
    else:
        _print(stream, plan, seen, dry_run=dry_run)
    return ExitCode.REFUSED if seen.findings else ExitCode.COMPLETED


async def _look(plan: Plan, stream: Stream) -> Seen:
    from qpostcopy.preflight import examine, examine_side, is_error

    if (busy := _busy(plan)) is not None:
        return Seen(None, None, [busy], [])
    looked = await asyncio.gather(
        _facts("source", plan.source), _facts("destination", plan.destination)
    )
    source, destination = (facts for facts, _ in looked)
    if source is not None:
        stream.source_qemu, stream.source_status = _process(source), source.run_status
    found = [finding for _, finding in looked if finding is not None]
    if (second := _second(source, destination)) is not None:
        return Seen(source, destination, [second], [])
    if source is not None and destination is not None:
        found = examine(source, destination)
    else:
        for facts in (source, destination):
            found += [] if facts is None else examine_side(facts)
    errors = [finding for finding in found if is_error(finding)]
    if source is not None:
        errors += _misfit(plan, source, errors)
    warnings = [finding for finding in found if not is_error(finding)]
    return Seen(source, destination, errors, warnings)


def _busy(plan: Plan) -> Finding | None:
    """Another migration holds the monitors: they are not waited for."""
    from qpostcopy.preflight import already_migrating
    from qpostcopy.registry import migration_at

    other = migration_at(plan.source.qmp, plan.destination.qmp)
    return None if other is None else already_migrating(other.migration_id, other.state.phase)


def _second(*sides: SideFacts | None) -> Finding | None:
    """Another migration, dead or by another monitor, is not done with one of these QEMUs."""
    from qpostcopy.preflight import already_migrating
    from qpostcopy.registry import migration_of

    other = migration_of({_process(side) for side in sides if side is not None})
    return None if other is None else already_migrating(other.migration_id, other.state.phase)


def _process(side: SideFacts) -> Process:
    from qpostcopy.process import Process

    return Process(pid=side.pid, start_ticks=side.pid_start_ticks)


async def _facts(
    role: Literal["source", "destination"], side: SidePlan
) -> tuple[SideFacts | None, Finding | None]:
    """The facts of one side, through its monitor, which is given back at once."""
    from qpostcopy.companion import FIRST_ANSWER_SECONDS
    from qpostcopy.errors import QpostcopyError
    from qpostcopy.inspect import gather_facts
    from qpostcopy.migration import error_code
    from qpostcopy.netns import expect_enterable
    from qpostcopy.preflight import unreachable
    from qpostcopy.qmp.monitor import Monitor

    try:
        await asyncio.to_thread(expect_enterable, side.netns)
        # As long as `migrate` will wait.
        monitor = await Monitor.connect(side.qmp, FIRST_ANSWER_SECONDS)
        try:
            pid = monitor.peer_pid if side.pid == "auto" else side.pid
            return await gather_facts(role, monitor.execute, pid, monitor.version), None
        finally:
            await monitor.close()
    except QpostcopyError as error:  # it may end, or hang, at any moment
        return None, unreachable(role, error_code(error), error)


def _misfit(plan: Plan, source: SideFacts, errors: Sequence[Finding]) -> list[Finding]:
    """One more finding if there are others; alone, it is the wrong profile's own error.

    :raise ScheduleError: a step names RAM that this VM does not have.
    """
    from qpostcopy.preflight import Finding
    from qpostcopy.source.schedule import ScheduleError, compile_schedule

    blocks = sorted(source.blocks, key=lambda block: block.first_gpa)
    try:
        compile_schedule(plan.profile, blocks)
    except ScheduleError as error:
        if not errors:
            raise
        remedy = error.remedy or "choose another profile"
        return [Finding("profile-does-not-fit", "source", str(error), remedy)]
    return []


def _print(stream: Stream, plan: Plan, seen: Seen, *, dry_run: bool) -> None:
    for finding in (*seen.findings, *seen.warnings):
        kind = "warning: " if finding in seen.warnings else ""
        tell(f"{kind}{finding.side}: {finding.message} [{finding.code}]")
        tell(f"  remedy: {finding.remedy}")
    if seen.findings:
        place = f"nothing was changed; VM at: {stream.location}"
        stream.out(f"{plan.name}: cannot be migrated: {len(seen.findings)} finding(s); {place}")
        return
    assert seen.source is not None, "a side that cannot be reached is a finding"
    stream.out(f"{plan.name}: ready; {_what(plan, seen.source)}")
    if dry_run:
        stream.out("dry run: nothing was changed")


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


def _result(stream: Stream, plan: Plan, seen: Seen) -> Message:
    sides = {"source": seen.source, "destination": seen.destination}
    return {
        "status": "refused" if seen.findings else "ready",
        "rc": int(ExitCode.REFUSED if seen.findings else ExitCode.COMPLETED),
        "vm_location": stream.location,
        "profile": plan.profile_name,
        "qemu": {role: facts.qemu_version for role, facts in sides.items() if facts is not None},
        "ram_bytes": sum(block.size_bytes for block in seen.source.blocks) if seen.source else 0,
        "findings": [_told(finding) for finding in seen.findings],
        "warnings": [_told(finding) for finding in seen.warnings],
    }


def _told(finding: Finding) -> Message:
    return {name: getattr(finding, name) for name in ("code", "side", "message", "remedy")}
