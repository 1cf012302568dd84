"""What a verb with `--json` prints: one JSON object a line, on stdout, nothing else.

Guarantees: every object has `v`, `type`, `ts` and `migration_id`; after a
`result` nothing follows; a failure of any kind, our own bugs too, is told as the
one `result` with where the VM is. docs/json.md describes the objects.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import click

from qpostcopy.errors import ExitCode, QpostcopyError, StateLostError

if TYPE_CHECKING:
    from qpostcopy.report import Location
    from qpostcopy.state import StateDirectory

Message = dict[str, object]

#: How a failure is named in `status`; an exit code that is not here is an `error`.
_STATUS = {
    ExitCode.REFUSED: "refused",
    ExitCode.ROLLED_BACK: "rolled-back",
    ExitCode.TIMED_OUT: "timed-out",
    ExitCode.INTERRUPTED: "interrupted",
    ExitCode.FAILED: "failed",
    ExitCode.SIGINT: "cancelled",
    ExitCode.SIGTERM: "cancelled",
}


class Stream:
    """The stdout of one command.

    :param on: whether `--json` was given; if not, nothing is printed.
    :param starts: the verb only begins a migration: without one the VM is at its source.
    :ivar directory: of the migration, once the verb knows it.
    """

    def __init__(self, *, on: bool = False, starts: bool = False) -> None:
        self.on = on
        self.directory: StateDirectory | None = None
        self._starts = starts
        self._ended = False

    def write(self, message: Message) -> None:
        """Print one object, unless the result was printed."""
        if not self.on or self._ended:
            return
        self._ended = message["type"] == "result"
        click.echo(json.dumps(message))

    def say(self, kind: str, content: Message) -> None:
        """Print one object of our own."""
        self.write(head(kind, self.migration_id) | content)

    def fail(self, error: BaseException, code: int, message: str, remedy: str | None) -> None:
        """Print the result of a verb that failed."""
        if not self.on or self._ended:
            return
        result: Message = {
            "status": _STATUS.get(ExitCode(code), "error"),
            "rc": int(code),
            "vm_location": self.location,
            "error": {
                "code": _code_of(error),
                "message": message,
                "remedy": remedy,
                "findings": [],
            },
        }
        self.say("result", result)

    @property
    def migration_id(self) -> str | None:
        return None if self.directory is None else self.directory.migration_id

    @property
    def location(self) -> Location:
        """Where the VM is, as far as can be told without asking anybody."""
        if self.directory is None:
            return "source" if self._starts else "unknown"
        return place_of(self.directory)


def head(kind: str, migration_id: str | None) -> Message:
    """What every object begins with."""
    return {"v": 1, "type": kind, "ts": round(time.time(), 6), "migration_id": migration_id}


def place_of(directory: StateDirectory) -> Location:
    """Where the VM is by what is on disk now; `unknown` if that QEMU is gone."""
    from qpostcopy.state import StateDirectory

    try:
        directory = StateDirectory.open(directory.path)
    except StateLostError:
        return "unknown"
    result = directory.read_result()
    if result is not None and result.get("vm_location") in ("ended", "unknown"):
        return "ended" if result["vm_location"] == "ended" else "unknown"
    role: Location = "destination" if directory.committed else "source"
    qemu = directory.state.destination.qemu if directory.committed else directory.state.source.qemu
    return role if qemu is None or qemu.alive() else "unknown"


def _code_of(error: BaseException) -> str:
    if isinstance(error, click.ClickException):
        return "usage"
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return "cancelled"
    if not isinstance(error, QpostcopyError):
        return "unexpected"
    from qpostcopy.migration import error_code

    return error_code(error)
