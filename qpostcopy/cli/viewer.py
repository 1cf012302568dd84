"""Start a controller and watch it: what `migrate`, `resume` and `abort` share.

The migration lives in its own processes; a viewer only shows it. Interrupting a
viewer asks for an abort while that is safe; once the VM has moved, the first
interrupt says so and goes on, the second leaves the display. If the controller
dies under `migrate`, the viewer starts one recovery by itself, rather than leave
a stopped source behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import click

from qpostcopy.controller import CONTROL_SOCKET
from qpostcopy.errors import InterruptedMigrationError, QpostcopyError
from qpostcopy.progress import Progress, line
from qpostcopy.qmp import schema
from qpostcopy.qmp.client import EndpointClient, EndpointConnectError, RemoteError
from qpostcopy.qmp.connection import ConnectionLostError
from qpostcopy.report import ErrorReport, Result, error_lines, summary
from qpostcopy.state import StateDirectory

Message = dict[str, object]

START_SECONDS = 20.0
EXIT_SECONDS = 15.0
#: Off a terminal: one line in this time.
PLAIN_LINE_SECONDS = 2.0
_SIGNALS: dict[int, Literal["SIGINT", "SIGTERM"]] = {
    signal.SIGINT: "SIGINT",
    signal.SIGTERM: "SIGTERM",
}


class ControllerStartError(QpostcopyError):
    """The controller process did not start; nothing was touched."""


class ControllerLostError(QpostcopyError):
    """The controller died without a result."""


class DisplayLeftError(InterruptedMigrationError):
    """The operator left the display; the migration goes on by itself."""


# --- the controller's process ---------------------------------------------------------------


class ControllerProcess:
    """A controller that was started here, held back until `go`."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child

    @classmethod
    def start(cls, directory: StateDirectory, *, resume: bool) -> ControllerProcess:
        """Start it detached; on return its socket accepts.

        :raise ControllerStartError: with the end of its log.
        """
        ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
        command = [sys.executable, "-m", "qpostcopy.controller", str(directory.path)]
        command += ["--ready-fd", str(ready_write)] + (["--resume"] if resume else [])
        log_path = directory.path / "controller.log"
        try:
            with log_path.open("ab") as log_file:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=log_file,
                    stderr=log_file,
                    pass_fds=[ready_write],
                    start_new_session=True,
                    cwd="/",
                )
        finally:
            os.close(ready_write)
        process = cls(child)
        try:
            ready = _read_within(ready_read, START_SECONDS)
        finally:
            os.close(ready_read)
        if ready != b"ready\n":
            process.go()
            last = log_path.read_text(errors="replace").strip().rpartition("\n")[2]
            process.wait_end()
            raise ControllerStartError(f"the controller did not start: {last or 'it says nothing'}")
        return process

    def go(self) -> None:
        """Let it begin."""
        assert self._child.stdin is not None
        self._child.stdin.close()

    def wait_end(self) -> None:
        """It ends soon after its result."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(EXIT_SECONDS)


def _read_within(fd: int, seconds: float) -> bytes:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return os.read(fd, 64) if poll.poll(seconds * 1000) else b""


# --- what is shown ------------------------------------------------------------------------


class Display(Protocol):
    """Shows the messages of a controller."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def show(self, message: Message) -> None: ...

    def note(self, text: str) -> None: ...


class _StreamDisplay:
    """A display that has nothing to set up or to tidy."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def note(self, text: str) -> None:
        click.echo(text, err=True)


class JsonDisplay(_StreamDisplay):
    """Every message verbatim, one object a line, on stdout."""

    def show(self, message: Message) -> None:
        click.echo(json.dumps(message))


class PlainDisplay(_StreamDisplay):
    """Lines on stderr, progress no more often than one an interval."""

    def __init__(self) -> None:
        self._last_seconds = 0.0

    def show(self, message: Message) -> None:
        if message["type"] == "progress":
            now = time.monotonic()
            if now - self._last_seconds < PLAIN_LINE_SECONDS:
                return
            self._last_seconds = now
        if text := describe(message):
            self.note(text)


class TerminalDisplay:
    """One line that is kept up to date, logs above it. rich honours NO_COLOR."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._status = self._console.status("starting")

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._status.stop()

    def show(self, message: Message) -> None:
        text = describe(message)
        if message["type"] == "progress":
            self._status.update(text)
        elif text:
            self._console.print(text, markup=False)
            if message["type"] == "phase":
                self._status.update(str(message["phase"]))

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)


def make_display(as_json: bool) -> Display:
    if as_json:
        return JsonDisplay()
    return TerminalDisplay() if sys.stderr.isatty() else PlainDisplay()


def describe(message: Message) -> str:
    """A message in words; nothing for the result, which is not progress."""
    if message["type"] == "phase":
        return f"{message['phase']}: {message['message']}"
    if message["type"] == "log":
        return f"{message['level']}: {message['message']}"
    if message["type"] == "progress":
        fields = {key: message[key] for key in Progress.model_fields if key in message}
        return line(Progress.model_validate(fields))
    return ""


# --- watching -----------------------------------------------------------------------------


