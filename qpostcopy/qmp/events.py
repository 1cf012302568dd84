"""Fan-out of events to any number of subscribers, with bounded memory.

qemu.qmp's own listeners keep every event for ever, which a companion that lives
as long as a migration cannot afford. Here an event is kept only until each
subscriber has taken it; a subscriber that does not keep up gets an error in
place of a gap; when the connection ends, every subscriber hears of it after the
last event, and nobody waits for ever.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType

from qpostcopy.errors import QpostcopyError
from qpostcopy.qmp.schema import Model

#: A subscriber this far behind has stopped reading.
SUBSCRIPTION_EVENTS = 4096


class EventsOverflowError(QpostcopyError):
    """A subscriber did not take its events, so later ones were dropped: query the state."""


class EventTimeoutError(QpostcopyError):
    """The expected event did not come in time."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event of QEMU or of ours.

    `model` is the validated content of one of ours (qmp/schema.py), else None;
    `received_seconds` is our monotonic clock at receipt.
    """

    name: str
    data: Mapping[str, object]
    model: Model | None = None
    received_seconds: float = field(default_factory=time.monotonic)


class Subscription:
    """The events of one subscriber; a context manager and an async iterator.

    Iteration ends when we close the connection ourselves, and raises when it is lost.
    """

    def __init__(self, fanout: Fanout, names: frozenset[str], limit: int) -> None:
        self._fanout = fanout
        self._names = names
        self._limit = limit
        self._waiting: deque[Event] = deque()
        self._ready = asyncio.Event()
        self._end: QpostcopyError | None = None
        self._ended = False

    def __enter__(self) -> Subscription:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._fanout.remove(self)

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Event:
        while not self._waiting:
            if self._ended:
                if self._end is None:
                    raise StopAsyncIteration
                raise self._end
            self._ready.clear()
            await self._ready.wait()
        return self._waiting.popleft()

    async def get(self, timeout_seconds: float | None = None) -> Event:
        """The next event.

        :raise EventTimeoutError: none came in time.
        :raise QpostcopyError: the connection was lost (or closed by us).
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                return await anext(self)
        except TimeoutError as error:
            wanted = " or ".join(sorted(self._names)) or "any event"
            raise EventTimeoutError(f"no {wanted} within {timeout_seconds} s") from error
        except StopAsyncIteration as error:
            raise QpostcopyError("the connection was closed while waiting for an event") from error

    def put(self, event: Event) -> None:
        """Deliver (called by the fan-out)."""
        if self._ended or (self._names and event.name not in self._names):
            return
        if len(self._waiting) >= self._limit:
            self.end(EventsOverflowError(f"{self._limit} events were not read in time"))
            return
        self._waiting.append(event)
        self._ready.set()

    def end(self, error: QpostcopyError | None) -> None:
        """No more events; `error` is raised once the waiting ones were taken."""
        if not self._ended:
            self._ended, self._end = True, error
            self._ready.set()


class Fanout:
    """Delivers each event to all subscribers, in order, without waiting for any."""

    def __init__(self) -> None:
        self._subscriptions: list[Subscription] = []
        self._callbacks: list[Callable[[Event], None]] = []
        self._ended = False
        self._end: QpostcopyError | None = None

    def subscribe(self, *names: str, limit: int = SUBSCRIPTION_EVENTS) -> Subscription:
        """Events from now on, of these names, or all."""
        subscription = Subscription(self, frozenset(names), limit)
        if self._ended:
            subscription.end(self._end)
        self._subscriptions.append(subscription)
        return subscription

    def remove(self, subscription: Subscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)
        subscription.end(None)

    def on_event(self, callback: Callable[[Event], None]) -> None:
        """Call at receipt, before any later message is read. The callback must not block."""
        self._callbacks.append(callback)

    def put(self, event: Event) -> None:
        for callback in self._callbacks:
            callback(event)
        for subscription in tuple(self._subscriptions):
            subscription.put(event)

    def end(self, error: QpostcopyError | None) -> None:
        """The connection ended: lost (`error`), or closed by us (None)."""
        if not self._ended:
            self._ended, self._end = True, error
            for subscription in self._subscriptions:
                subscription.end(error)
