"""`qpostcopy migrate`: start a migration and watch it to its end."""

from __future__ import annotations

from pathlib import Path

import click

from qpostcopy.errors import ExitCode, QpostcopyError


@click.command(name="migrate")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--profile", metavar="FILE", help="A profile in place of the plan's.")
@click.option("--dry-run", is_flag=True, help="Check, and say what would be done; change nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line on stdout.")
def command(plan: Path, profile: str | None, dry_run: bool, as_json: bool) -> int:
    """Move the VM that PLAN names.

    The migration runs in processes of its own and goes on if this one ends.
    Ctrl-C cancels it while the VM is at the source; after that, once warns, and
    twice leaves the display.
    """
    if dry_run:
        from qpostcopy.cli.check import run_check

        return run_check(plan, profile, as_json=as_json, dry_run=True)
    try:
        return _migrate(plan, profile, as_json=as_json)
    except QpostcopyError as error:
        if as_json and error.exit_code == ExitCode.USAGE:
            from qpostcopy.cli.viewer import print_error_result

            print_error_result(error)
        raise


def _migrate(path: Path, profile: str | None, *, as_json: bool) -> int:
    from qpostcopy.cli.viewer import run_controller
    from qpostcopy.config import load_plan
    from qpostcopy.state import StateDirectory

    plan = load_plan(path, profile=profile)
    directory = StateDirectory.create(
        plan.name,
        plan_text=plan.to_yaml(),
        profile=plan.profile_name,
        source_qmp=plan.source.qmp,
        destination_qmp=plan.destination.qmp,
    )
    return run_controller(directory, resume=False, as_json=as_json)
