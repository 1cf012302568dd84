"""The greeting of a lane: both sides agree on the migration before any page moves.

`greet` and `welcome` block, with a deadline, and are called from a thread; what
they are made of (`hello_body_bytes`, `judge_offer`, `prepare_lane`) does no
waiting, for who greets in an event loop. The codec is C (wire.c).
"""

from __future__ import annotations

import hmac
import socket
import time
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from qpostcopy.core.calls import CoreError, call, ffi, lib
from qpostcopy.core.types import PAGE_BYTES, RamBlock
from qpostcopy.errors import QpostcopyError

#: What can be judged before a peer is believed to send a hello at all.
HELLO_HEADER_BYTES = int(lib.QPC_HELLO_HEADER_BYTES)
#: A peer that vanished without a word is noticed after this long.
DEAD_PEER_MS = 15_000
HIGHEST_VERSION = int(lib.QPC_VERSION_HIGHEST)


class HelloError(QpostcopyError):
    """The lane's peer is not who it should be, or does not want us."""


class LaneKind(IntEnum):
    DEMAND = 1
    PUSH = 2
    STATE = 3


class Verdict(IntEnum):
    """What a hello says; the values of `enum qpc_hello_status`."""

    OFFER = 1
    ACCEPT = 2
    VERSION = 3
    IDENTITY = 4
    BLOCKS = 5
    LANE = 6


REFUSALS = {
    Verdict.VERSION: "it speaks other versions of the lane protocol",
    Verdict.IDENTITY: "it serves another migration, or the token differs",
    Verdict.BLOCKS: "its RAM blocks differ",
    Verdict.LANE: "it does not expect this lane",
}


@dataclass(frozen=True, slots=True)
class Hello:
    """Who greets: the migration, and which of its lanes this is."""

    migration_id: str
    token: bytes
    kind: LaneKind
    index: int
    blocks: tuple[RamBlock, ...]
    features: int = 0


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is thought of an offer: the bytes to answer with, and why it is refused (None: not)."""

    kind: LaneKind
    index: int
    answer: bytes
    refusal: str | None


def greet(sock: socket.socket, hello: Hello, timeout_seconds: float) -> int:
    """Page server's side: offer, and wait to be accepted. The version that both speak.

    :raise HelloError: refused, or not answered in time.
    """
    deadline = time.monotonic() + timeout_seconds
    prepare_lane(sock)
    _send(sock, _encode(hello, Verdict.OFFER), deadline)
    answer = _decode(_receive(sock, deadline))
    verdict = Verdict(answer.status)
    if verdict in REFUSALS:
        raise HelloError(
            f"the handler refused the {hello.kind.name.lower()} lane {hello.index}: "
            f"{REFUSALS[verdict]}"
        )
    version = _common_version(answer)
    if verdict is not Verdict.ACCEPT or not version:
        raise HelloError("the handler's answer to our hello makes no sense")
    sock.settimeout(None)
    return version


def welcome(sock: socket.socket, expected: Hello, timeout_seconds: float) -> tuple[LaneKind, int]:
    """Handler's side: read the offer, check it, accept or refuse it.

    `expected.kind` and `expected.index` are not looked at: which lane it is, is
    the answer. A stranger learns nothing but which check it failed.

    :raise HelloError: the peer was refused, or is no page server.
    """
    deadline = time.monotonic() + timeout_seconds
    prepare_lane(sock)
    judgement = judge_offer(_receive(sock, deadline), expected)
    _send(sock, judgement.answer, deadline)
    if judgement.refusal is not None:
        raise HelloError(f"refused a lane: {judgement.refusal}")
    sock.settimeout(None)
    return judgement.kind, judgement.index


def hello_body_bytes(header: bytes) -> int:
    """How many bytes follow a hello's header of HELLO_HEADER_BYTES; bounded.

    :raise HelloError: whoever sent it is no lane of ours.
    """
    length = ffi.new("size_t *")
    _checked(lib.qpc_hello_body_bytes, header, length)
    return int(length[0])


def judge_offer(whole: bytes, expected: Hello) -> Judgement:
    """Read an offer, header and body, and find the answer to it. As `welcome`, without a socket.

    :raise HelloError: it is no hello: no answer is due.
    """
    offer = _decode(whole)
    verdict, why = _judge(offer, expected)
    answer = Hello("", b"", LaneKind(offer.lane_kind), offer.lane_index, ())
    refusal = None if verdict is Verdict.ACCEPT else why
    return Judgement(answer.kind, answer.index, _encode(answer, verdict), refusal)


def prepare_lane(sock: socket.socket) -> None:
    """Small frames at once; a peer that is gone without a word is noticed."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_PEER_MS)


