"""The QMP endpoint that our processes offer: several sessions on one unix socket.

Stands on qemu.qmp's AsyncProtocol and speaks what QEMU speaks (greeting,
`qmp_capabilities`, `id`, `{"class", "desc"}`), so any QMP client can talk to it.
Commands of ours are looked up in a table of qmp/schema.py and validated both
ways; all others go to the pass-through, if there is one.

Guarantees: one slow command blocks no other command and no other session; a
command of ours, once begun, runs to its end even if its client leaves; no client
makes us keep more than a bounded amount of memory; the socket is 0600 in a
directory that only its owner can enter, and replaces another only if nobody
listens on that.

An error carries an extra member that ordinary clients ignore:
    {"class": .., "desc": .., "data": {"kind", "remedy", "exit_code", "outcome_unknown"}}
An error of QEMU passes without it, word for word.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path

from pydantic import ValidationError
from qemu.qmp import ConnectError, Message
from qemu.qmp.error import ProtocolError
from qemu.qmp.protocol import AsyncProtocol, Runstate

from qpostcopy import __version__
from qpostcopy.errors import OutcomeUnknownError, QpostcopyError, UsageError
from qpostcopy.qmp import schema
from qpostcopy.qmp.connection import CommandError
from qpostcopy.qmp.framing import Framer, OversizeError
from qpostcopy.qmp.sockets import bind_private

log = logging.getLogger(__name__)

MESSAGE_BYTES = 4 << 20
BACKLOG_BYTES = 16 << 20
SESSIONS = 32
COMMANDS_IN_FLIGHT = 128
NEGOTIATION_SECONDS = 60.0
CLOSE_SECONDS = 2.0
_READ_BYTES = 64 << 10
_ACCEPT_PAUSE_SECONDS = 0.1

#: (command, arguments) -> what QEMU returned
PassThrough = Callable[[str, Mapping[str, object] | None], Awaitable[object]]
CommandTable = Mapping[str, tuple[type[schema.Model], type[schema.Model]]]


class CommandNotFoundError(UsageError):
    """No such command here."""


def method_name(command: str) -> str:
    """The method of the service object that runs a command of ours."""
    return command.replace("-", "_")


def error_data(error: QpostcopyError) -> dict[str, object]:
    """What travels beside class and desc; client.rebuild_error is its inverse."""
    return {
        "kind": type(error).__name__,
        "remedy": error.remedy,
        "exit_code": int(error.exit_code),
        "outcome_unknown": isinstance(error, OutcomeUnknownError),
    }


def error_object(error: QpostcopyError) -> dict[str, object]:
    """QMP's error object for one of our errors, or QEMU's own."""
    if isinstance(error, CommandError):
        return {"class": error.error_class, "desc": error.desc}
    kind = "CommandNotFound" if isinstance(error, CommandNotFoundError) else "GenericError"
    return {"class": kind, "desc": str(error), "data": error_data(error)}


class Session(AsyncProtocol[Message]):
    """One client of an endpoint."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__()
        self._endpoint = endpoint
        self._framer = Framer(MESSAGE_BYTES)
        self._texts: deque[bytes] = deque()
        self._backlog_bytes = 0
        self._in_flight = 0

    async def run(self, sock: socket.socket) -> None:
        """Serve until the client leaves or is dropped."""
        try:
            await self.connect(sock)
        except ConnectError as error:
            log.info("control session did not begin: %s", error)
            return
        finally:
            if self.runstate is not Runstate.RUNNING:
                sock.close()
        while self.runstate is Runstate.RUNNING:
            await self.runstate_changed()
        with contextlib.suppress(EOFError, OSError, ProtocolError, OversizeError):
            await self.disconnect()

    def post(self, message: Mapping[str, object]) -> None:
        """Queue a message; a client that does not read is dropped instead of fed."""
        if self.runstate is not Runstate.RUNNING:
            return
        outgoing = Message(message)
        self._backlog_bytes += len(bytes(outgoing))
        if self._backlog_bytes > BACKLOG_BYTES:
            log.warning("control session dropped: it does not read what we send")
            self.abort()
            return
        self._outgoing.put_nowait(outgoing)

    def hang_up(self) -> None:
        """Flush and disconnect; `run` ends."""
        self._schedule_disconnect()

    def abort(self) -> None:
        """Drop the connection without a flush; `run` ends."""
        if self._writer is not None:
            self._writer.transport.abort()

    async def _establish_session(self) -> None:
        async with asyncio.timeout(NEGOTIATION_SECONDS):
            await self._send(Message(self._endpoint.greeting))
            while not await self._negotiated(await self._recv()):
                pass
        await super()._establish_session()

    async def _negotiated(self, message: Message) -> bool:
        """Answer one message before the session is up; True if it ended the negotiation."""
        reply: dict[str, object] = {"return": {}}
        done = message.get("execute") == "qmp_capabilities"
        if not done:
            desc = "Expecting capabilities negotiation with 'qmp_capabilities'"
            reply = {"error": {"class": "CommandNotFound", "desc": desc}}
        await self._send(Message(_with_id(reply, message)))
        return done

    async def _do_recv(self) -> Message:
        """The next JSON object; what is none is answered and skipped, as QEMU does."""
        assert self._reader is not None
        while True:
            while self._texts:
                text = self._texts.popleft()
                try:
                    return Message(text)
                except (ProtocolError, ValueError, RecursionError):
                    await self._refuse("JSON parse error")
            data = await self._reader.read(_READ_BYTES)
            if not data:
                raise EOFError
            try:
                self._texts.extend(self._framer.feed(data))
            except OversizeError as error:
                log.warning("control session dropped: %s", error)
                await self._refuse(str(error))
                raise

    async def _refuse(self, desc: str) -> None:
        """Answer what has no id; straight to the stream, for it may come before the session."""
        assert self._writer is not None
        self._do_send(Message({"error": {"class": "GenericError", "desc": desc}}))
        await self._writer.drain()

    def _do_send(self, msg: Message) -> None:
        assert self._writer is not None
        self._writer.write(bytes(msg) + b"\r\n")

    async def _send(self, msg: Message) -> None:
        await super()._send(msg)
        assert self._writer is not None
        await self._writer.drain()
        self._backlog_bytes = max(0, self._backlog_bytes - len(bytes(msg)))

    async def _on_message(self, msg: Message) -> None:
        if self._in_flight >= COMMANDS_IN_FLIGHT:
            error = QpostcopyError("too many commands without a reply in this session")
            self.post(_with_id({"error": error_object(error)}, msg))
            return
        self._in_flight += 1
        self._endpoint.start(self._answer(msg))

    async def _answer(self, message: Message) -> None:
        try:
            reply = await self._endpoint.run_command(message)
        finally:
            self._in_flight -= 1
        self.post(_with_id(reply, message))


