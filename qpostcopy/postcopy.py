"""Postcopy and completion: from the running destination to nothing of ours left.

The guest is at the destination and cannot go back. Lost lanes and dead
companions are repaired here, a bounded number of times within a while; then the
migration is `interrupted`: the companions stay up, the guest waits on missing
pages only, and `resume` goes on from the same place.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextlib import suppress

from qpostcopy.errors import InterruptedMigrationError, QpostcopyError, StateLostError
from qpostcopy.migration import (
    COMMAND_SECONDS,
    Migration,
    guest_ended,
    now_seconds,
    together,
    who_ended,
)
from qpostcopy.phases import Phase
from qpostcopy.qmp import schema
from qpostcopy.recovery import (
    DETACH_SECONDS,
    ensure_handler,
    repair,
    restore_settings,
    settle_guest,
)
from qpostcopy.report import Location
from qpostcopy.side import COMPANION_LOST, COMPANIONS, Seen
from qpostcopy.switchover import ContRefusedError
from qpostcopy.uffd.registration import RECORD

log = logging.getLogger(__name__)

REPAIRS = 3
REPAIRS_WITHIN_SECONDS = 60.0
_BACKOFF_SECONDS = 0.2
STATS_SECONDS = 5.0
GONE_SECONDS = 10.0

#: A companion answers within milliseconds: what blocks runs in threads of its own.
PROBE_SECONDS = 3.0
PROBES = 2

_ENDS_SESSION = frozenset({"QPC_LANE_LOST", "QPC_FATAL", COMPANION_LOST})


class DestinationLostError(StateLostError):
    """The destination QEMU died after the commit."""


class RepairBudget:
    """At most `REPAIRS` within `REPAIRS_WITHIN_SECONDS`."""

    def __init__(self, migration_id: str) -> None:
        self._migration_id = migration_id
        self._spent: deque[float] = deque()

    def spend(self, now: float, problem: str) -> float:
        """Take one repair; how long to wait before it.

        :param problem: the reason for it, told when there is none left.

        :raise InterruptedMigrationError: there is none left.
        """
        while self._spent and now - self._spent[0] > REPAIRS_WITHIN_SECONDS:
            self._spent.popleft()
        if len(self._spent) >= REPAIRS:
            raise InterruptedMigrationError(
                f"{REPAIRS} repairs within {REPAIRS_WITHIN_SECONDS:g} s did not help ({problem}); "
                "the VM is at the destination, waits on missing pages only, and must not be "
                "started elsewhere",
                remedy="see the logs in the state directory, then `qpostcopy resume "
                f"{self._migration_id}`",
            )
        self._spent.append(now)
        return _BACKOFF_SECONDS * ((1 << len(self._spent) >> 1) - 1)


async def run_postcopy(migration: Migration, problem: str) -> Location:
    """Until every page is placed. Returns where the VM is: `destination`, or `ended`.

    The phase is `postcopy` from the moment on that the guest is known to be settled there.

    :param problem: why the present session of lanes is not to be trusted; empty: it is.
    :raise ContRefusedError: the destination will not run the guest, and never did.
    :raise InterruptedMigrationError: `resume` can go on.
    :raise StateLostError: it cannot.
    """
    budget, mark = RepairBudget(migration.state.migration_id), 0
    while not await _destination_gone(migration):
        try:
            if problem:
                await asyncio.sleep(budget.spend(now_seconds(), problem))
                mark = await repair(migration)
            await settle_guest(migration)
            if migration.machine.phase is not Phase.POSTCOPY:
                migration.machine.set(Phase.POSTCOPY)
            problem = await _serve_until_trouble(migration, mark)
            if not problem:
                return "destination"
        except (StateLostError, InterruptedMigrationError, ContRefusedError):
            raise
        except QpostcopyError as error:
            problem = str(error)
        migration.say("warning", f"{problem}; the VM is at the destination, and safe")
    return "ended"


async def _serve_until_trouble(migration: Migration, mark: int) -> str:
    """What ended this session, or nothing: every page is placed."""
    end = asyncio.create_task(_end_of_session(migration, mark))
    silence = asyncio.create_task(_silence(migration))
    try:
        await asyncio.wait([end, silence], return_when=asyncio.FIRST_COMPLETED)
        return end.result() if end.done() else silence.result()
    finally:
        end.cancel()
        silence.cancel()
        await asyncio.wait([end, silence])


async def _end_of_session(migration: Migration, mark: int) -> str:
    seen = await _next(migration, mark)
    if seen is None or _is_placed(seen):
        return ""
    return f"{seen.event.name} from the {seen.role} side: {seen.event.data.get('reason', '')}"


async def _silence(migration: Migration) -> str:
    """Which companion has hung: it lives, holds its lanes, and sends neither pages nor events.

    Returns once one has missed PROBES questions in a row; whoever repairs ends it (Side.ensure).
    """
    missed = {"source": 0, "destination": 0}
    while True:
        await asyncio.sleep(PROBE_SECONDS)
        for side in (migration.source, migration.destination):
            missed[side.role] = 0 if await side.answers(PROBE_SECONDS) else missed[side.role] + 1
            if missed[side.role] >= PROBES:
                return f"the {COMPANIONS[side.role]} does not answer"


async def _next(migration: Migration, mark: int) -> Seen | None:
    """The end of this session: QPC_PLACED (however early), trouble since `mark`; None: placed."""
    placed = migration.book.find(_is_placed)
    if placed is not None:
        return placed
    stats = await current_stats(migration)
    if stats is not None and stats.remaining_pages == 0:
        return None
    return await migration.book.wait(lambda seen: _is_placed(seen) or _ends(seen), since=mark)


def _is_placed(seen: Seen) -> bool:
    return seen.is_("destination", "QPC_PLACED")


def _ends(seen: Seen) -> bool:
    return seen.event.name in _ENDS_SESSION or seen.is_("destination", "QPC_QEMU_GONE")


async def _destination_gone(migration: Migration) -> bool:
    """Whether the guest ended by itself there.

    :raise DestinationLostError: its QEMU is gone, and not by its guest's own doing.
    """
    if await guest_ended(migration, "destination"):
        return True
    if migration.destination.qemu_alive():
        return False
    gone = f"the destination QEMU ended after the commit{who_ended(migration, 'destination')}"
    if migration.state.cont_sent:
        raise DestinationLostError(
            f"{gone}; the source still holds the memory of the moment of the switchover, but the "
            "disk has moved on since, so it is not started",
            remedy="start the VM anew from its disk; the source QEMU stays paused until you end it",
        )
    raise DestinationLostError(
        f"{gone}; it never got a `cont` from us, so the source still has the whole VM, paused",
        remedy="if nobody else ran the guest at the destination, go on at the source: `cont` at "
        "its QMP",
    )


async def current_stats(migration: Migration) -> schema.HandlerStats | None:
    """The handler's counters, or None: it does not answer now."""
    try:
        migration.stats = await migration.destination.call(
            "qpc-stats", schema.Empty(), schema.HandlerStats, STATS_SECONDS
        )
    except QpostcopyError as error:
        log.debug("no counters: %s", error)
        return None
    return migration.stats


