"""The connection for device state: made by us, lent to QEMU, or not there at all."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from qpostcopy import stream
from qpostcopy.migration import COMMAND_SECONDS
from qpostcopy.qmp.holder import LEND_SECONDS, MonitorHolder
from qpostcopy.qmp.sockets import CannotConnectError
from tests.qmp.support import private_directory, run


class Borrower(MonitorHolder):
    """A QEMU that keeps what it is lent."""

    def __init__(self) -> None:
        super().__init__(Path("/none"), on_event=lambda _: None, on_lost=lambda _: None)
        self.got: dict[str, int] = {}

    async def lend(self, fd: int, name: str) -> None:
        self.got[name] = os.dup(fd)


def test_each_gets_its_end_of_one_connection() -> None:
    async def body() -> None:
        with private_directory() as directory:
            source, destination = Borrower(), Borrower()
            listener = stream.StreamListener(directory)
            await stream.connect_and_lend(directory, source)
            await listener.accept_and_lend(destination)
            listener.close()
            ends = source.got[stream.NAME], destination.got[stream.NAME]
            assert [os.get_blocking(end) for end in ends] == [True, True]
            os.write(ends[0], b"state")
            assert os.read(ends[1], 9) == b"state"
            for end in ends:
                os.close(end)
            assert list(directory.iterdir()) == []

    run(body)


def test_a_page_server_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CONNECT_SECONDS", 0.05)

    async def body() -> None:
        with private_directory() as directory:
            listener = stream.StreamListener(directory)
            with pytest.raises(stream.NoStreamError, match="did not connect"):
                await listener.accept_and_lend(Borrower())
            listener.close()
            assert list(directory.iterdir()) == []

    run(body)


def test_a_controller_waits_long_enough_to_hear_why() -> None:
    assert stream.CONNECT_SECONDS + LEND_SECONDS < COMMAND_SECONDS


def test_nobody_listens() -> None:
    async def body() -> None:
        with (
            private_directory() as directory,
            pytest.raises(CannotConnectError, match="No such file"),
        ):
            await stream.connect_and_lend(directory, Borrower())

    run(body)


def test_a_listener_that_was_killed_is_replaced() -> None:
    async def body() -> None:
        with private_directory() as directory:
            dead = stream.StreamListener(directory)
            dead._socket.close()
            listener = stream.StreamListener(directory)
            source, destination = Borrower(), Borrower()
            async with asyncio.timeout(5):
                await stream.connect_and_lend(directory, source)
                await listener.accept_and_lend(destination)
            for borrower in (source, destination):
                os.close(borrower.got[stream.NAME])
            listener.close()

    run(body)