def _judge(offer: Any, expected: Hello) -> tuple[Verdict, str]:
    theirs = ffi.string(offer.migration_id).decode(errors="replace")
    if offer.status != Verdict.OFFER:
        return Verdict.LANE, "its hello is no offer"
    if not hmac.compare_digest(bytes(offer.token), expected.token):
        return Verdict.IDENTITY, f"wrong token (for migration {theirs!r})"
    if theirs != expected.migration_id:
        return Verdict.IDENTITY, f"migration {theirs!r}, not {expected.migration_id!r}"
    if not _common_version(offer):
        return Verdict.VERSION, (
            f"versions {offer.version_lowest}..{offer.version_highest}, "
            f"ours {lib.QPC_VERSION_LOWEST}..{lib.QPC_VERSION_HIGHEST}"
        )
    blocks = _blocks_of(offer)
    if offer.page_bytes != PAGE_BYTES or blocks != expected.blocks:
        return Verdict.BLOCKS, f"RAM blocks {blocks}, ours {expected.blocks}"
    return Verdict.ACCEPT, ""


def _common_version(hello: Any) -> int:
    return int(
        lib.qpc_version_choose(
            lib.QPC_VERSION_LOWEST,
            lib.QPC_VERSION_HIGHEST,
            hello.version_lowest,
            hello.version_highest,
        )
    )


def _blocks_of(hello: Any) -> tuple[RamBlock, ...]:
    return tuple(
        RamBlock(
            ffi.string(hello.blocks[i].name).decode(errors="replace"), hello.blocks[i].size_bytes
        )
        for i in range(hello.block_count)
    )


def _encode(hello: Hello, verdict: Verdict) -> bytes:
    assert len(hello.blocks) <= lib.QPC_BLOCKS_MAX
    raw = ffi.new("struct qpc_hello *")
    raw.version_lowest = lowest_version(hello.kind)
    raw.version_highest = lib.QPC_VERSION_HIGHEST
    raw.status = verdict
    raw.lane_kind = hello.kind
    raw.lane_index = hello.index
    raw.page_bytes = PAGE_BYTES
    raw.features = hello.features
    ffi.memmove(raw.migration_id, hello.migration_id.encode(), len(hello.migration_id.encode()))
    ffi.memmove(raw.token, hello.token, len(hello.token))
    raw.block_count = len(hello.blocks)
    for entry, block in zip(raw.blocks, hello.blocks, strict=False):
        entry.size_bytes = block.size_bytes
        ffi.memmove(entry.name, block.name.encode(), len(block.name.encode()))
    out = ffi.new("uint8_t[]", lib.QPC_HELLO_HEADER_BYTES + lib.QPC_HELLO_BODY_MAX)
    return bytes(ffi.buffer(out, lib.qpc_hello_encode(raw, out)))


def lowest_version(kind: LaneKind) -> int:
    """The lowest version in which there is such a lane.

    A peer of version 1 does not get as far as that: it knows no such kind, and hangs up.
    """
    return int(lib.QPC_VERSION_STATE if kind is LaneKind.STATE else lib.QPC_VERSION_LOWEST)


def _decode(whole: bytes) -> Any:
    raw = ffi.new("struct qpc_hello *")
    _checked(lib.qpc_hello_decode, whole, len(whole), raw)
    return raw


def _checked(function: Any, *arguments: Any) -> None:
    try:
        call(function, *arguments)
    except CoreError as error:
        raise HelloError(f"not a lane of qpostcopy: {error}") from error


def _receive(sock: socket.socket, deadline: float) -> bytes:
    header = _receive_exactly(sock, HELLO_HEADER_BYTES, deadline)
    return header + _receive_exactly(sock, hello_body_bytes(header), deadline)


def _receive_exactly(sock: socket.socket, length: int, deadline: float) -> bytes:
    parts = b""
    while len(parts) < length:
        got = _bounded(sock, deadline, sock.recv, length - len(parts))
        if not got:
            raise HelloError("the peer hung up during the hello")
        parts += got
    return parts


def _send(sock: socket.socket, data: bytes, deadline: float) -> None:
    _bounded(sock, deadline, sock.sendall, data)


def _bounded(sock: socket.socket, deadline: float, operation: Any, argument: Any) -> Any:
    sock.settimeout(max(deadline - time.monotonic(), 0.001))
    try:
        return operation(argument)
    except TimeoutError as error:
        raise HelloError("the peer did not finish its hello in time") from error
    except OSError as error:
        raise HelloError(f"the lane broke during the hello: {error}") from error
