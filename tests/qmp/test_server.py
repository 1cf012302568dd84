"""The endpoint, spoken to by ordinary QMP clients, several at once, and by hostile ones."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError, QMPClient

from qpostcopy.errors import RefusedError
from qpostcopy.qmp import schema, server
from qpostcopy.qmp.connection import CommandError
from qpostcopy.qmp.server import Endpoint, method_name
from qpostcopy.qmp.sockets import SocketInUseError, bind_private
from tests.qmp.support import controller_endpoint, echo, private_directory, run

NEGOTIATE = b'{"execute": "qmp_capabilities", "id": 0}\n'


class RawClient:
    """Bytes in, lines out."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, path: Path, *, negotiate: bool = True) -> RawClient:
        client = cls(*await asyncio.open_unix_connection(str(path), limit=1 << 20))
        try:
            assert "QMP" in await client.receive()
        except EOFError:
            await client.close()
            raise
        if negotiate:
            assert await client.ask(NEGOTIATE) == {"return": {}, "id": 0}
        return client

    async def receive(self) -> dict[str, object]:
        line = await self.reader.readline()
        if not line:
            raise EOFError
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    async def ask(self, data: bytes) -> dict[str, object]:
        self.writer.write(data)
        return await self.receive()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


async def still_serves(path: Path) -> None:
    client = await RawClient.connect(path)
    assert "return" in await client.ask(b'{"execute": "qpc-hello"}')
    await client.close()


def test_an_ordinary_client_talks_to_it() -> None:
    async def body() -> None:
        async with controller_endpoint(echo) as (endpoint, _):
            client = QMPClient("test")
            await client.connect(str(endpoint.path))
            hello = await client.execute("qpc-hello")
            assert isinstance(hello, dict)
            assert hello["role"] == "controller"
            assert await client.execute("query-status", {"a": 1}) == {
                "command": "query-status",
                "arguments": {"a": 1},
            }
            endpoint.emit(schema.Fatal(reason="test"))
            event = await client.events.get()
            assert (event["event"], event["data"]) == ("QPC_FATAL", {"reason": "test"})
            await client.disconnect()

    run(body)


def test_an_id_of_any_kind_is_echoed() -> None:
    async def body() -> None:
        async with controller_endpoint() as (endpoint, _):
            client = await RawClient.connect(endpoint.path)
            for identity in (7, "x", {"a": [None]}, None):
                request = json.dumps({"execute": "qpc-hello", "id": identity}).encode()
                assert (await client.ask(request))["id"] == identity
            assert "id" not in await client.ask(b'{"execute": "qpc-hello"}')
            await client.close()

    run(body)


@pytest.mark.parametrize(
    ("request_", "error_class", "words"),
    [
        ({"execute": "qpc-nonsense"}, "CommandNotFound", "qpc-nonsense"),
        ({"execute": "query-status"}, "CommandNotFound", "query-status"),
        ({"execute": "qmp_capabilities"}, "CommandNotFound", "qmp_capabilities"),
        ({"execute": 5}, "GenericError", "execute"),
        ({"exec-oob": "qpc-hello"}, "GenericError", "execute"),
        ({"execute": "qpc-hello", "arguments": [1]}, "GenericError", "object"),
        ({"execute": "qpc-hello", "arguments": {"x": 1}}, "GenericError", "qpc-hello: x"),
        ({"execute": "qpc-abort", "arguments": {"signal": "SIGKILL"}}, "GenericError", "signal"),
    ],
)
def test_wrong_requests_are_refused_by_name(
    request_: dict[str, object], error_class: str, words: str
) -> None:
    async def body() -> None:
        async with controller_endpoint() as (endpoint, _):
            client = await RawClient.connect(endpoint.path)
            error = (await client.ask(json.dumps(request_).encode()))["error"]
            assert isinstance(error, dict)
            assert error["class"] == error_class
            assert words in error["desc"]
            await client.close()

    run(body)


def test_nothing_runs_before_the_negotiation() -> None:
    async def body() -> None:
        async with controller_endpoint() as (endpoint, _):
            client = await RawClient.connect(endpoint.path, negotiate=False)
            reply = await client.ask(b'{"execute": "qpc-hello", "id": 1}')
            assert reply["id"] == 1
            assert "error" in reply
            assert "return" in await client.ask(NEGOTIATE)
            await client.close()

    run(body)