# --- complete -----------------------------------------------------------------------------


async def complete(migration: Migration, location: Location) -> Location:
    """Nothing of ours stays in either QEMU. Trouble here costs a warning: the VM has moved."""
    await _reconnect(migration)
    await current_stats(migration)
    if location != "ended":
        await _detach(migration)
        await restore_settings(migration, "destination")
    await _release_source(migration)
    await together(migration.source.quit(), migration.destination.quit())
    if await guest_ended(migration, "destination") or not migration.destination.qemu_alive():
        return "ended"
    return location


async def _reconnect(migration: Migration) -> None:
    """A resumed controller has no connections yet; what cannot be had is told further down."""
    for side in (migration.source, migration.destination):
        if side.qemu_alive():
            with suppress(QpostcopyError):
                await side.ensure(monitor=True, network=False)


async def _detach(migration: Migration) -> None:
    """A handler that was started just now holds nothing yet: it must adopt to let go."""
    problem = ""
    for _ in range(2):
        if not (migration.directory.path / RECORD).exists():
            return  # whoever let go has removed it last: nothing of ours is in QEMU
        try:
            await ensure_handler(migration, network=False)
            await current_stats(migration)
            await migration.destination.call(
                "qpc-detach", schema.Detach(), schema.Empty, DETACH_SECONDS
            )
            return
        except QpostcopyError as error:
            problem = str(error)
    if migration.destination.qemu_alive():
        migration.warn(
            f"a userfaultfd is left in the destination QEMU: {problem}; every page is placed, "
            "the VM runs well, but it cannot be migrated to here again"
        )


async def _release_source(migration: Migration) -> None:
    """The source QEMU ends, or stays paused, as the plan says. It is never `cont`ed."""
    if not migration.source.qemu_alive():
        return
    if migration.plan.source.after == "keep":
        await restore_settings(migration, "source")
        return
    problem = ""
    try:
        await migration.source.execute("quit", None, COMMAND_SECONDS)
    except QpostcopyError as error:
        problem = f": {error}"  # the reply is often lost in the exit: what counts is below
    process = migration.source.qemu
    if process and not await asyncio.to_thread(process.wait_gone, GONE_SECONDS):
        migration.warn(
            f"the source QEMU (pid {process.pid}) did not quit{problem}; end it, never `cont` it"
        )
