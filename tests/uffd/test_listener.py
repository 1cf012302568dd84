"""Lanes come in, strangers do not, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from qpostcopy.core import Hello, HelloError, LaneKind, RamBlock, greet
from qpostcopy.core.hello import HELLO_HEADER_BYTES
from qpostcopy.lanes import Lanes, LaneSetupError
from qpostcopy.qmp.schema import Connect
from qpostcopy.source.connect import connect_lanes
from qpostcopy.uffd import listener as listener_module
from qpostcopy.uffd.listener import STRANGERS, LaneListener
from tests.qmp.support import run

TOKEN = bytes(range(32))
BLOCKS = (RamBlock("ram", 1 << 20),)


def hello(
    kind: LaneKind = LaneKind.DEMAND,
    index: int = 0,
    token: bytes = TOKEN,
    blocks: tuple[RamBlock, ...] = BLOCKS,
) -> Hello:
    return Hello("m-1", token, kind, index, blocks)


def offer() -> bytes:
    """What a page server says, in bytes."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(HelloError):
            greet(ours, hello(), 0.001)
        return theirs.recv(1 << 16)


async def connect(port: int, push_lanes: int) -> tuple[socket.socket, ...]:
    lanes = await connect_all(port, push_lanes, device_state=False)
    return (lanes.demand, *lanes.push)


async def connect_all(port: int, push_lanes: int, device_state: bool) -> Lanes:
    arguments = Connect(
        host="127.0.0.1",
        port=port,
        push_lanes=push_lanes,
        token=TOKEN.hex(),
        device_state=device_state,
    )
    return await asyncio.to_thread(connect_lanes, arguments, "m-1", BLOCKS)


async def knock(port: int, words: bytes | Hello) -> None:
    """Connect, say something, and wait to be thrown out."""

    def body() -> None:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            if isinstance(words, Hello):
                greet(sock, words, 5)
            else:
                sock.sendall(words)
            sock.settimeout(5)
            assert sock.recv(1) == b""

    await asyncio.to_thread(body)


def test_all_lanes_come_in_in_order() -> None:
    async def body() -> None:
        listener = LaneListener(hello(), push_lanes=3)
        port = await listener.open("127.0.0.1", 0)
        theirs = await connect(port, 3)
        lanes = await listener.lanes(5)
        for ours, other in zip((lanes.demand, *lanes.push), theirs, strict=True):
            assert ours.getpeername() == other.getsockname()
            other.close()
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port))
        await listener.close()
        assert lanes.demand.fileno() >= 0  # taken: ours to close
        lanes.close()

    run(body)


def test_the_lane_of_device_state_comes_with_them_and_not_a_byte_of_it_is_read() -> None:
    async def body() -> None:
        listener = LaneListener(hello(), push_lanes=2, device_state=True)
        theirs = await connect_all(await listener.open("127.0.0.1", 0), 2, device_state=True)
        assert theirs.device_state is not None
        theirs.device_state.sendall(b"state")
        lanes = await listener.lanes(5)
        await listener.close()
        assert lanes.device_state is not None
        assert lanes.device_state.getpeername() == theirs.device_state.getsockname()
        assert lanes.device_state.recv(9) == b"state"
        for end in (lanes.device_state, theirs.device_state):
            assert end.getblocking()
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        lanes.close()
        theirs.close()

    run(body)


def test_a_session_without_device_state_takes_no_lane_for_it() -> None:
    """As after the switch: QEMU's stream has done its work."""

    async def body() -> None:
        listener = LaneListener(hello(), push_lanes=1)
        port = await listener.open("127.0.0.1", 0)
        await knock(port, hello(LaneKind.STATE))
        theirs = await connect_all(port, 1, device_state=False)
        lanes = await listener.lanes(5)
        await listener.close()
        assert (theirs.device_state, lanes.device_state) == (None, None)
        lanes.close()
        theirs.close()

    run(body)


@pytest.mark.parametrize(
    ("stranger", "told"),
    [
        (hello(token=bytes(32)), "token differs"),
        (hello(blocks=(RamBlock("ram", 2 << 20),)), "RAM blocks differ"),
        (b"GET / HTTP/1.1\r\n\r\n" + b"x" * 200, None),
    ],
)
def test_strangers_are_dropped_and_spoil_nothing(stranger: bytes | Hello, told: str | None) -> None:
    async def body() -> None:
        listener = LaneListener(hello(), push_lanes=1)
        port = await listener.open("127.0.0.1", 0)
        with socket.create_connection(("127.0.0.1", port)):  # silent, and stays
            if told is None:
                with contextlib.suppress(ConnectionError):  # dropped with our words unread
                    await knock(port, stranger)
            else:
                with pytest.raises(HelloError, match=told):
                    await knock(port, stranger)
            theirs = await connect(port, 1)
            lanes = await listener.lanes(5)
            await listener.close()
        for sock in (*theirs, lanes.demand, *lanes.push):
            sock.close()

    run(body)


