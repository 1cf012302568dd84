"""What a verb with `--json` prints: one JSON object a line, on stdout, nothing else.

Guarantees: every object has `v`, `type`, `ts` and `migration_id`; after a
`result` nothing follows; a failure of any kind, our own bugs too, is told as the
one `result` with where the VM is. docs/json.md describes the objects.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

import click

from qpostcopy.cli.words import mute, wrapped
from qpostcopy.errors import ExitCode, QpostcopyError, StateLostError

if TYPE_CHECKING:
    from qpostcopy.config import Plan
    from qpostcopy.process import Process
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
    :param starts: the verb only begins a migration: without one nothing was touched.
    :ivar directory: of the migration, once the verb knows it.
    :ivar plan: of a verb that begins one, once it was read.
    :ivar source_qemu: the one that listens at the plan's source, once that is known.
    :ivar source_status: its run state then.
    :ivar lost: why stdout cannot be written, if it cannot.
    """

    def __init__(self, *, on: bool = False, starts: bool = False) -> None:
        self.on = on
        self.directory: StateDirectory | None = None
        self.plan: Plan | None = None
        self.source_qemu: Process | None = None
        self.source_status: str | None = None
        self.lost: OSError | None = None
        self._starts = starts
        self._ended = False

    def write(self, message: Message) -> None:
        """Print one object, unless the result was printed."""
        if not self.on or self._ended:
            return
        self._ended = message["type"] == "result"
        self._print(json.dumps(message))

    def out(self, text: str) -> None:
        """Print words for people."""
        for line in text.splitlines():
            self._print(wrapped(line, sys.stdout))

    def _print(self, text: str) -> None:
        """That nobody reads it any more ends no verb; `lost` tells."""
        try:
            click.echo(text)
        except OSError as error:
            self.lost = self.lost or error
            mute(sys.stdout)

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
    def place(self) -> str | None:
        """Where the VM is, and whether abort is safe, in words; None: we do not know of any."""
        if self.directory is None:
            return "nothing was touched: the VM is where it was" if self._starts else None
        from qpostcopy.state import StateDirectory

        text = f"the VM is at: {self.location}"
        try:
            directory = StateDirectory.open(self.directory.path)
        except StateLostError:
            return text
        if directory.finished:
            return text
        return f"{text}; abort is {'not possible' if directory.committed else 'safe'}"

    @property
    def location(self) -> Location:
        """Where the VM is, as far as can be told without asking anybody."""
        if self.directory is not None:
            return place_of(self.directory)
        if self.plan is None:
            return "unknown"
        return place_before(self.plan, self.source_qemu, self.source_status)


def head(kind: str, migration_id: str | None) -> Message:
    """What every object begins with."""
    return {"v": 1, "type": kind, "ts": round(time.time(), 6), "migration_id": migration_id}


def place_before(
    plan: Plan, source_qemu: Process | None, source_status: str | None = None
) -> Location:
    """Where earlier migrations left a VM; `unknown` if what they wrote cannot be looked at."""
    from qpostcopy.history import moved_before
    from qpostcopy.state import RunDirectoryError

    source, destination = str(plan.source.qmp), str(plan.destination.qmp)
    try:
        return moved_before(source, destination, source_qemu, source_status)
    except RunDirectoryError:
        return "unknown"


def place_of(directory: StateDirectory) -> Location:
    """Where the VM is by what is on disk now; `unknown` if that QEMU is gone."""
    from qpostcopy.state import StateDirectory

    try:
        directory = StateDirectory.open(directory.path)
    except StateLostError:
        return "unknown"
    place = (directory.read_result() or {}).get("vm_location")
    # One that was refused touched nothing: it says where it found the VM.
    if place in ("ended", "unknown") or (place == "destination" and directory.refused):
        return place
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
