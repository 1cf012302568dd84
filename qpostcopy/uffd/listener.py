"""Accepts the lanes of one session.

The port is known at once; the lanes come in the background, within a deadline.
Whoever connects and is not our page server is dropped, and spoils nothing: all
are greeted at once, none holds a thread, who stays silent is dropped soon, and
of too many the oldest go first, the silent before those that speak.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from functools import partial

from qpostcopy.core import Hello, HelloError
from qpostcopy.core.hello import (
    HELLO_HEADER_BYTES,
    Judgement,
    hello_body_bytes,
    judge_offer,
    prepare_lane,
)
from qpostcopy.lanes import LaneKey, Lanes, LaneSetupError, lane_keys
from qpostcopy.netns import hint

log = logging.getLogger(__name__)

#: For the first bytes: one that were lost on the way come again within this.
HEADER_SECONDS = 1.0
#: For all of it; well within the page server's patience (source/connect.py).
HELLO_SECONDS = 2.0
#: Being greeted at the same time.
STRANGERS = 128
_BACKLOG = 64
_ACCEPT_PAUSE_SECONDS = 0.1


class LaneListener:
    """Listens from `open` until all lanes are in, or `close`.

    :param expected: our half of the hello; kind and index are not looked at.
    :param push_lanes: how many push lanes make a session.
    :param device_state: and whether a state lane does.
    """

    def __init__(self, expected: Hello, push_lanes: int, device_state: bool = False) -> None:
        self._expected = expected
        self._wanted = {*lane_keys(push_lanes, device_state)}
        self._socks: dict[LaneKey, socket.socket] = {}
        self._complete = asyncio.Event()
        self._greetings: set[asyncio.Task[None]] = set()
        # Of these, in the order of arrival: did not say a word yet, and did.
        self._silent: dict[asyncio.Task[None], None] = {}
        self._speaking: dict[asyncio.Task[None], None] = {}
        self._listener: socket.socket | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._taken = False

    async def open(self, host: str, port: int) -> int:
        """Listen; the port.

        :raise LaneSetupError: this address cannot be listened on.
        """
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            family, _, _, _, address = found[0]
            self._listener = socket.create_server(address, family=family, backlog=_BACKLOG)
        except OSError as error:
            raise LaneSetupError(
                f"cannot listen for lanes on {host} port {port}: {error.strerror or error}",
                remedy="set lanes.listen and lanes.port to a free address of the destination"
                + hint(error),
            ) from error
        self._listener.setblocking(False)
        self._go_on_accepting()
        return int(self._listener.getsockname()[1])

    async def lanes(self, timeout_seconds: float) -> Lanes:
        """All lanes of the session, once they are in. The caller owns the sockets.

        :raise LaneSetupError: not all came in time.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._complete.wait()
        except TimeoutError as error:
            missing = sorted(
                f"{kind.name.lower()} {n}" for kind, n in self._wanted - {*self._socks}
            )
            raise LaneSetupError(
                f"the page server did not bring all lanes: {', '.join(missing)} missing"
            ) from error
        self._taken = True
        return Lanes.of(self._socks)

    async def close(self) -> None:
        """Stop listening; lanes that nobody took are closed."""
        self._stop_accepting()
        for task in tuple(self._greetings):
            task.cancel()
        if self._greetings:
            await asyncio.wait(self._greetings)
        if not self._taken:
            for sock in self._socks.values():
                sock.close()

    def _go_on_accepting(self) -> None:
        self._pause = None
        asyncio.get_running_loop().add_reader(self._bound, self._accept)

    def _stop_accepting(self) -> None:
        """Idempotent."""
        if self._pause is not None:
            self._pause.cancel()
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    @property
    def _bound(self) -> socket.socket:
        assert self._listener is not None, "accepts before open, or after the end"
        return self._listener

    def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            sock, peer = self._bound.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return  # gone again already
        except OSError as error:  # out of descriptors: they wait in the backlog
            log.error("lanes: cannot accept: %s", error)
            loop.remove_reader(self._bound)
            self._pause = loop.call_later(_ACCEPT_PAUSE_SECONDS, self._go_on_accepting)
            return
        if len(self._silent) + len(self._speaking) >= STRANGERS:
            self._drop_oldest()
        task = asyncio.create_task(self._greet(sock, str(peer)))
        self._greetings.add(task)
        self._silent[task] = None
        task.add_done_callback(partial(self._end_greeting, sock))

    def _drop_oldest(self) -> None:
        log.warning("lanes: %d strangers at once; the oldest is dropped", STRANGERS)
        oldest = next(iter(self._silent or self._speaking))
        self._silent.pop(oldest, None)
        self._speaking.pop(oldest, None)
        oldest.cancel()

    def _end_greeting(self, sock: socket.socket, task: asyncio.Task[None]) -> None:
        """However it ended, even before it began: a socket that is no lane is closed."""
        self._greetings.discard(task)
        self._silent.pop(task, None)
        self._speaking.pop(task, None)
        if sock not in self._socks.values():
            sock.close()

    async def _greet(self, sock: socket.socket, peer: str) -> None:
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                judgement = await self._exchange(sock)
            if judgement.refusal is not None:
                raise HelloError(f"refused a lane: {judgement.refusal}")
            self._keep((judgement.kind, judgement.index), sock, peer)
        except TimeoutError:
            log.warning("lane from %s dropped: it did not finish its hello in time", peer)
        except (HelloError, OSError, ValueError) as error:
            log.warning("lane from %s dropped: %s", peer, error)

    async def _exchange(self, sock: socket.socket) -> Judgement:
        """Read the offer and answer it; what the core's `welcome` does, without a thread."""
        loop = asyncio.get_running_loop()
        sock.setblocking(False)
        prepare_lane(sock)
        async with asyncio.timeout(HEADER_SECONDS):
            header = await _receive_exactly(sock, HELLO_HEADER_BYTES)
        body_bytes = hello_body_bytes(header)
        task = asyncio.current_task()
        assert task is not None
        if task in self._silent:
            del self._silent[task]
            self._speaking[task] = None
        judgement = judge_offer(header + await _receive_exactly(sock, body_bytes), self._expected)
        await loop.sock_sendall(sock, judgement.answer)
        sock.setblocking(True)  # from here on the core's
        return judgement

    def _keep(self, key: LaneKey, sock: socket.socket, peer: str) -> None:
        if key not in self._wanted or key in self._socks:
            log.warning("lane from %s dropped: %s %d is not expected", peer, key[0].name, key[1])
            return
        self._socks[key] = sock
        if len(self._socks) == len(self._wanted):
            self._complete.set()
            self._stop_accepting()


async def _receive_exactly(sock: socket.socket, length: int) -> bytes:
    parts = b""
    while len(parts) < length:
        got = await asyncio.get_running_loop().sock_recv(sock, length - len(parts))
        if not got:
            raise HelloError("the peer hung up during the hello")
        parts += got
    return parts