def strangers(port: int, count: int) -> list[socket.socket]:
    """They connect, and say nothing."""
    return [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]


@pytest.mark.parametrize("count", [8, 70, STRANGERS + 50])
def test_silent_strangers_do_not_keep_the_page_server_out(count: int) -> None:
    async def body() -> None:
        listener = LaneListener(hello(), push_lanes=2)
        port = await listener.open("127.0.0.1", 0)
        silent = await asyncio.to_thread(strangers, port, count)
        theirs = await connect(port, 2)
        lanes = await listener.lanes(5)
        assert len(listener._greetings) <= STRANGERS
        await listener.close()
        lanes.close()
        for sock in (*theirs, *silent):
            sock.close()

    run(body)


@pytest.mark.parametrize("said_bytes", [0, HELLO_HEADER_BYTES - 1, HELLO_HEADER_BYTES])
def test_a_hello_that_stops_half_way_is_given_up(
    said_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = said_bytes == HELLO_HEADER_BYTES
    monkeypatch.setattr(listener_module, "HEADER_SECONDS", 60 if heard else 0.05)
    monkeypatch.setattr(listener_module, "HELLO_SECONDS", 0.05 if heard else 60)

    async def body() -> None:
        listener = LaneListener(hello(), push_lanes=1)
        port = await listener.open("127.0.0.1", 0)
        await knock(port, offer()[:said_bytes])
        await listener.close()

    run(body)


def test_of_too_many_the_silent_are_dropped_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "STRANGERS", 3)
    words = offer()

    async def body() -> None:
        listener = LaneListener(hello(), push_lanes=0)
        port = await listener.open("127.0.0.1", 0)
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(words[:HELLO_HEADER_BYTES])
            while not listener._speaking:  # noqa: ASYNC110
                await asyncio.sleep(0)
            silent = await asyncio.to_thread(strangers, port, 6)
            while len(listener._silent) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0)
            slow.sendall(words[HELLO_HEADER_BYTES:])
            lanes = await listener.lanes(1)
            assert lanes.demand.getpeername() == slow.getsockname()
            await listener.close()
            lanes.close()
        for sock in silent:
            sock.close()

    run(body)


def test_a_lane_that_is_there_already_or_not_wanted_is_dropped() -> None:
    async def body() -> None:
        listener = LaneListener(hello(), push_lanes=1)
        port = await listener.open("127.0.0.1", 0)
        first = socket.create_connection(("127.0.0.1", port))
        await asyncio.to_thread(greet, first, hello(), 5)
        await knock(port, hello())
        await knock(port, hello(LaneKind.PUSH, 1))
        second = socket.create_connection(("127.0.0.1", port))
        await asyncio.to_thread(greet, second, hello(LaneKind.PUSH, 0), 5)
        lanes = await listener.lanes(5)
        assert lanes.demand.getpeername() == first.getsockname()
        await listener.close()
        lanes.close()
        first.close()
        second.close()

    run(body)


def test_lanes_that_do_not_come_are_named_and_those_that_came_are_closed() -> None:
    async def body() -> None:
        listener = LaneListener(hello(), push_lanes=2)
        port = await listener.open("127.0.0.1", 0)
        first = socket.create_connection(("127.0.0.1", port))
        await asyncio.to_thread(greet, first, hello(), 5)
        with pytest.raises(LaneSetupError, match="push 0, push 1 missing"):
            await listener.lanes(0.05)
        await listener.close()
        assert first.recv(1) == b""
        first.close()

    run(body)


def test_close_ends_a_greeting_in_progress() -> None:
    async def body() -> None:
        listener = LaneListener(hello(), push_lanes=1)
        port = await listener.open("127.0.0.1", 0)
        silent = socket.create_connection(("127.0.0.1", port))
        while not listener._greetings:  # noqa: ASYNC110
            await asyncio.sleep(0)
        async with asyncio.timeout(2):  # well below the deadline of a hello
            await listener.close()
        assert silent.recv(1) == b""
        silent.close()

    run(body)


def test_an_address_that_cannot_be_listened_on() -> None:
    async def body() -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            listener = LaneListener(hello(), push_lanes=1)
            with pytest.raises(LaneSetupError, match="cannot listen"):
                await listener.open("127.0.0.1", other.getsockname()[1])
            await listener.close()

    run(body)