def test_an_error_carries_remedy_and_exit_code() -> None:
    async def body() -> None:
        async with controller_endpoint() as (endpoint, _):
            client = await RawClient.connect(endpoint.path)
            error = (await client.ask(b'{"execute": "qpc-status"}'))["error"]
            assert error == {
                "class": "GenericError",
                "desc": "no status today",
                "data": {
                    "kind": "RefusedError",
                    "remedy": "ask tomorrow",
                    "exit_code": 3,
                    "outcome_unknown": False,
                },
            }
            await client.close()

    run(body)


def test_an_error_of_qemu_passes_word_for_word() -> None:
    async def fail(command: str, _: Mapping[str, object] | None) -> object:
        raise CommandError(command, "DeviceNotFound", "Device 'x' not found")

    async def body() -> None:
        async with controller_endpoint(fail) as (endpoint, _):
            client = QMPClient("test")
            await client.connect(str(endpoint.path))
            with pytest.raises(ExecuteError) as caught:
                await client.execute("device_del", {"id": "x"})
            assert caught.value.received["error"] == {
                "class": "DeviceNotFound",
                "desc": "Device 'x' not found",
            }
            await client.disconnect()

    run(body)


def test_a_slow_command_blocks_no_other_and_no_other_session() -> None:
    async def body() -> None:
        async with controller_endpoint() as (endpoint, service):
            first = await RawClient.connect(endpoint.path)
            second = await RawClient.connect(endpoint.path)
            first.writer.write(b'{"execute": "qpc-abort", "id": "slow"}')
            await service.abort_begun.wait()
            assert (await first.ask(b'{"execute": "qpc-hello", "id": "a"}'))["id"] == "a"
            assert (await second.ask(b'{"execute": "qpc-hello", "id": "b"}'))["id"] == "b"
            service.abort_may_end.set()
            assert (await first.receive())["id"] == "slow"
            await first.close()
            await second.close()

    run(body)


def test_pass_through_keeps_the_order_of_a_session() -> None:
    seen: list[str] = []
    done = asyncio.Event()

    async def record(command: str, _: Mapping[str, object] | None) -> object:
        seen.append(command)
        if len(seen) == 20:
            done.set()
        await done.wait()
        return {}

    async def body() -> None:
        async with controller_endpoint(record) as (endpoint, _):
            client = await RawClient.connect(endpoint.path)
            client.writer.write(b"".join(b'{"execute": "c%d"}' % n for n in range(20)))
            for _ in range(20):
                assert await client.receive() == {"return": {}}
            assert seen == [f"c{n}" for n in range(20)]
            await client.close()

    run(body)


def test_a_command_runs_to_its_end_though_its_client_left() -> None:
    async def body() -> None:
        async with controller_endpoint() as (endpoint, service):
            client = await RawClient.connect(endpoint.path)
            client.writer.write(b'{"execute": "qpc-abort"}')
            await service.abort_begun.wait()
            await client.close()
            await still_serves(endpoint.path)
            service.abort_may_end.set()
            await service.abort_done.wait()

    run(body)


@pytest.mark.parametrize(
    "garbage",
    [b"hello\n", b"{]}\n", b"[1, 2]\n", b'{"a": \xff}\n', b"[" * 50_000 + b"]" * 50_000, b"}\n"],
    ids=["text", "brackets", "array", "not-utf8", "deep", "stray"],
)
def test_garbage_gets_an_error_and_the_session_goes_on(garbage: bytes) -> None:
    async def body() -> None:
        async with controller_endpoint() as (endpoint, _):
            client = await RawClient.connect(endpoint.path)
            assert "error" in await client.ask(garbage)
            reply = await client.ask(b'{"execute": "qpc-hello"}')
            while "return" not in reply:  # garbage may be more than one message
                reply = await client.receive()
            await client.close()

    run(body)


