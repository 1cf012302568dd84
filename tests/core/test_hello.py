"""Lanes are opened by the right peer only, and a wrong one learns why."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpostcopy.core import Hello, HelloError, LaneKind, RamBlock, greet, welcome
from qpostcopy.core.hello import HELLO_HEADER_BYTES, HIGHEST_VERSION, judge_offer

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
    assert meet(HELLO, HELLO) == (HIGHEST_VERSION, (LaneKind.PUSH, 3))


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


def offer_of(hello: Hello) -> bytes:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(HelloError):
            greet(ours, hello, 0.001)
        return theirs.recv(1 << 16)


def speaking(offer: bytes, lowest: int, highest: int) -> bytes:
    """The same from a peer of other versions; they follow the magic."""
    at = HELLO_HEADER_BYTES - 8
    return offer[:at] + struct.pack("<HH", lowest, highest) + offer[at + 4 :]


def test_a_page_server_of_the_version_before_is_accepted() -> None:
    judgement = judge_offer(speaking(offer_of(HELLO), 1, 1), HELLO)
    assert judgement.refusal is None
    versions = struct.unpack_from("<HH", judgement.answer, HELLO_HEADER_BYTES - 8)
    assert versions == (1, 2)


def test_a_state_lane_is_of_version_2() -> None:
    state = replace(HELLO, kind=LaneKind.STATE, index=0)
    assert meet(state, HELLO) == (HIGHEST_VERSION, (LaneKind.STATE, 0))
    offer = offer_of(state)
    assert offer == speaking(offer, 2, 2), "there is none in version 1"
    with pytest.raises(HelloError, match="a state lane of a version without"):
        judge_offer(speaking(offer, 1, 2), HELLO)


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
