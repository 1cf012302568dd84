"""Start a controller and watch it: what `migrate`, `resume` and `abort` share.

The migration lives in its own processes; a viewer only shows it. The first
signal asks for an abort, as soon as there is somebody to ask; once the VM has
moved, that is refused and said so. The second always leaves the display. If the
controller dies under `migrate`, the viewer starts one recovery by itself, rather
than leave a stopped source behind.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from qpostcopy.cli.display import Display, make_display
from qpostcopy.cli.signals import Name, Signals
from qpostcopy.cli.starter import ControllerProcess, ControllerStartError
from qpostcopy.cli.stream import Message, Stream, head
from qpostcopy.cli.words import tell
from qpostcopy.errors import InterruptedMigrationError, OutcomeUnknownError, QpostcopyError
from qpostcopy.qmp import schema
from qpostcopy.qmp.client import EndpointClient, EndpointConnectError, RemoteError
from qpostcopy.qmp.connection import ConnectionLostError
from qpostcopy.report import Result, error_lines, summary
from qpostcopy.state import CONTROL_SOCKET, ControllerAliveError, StateDirectory
from qpostcopy.takeover import ControllerState, controller_state

#: From taking the lock to being recorded takes a controller some milliseconds.
OTHER_SECONDS = 10.0
_ONCE_MORE = "once more leaves this display"


class ControllerLostError(QpostcopyError):
    """The controller died without a result."""


class DisplayLeftError(QpostcopyError):
    """The operator left the display before the commit; the migration goes on, or back."""

    code = "display-left"


class DisplayLeftAfterCommitError(InterruptedMigrationError):
    """The operator left the display; the migration goes on by itself."""

    code = "display-left"


class Viewer:
    """Watches one controller until its result."""

    def __init__(self, directory: StateDirectory, display: Display, signals: Signals) -> None:
        self._directory = directory
        self._display = display
        self._signals = signals
        self._client: EndpointClient | None = None
        self._asking: asyncio.Task[None] | None = None
        self._left: asyncio.Future[None] | None = None

    async def watch(self, process: ControllerProcess | None = None) -> Message:
        """The result message.

        :param process: a controller that waits for its `go`.
        :raise ControllerStartError: it did not answer, and was never told to go.
        :raise ControllerLostError: it died without a result.
        :raise DisplayLeftError: the operator left; or DisplayLeftAfterCommitError.
        :raise CancelledEarlyError: the operator left before it was told to go.
        """
        loop = asyncio.get_running_loop()
        self._left = loop.create_future()
        loop.add_reader(self._signals.fd, self._on_signal)
        following = asyncio.create_task(self._follow(process))
        first: list[asyncio.Future[Any]] = [following, self._left]
        try:
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                return following.result()
            if process is not None and not process.gone_ahead:
                raise self._signals.cancelled()
            raise self._left_error()
        finally:
            loop.remove_reader(self._signals.fd)
            await self._end(following)
            if process is not None:
                process.abandon()

    @property
    def _id(self) -> str:
        return self._directory.migration_id

    def _left_error(self) -> QpostcopyError:
        if self._directory.committed:
            return DisplayLeftAfterCommitError(
                f"display left; the VM is at the destination and the migration goes on: "
                f"qpostcopy status {self._id}",
                remedy=f"qpostcopy resume {self._id} shows it again and waits for its end",
            )
        return DisplayLeftError(
            "display left before the commit; the end of the abort was not waited for: qpostcopy "
            f"status {self._id} tells where the VM is",
            remedy=f"qpostcopy resume {self._id} shows it again and waits for its end",
        )

    async def _end(self, following: asyncio.Task[Message]) -> None:
        following.cancel()
        await asyncio.wait([following])
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])
        if self._client is not None:
            await self._client.close()

    async def _follow(self, process: ControllerProcess | None) -> Message:
        try:
            self._client = await EndpointClient.connect(self._directory.path / CONTROL_SOCKET)
            with self._client.subscribe("QPC_MESSAGE") as messages:
                await self._begin(self._client, process)
                async for event in messages:
                    message = event.data["message"]
                    assert isinstance(message, dict)
                    self._display.show(message)
                    if message["type"] == "result":
                        return message
        except (ConnectionLostError, EndpointConnectError, OutcomeUnknownError) as error:
            held_back = process is not None and not process.gone_ahead
            if held_back and not self._directory.finished:  # else another one was faster
                raise ControllerStartError(
                    f"the controller does not answer (nothing was touched): {error}",
                    remedy=f"its log is {self._directory.path / 'controller.log'}",
                ) from error
            return self._result_on_disk(error)
        return self._result_on_disk(None)

    async def _begin(self, client: EndpointClient, process: ControllerProcess | None) -> None:
        """Ask for what a signal wanted before there was anybody to ask, then let it go."""
        status = await client.call("qpc-status", schema.Empty(), schema.Status)
        if self._signals.names and self._asking is None:
            await self._ask_abort(client, self._signals.names[0])
        if process is not None:
            process.go()
        elif status.result is None:
            self._display.note(f"{status.phase}: {status.message}")

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

    def _on_signal(self) -> None:
        for name in self._signals.take():
            if len(self._signals.names) > 1:
                assert self._left is not None
                if not self._left.done():
                    self._left.set_result(None)
            elif self._client is None:
                self._display.note(f"{name}: cancels as soon as the controller answers")
            else:
                self._asking = asyncio.create_task(self._ask_abort(self._client, name))

    async def _ask_abort(self, client: EndpointClient, name: Name) -> None:
        try:
            await client.call("qpc-abort", schema.Abort(signal=name), schema.Empty)
            self._display.note(f"{name}: cancelling; the VM stays at the source; {_ONCE_MORE}")
        except RemoteError as error:
            self._display.note(f"{name}: {error}; {_ONCE_MORE}")
        except QpostcopyError as error:
            self._display.note(f"{name}: the controller cannot be asked: {error}; {_ONCE_MORE}")


def result_message(migration_id: str, result: Message) -> Message:
    """A result as the `--json` stream ends in it."""
    return head("result", migration_id) | result


def conclude(message: Message, stream: Stream) -> int:
    """Tell a result to people (`--json` has it already); its exit code."""
    fields = {key: value for key, value in message.items() if key in Result.model_fields}
    result = Result.model_validate(fields)
    if not stream.on:
        if result.error is not None:
            for text in error_lines(result.error):
                tell(text)
            tell(f"  {stream.place}")
            if stream.directory is not None:
                tell(f"  logs: {stream.directory.path}")
        stream.out(summary(result))
    return result.rc


def run_controller(
    directory: StateDirectory, display: Display, signals: Signals, *, resume: bool
) -> Message:
    """Start a controller, watch it to its end, recover once if it dies; the result.

    :raise QpostcopyError: see Viewer.watch and ControllerProcess.start.
    """
    if resume:
        return _resume_or_watch(directory, display, signals)
    try:
        return _run_once(directory, display, signals, resume=False)
    except ControllerLostError as error:
        display.note(f"{error}: recovering by itself")
        return _resume_or_watch(directory, display, signals)


def _resume_or_watch(directory: StateDirectory, display: Display, signals: Signals) -> Message:
    """Two may resume at once, say `resume` and a `migrate` that recovers: one has the lock."""
    try:
        return _run_once(directory, display, signals, resume=True)
    except ControllerStartError:
        other = _other_controller(directory)
        if other is None:
            raise
    display.note("another controller is at work on it: watching that one")
    return asyncio.run(Viewer(other, display, signals).watch())


def _other_controller(directory: StateDirectory) -> StateDirectory | None:
    """The directory as whoever holds its lock has it, or has left it; None: nobody."""
    deadline = time.monotonic() + OTHER_SECONDS
    while time.monotonic() < deadline:
        fresh = StateDirectory.open(directory.path)
        if fresh.finished or asyncio.run(controller_state(fresh)) is ControllerState.ALIVE:
            return fresh
        try:
            with fresh.lock():
                return None
        except ControllerAliveError:
            time.sleep(0.05)  # it has not said yet who it is, and nothing tells when it does
    return None


def _run_once(
    directory: StateDirectory, display: Display, signals: Signals, *, resume: bool
) -> Message:
    process = ControllerProcess.start(directory, signals, resume=resume)
    message = asyncio.run(Viewer(directory, display, signals).watch(process))
    process.wait_end()
    return message


def start_and_conclude(
    directory: StateDirectory, stream: Stream, signals: Signals, *, resume: bool
) -> int:
    """Run a controller to its end and tell its result; its exit code."""
    with make_display(stream) as display:
        message = run_controller(directory, display, signals, resume=resume)
    return conclude(message, stream)


def watch_living(directory: StateDirectory, stream: Stream, signals: Signals) -> int:
    """Watch a controller that runs already; the exit code of its result."""
    with make_display(stream) as display:
        message = asyncio.run(Viewer(directory, display, signals).watch())
    return conclude(message, stream)
