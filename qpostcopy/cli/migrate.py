"""`qpostcopy migrate`: start a migration and watch it to its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qpostcopy.cli.completing import profiles

if TYPE_CHECKING:
    from qpostcopy.cli.stream import Stream


@click.command(
    name="migrate",
    epilog="\b\nqpostcopy migrate web1.yaml --dry-run\n"
    "qpostcopy migrate web1.yaml --json > result.jsonl",
)
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--profile", metavar="FILE", shell_complete=profiles, help="A profile in place of the plan's."
)
@click.option("--dry-run", is_flag=True, help="Check, and say what would be done; change nothing.")
@click.option("--json", is_flag=True, expose_value=False, help="One JSON object a line on stdout.")
@click.pass_obj
def command(stream: Stream, plan: Path, profile: str | None, dry_run: bool) -> int:
    """Move the VM that PLAN names.

    The migration runs in processes of its own and goes on if this one ends.
    Ctrl-C cancels it while the VM is at the source, and only warns after that; a
    second one leaves the display.

    \b
    Exit codes: 0 done, 2 the plan is wrong, 3 refused (nothing was touched),
    4, 5, 130, 143 back at the source (failed, too late, cancelled),
    10 interrupted at the destination (resume ID), 11 lost, 1 other.
    """
    if dry_run:
        from qpostcopy.cli.check import run_check

        return run_check(stream, plan, profile, dry_run=True)
    return _migrate(stream, plan, profile)


def _migrate(stream: Stream, path: Path, profile: str | None) -> int:
    from qpostcopy.cli.signals import Signals

    signals = Signals.install()
    from qpostcopy.cli.viewer import start_and_conclude
    from qpostcopy.config import load_plan
    from qpostcopy.state import StateDirectory, write_durably

    plan = stream.plan = load_plan(path, profile=profile)
    traces = plan.read_traces()
    signals.cancel_if_any()
    directory = StateDirectory.create(
        plan.name,
        plan_text=plan.to_yaml(),
        profile=plan.profile_name,
        source_qmp=plan.source.qmp,
        destination_qmp=plan.destination.qmp,
    )
    # What the traces say is kept with the plan: `resume` must not miss a file of the operator's.
    if traces:
        with directory.whole_or_gone():
            kept = plan.with_traces_in(directory.path, traces)
            write_durably(directory.path / "plan.yaml", kept.to_yaml())
    stream.directory = directory
    return start_and_conclude(directory, stream, signals, resume=False)