class Endpoint:
    """Listens on a control socket and runs commands for its sessions.

    :param path: of the unix socket.
    :param commands: a table of qmp/schema.py.
    :param service: has an async method for each, `qpc-x` -> `qpc_x(arguments) -> reply`.
    :param pass_through: runs commands that are not ours, or None.
    """

    def __init__(
        self,
        path: Path,
        commands: CommandTable,
        service: object,
        *,
        pass_through: PassThrough | None = None,
    ) -> None:
        self.path = path
        self._commands = commands
        self._service = service
        self._pass_through = pass_through
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._sessions: dict[Session, asyncio.Task[None]] = {}
        self._running: set[asyncio.Task[None]] = set()

    @property
    def greeting(self) -> dict[str, object]:
        version = {
            "qemu": {"major": 0, "minor": 0, "micro": 0},
            "package": f"qpostcopy {__version__}",
        }
        return {"QMP": {"version": version, "capabilities": []}}

    async def listen(self) -> None:
        """Bind and accept from now on.

        :raise SocketInUseError: somebody else listens there.
        """
        self._listener = bind_private(self.path)
        self._accepting = asyncio.create_task(self._accept_forever(self._listener))

    def emit(self, event: schema.Model) -> None:
        """Send an event of ours to all sessions."""
        self.broadcast(schema.event_name(event), event.model_dump(mode="json"))

    def broadcast(self, name: str, data: Mapping[str, object]) -> None:
        """Send any event to all sessions."""
        seconds = time.time()
        message: dict[str, object] = {"event": name, "data": dict(data)}
        message["timestamp"] = {
            "seconds": int(seconds),
            "microseconds": int(seconds % 1 * 1_000_000),
        }
        for session in tuple(self._sessions):
            session.post(message)

    def start(self, coroutine: Coroutine[None, None, None]) -> None:
        """Run a command as a task of the endpoint: its session may end before it."""
        task = asyncio.create_task(coroutine)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def run_command(self, message: Message) -> dict[str, object]:
        """Run one command message; the reply without its id."""
        try:
            return {"return": await self._dispatch(message)}
        except QpostcopyError as error:
            return {"error": error_object(error)}
        except Exception as error:
            log.exception("%s failed", message.get("execute"))
            problem = QpostcopyError(f"internal error: {type(error).__name__}: {error}")
            return {"error": error_object(problem)}

    async def close(self) -> None:
        """Stop accepting, give commands that run a moment, end all sessions, unlink."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait([self._accepting])
        if self._listener is not None:
            self._listener.close()
            self.path.unlink(missing_ok=True)
        others = {task for task in self._running if task is not asyncio.current_task()}
        if others:
            _, late = await asyncio.wait(others, timeout=CLOSE_SECONDS)
            for task in late:
                task.cancel()
        await self._end_sessions()

    async def _end_sessions(self) -> None:
        for session in tuple(self._sessions):
            session.hang_up()
        if self._sessions:
            _, late = await asyncio.wait(set(self._sessions.values()), timeout=CLOSE_SECONDS)
            for session in tuple(self._sessions):
                session.abort()
            if late:
                await asyncio.wait(late)

    async def _accept_forever(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:  # out of descriptors: clients wait in the backlog
                log.error("control socket: cannot accept: %s", error)
                await asyncio.sleep(_ACCEPT_PAUSE_SECONDS)
                continue
            if len(self._sessions) >= SESSIONS:
                log.warning("control session refused: %d are open", SESSIONS)
                sock.close()
                continue
            session = Session(self)
            self._sessions[session] = asyncio.create_task(self._run_session(session, sock))

    async def _run_session(self, session: Session, sock: socket.socket) -> None:
        try:
            await session.run(sock)
        except Exception:
            log.exception("control session failed")
        finally:
            del self._sessions[session]

    async def _dispatch(self, message: Message) -> object:
        command = message.get("execute")
        arguments = message.get("arguments")
        if not isinstance(command, str):
            raise UsageError("QMP input lacks member 'execute' of type string")
        if arguments is not None and not isinstance(arguments, dict):
            raise UsageError("QMP input member 'arguments' must be an object")
        if command in self._commands:
            return await self._run_ours(command, arguments or {})
        ours = command.startswith("qpc-") or command == "qmp_capabilities"
        if ours or self._pass_through is None:
            raise CommandNotFoundError(f"The command {command} has not been found")
        return await self._pass_through(command, arguments)

    async def _run_ours(self, command: str, raw: Mapping[str, object]) -> dict[str, object]:
        takes, gives = self._commands[command]
        try:
            arguments = takes.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "arguments"
            raise UsageError(f"{command}: {where}: {first['msg']}") from error
        reply = await getattr(self._service, method_name(command))(arguments)
        assert type(reply) is gives, f"{command} must return {gives.__name__}"
        content: dict[str, object] = reply.model_dump(mode="json")
        return content


def _with_id(reply: Mapping[str, object], message: Message) -> dict[str, object]:
    answer = dict(reply)
    if "id" in message:
        answer["id"] = message["id"]
    return answer
