"""A client connection that speaks QMP: what Monitor and EndpointClient share.

Guarantees: connecting has a deadline; every command has a time limit; a reply
that did not come is OutcomeUnknownError, never a guess; a command that was not
sent is ConnectionLostError; events are handed on without being kept; the loss
of the connection is noticed at once and told to whoever waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, Self

from qemu.qmp import (
    ConnectError,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    StateError,
)
from qemu.qmp.error import ProtocolError
from qemu.qmp.protocol import Runstate

from qpostcopy.errors import OutcomeUnknownError, QpostcopyError
from qpostcopy.qmp.events import Event, Fanout, Subscription
from qpostcopy.qmp.sockets import CannotConnectError, ConnectFailure, connect_socket, peer_pid

CONNECT_SECONDS = 10.0
EXECUTE_SECONDS = 30.0
CLOSE_SECONDS = 2.0


class CommandError(QpostcopyError):
    """The peer ran a command and it failed.

    :ivar error_class: QMP's error class, nearly always `GenericError`.
    :ivar desc: the peer's own words.
    :ivar data: what our endpoints add (qmp/server.py), else empty.
    """

    def __init__(
        self, command: str, error_class: str, desc: str, data: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(f"{command}: {desc}")
        self.command = command
        self.error_class = error_class
        self.desc = desc
        self.data = data or {}


class ConnectionLostError(QpostcopyError):
    """There is no connection (any more). Raised by a command: it was not sent."""


class _Client(QMPClient):
    """qemu.qmp's client, its events handed to us rather than kept for ever."""

    def __init__(self, deliver: Callable[[Message], None]) -> None:
        super().__init__()
        self._deliver = deliver

    async def _event_dispatch(self, msg: Message) -> None:
        self._deliver(msg)

    async def _recv(self) -> Message:
        """QEMU may tell an event before it answers qmp_capabilities; the library takes the
        next message for the answer. An event of that moment concerns nobody yet.
        """
        message = await super()._recv()
        while self.runstate is Runstate.CONNECTING and "event" in message:
            message = await super()._recv()
        return message

    def abort(self) -> None:
        """Drop the connection without a flush."""
        if self._writer is not None:
            self._writer.transport.abort()


class Connection:
    """A connected QMP session; subclasses say to whom, and offer `connect`.

    :ivar peer_pid: the process that made the socket listen (SO_PEERCRED).
    """

    WHAT: ClassVar[str]

    def __init__(self, path: Path, pid: int) -> None:
        self.name = f"{self.WHAT} {path}"
        self.peer_pid = pid
        self._client = _Client(self._deliver)
        self._fanout = Fanout()
        self._close_asked = asyncio.Event()
        self._lost: asyncio.Future[ConnectionLostError | None]
        self._watcher: asyncio.Task[None]

    @classmethod
    async def _open(cls, path: Path, timeout_seconds: float) -> Self:
        """Connect, await the greeting, negotiate.

        :raise CannotConnectError: with the reason.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        sock = await connect_socket(path, cls.WHAT, deadline)
        connection = cls(path, peer_pid(sock))
        try:
            async with asyncio.timeout_at(deadline):
                await connection._client.connect(sock)
        except TimeoutError as error:
            message = f"{connection.name} accepts but does not answer"
            raise CannotConnectError(ConnectFailure.SILENT, message) from error
        except ConnectError as error:
            message = f"{connection.name} does not speak QMP: {error.exc or 'it hung up'}"
            raise CannotConnectError(ConnectFailure.FOREIGN, message) from error
        finally:
            if connection._client.runstate is not Runstate.RUNNING:
                sock.close()
        connection._lost = loop.create_future()
        connection._watcher = loop.create_task(connection._watch())
        return connection

    @property
    def version(self) -> str:
        """The QEMU version of the greeting, e.g. `7.2.22`."""
        numbers = self._greeting().get("qemu")
        if not isinstance(numbers, dict):
            return "unknown"
        return ".".join(str(numbers.get(part, 0)) for part in ("major", "minor", "micro"))

    @property
    def package(self) -> str:
        """The free text of the greeting, e.g. `Debian 1:7.2+dfsg-7`."""
        return str(self._greeting().get("package", ""))

    @property
    def connected(self) -> bool:
        return self._client.runstate is Runstate.RUNNING and not self._close_asked.is_set()

    def subscribe(self, *names: str) -> Subscription:
        """Events of these names, or all, from now on; use it in a `with`."""
        return self._fanout.subscribe(*names)

    def on_event(self, callback: Callable[[Event], None]) -> None:
        """Call at receipt, in order with replies. The callback must not block."""
        self._fanout.on_event(callback)

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        timeout_seconds: float = EXECUTE_SECONDS,
    ) -> object:
        """Run a command and return what it returns.

        :raise CommandError: it ran and failed.
        :raise ConnectionLostError: it was not sent.
        :raise OutcomeUnknownError: it was sent, and no reply came.
        """
        if not self.connected:
            raise ConnectionLostError(f"{command} was not sent: {self.name} is lost")
        try:
            async with asyncio.timeout(timeout_seconds):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise _command_error(command, error) from error
        except StateError as error:
            raise ConnectionLostError(f"{command} was not sent: {self.name} is lost") from error
        except TimeoutError as error:
            message = f"{command}: no reply from {self.name} within {timeout_seconds:g} s"
            raise OutcomeUnknownError(message) from error
        except (ExecInterruptedError, ProtocolError) as error:
            message = f"{command}: {self.name} was lost before the reply"
            raise OutcomeUnknownError(message) from error

    def send_fd(self, fd: int) -> None:
        """Pass a file descriptor (borrowed) for the next `add-fd` or `getfd`."""
        self._client.send_fd_scm(fd)

    async def wait_lost(self) -> ConnectionLostError | None:
        """Wait for the end: the error if the connection was lost, None if we closed it."""
        return await asyncio.shield(self._lost)

    async def close(self) -> None:
        """Hang up. Idempotent."""
        self._close_asked.set()
        await self._watcher

    def _decode(self, name: str, data: Mapping[str, object]) -> Event | None:
        """Make an event of what came in; None drops it."""
        return Event(name, data)

    def _deliver(self, message: Message) -> None:
        data = message.get("data")
        event = self._decode(str(message["event"]), data if isinstance(data, dict) else {})
        if event is not None:
            self._fanout.put(event)

    def _greeting(self) -> Mapping[str, object]:
        greeting = self._client.greeting
        assert greeting is not None, "connected without a greeting"
        return greeting.QMP.version

    async def _watch(self) -> None:
        """Notice the end, reap qemu.qmp's tasks, tell everyone."""
        ends = {
            asyncio.create_task(self._not_running()),
            asyncio.create_task(self._close_asked.wait()),
        }
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in ends:
            task.cancel()
        cause = await self._disconnect()
        error = None
        if not self._close_asked.is_set():
            reason = f": {cause}" if str(cause or "") else ""
            error = ConnectionLostError(f"{self.name} hung up{reason}")
        self._fanout.end(error)
        self._lost.set_result(error)

    async def _not_running(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()

    async def _disconnect(self) -> Exception | None:
        """Disconnect, and return what the reader or writer died of, if they did."""
        try:
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._client.disconnect()
            except TimeoutError:  # a peer that reads nothing holds up the flush
                self._client.abort()
                await self._client.disconnect()
        except Exception as error:
            return error
        return None


def _command_error(command: str, error: ExecuteError) -> CommandError:
    raw = error.received.get("error")
    data = raw.get("data") if isinstance(raw, dict) else None
    return CommandError(
        command, error.error_class, str(error), data if isinstance(data, dict) else None
    )
