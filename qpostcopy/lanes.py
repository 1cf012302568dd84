"""The threads that carry a session of lanes, on either side.

The core's loops block in C; each runs in a thread here, and its end is reported
to the event loop once. Guarantees: who starts a thread joins it; sockets are
closed, and a core destroyed, only after the threads that use them have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, Self, TypeVar

from qpostcopy.core import (
    CoreError,
    LaneBrokenError,
    LaneClosedError,
    LaneEnd,
    LaneKind,
    LaneProtocolError,
    LaneTimeoutError,
)
from qpostcopy.errors import QpostcopyError

log = logging.getLogger(__name__)

Outcome = LaneEnd | Exception
#: Which lane of a session.
LaneKey = tuple[LaneKind, int]
P = ParamSpec("P")
T = TypeVar("T")


class LaneSetupError(QpostcopyError):
    """Lanes could not be brought up."""


def lane_keys(push_lanes: int, device_state: bool) -> tuple[LaneKey, ...]:
    """The lanes that make a session, in the order in which they are connected."""
    push = [(LaneKind.PUSH, index) for index in range(push_lanes)]
    state = [(LaneKind.STATE, 0)] if device_state else []
    return ((LaneKind.DEMAND, 0), *push, *state)


@dataclass(frozen=True, slots=True)
class Lanes:
    """The connected sockets of one session.

    :ivar device_state: QEMU's, not for pages; see stream.py.
    """

    demand: socket.socket
    push: tuple[socket.socket, ...]
    device_state: socket.socket | None = None

    @classmethod
    def of(cls, socks: Mapping[LaneKey, socket.socket]) -> Self:
        """The sockets of all of `lane_keys`."""
        push = [socks[key] for key in sorted(socks) if key[0] is LaneKind.PUSH]
        return cls(socks[LaneKind.DEMAND, 0], tuple(push), socks.get((LaneKind.STATE, 0)))

    def close(self) -> None:
        for sock in (self.demand, *self.push):
            sock.close()
        if self.device_state is not None:
            self.device_state.close()


class LaneThreads:
    """One thread for each loop of one session.

    :param on_end: called in the event loop with a loop's name and how it ended.
    """

    def __init__(self, on_end: Callable[[str, Outcome], None]) -> None:
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._threads: list[threading.Thread] = []

    def start(self, name: str, run: Callable[[], LaneEnd]) -> None:
        thread = threading.Thread(target=self._body, args=(name, run), name=name)
        self._threads.append(thread)
        thread.start()

    @property
    def running(self) -> bool:
        """Whether any loop has not ended yet."""
        return any(thread.is_alive() for thread in self._threads)

    async def join(self) -> None:
        """Until all loops have ended; ask them to stop first."""
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        self._threads.clear()

    def _body(self, name: str, run: Callable[[], LaneEnd]) -> None:
        outcome: Outcome
        try:
            outcome = run()
        except Exception as error:
            outcome = error
        self._loop.call_soon_threadsafe(self._on_end, name, outcome)


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As asyncio.to_thread, but whoever is cancelled waits for the thread before it goes.

    For calls into a core: nothing that they use may be destroyed while they run. The core
    must be asked to stop, or the call have a deadline.
    """
    call = partial(function, *args, **kwargs)
    work = asyncio.get_running_loop().run_in_executor(None, call)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([work])
        if error := work.exception():
            log.info("a call that nobody waits for any more: %s", error)
        raise


def is_lane_trouble(outcome: Outcome) -> bool:
    """Whether new lanes can mend it."""
    lane_errors = (LaneBrokenError, LaneClosedError, LaneProtocolError, LaneTimeoutError)
    return outcome is LaneEnd.CLOSED or isinstance(outcome, lane_errors)


def is_harmless(outcome: Outcome) -> bool:
    """Stopped or done: as it should be."""
    return outcome in (LaneEnd.STOPPED, LaneEnd.DONE)


def reason_of(outcome: Outcome) -> str:
    """The end of a loop, in words."""
    if outcome is LaneEnd.CLOSED:
        return "the other side closed it"
    if isinstance(outcome, CoreError):
        return str(outcome)
    return f"{type(outcome).__name__}: {outcome}"
