"""Lanes are opened by the right peer only, and a wrong one learns why."""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpostcopy.core import Hello, HelloError, LaneKind, RamBlock, greet, welcome

HELLO = Hello(
    "web1-20261123T101500",
    os.urandom(32),
    LaneKind.PUSH,
    3,
    (RamBlock("ram0", 1 << 30), RamBlock("/objects/ram1", 12288)),
)


def meet(offer: Hello, expected: Hello) -> tuple[object, object]:
    """What both ends get: a result, or the error that they raise."""
    ours, theirs = socket.socketpair()
    results: list[object] = [None, None]

    def run(index: int, function: object, *arguments: object) -> None:
        try:
            results[index] = function(*arguments)  # type: ignore[operator]
        except HelloError as error:
            results[index] = error

    with ours, theirs:
        threads = [
            threading.Thread(target=run, args=(0, greet, ours, offer, 5.0)),
            threading.Thread(target=run, args=(1, welcome, theirs, expected, 5.0)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results[0], results[1]


def test_the_right_peer_is_accepted() -> None:
    assert meet(HELLO, HELLO) == (None, (LaneKind.PUSH, 3))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"token": bytes(32)}, "token"),
        ({"migration_id": "web1-20261123T101501"}, "serves another migration"),
        ({"blocks": HELLO.blocks[:1]}, "RAM blocks differ"),
        ({"blocks": (RamBlock("ram0", 1 << 30), RamBlock("ram1", 12288))}, "RAM blocks differ"),
        ({"blocks": tuple(reversed(HELLO.blocks))}, "RAM blocks differ"),
    ],
)
def test_a_wrong_peer_is_refused_and_told_why(change: dict[str, object], reason: str) -> None:
    offered, welcomed = meet(replace(HELLO, **change), HELLO)  # type: ignore[arg-type]
    assert isinstance(offered, HelloError) and reason in str(offered)
    assert isinstance(welcomed, HelloError)


@pytest.mark.fuzz
@given(st.binary(max_size=400))
def test_garbage_is_refused(garbage: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(garbage)
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(HelloError):
            welcome(theirs, HELLO, 5.0)


def test_a_silent_peer_is_given_up() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        started = time.monotonic()
        with pytest.raises(HelloError, match="in time"):
            welcome(theirs, HELLO, 0.2)
        assert time.monotonic() - started < 5
