"""The `qpostcopy` command: its verbs, and the one place where an error becomes an exit code.

Start-up time counts (companions and scripts start us often), so a verb's module
is imported only when that verb is used. A verb's callback returns its exit code.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import signal
import sys
import traceback

import click

from qpostcopy import __version__
from qpostcopy.cli.stream import Stream
from qpostcopy.cli.words import mute, open_standard_streams, tell
from qpostcopy.environment import LOG_LEVEL_VARIABLE
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
    "completion",
    "page-server",
    "handler",
)
#: Those whose stdout is the stream of docs/json.md if they are given `--json`.
JSON_VERBS = ("check", "migrate", "status", "abort", "resume")
#: Those that only begin a migration: where they fail without one, nothing was touched.
STARTING_VERBS = ("check", "migrate")
LEVELS = ("debug", "info", "warning", "error")


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
    """Run the command; the exit code. What went wrong is one line on stderr.

    With `--json` it is the result, too, whatever it was.
    """
    stream = _stream(sys.argv[1:] if arguments is None else arguments)
    code = _run(stream, arguments)
    if stream.lost is None or isinstance(stream.lost, BrokenPipeError):
        return code  # whoever reads a part only has what was wanted
    tell(f"qpostcopy: error: stdout cannot be written: {stream.lost.strerror}")
    return code or ExitCode.UNEXPECTED


def _run(stream: Stream, arguments: list[str] | None) -> int:
    try:
        code = cli.main(arguments, prog_name="qpostcopy", standalone_mode=False, obj=stream)
        return int(code) if isinstance(code, int) else ExitCode.COMPLETED
    except BrokenPipeError:
        mute(sys.stdout)
        return ExitCode.UNEXPECTED
    except click.ClickException as error:
        error.show()
        stream.fail(error, ExitCode.USAGE, error.format_message(), None)
        return ExitCode.USAGE
    except (click.Abort, KeyboardInterrupt) as error:
        stream.fail(error, ExitCode.SIGINT, "interrupted", None)
        return ExitCode.SIGINT
    except QpostcopyError as error:
        return _fail(stream, error, error.exit_code, str(error), error.remedy)
    except Exception as error:
        message = f"unexpected {type(error).__name__}: {error}"
        remedy = "this is a bug of qpostcopy: report it with the output of --debug"
        return _fail(stream, error, ExitCode.UNEXPECTED, message, remedy)


def _stream(arguments: list[str]) -> Stream:
    """Known before the arguments are parsed: they may be what is wrong."""
    verb = next((word for word in arguments if word in VERBS), "")
    return Stream(on=verb in JSON_VERBS and "--json" in arguments, starts=verb in STARTING_VERBS)


def _fail(
    stream: Stream, error: Exception, code: ExitCode, message: str, remedy: str | None
) -> ExitCode:
    _tell(message, remedy)
    if (place := stream.place) is not None:
        tell(f"  {place}")
    stream.fail(error, code, message, remedy)
    return code


def _tell(message: str, remedy: str | None) -> None:
    """One error, one line, and its remedy below."""
    if os.environ.get(LOG_LEVEL_VARIABLE) == "debug":
        traceback.print_exc()
    tell(f"qpostcopy: error: {message}")
    if remedy:
        tell(f"  remedy: {remedy}")


def entry() -> None:
    """Entry of the console script."""
    open_standard_streams()
    code = run()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the code is known: nothing changes it any more
    sys.exit(code)
