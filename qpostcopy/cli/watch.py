"""`qpostcopy status --watch`: follow a migration that somebody else drives.

Guarantees: it asks for nothing and changes nothing, so it may begin and end at
any moment; whenever the controller dies, or says nothing, it tells so, and where
the VM is, and goes on with the next controller if one comes.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from qpostcopy.cli.display import Display, make_display
from qpostcopy.cli.lookup import find
from qpostcopy.cli.signals import Signals
from qpostcopy.cli.status import ASK_SECONDS, from_controller, look
from qpostcopy.cli.stream import Message, Stream, head
from qpostcopy.cli.viewer import conclude, result_message
from qpostcopy.cli.words import tell
from qpostcopy.errors import ExitCode, OutcomeUnknownError, QpostcopyError
from qpostcopy.qmp import schema
from qpostcopy.qmp.client import EndpointClient, EndpointConnectError
from qpostcopy.qmp.connection import ConnectionLostError
from qpostcopy.qmp.events import EventsOverflowError, EventTimeoutError, Subscription
from qpostcopy.state import CONTROL_SOCKET, StateDirectory
from qpostcopy.takeover import ControllerState, controller_state

#: `migrate` starts another controller by itself, within seconds even on a busy machine.
SUCCESSOR_SECONDS = 15.0
#: A controller that sends nothing for so long is asked for a word.
QUIET_SECONDS = 5.0
_LOOK_SECONDS = 0.2
#: What another connection may mend, or another controller.
_LOST = (ConnectionLostError, OutcomeUnknownError, EventsOverflowError)


class NobodyAtWorkError(QpostcopyError):
    """The controller died, or says nothing, and no other came."""


def watch_to_the_end(stream: Stream, migration: str | None) -> int:
    """Follow a migration: 0 once its end was told, however it ended.

    :raise NobodyAtWorkError: it has not ended, and nobody works on it.
    :raise QpostcopyError: its controller does not do as it should.
    """
    signals = Signals.install()
    stream.directory = find(migration)
    signals.take()
    with make_display(stream) as display:
        message = None if signals.names else asyncio.run(_Watcher(stream, display, signals).watch())
    if message is not None:
        conclude(message, stream)
        return ExitCode.COMPLETED
    return _leave(stream, signals)


def _leave(stream: Stream, signals: Signals) -> int:
    """The operator has seen enough, or nobody reads us."""
    if not signals.names:
        return ExitCode.COMPLETED
    code = ExitCode.SIGINT if signals.names[0] == "SIGINT" else ExitCode.SIGTERM
    said = f"no longer watching {stream.migration_id}; the migration is left as it is"
    tell(f"{said}; {stream.place}")
    error: Message = {"code": "watch-left", "message": said, "remedy": None, "findings": []}
    left: Message = {
        "status": "error",
        "rc": int(code),
        "vm_location": stream.location,
        "error": error,
    }
    stream.say("result", left)
    return code


class _Watcher:
    """Watches one migration, whoever its controller is."""

    def __init__(self, stream: Stream, display: Display, signals: Signals) -> None:
        assert stream.directory is not None
        self._path = stream.directory.path
        self._stream = stream
        self._display = display
        self._signals = signals

    async def watch(self) -> Message | None:
        """The migration's result; None: a signal came, or nobody reads stdout any more.

        :raise NobodyAtWorkError: see there.
        :raise QpostcopyError: there is a controller, and it does not do as it should.
        """
        loop = asyncio.get_running_loop()
        signalled: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._signals.fd, self._on_signal, signalled)
        following = asyncio.create_task(self._to_the_end())
        either: list[asyncio.Future[Any]] = [following, signalled]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            return following.result() if following.done() else None
        finally:
            loop.remove_reader(self._signals.fd)
            following.cancel()
            await asyncio.wait([following])

    def _on_signal(self, signalled: asyncio.Future[None]) -> None:
        if self._signals.take() and not signalled.done():
            signalled.set_result(None)

    async def _to_the_end(self) -> Message | None:
        nobody_since: float | None = None
        while self._stream.lost is None:
            directory = StateDirectory.open(self._path)
            state = await controller_state(directory, ASK_SECONDS)
            if state is ControllerState.ALIVE:
                nobody_since = None
                message = await self._follow()
            else:
                message = self._ended(directory) if state is ControllerState.DEAD else None
            if message is not None:
                self._display.show(message)
                return message
            if state is not ControllerState.ALIVE:
                nobody_since = nobody_since or await self._tell_trouble(directory)
                self._give_up_after(nobody_since, directory)
            await asyncio.sleep(_LOOK_SECONDS)  # nothing tells when another one comes
        return None

    def _ended(self, directory: StateDirectory) -> Message | None:
        """Its result, if it has one. For a dead controller: it wrote that before it died."""
        result = directory.read_result()
        return None if result is None else result_message(directory.migration_id, result)

    async def _tell_trouble(self, directory: StateDirectory) -> float:
        """Say what is known without a controller; when that was."""
        self._tell_status(await look(directory))
        return time.monotonic()

    def _tell_status(self, status: Message) -> None:
        self._display.show(head("status", self._stream.migration_id) | status)

    def _give_up_after(self, since: float, directory: StateDirectory) -> None:
        if time.monotonic() - since < SUCCESSOR_SECONDS:
            return
        raise NobodyAtWorkError(
            f"nobody has worked on {directory.migration_id} for {SUCCESSOR_SECONDS:g} s",
            remedy=f"qpostcopy resume {directory.migration_id} goes on with it, or rolls it back "
            "if it was not committed",
        )

    async def _follow(self) -> Message | None:
        """Show what a living controller sends, to its result; None: it is lost, or says nothing.

        :raise QpostcopyError: it refuses, or answers what nobody understands: asking again would
            not end.
        """
        try:
            client = await EndpointClient.connect(self._path / CONTROL_SOCKET, ASK_SECONDS)
        except EndpointConnectError:
            return None
        try:
            with client.subscribe("QPC_MESSAGE") as messages:
                status = await client.call("qpc-status", schema.Empty(), schema.Status, ASK_SECONDS)
                self._tell_status(from_controller(status))
                if status.result is not None:  # it was sent before we listened
                    return result_message(status.migration_id, status.result)
                return await self._show_all(client, messages)
        except _LOST:
            return None
        finally:
            await client.close()

    async def _show_all(self, client: EndpointClient, messages: Subscription) -> Message | None:
        """:raise QpostcopyError: the controller ended, or does not answer as it should."""
        while self._stream.lost is None:
            try:
                event = await messages.get(QUIET_SECONDS)
            except EventTimeoutError:
                await client.call("qpc-hello", schema.Empty(), schema.Hello, ASK_SECONDS)
                continue
            message = event.data["message"]
            assert isinstance(message, dict)
            if message["type"] == "result":
                return message
            self._display.show(message)
        return None
