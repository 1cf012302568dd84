"""The `qpostcopy` command: its verbs, and the one place where an error becomes an exit code.

Start-up time counts (companions and scripts start us often), so a verb's module
is imported only when that verb is used. A verb's callback returns its exit code.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
import traceback

import click

from qpostcopy import __version__
from qpostcopy.errors import ExitCode, QpostcopyError

#: In the order of `--help`. A verb whose module does not exist is not offered.
VERBS = (
    "check",
    "migrate",
    "status",
    "abort",
    "resume",
    "profile",
    "demo",
    "page-server",
    "handler",
)
LEVELS = ("debug", "info", "warning", "error")
#: Inherited by the controller and its companions.
LOG_LEVEL_VARIABLE = "QPOSTCOPY_LOG_LEVEL"


class _Verbs(click.Group):
    """Finds a verb's click command, named `command`, in the module of its name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [verb for verb in VERBS if importlib.util.find_spec(_module(verb))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command = importlib.import_module(_module(cmd_name)).command
        assert isinstance(command, click.Command)
        return command


def _module(verb: str) -> str:
    return f"qpostcopy.cli.{verb.replace('-', '_')}"


@click.command(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qpostcopy")
@click.option(
    "--log-level",
    type=click.Choice(LEVELS),
    help="What goes to the logs (default: info), and, if given, to stderr.",
)
@click.option("--debug", is_flag=True, help="The same as --log-level debug: tracebacks too.")
def cli(log_level: str | None, debug: bool) -> None:
    """Move a running QEMU VM to another QEMU by post-copy."""
    level = "debug" if debug else log_level
    if level:
        os.environ[LOG_LEVEL_VARIABLE] = level
        logging.basicConfig(stream=sys.stderr, level=level.upper())


def run(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code. What went wrong is one line on stderr."""
    try:
        code = cli.main(arguments, prog_name="qpostcopy", standalone_mode=False)
        return int(code) if isinstance(code, int) else ExitCode.COMPLETED
    except click.ClickException as error:
        error.show()
        return ExitCode.USAGE
    except (click.Abort, KeyboardInterrupt):
        return ExitCode.SIGINT
    except QpostcopyError as error:
        _tell(str(error), error.remedy)
        return error.exit_code
    except BrokenPipeError:
        # Nobody reads our output any more; do not complain about that at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.UNEXPECTED
    except Exception as error:
        _tell(
            f"unexpected {type(error).__name__}: {error}",
            "this is a bug of qpostcopy: report it with the output of --debug",
        )
        return ExitCode.UNEXPECTED


def _tell(message: str, remedy: str | None) -> None:
    """One error, one line, and its remedy below."""
    if os.environ.get(LOG_LEVEL_VARIABLE) == "debug":
        traceback.print_exc()
    click.echo(f"qpostcopy: error: {message}", err=True)
    if remedy:
        click.echo(f"  remedy: {remedy}", err=True)


def entry() -> None:
    """Entry of the console script."""
    sys.exit(run())
