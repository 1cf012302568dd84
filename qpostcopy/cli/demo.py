"""`qpostcopy demo`: move a running guest on this machine, and have it prove its memory."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import click

from qpostcopy.cli.completing import profiles
from qpostcopy.cli.display import make_people_display
from qpostcopy.config import load_profile, shipped_profiles
from qpostcopy.errors import ExitCode, UsageError
from qpostcopy.lab.guest import Ready, find_image
from qpostcopy.lab.measure import GuestCost
from qpostcopy.lab.scenario import WORKLOADS, Check, Scenario, Setting
from qpostcopy.progress import human_bytes, human_seconds
from qpostcopy.report import PageCounts, Result

#: Below this the guest's kernel leaves too little for the workload.
_LEAST_MIB = 128
#: The state directory is no place for a disk: the commit is fsynced while the guest stands.
_TMPFS = "/dev/shm"
_PATH = click.Path(path_type=Path)
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(name="demo")
@click.option(
    "--memory",
    "memory_mib",
    type=click.IntRange(min=_LEAST_MIB),
    default=512,
    show_default=True,
    metavar="MIB",
    help="Memory of the guest in MiB.",
)
@click.option(
    "--profile",
    default="sequential",
    show_default=True,
    metavar="FILE",
    shell_complete=profiles,
    help="The page order: a file, or the name of a shipped one.",
)
@click.option(
    "--workload",
    type=click.Choice(WORKLOADS),
    default="service",
    show_default=True,
    help="What the guest does meanwhile.",
)
@click.option("--qemu", default="qemu-system-x86_64", show_default=True, help="The QEMU to use.")
@click.option("--no-precopy", is_flag=True, help="Switch at once, copy nothing before.")
@click.option("--json", "json_file", type=_FILE, help="Write the result object there.")
@click.option("--keep", is_flag=True, help="Leave the guest running at the destination.")
@click.option("--kernel", type=_PATH, help="Guest kernel [default: the one scripts/setup made].")
@click.option("--initrd", type=_PATH, help="Its initramfs [default: the one scripts/setup made].")
def command(
    memory_mib: int,
    profile: str,
    workload: str,
    qemu: str,
    no_precopy: bool,
    json_file: Path | None,
    keep: bool,
    kernel: Path | None,
    initrd: Path | None,
) -> int:
    """Move a running Linux guest between two QEMUs on this machine.

    Exits 0 only if the guest runs on at the destination with every page right
    and nothing of the migration is left behind.
    """
    kernel, initrd = find_image(kernel, initrd)
    setting = Setting(
        memory_bytes=memory_mib << 20,
        kernel=kernel.resolve(),
        initrd=initrd.resolve(),
        profile=_resolved_profile(profile),
        workload=workload,
        qemu=_resolved_qemu(qemu),
        precopy="never" if no_precopy else "auto",
        keep=keep,
    )
    return _play(setting, json_file)


def _resolved_profile(profile: str) -> str:
    """A shipped name as it is, a file as an absolute path; loaded once, to fail early."""
    if profile in shipped_profiles():
        return profile
    load_profile(Path(profile))
    return str(Path(profile).resolve())


def _resolved_qemu(qemu: str) -> str:
    found = shutil.which(qemu)
    if found is None:
        raise UsageError(
            f"--qemu: {qemu} is not an executable",
            remedy="install qemu-system-x86, or give the path of a QEMU",
        )
    return found


def _play(setting: Setting, json_file: Path | None) -> int:
    """The whole scenario; its exit code."""
    directory = Path(
        tempfile.mkdtemp(prefix="qpostcopy-demo-", dir=os.environ.get("TMPDIR", _TMPFS))
    )
    status, kept, interrupted = int(ExitCode.UNEXPECTED), False, False
    try:
        with Scenario(setting, directory) as scenario:
            status = _steps(scenario, json_file)
            kept = setting.keep and status == 0
            if kept:
                scenario.keep()
                _tell_kept(scenario)
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        if interrupted or (status == 0 and not kept):
            shutil.rmtree(directory)
        elif not kept:
            click.echo(f"logs, plan and state are left in {directory}", err=True)
    return status


def _steps(scenario: Scenario, json_file: Path | None) -> int:
    display = make_people_display()
    setting = scenario.setting
    with display:
        size = human_bytes(setting.memory_bytes)
        display.note(f"booting a guest of {size}, workload {setting.workload}")
        ready = scenario.boot()
        display.note("the guest is at work; measuring its speed")
        scenario.measure_baseline()
        scenario.start_destination()
        status = scenario.migrate(scenario.write_plan(), display.show)
        if status == 0:
            display.note("migrated; the guest checks every byte of its memory")
            scenario.settle()
            scenario.verify()
    if status != 0:
        _tell_failure(scenario)
        _write_result(json_file, scenario.result)
        return status
    cost, checks = scenario.cost(ready), scenario.checks(ready)
    scenario.result["guest"] = cost.model_dump(mode="json")
    _write_result(json_file, scenario.result)
    _report(scenario, ready, cost, checks)
    return 0 if all(check.holds for check in checks if check.decides) else int(ExitCode.UNEXPECTED)


def _write_result(file: Path | None, result: dict[str, object]) -> None:
    if file:
        file.write_text(json.dumps(result, indent=2) + "\n")


def _tell_failure(scenario: Scenario) -> None:
    """What the migration says went wrong; its own stderr has the rest."""
    result = scenario.result
    error = result.get("error") or {}
    click.echo(f"{result['status']}: {error.get('message', 'no reason was given')}", err=True)
    for finding in error.get("findings", ()):
        click.echo(f"  {finding['side']}: {finding['message']}: {finding['remedy']}", err=True)
    if error.get("remedy"):
        click.echo(f"  {error['remedy']}", err=True)
    click.echo(f"the VM was at: {result.get('vm_location', 'unknown')}", err=True)


def _tell_kept(scenario: Scenario) -> None:
    destination = scenario.destination
    click.echo(
        f"the guest runs on: QEMU pid {destination.pid}, monitor {destination.observer_path}, "
        f"serial port {destination.serial_path}; to end it: kill {destination.pid}"
    )


# --- the report ---------------------------------------------------------------------------


def _report(scenario: Scenario, ready: Ready, cost: GuestCost, checks: list[Check]) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(scenario.outcome.migration_id, style="bold")
    for name, value in _facts(scenario.outcome, ready, cost):
        console.print(f"  {name:15}", style="cyan", end="")
        console.print(value, markup=False)
    for check in checks:
        console.print(_word(check), check.what, end=" ")
        console.print(f"({check.detail})", markup=False, style="dim")


def _word(check: Check) -> str:
    if check.holds:
        return "[green]ok[/]    "
    return "[bold red]FAILED[/]" if check.decides else "[yellow]missed[/]"


def _facts(result: Result, ready: Ready, cost: GuestCost) -> list[tuple[str, str]]:
    faults, pages = result.faults, result.pages
    downtime = "unknown" if result.downtime_ms is None else f"{result.downtime_ms:.1f} ms"
    phases = (f"{phase.name} {phase.duration_ms:.0f} ms" for phase in result.phases)
    rate = f"{ready.rate} requests/s" if ready.rate else "as fast as it can"
    late = "" if cost.late_ms is None else f"; {cost.late_ms:.0f} ms late"
    return [
        ("guest", f"{human_bytes(result.ram_bytes)}, {ready.workload}, {rate}"),
        ("QEMU", f"{result.qemu.get('source')} to {result.qemu.get('destination')}"),
        ("profile", result.profile),
        ("downtime", downtime),
        ("total", f"{human_seconds(result.total_ms / 1000)}: {', '.join(phases)}"),
        ("sent", f"{human_bytes(result.bytes.wire)}, {_pages(pages)}"),
        ("push", f"{human_bytes(result.push_bytes_per_second)}/s"),
        (
            "faults",
            f"{faults.count} ({faults.local} answered locally), p50 {faults.p50_us:.0f} us, "
            f"p99 {faults.p99_us:.0f} us, max {faults.max_us:.0f} us",
        ),
        (
            "the guest lost",
            f"{cost.work_lost_ms:.0f} ms of work at {cost.baseline_ops_per_second:.0f} "
            f"operations/s{late}",
        ),
    ]


def _pages(pages: PageCounts) -> str:
    return f"{pages.push} pages pushed, {pages.demand} on demand, {pages.around} around them"