class Viewer:
    """Watches one controller until its result."""

    def __init__(self, directory: StateDirectory, display: Display) -> None:
        self._directory = directory
        self._display = display
        self._client: EndpointClient | None = None
        self._abort_task: asyncio.Task[None] | None = None
        self._left: asyncio.Future[None] | None = None
        self._warned = False

    async def watch(self, process: ControllerProcess | None = None) -> Message:
        """The result message.

        :param process: a controller that waits for its `go`.
        :raise ControllerLostError: it died without a result.
        :raise DisplayLeftError: the operator left.
        """
        loop = asyncio.get_running_loop()
        self._left = loop.create_future()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        following = asyncio.create_task(self._follow(process))
        first: list[asyncio.Future[Any]] = [following, self._left]
        try:
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                return following.result()
            raise DisplayLeftError(
                f"display left; the migration goes on: qpostcopy status {self._id}",
                remedy=f"qpostcopy resume {self._id} shows it again and waits for its end",
            )
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
            await self._end(following)

    @property
    def _id(self) -> str:
        return self._directory.migration_id

    async def _end(self, following: asyncio.Task[Message]) -> None:
        following.cancel()
        await asyncio.wait([following])
        if self._abort_task is not None:
            self._abort_task.cancel()
            await asyncio.wait([self._abort_task])
        if self._client is not None:
            await self._client.close()

    async def _follow(self, process: ControllerProcess | None) -> Message:
        try:
            self._client = await EndpointClient.connect(self._directory.path / CONTROL_SOCKET)
            with self._client.subscribe("QPC_MESSAGE") as messages:
                status = await self._client.call("qpc-status", schema.Empty(), schema.Status)
                if process is not None:
                    process.go()
                elif status.result is None:
                    self._display.note(f"{status.phase}: {status.message}")
                async for event in messages:
                    message = event.data["message"]
                    assert isinstance(message, dict)
                    self._display.show(message)
                    if message["type"] == "result":
                        return message
        except (ConnectionLostError, EndpointConnectError) as error:
            return self._result_on_disk(error)
        finally:
            if process is not None:
                process.go()
        return self._result_on_disk(None)

    def _result_on_disk(self, error: Exception | None) -> Message:
        """The controller is gone: it may have finished while we looked elsewhere."""
        result = self._directory.read_result()
        if result is None:
            raise ControllerLostError(
                f"the controller of {self._id} died without a result",
                remedy=f"qpostcopy resume {self._id}",
            ) from error
        message = result_message(self._id, result)
        self._display.show(message)
        return message

    def _on_signal(self, number: int) -> None:
        if self._warned:
            assert self._left is not None
            if not self._left.done():
                self._left.set_result(None)
        elif self._abort_task is None:
            self._abort_task = asyncio.create_task(self._abort(_SIGNALS[number]))

    async def _abort(self, name: Literal["SIGINT", "SIGTERM"]) -> None:
        if self._client is None:
            return
        try:
            await self._client.call("qpc-abort", schema.Abort(signal=name), schema.Empty)
            self._display.note(f"{name}: cancelling; the VM stays at the source")
        except RemoteError as error:
            self._warned = True
            self._display.note(f"{name}: {error}; once more leaves this display")
        except QpostcopyError as error:
            self._display.note(f"{name}: {error}")


def result_message(migration_id: str, result: Message) -> Message:
    """A result as the `--json` stream ends in it."""
    head: Message = {"v": 1, "type": "result", "ts": round(time.time(), 6)}
    return head | {"migration_id": migration_id} | result


def conclude(message: Message, *, as_json: bool) -> int:
    """Tell a result to people (`--json` has it already); its exit code."""
    fields = {key: value for key, value in message.items() if key in Result.model_fields}
    result = Result.model_validate(fields)
    if not as_json:
        if result.error is not None:
            for text in error_lines(result.error):
                click.echo(text, err=True)
        click.echo(summary(result))
    return result.rc


def print_error_result(error: QpostcopyError) -> None:
    """For `--json` before there is a migration: the one result that the stream ends in."""
    from qpostcopy.migration import error_code

    report = ErrorReport(code=error_code(error), message=str(error), remedy=error.remedy)
    result: Message = {
        "status": "error",
        "rc": int(error.exit_code),
        "vm_location": "source",
        "error": report.model_dump(mode="json"),
    }
    head: Message = {"v": 1, "type": "result", "ts": round(time.time(), 6), "migration_id": None}
    click.echo(json.dumps(head | result))


def run_controller(directory: StateDirectory, *, resume: bool, as_json: bool) -> int:
    """Start a controller, watch it to its end, recover once if it dies; the exit code."""
    with make_display(as_json) as display:
        try:
            message = _run_once(directory, display, resume=resume)
        except ControllerLostError as error:
            if resume:
                raise
            display.note(f"{error}: recovering by itself")
            message = _run_once(directory, display, resume=True)
    return conclude(message, as_json=as_json)


def _run_once(directory: StateDirectory, display: Display, *, resume: bool) -> Message:
    process = ControllerProcess.start(directory, resume=resume)
    message = asyncio.run(Viewer(directory, display).watch(process))
    process.wait_end()
    return message


def watch_living(directory: StateDirectory, *, as_json: bool) -> int:
    """Watch a controller that runs already; the exit code of its result."""
    with make_display(as_json) as display:
        message = asyncio.run(Viewer(directory, display).watch())
    return conclude(message, as_json=as_json)
