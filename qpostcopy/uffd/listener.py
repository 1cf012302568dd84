"""Accepts the lanes of one session.

The port is known at once; the lanes come in the background, within a deadline.
Whoever connects and is not our page server is dropped, and spoils nothing:
strangers are greeted in a few threads of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from concurrent.futures import ThreadPoolExecutor

from qpostcopy.core import Hello, HelloError, LaneKind, welcome
from qpostcopy.lanes import Lanes, LaneSetupError

log = logging.getLogger(__name__)

HELLO_SECONDS = 4.0
_GREETERS = 8
_BACKLOG = 64
_ACCEPT_PAUSE_SECONDS = 0.1


class LaneListener:
    """Listens from `open` until all lanes are in, or `close`.

    :param expected: our half of the hello; kind and index are not looked at.
    :param push_lanes: how many push lanes make a session.
    """

    def __init__(self, expected: Hello, push_lanes: int) -> None:
        self._expected = expected
        self._wanted = {(LaneKind.DEMAND, 0)} | {
            (LaneKind.PUSH, index) for index in range(push_lanes)
        }
        self._socks: dict[tuple[LaneKind, int], socket.socket] = {}
        self._complete = asyncio.Event()
        self._pool = ThreadPoolExecutor(_GREETERS, thread_name_prefix="greeter")
        self._greetings: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
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
                remedy="set lanes.listen and lanes.port to a free address of the destination",
            ) from error
        self._listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept_forever(self._listener))
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
        push = [self._socks[key] for key in sorted(self._wanted) if key[0] is LaneKind.PUSH]
        return Lanes(self._socks[LaneKind.DEMAND, 0], tuple(push))

    async def close(self) -> None:
        """Stop listening; lanes that nobody took are closed."""
        await self._stop_accepting()
        for task in tuple(self._greetings):
            task.cancel()
        if self._greetings:
            await asyncio.wait(self._greetings)
        self._pool.shutdown(wait=False)
        if not self._taken:
            for sock in self._socks.values():
                sock.close()

    async def _stop_accepting(self) -> None:
        if self._accepting is not None and self._accepting is not asyncio.current_task():
            self._accepting.cancel()
            await asyncio.wait([self._accepting])
        if self._listener is not None:
            self._listener.close()

    async def _accept_forever(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while not self._complete.is_set():
            try:
                sock, peer = await loop.sock_accept(listener)
            except OSError as error:
                log.error("lanes: cannot accept: %s", error)
                await asyncio.sleep(_ACCEPT_PAUSE_SECONDS)
                continue
            task = asyncio.create_task(self._greet(sock, str(peer)))
            self._greetings.add(task)
            task.add_done_callback(self._greetings.discard)

    async def _greet(self, sock: socket.socket, peer: str) -> None:
        loop = asyncio.get_running_loop()
        kept = False
        greeting = loop.run_in_executor(self._pool, welcome, sock, self._expected, HELLO_SECONDS)
        try:
            # Cancelled, the thread still uses the socket: a shutdown ends its wait.
            key = await asyncio.shield(greeting)
            kept = self._keep(key, sock, peer)
        except (HelloError, OSError, ValueError) as error:
            log.warning("lane from %s dropped: %s", peer, error)
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(HelloError, OSError, ValueError):
                await greeting
            raise
        finally:
            if not kept:
                sock.close()

    def _keep(self, key: tuple[LaneKind, int], sock: socket.socket, peer: str) -> bool:
        if key not in self._wanted or key in self._socks:
            log.warning("lane from %s dropped: %s %d is not expected", peer, key[0].name, key[1])
            return False
        self._socks[key] = sock
        if len(self._socks) == len(self._wanted):
            self._complete.set()
            if self._accepting is not None:
                self._accepting.cancel()
            if self._listener is not None:
                self._listener.close()
        return True