def test_an_endless_message_ends_the_session_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MESSAGE_BYTES", 10_000)

    async def body() -> None:
        async with controller_endpoint() as (endpoint, _):
            client = await RawClient.connect(endpoint.path)
            assert "error" in await client.ask(b'{"a": "' + b"x" * 20_000)
            with pytest.raises((EOFError, ConnectionError)):
                await client.receive()
            await client.close()
            await still_serves(endpoint.path)

    run(body)


def test_a_client_that_does_not_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BACKLOG_BYTES", 1 << 20)

    async def body() -> None:
        async with controller_endpoint() as (endpoint, _):
            deaf = await RawClient.connect(endpoint.path)
            deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
            ears = await RawClient.connect(endpoint.path)
            for _ in range(100):  # 6 MiB: beyond kernel buffers and our limit
                endpoint.emit(schema.Fatal(reason="x" * 65536))
                assert (await ears.receive())["event"] == "QPC_FATAL"
            assert len(endpoint._sessions) == 1
            assert "return" in await ears.ask(b'{"execute": "qpc-hello"}')
            await ears.close()
            await deaf.close()

    run(body)


def test_too_many_commands_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "COMMANDS_IN_FLIGHT", 3)

    async def body() -> None:
        async with controller_endpoint() as (endpoint, service):
            client = await RawClient.connect(endpoint.path)
            client.writer.write(b'{"execute": "qpc-abort", "id": 0}' * 3)
            reply = await client.ask(b'{"execute": "qpc-hello", "id": 1}')
            assert reply["id"] == 1
            assert "error" in reply
            service.abort_may_end.set()
            for _ in range(3):
                assert await client.receive() == {"return": {}, "id": 0}
            assert "return" in await client.ask(b'{"execute": "qpc-hello"}')
            await client.close()

    run(body)


def test_too_many_sessions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SESSIONS", 2)

    async def body() -> None:
        async with controller_endpoint() as (endpoint, _):
            clients = [await RawClient.connect(endpoint.path) for _ in range(2)]
            with pytest.raises(EOFError):
                await RawClient.connect(endpoint.path)
            leaving = tuple(endpoint._sessions.values())
            await clients.pop().close()
            await asyncio.wait(leaving, return_when=asyncio.FIRST_COMPLETED)
            await still_serves(endpoint.path)
            await clients.pop().close()

    run(body)


def test_a_silent_client_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "NEGOTIATION_SECONDS", 0.05)

    async def body() -> None:
        async with controller_endpoint() as (endpoint, _):
            client = await RawClient.connect(endpoint.path, negotiate=False)
            with pytest.raises(EOFError):
                await client.receive()
            await client.close()

    run(body)


def test_close_ends_sessions_and_removes_the_socket() -> None:
    async def body() -> None:
        with private_directory() as directory:
            endpoint = Endpoint(directory / "s", schema.CONTROLLER, object())
            await endpoint.listen()
            client = await RawClient.connect(endpoint.path)
            silent = await RawClient.connect(endpoint.path, negotiate=False)
            await endpoint.close()
            for each in (client, silent):
                with pytest.raises(EOFError):
                    await each.receive()
                await each.close()
            assert not endpoint.path.exists()

    run(body)


def test_the_socket_is_private_and_replaces_only_the_dead() -> None:
    with private_directory() as directory:
        path = directory / "s"
        first = bind_private(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(SocketInUseError, match="already listens"):
            bind_private(path)
        first.close()
        bind_private(path).close()
        path.unlink()
        path.write_text("precious")
        with pytest.raises(RefusedError, match="not a socket"):
            bind_private(path)
        assert path.read_text() == "precious"


def test_an_open_directory_is_refused() -> None:
    with private_directory() as directory:
        directory.chmod(0o755)
        with pytest.raises(RefusedError) as caught:
            bind_private(directory / "s")
        assert caught.value.remedy == f"chmod 700 {directory}"
        assert not (directory / "s").exists()


def test_a_path_too_long_for_a_socket_is_refused() -> None:
    with private_directory() as directory, pytest.raises(RefusedError, match="too long"):
        bind_private(directory / ("x" * 120))


def test_the_umask_is_put_back() -> None:
    before = os.umask(0o022)
    try:
        with private_directory() as directory:
            bind_private(directory / "s").close()
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_method_names() -> None:
    assert method_name("qpc-hello") == "qpc_hello"
