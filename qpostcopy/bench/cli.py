"""`scripts/bench`: measure, and show what was measured."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.console import Console

from qpostcopy.bench.book import FILE, BookFile, read_book
from qpostcopy.bench.limits import Limits, Place, measure_limits
from qpostcopy.bench.limits_table import limits_table
from qpostcopy.bench.link import open_link
from qpostcopy.bench.matrix import Matrix
from qpostcopy.bench.model import Book, Cell, Engine, Link
from qpostcopy.bench.page import write_report
from qpostcopy.bench.qemus import find_qemus
from qpostcopy.bench.selfcheck import Checked, same, selfcheck_table, slowed
from qpostcopy.bench.selfcheck import agree as agreement
from qpostcopy.bench.session import BenchSession
from qpostcopy.bench.slow import build_slow_library, slow_environment
from qpostcopy.bench.table import print_report
from qpostcopy.environment import LOG_LEVEL_VARIABLE
from qpostcopy.errors import ExitCode, QpostcopyError
from qpostcopy.lab.guest import find_image
from qpostcopy.lab.scenario import WORKLOADS

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "bench"
_LEAST_MIB = 128
_RUNS = 5
#: What a page fault is made later by, on purpose.
_DELAY_US = 1000
_ENGINES = (Engine.QPOSTCOPY, Engine.PRECOPY, Engine.POSTCOPY, Engine.PREEMPT)
#: How much goes through a link for its limits: a second or less of it.
_LIMIT_BYTES = {Link.LOOPBACK: 512 << 20, Link.GIGABIT: 64 << 20}


@dataclass(frozen=True, slots=True)
class _Scope:
    """What is measured if no option says otherwise."""

    memory_mib: int
    workloads: tuple[str, ...]
    links: tuple[Link, ...]


_DEFAULT = _Scope(512, ("service", "kv", "churn"), tuple(Link))
_QUICK = _Scope(256, ("service",), (Link.LOOPBACK,))


_link_option = click.option(
    "--link",
    "links",
    multiple=True,
    type=click.Choice([link.value for link in Link]),
    help="[default: both]",
)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--quick", is_flag=True, help="A verdict in five minutes: 256 MiB, service, loopback."
)
@click.option(
    "--engine",
    "engines",
    multiple=True,
    type=click.Choice([engine.value for engine in Engine]),
    help="[default: all but qemu-hybrid and qemu-precopy-multifd]",
)
@click.option(
    "--qemu",
    "qemus",
    multiple=True,
    default=("10.0",),
    show_default=True,
    help="7.2 (the installed one), 10.0 or 5.2 (fetched once), or the path of a QEMU.",
)
@click.option(
    "--workload",
    "workloads",
    multiple=True,
    type=click.Choice(WORKLOADS),
    help="[default: service, kv, churn]",
)
@_link_option
@click.option(
    "--memory",
    "memory_mib",
    type=click.IntRange(min=_LEAST_MIB),
    help="RAM of the guest in MiB.  [default: 512]",
)
@click.option(
    "--runs",
    type=click.IntRange(min=1),
    default=_RUNS,
    show_default=True,
    help="That count, of each cell of the matrix.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"Where {FILE}, page and plots go.  [default: .cache/bench]",
)
@click.option("--no-limits", is_flag=True, help="Do not measure what the machine can do at best.")
@click.option("--no-portraits", is_flag=True, help="No extra runs for the plot of page arrivals.")
@click.pass_context
def cli(
    context: click.Context,
    quick: bool,
    engines: Sequence[Engine],
    qemus: Sequence[str],
    workloads: Sequence[str],
    links: Sequence[Link],
    memory_mib: int | None,
    runs: int,
    output: Path | None,
    no_limits: bool,
    no_portraits: bool,
) -> None:
    """Compare qpostcopy with QEMU's own migration on this machine, in one run.

    Several of an option may be given. What was measured before, of the same code,
    machine and QEMUs, counts: an interrupted benchmark goes on where it was.
    """
    if context.invoked_subcommand:
        _expect_no_options(context)
        return
    scope = _QUICK if quick else _DEFAULT
    found = find_qemus(qemus)
    matrix = Matrix(
        engines=[Engine(name) for name in engines] or _ENGINES,
        qemus=list(found),
        workloads=list(workloads) or scope.workloads,
        links=[Link(name) for name in links] or scope.links,
        memory_mib=memory_mib or scope.memory_mib,
        runs=runs,
    )
    file = BookFile(output or (_fresh_directory("quick") if quick else CACHE))
    session = BenchSession(file, matrix, find_image(), found, _tell)
    try:
        session.run(None if no_limits else limits_of_link, portraits=not no_portraits)
    except KeyboardInterrupt:
        _tell(f"interrupted; with --output {file.directory} the same command goes on from here")
        raise
    _show(file.book, file.directory)


def _expect_no_options(context: click.Context) -> None:
    """What is said of the whole benchmark means nothing to one of its commands."""
    given = click.core.ParameterSource.COMMANDLINE
    for parameter in context.command.params:
        if context.get_parameter_source(str(parameter.name)) is given:
            verb = context.invoked_subcommand
            raise click.UsageError(
                f"{parameter.opts[0]} is no option of {verb}; see scripts/bench {verb} --help"
            )


@cli.command()
@_link_option
def limits(links: Sequence[Link]) -> None:
    """Measure what this machine can do at best, without QEMU and without any engine."""
    console = _console()
    for name in links or tuple(Link):
        link = Link(name)
        console.print(f"{link}:", style="bold")
        console.print(limits_table(limits_of_link(link)))


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False), default=CACHE)
def report(directory: Path) -> None:
    """Show again what was measured, and write page and plots anew."""
    _show(read_book(directory / FILE), directory)


@cli.command()
@click.option("--runs", type=click.IntRange(min=3), default=_RUNS, show_default=True)
def selfcheck(runs: int) -> int:
    """Check the benchmark itself: some minutes, and an exit code of 1 if it cannot be trusted.

    QEMU against QEMU must be equal, and a handler that is slowed by 1 ms a fault on
    purpose must show as that.
    """
    found = find_qemus(("10.0",))
    (qemu,) = found
    file = BookFile(_fresh_directory("selfcheck"))
    slow = slow_environment(build_slow_library(CACHE / "slow"), _DELAY_US)

    def cells(engine: Engine, link: Link, *labels: str) -> list[Cell]:
        matrix = Matrix([engine], [qemu], ["kv"], [link], _QUICK.memory_mib, runs, labels)
        session = BenchSession(file, matrix, find_image(), found, _tell, {"slow": slow})
        session.run(None, portraits=False)
        return matrix.cells

    one, other = cells(Engine.PREEMPT, Link.LOOPBACK, "a", "b")
    # A slow link: on a fast one the transfer is over before many pages are asked for.
    plain, slowed_down = cells(Engine.QPOSTCOPY, Link.GIGABIT, "plain", "slow")
    checks = (
        same(file.book, one, other),
        slowed(file.book, plain, slowed_down, _DELAY_US),
    )
    return _judge(checks)


@cli.command()
@click.argument("directories", nargs=2, type=click.Path(path_type=Path, file_okay=False))
def agree(directories: tuple[Path, Path]) -> int:
    """Whether two runs, e.g. of --quick, say the same within their spread."""
    one, other = (read_book(directory / FILE) for directory in directories)
    return _judge([agreement(one, other)])


def _judge(checks: Iterable[Checked]) -> int:
    console = _console()
    holds = True
    for checked in checks:
        console.print(selfcheck_table(checked))
        holds = holds and checked.holds
    return ExitCode.COMPLETED if holds else ExitCode.UNEXPECTED


def limits_of_link(link: Link) -> Limits:
    """What the machine can do, over such a link."""
    with open_link(link) as ends:
        return measure_limits(
            _LIMIT_BYTES[link],
            Place(ends.source.address, ends.source.netns_path),
            Place(ends.destination.address, ends.destination.netns_path),
            cache=CACHE / "limits",
        )


def _show(book: Book, directory: Path) -> None:
    console = _console()
    print_report(book, console)
    page = write_report(book, directory)
    console.print(f"{page}", markup=False)


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def _fresh_directory(name: str) -> Path:
    return CACHE / f"{name}-{datetime.now(UTC).strftime('%Y%m%dT%H%M%S')}"


def _tell(line: str) -> None:
    click.echo(f"bench: {line}", err=True)


def run(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code. What went wrong is one line on stderr."""
    try:
        code = cli.main(arguments, prog_name="scripts/bench", standalone_mode=False)
        return int(code) if isinstance(code, int) else ExitCode.COMPLETED
    except click.ClickException as error:
        error.show()
        return ExitCode.USAGE
    except (click.Abort, KeyboardInterrupt):
        return ExitCode.SIGINT
    except QpostcopyError as error:
        if os.environ.get(LOG_LEVEL_VARIABLE) == "debug":
            traceback.print_exc()
        _tell(f"error: {error}")
        if error.remedy:
            _tell(f"  remedy: {error.remedy}")
        return error.exit_code
    except OSError as error:
        _tell(f"error: {error}")
        _tell("  remedy: see that there is room and the right to write; --output chooses where")
        return ExitCode.UNEXPECTED


def entry() -> None:
    """Entry of `python -m qpostcopy.bench`."""
    # What is under way is cleared away in either case.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run())
