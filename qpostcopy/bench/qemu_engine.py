"""QEMU's own migration, with the settings that are best for it.

Bandwidth is unlimited, the downtime limit QEMU's own (300 ms). Post-copy begins at
once, as ours does, or after one pass of pre-copy. How long faults waited is asked
of QEMU itself: `postcopy-blocktime` of the destination (milliseconds in which no
vCPU could run, from the read of the fault to the placing of its page) over
`postcopy-requests` of the source. docs/devel/migration/postcopy.rst, qapi/migration.json.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from qpostcopy.bench.engine import (
    Faults,
    GaveUpError,
    Moved,
    NotMovedError,
    Pair,
    UnsupportedError,
)
from qpostcopy.errors import QpostcopyError
from qpostcopy.lab.observer import Observer, ObserverTimeoutError

#: A namespace of our own: any port is free.
_PORT = 4444
#: No link is so fast.
_UNLIMITED_BYTES_PER_SECOND = 1 << 40
_CANCEL_SECONDS = 30.0
_POSTCOPY_SECONDS = 120.0
_ENDED = ("completed", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class QemuEngine:
    """One way of using it.

    :ivar postcopy: switch to post-copy.
    :ivar passes: of pre-copy before that.
    :ivar preempt: with a channel of its own for pages that are waited for.
    :ivar multifd: pages go through several connections (not with post-copy in these versions).
    :ivar give_up_seconds: pre-copy that has not converged by then is cancelled.
    :ivar shared_ram: with which kind of RAM it is faster was measured (docs/benchmarks.md).
    """

    postcopy: bool
    preempt: bool = False
    passes: int = 0
    multifd: bool = False
    give_up_seconds: float = 30.0
    shared_ram: bool = False

    def prepare(self, pair: Pair) -> None:
        wanted = self._capabilities(blocktime=True)
        _expect_known(pair.destination.observer, wanted)
        _set_capabilities(pair.destination.observer, wanted)
        address = f"tcp:{pair.ends.destination.address}:{_PORT}"
        pair.destination.observer.execute("migrate-incoming", {"uri": address})

    def move(self, pair: Pair) -> Moved:
        try:
            return self._move(pair)
        except (GaveUpError, NotMovedError):
            raise
        except QpostcopyError as error:
            raise NotMovedError(f"QEMU: {error}") from error

    def _move(self, pair: Pair) -> Moved:
        source = pair.source.observer
        _set_capabilities(source, self._capabilities(blocktime=False))
        source.execute("migrate-set-parameters", {"max-bandwidth": _UNLIMITED_BYTES_PER_SECOND})
        source.execute("migrate", {"uri": f"tcp:{pair.ends.destination.address}:{_PORT}"})
        if self.postcopy:
            _await_status(source, ("active", *_ENDED), _POSTCOPY_SECONDS)
            self._await_passes(source)
            source.execute("migrate-start-postcopy")
        at_source = self._await_end(source)
        at_destination = _await_status(pair.destination.observer, _ENDED, _POSTCOPY_SECONDS)
        return Moved(
            ended_s=time.monotonic(),
            placed_s=max(at_source, at_destination),
            faults=_faults(pair) if self.postcopy else None,
        )

    def _capabilities(self, *, blocktime: bool) -> dict[str, bool]:
        return {
            "events": True,
            "multifd": self.multifd,
            "postcopy-ram": self.postcopy,
            "postcopy-preempt": self.preempt,
            "postcopy-blocktime": self.postcopy and blocktime,
        }

    def _await_passes(self, source: Observer) -> None:
        """QEMU tells in MIGRATION_PASS that a pass begins; the first is number 1."""
        for _ in range(self.passes + 1 if self.passes else 0):
            source.wait_event("MIGRATION_PASS", limit_seconds=_POSTCOPY_SECONDS)

    def _await_end(self, source: Observer) -> float:
        limit_seconds = _POSTCOPY_SECONDS if self.postcopy else self.give_up_seconds
        try:
            return _await_status(source, _ENDED, limit_seconds)
        except ObserverTimeoutError as error:
            if self.postcopy:
                raise NotMovedError(f"not completed within {limit_seconds:g} s") from error
            source.execute("migrate_cancel")
            status, at_s = _await_event_status(source, _ENDED, _CANCEL_SECONDS)
            if status == "completed":
                return at_s  # it was quicker than we
            raise GaveUpError(f"not converged within {limit_seconds:g} s") from error


def _expect_known(observer: Observer, wanted: dict[str, bool]) -> None:
    known = {each["capability"] for each in observer.execute("query-migrate-capabilities")}
    lacking = sorted(name for name, on in wanted.items() if on and name not in known)
    if lacking:
        raise UnsupportedError(f"this QEMU has no {', '.join(lacking)}")


def _set_capabilities(observer: Observer, wanted: dict[str, bool]) -> None:
    """Only what is to be on: an older QEMU may not know the others."""
    states = [{"capability": name, "state": True} for name, on in wanted.items() if on]
    observer.execute("migrate-set-capabilities", {"capabilities": states})


def _await_status(observer: Observer, statuses: tuple[str, ...], limit_seconds: float) -> float:
    """Until QEMU tells one of these; when, by the wall clock.

    :raise NotMovedError: it is not a good one.
    """
    status, at_s = _await_event_status(observer, statuses, limit_seconds)
    if status in ("failed", "cancelled"):
        reason = observer.execute("query-migrate").get("error-desc", "no reason was given")
        raise NotMovedError(f"QEMU's migration {status}: {reason}")
    return at_s


def _await_event_status(
    observer: Observer, statuses: tuple[str, ...], limit_seconds: float
) -> tuple[str, float]:
    deadline = time.monotonic() + limit_seconds
    while True:
        left_seconds = max(0.0, deadline - time.monotonic())
        event = observer.wait_event("MIGRATION", limit_seconds=left_seconds)
        if (status := event["data"]["status"]) in statuses:
            return status, event_s(event)


def event_s(event: dict[str, Any]) -> float:
    """When QEMU sent an event, by the wall clock of its host, which is ours."""
    stamp = event["timestamp"]
    return float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6


def _faults(pair: Pair) -> Faults:
    blocked_ms = pair.destination.observer.execute("query-migrate").get("postcopy-blocktime")
    count = pair.source.observer.execute("query-migrate")["ram"]["postcopy-requests"]
    if not count or blocked_ms is None:
        return Faults(count, None)
    return Faults(count, blocked_ms * 1e3 / count)
