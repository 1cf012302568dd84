"""The threads that carry a session of lanes, on either side.

The core's loops block in C; each runs in a thread here, and its end is reported
to the event loop once. Guarantees: who starts a thread joins it; sockets are
closed only after the threads that use them have ended.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

from qpostcopy.core import (
    CoreError,
    CoreSystemError,
    LaneClosedError,
    LaneEnd,
    LaneProtocolError,
    LaneTimeoutError,
    TargetGoneError,
)
from qpostcopy.errors import QpostcopyError

log = logging.getLogger(__name__)

Outcome = LaneEnd | Exception


class LaneSetupError(QpostcopyError):
    """Lanes could not be brought up."""


@dataclass(frozen=True, slots=True)
class Lanes:
    """The connected sockets of one session."""

    demand: socket.socket
    push: tuple[socket.socket, ...]

    def close(self) -> None:
        for sock in (self.demand, *self.push):
            sock.close()


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


def is_lane_trouble(outcome: Outcome) -> bool:
    """Whether new lanes can mend it."""
    if isinstance(outcome, CoreSystemError):
        return "lane" in outcome.operation  # recv, sendmsg, poll on a lane: the network's errno
    lane_errors = (LaneClosedError, LaneProtocolError, LaneTimeoutError)
    return outcome is LaneEnd.CLOSED or isinstance(outcome, lane_errors)


def is_harmless(outcome: Outcome) -> bool:
    """Stopped or done; and QEMU's own end is reported by who watches QEMU."""
    return outcome in (LaneEnd.STOPPED, LaneEnd.DONE) or isinstance(outcome, TargetGoneError)


def reason_of(outcome: Outcome) -> str:
    """The end of a loop, in words."""
    if outcome is LaneEnd.CLOSED:
        return "the other side closed it"
    if isinstance(outcome, CoreError):
        return str(outcome)
    return f"{type(outcome).__name__}: {outcome}"
