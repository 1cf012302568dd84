"""The monitor against a real QEMU, and against sockets that are none."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading

import pytest

from qpostcopy.errors import ExitCode, OutcomeUnknownError
from qpostcopy.qmp.connection import CommandError, ConnectionLostError
from qpostcopy.qmp.monitor import (
    Monitor,
    MonitorAbsentError,
    MonitorConnectError,
    MonitorForeignError,
    MonitorHeldError,
)
from tests.qmp.support import bare_qemu, private_directory, run, wait_for_socket


@pytest.mark.vm
def test_a_real_monitor() -> None:
    async def body() -> None:
        with private_directory() as directory, bare_qemu(directory) as qemu:
            path = await wait_for_socket(directory / "qemu.qmp")
            monitor = await Monitor.connect(path)
            assert monitor.peer_pid == qemu.pid
            assert monitor.version.split(".")[0].isdigit()
            assert await monitor.execute("query-name") == {}
            with pytest.raises(CommandError) as caught:
                await monitor.execute("device_del", {"id": "x"})
            assert caught.value.error_class == "DeviceNotFound"
            assert str(caught.value) == "device_del: Device 'x' not found"
            with monitor.subscribe("RESUME") as events:
                await monitor.execute("cont")
                assert (await events.get(5)).name == "RESUME"
            await monitor.close()

    run(body)


@pytest.mark.vm
def test_a_socket_that_another_client_holds() -> None:
    async def body() -> None:
        with private_directory() as directory, bare_qemu(directory):
            path = await wait_for_socket(directory / "qemu.qmp")
            first = await Monitor.connect(path)
            with pytest.raises(MonitorHeldError, match="held by another client") as caught:
                await Monitor.connect(path, 0.2)
            assert caught.value.exit_code is ExitCode.REFUSED
            assert caught.value.remedy
            await first.close()
            await (await Monitor.connect(path)).close()

    run(body)


@pytest.mark.vm
def test_a_full_backlog_is_held_too() -> None:
    """asyncio's own connect would report success here, and fail at the first read."""

    async def body() -> None:
        with private_directory() as directory, bare_qemu(directory):
            path = await wait_for_socket(directory / "qemu.qmp")
            first = await Monitor.connect(path)
            waiting: list[socket.socket] = []
            while True:
                sock = socket.socket(socket.AF_UNIX)
                sock.setblocking(False)
                waiting.append(sock)
                try:
                    sock.connect(str(path))
                except BlockingIOError:
                    break
            with pytest.raises(MonitorHeldError):
                await Monitor.connect(path, 0.2)
            for sock in waiting:
                sock.close()
            await first.close()

    run(body)


@pytest.mark.vm
def test_a_hanging_qemu_is_unknown_and_comes_back() -> None:
    async def body() -> None:
        with private_directory() as directory, bare_qemu(directory) as qemu:
            path = await wait_for_socket(directory / "qemu.qmp")
            monitor = await Monitor.connect(path)
            os.kill(qemu.pid, signal.SIGSTOP)
            with pytest.raises(OutcomeUnknownError, match="query-name: no reply"):
                await monitor.execute("query-name", timeout_seconds=0.1)
            os.kill(qemu.pid, signal.SIGCONT)
            assert await monitor.execute("query-name") == {}
            await monitor.close()

    run(body)


@pytest.mark.vm
def test_a_dying_qemu_is_noticed() -> None:
    async def body() -> None:
        with private_directory() as directory, bare_qemu(directory) as qemu:
            path = await wait_for_socket(directory / "qemu.qmp")
            monitor = await Monitor.connect(path)
            os.kill(qemu.pid, signal.SIGSTOP)
            command = asyncio.create_task(monitor.execute("query-name"))
            await asyncio.sleep(0)  # let it be sent
            qemu.kill()
            with pytest.raises(OutcomeUnknownError, match="lost before the reply"):
                await command
            assert isinstance(await monitor.wait_lost(), ConnectionLostError)
            with pytest.raises(ConnectionLostError, match="query-name was not sent"):
                await monitor.execute("query-name")
            await monitor.close()
            qemu.wait()
            with pytest.raises(MonitorAbsentError, match="nobody listens"):
                await Monitor.connect(path)

    run(body)


@pytest.mark.vm
def test_a_descriptor_can_be_lent() -> None:
    async def body() -> None:
        with private_directory() as directory, bare_qemu(directory) as qemu:
            monitor = await Monitor.connect(await wait_for_socket(directory / "qemu.qmp"))
            read_fd, write_fd = os.pipe()
            monitor.send_fd(write_fd)
            lent = await monitor.execute("add-fd")
            assert isinstance(lent, dict)
            theirs = os.readlink(f"/proc/{qemu.pid}/fd/{lent['fd']}")  # noqa: PTH115
            assert theirs == os.readlink(f"/proc/self/fd/{write_fd}")  # noqa: PTH115
            os.close(read_fd)
            os.close(write_fd)
            await monitor.close()

    run(body)


def test_no_socket_no_listener_and_no_right() -> None:
    async def body() -> None:
        with private_directory() as directory:
            with pytest.raises(MonitorAbsentError, match="no QMP socket") as caught:
                await Monitor.connect(directory / "none")
            assert "-qmp unix:" in str(caught.value.remedy)
            plain = directory / "plain"
            plain.touch()
            with pytest.raises(MonitorAbsentError, match="not a socket"):
                await Monitor.connect(plain)
            with pytest.raises(MonitorConnectError, match="too long"):
                await Monitor.connect(directory / ("x" * 120))

    run(body)


def test_an_event_before_the_answer_to_the_negotiation() -> None:
    """As QEMU does in the moment of its start, which cannot be had on demand."""

    async def body() -> None:
        with private_directory() as directory, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(directory / "s"))
            listener.listen(1)
            peer = threading.Thread(target=greet_with_an_event, args=[listener])
            peer.start()
            monitor = await Monitor.connect(directory / "s")
            assert await monitor.execute("query-name") == {}
            await monitor.close()
            peer.join()

    run(body)


def greet_with_an_event(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
        while command := connection.recv(4096):
            event = {"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 0}}
            answer = {"return": {}, "id": json.loads(command).get("id")}
            connection.sendall(b"".join(json.dumps(m).encode() + b"\r\n" for m in (event, answer)))


@pytest.mark.parametrize("words", [b"SSH-2.0-x\r\n", b'{"a": 1}\r\n', b""])
def test_something_else_listens(words: bytes) -> None:
    async def body() -> None:
        with private_directory() as directory:

            async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(words)
                writer.close()

            async with await asyncio.start_unix_server(talk, str(directory / "s")):
                with pytest.raises(MonitorForeignError, match="does not speak QMP"):
                    await Monitor.connect(directory / "s")

    run(body)
