"""The ways back and the ways on, when something was killed, hung or said no.

Before the commit, `roll_back`: the destination cannot have run, and it never
will: it is put back to waiting if it was not told `migrate-incoming`, else it is
killed and proven gone, and only then may the source get a `cont`.

After the commit, `repair` and `settle_guest`: the guest belongs to the
destination; companions are restarted, a new session of lanes is opened, and a
`cont` whose reply was lost is settled by asking. The source gets no `cont` any
more, with one exception that `take_back_commit` proves to be none: the
destination died before it was sent its `cont`, so it has not run and never will.

All of it works from state.json, for a controller that was there and for one
that was started by `resume`.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from qpostcopy.errors import OutcomeUnknownError, QpostcopyError, StateLostError
from qpostcopy.migration import (
    COMMAND_SECONDS,
    QUERY_SECONDS,
    Migration,
    guest_ended,
    now_seconds,
    together,
)
from qpostcopy.phases import Phase
from qpostcopy.prepare import (
    compile_push_order,
    open_lanes,
    serve_faults,
    set_capability_states,
)
from qpostcopy.qmp import schema
from qpostcopy.qmp.connection import CommandError
from qpostcopy.report import Location
from qpostcopy.side import Role
from qpostcopy.switchover import announce_commit, note_resumed, send_cont, serve_pages

log = logging.getLogger(__name__)

SETTLE_SECONDS = 15.0
#: QEMU has no event for "the source's own attempt to start again is over".
_SETTLE_POLL_SECONDS = 0.05
DETACH_SECONDS = 30.0
#: MIGRATION states in which `migrate_cancel` has something to end.
_ACTIVE = frozenset({"setup", "active", "device", "pre-switchover", "wait-unplug"})
_UNSETTLED = _ACTIVE | {"cancelling"}


class SourceLostError(StateLostError):
    """The source cannot be brought back."""


class PagesLostError(StateLostError):
    """Pages are missing at the destination and no process can give them any more."""


class GuestUnsettledError(QpostcopyError):
    """Whether the guest runs at the destination could not be found out; it can be asked again."""


# --- before the commit --------------------------------------------------------------------


async def roll_back(migration: Migration) -> Location:
    """Back to where it was. Returns where the VM is: `source`, or `ended` by itself.

    :raise StateLostError: the destination is not proven gone, or the source does not come back.
    """
    assert not migration.directory.committed, "rollback after the commit"
    await _clear_destination(migration)
    return await _restore_source(migration)


async def _clear_destination(migration: Migration) -> None:
    """The destination waits as it did before, or is proven gone."""
    state = migration.state
    if state.destination.qemu is None or not migration.destination.qemu_alive():
        return
    if not state.incoming_sent:
        try:
            await _release_destination(migration)
            return
        except QpostcopyError as error:
            log.warning("the destination cannot be put back to waiting: %s", error)
    if state.incoming_sent or state.userfaultfds_before is not None:
        await migration.destination.kill_qemu()
        migration.say("info", "the destination QEMU was ended; start it again to try again")
    else:
        migration.warn("the destination QEMU may be left without autostart; it holds no guest")


async def _release_destination(migration: Migration) -> None:
    """Undo prepare, in reverse. It has not been told `migrate-incoming`: it cannot run."""
    state = migration.state
    if not state.stop_sent:
        return
    await migration.destination.ensure(monitor=True)
    if state.userfaultfds_before is not None:
        await migration.destination.call(
            "qpc-detach", schema.Detach(), schema.Empty, DETACH_SECONDS
        )
    await restore_capabilities(migration, "destination")
    # `cont` while `inmigrate` only sets autostart again, as it was before our `stop`.
    status = await migration.destination.query("query-status", QUERY_SECONDS)
    if status.get("status") == "inmigrate":
        await migration.destination.execute("cont", None, COMMAND_SECONDS)


async def _restore_source(migration: Migration) -> Location:
    state = migration.state
    if state.source.qemu is None:
        return "source"  # not even looked at
    if await guest_ended(migration, "source"):
        return "ended"
    try:
        if state.source.capabilities is None and not state.migrate_sent:
            return "source"  # nothing was changed there
        await migration.source.ensure(monitor=True)
        if state.migrate_sent:
            await _settle_source(migration)
        await _restore_settings(migration, "source")
    except QpostcopyError as error:
        raise _source_lost(migration, str(error)) from error
    return "source"


async def _settle_source(migration: Migration) -> None:
    """Cancel, wait until QEMU has done what it does by itself, then `cont` if need be."""
    deadline = now_seconds() + SETTLE_SECONDS
    cancelled = False
    while True:
        problem = "no answer"
        try:
            moved = await migration.source.query("query-migrate", QUERY_SECONDS)
            problem = f"its migration is {moved.get('status')}"
            if moved.get("status") in _ACTIVE and not cancelled:
                await migration.source.execute("migrate_cancel", None, COMMAND_SECONDS)
                cancelled = True
            elif moved.get("status") not in _UNSETTLED and await _runs_as_before(migration):
                return
        except (CommandError, OutcomeUnknownError) as error:
            problem = str(error)  # e.g. "Migration is not finalized yet": ask again
        if now_seconds() > deadline:
            raise QpostcopyError(f"within {SETTLE_SECONDS:g} s it did not settle: {problem}")
        await asyncio.sleep(_SETTLE_POLL_SECONDS)


async def _runs_as_before(migration: Migration) -> bool:
    """Query, `cont` only if it ran before and does not now, and query again."""
    if not migration.state.was_running:
        return True
    status = await migration.source.query("query-status", QUERY_SECONDS)
    if status.get("running") is True:
        return True
    if status.get("status") in ("shutdown", "suspended", "guest-panicked"):
        return True  # the guest's own doing meanwhile
    await migration.source.execute("cont", None, COMMAND_SECONDS)
    status = await migration.source.query("query-status", QUERY_SECONDS)
    return status.get("running") is True


def _source_lost(migration: Migration, why: str) -> SourceLostError:
    alive = migration.source.qemu_alive()
    process = migration.source.qemu
    pid = process.pid if process else "?"
    left = f"still exists (pid {pid})" if alive else "is gone, and with it the VM's memory"
    remedy = (
        "the destination is gone and cannot run: connect to the source's QMP, see query-status, "
        "and `cont` it by hand"
        if alive
        else "start the VM anew from its disk"
    )
    return SourceLostError(
        f"rolled back, but the source QEMU {left}, and does not run: {why}", remedy=remedy
    )


# --- settings of both QEMUs ---------------------------------------------------------------


async def restore_capabilities(migration: Migration, role: Role) -> None:
    """What set_capabilities changed, back to what it was."""
    before = migration.state.side(role).capabilities
    if before:
        await set_capability_states(migration, role, before)


async def _restore_settings(migration: Migration, role: Role) -> None:
    """Capabilities and parameters. Failing costs a warning, not the VM."""
    try:
        await restore_capabilities(migration, role)
        if parameters := migration.state.side(role).parameters:
            await migration.side(role).execute(
                "migrate-set-parameters", parameters, COMMAND_SECONDS
            )
    except QpostcopyError as error:
        migration.warn(f"the {role} QEMU keeps our migration settings: {error}")


async def restore_settings(migration: Migration, role: Role) -> None:
    """As `_restore_settings`, for a side that is expected to be there."""
    if migration.side(role).qemu_alive():
        await _restore_settings(migration, role)


# --- between the record and `cont` --------------------------------------------------------


async def take_back_commit(migration: Migration) -> bool:
    """Undo the record if that is safe: the destination is proven gone and was never started.

    Then nothing but the source has ever run this guest, and nothing else ever can.
    """
    state, process = migration.state, migration.destination.qemu
    never_started = migration.machine.phase is Phase.SWITCHOVER and not state.cont_sent
    if not never_started or process is None:
        return False
    if not await asyncio.to_thread(process.wait_gone, 0.0):
        return False
    migration.directory.erase_commit()
    return True


# --- after the commit ---------------------------------------------------------------------


async def repair(migration: Migration) -> int:
    """Living companions on both sides and a new session of lanes, serving.

    Returns the place in the event book from which on trouble concerns the new session.

    :raise PagesLostError: the source's memory is gone.
    :raise QpostcopyError: it did not work this time.
    """
    await together(_ensure_page_server(migration), ensure_handler(migration))
    await open_lanes(migration)
    mark = migration.book.mark
    # Even if it was not started just now: who started it may have died before this.
    await compile_push_order(migration)
    # At once: what the handler has may be more than fits a socket that nobody reads.
    await together(serve_faults(migration), serve_pages(migration))
    return mark


async def _ensure_page_server(migration: Migration) -> None:
    """A living page server keeps the source's RAM even if its QEMU is gone."""
    try:
        await migration.source.ensure()
    except QpostcopyError as error:
        if migration.source.qemu_alive():
            raise
        raise PagesLostError(
            "the source QEMU and the page server are both gone, and with them the pages that "
            "were not sent: the guest at the destination waits for them for ever",
            remedy="end the destination QEMU and start the VM anew from its disk",
        ) from error


async def ensure_handler(migration: Migration) -> None:
    """A living handler that holds the userfaultfd that QEMU kept open, told of the commit."""
    started = await migration.destination.ensure()
    if started or not await _is_attached(migration):
        policy, uffd_fd = migration.plan.profile.fault, migration.state.uffd_fd
        assert uffd_fd is not None, "committed without a userfaultfd"
        await migration.destination.call(
            "qpc-adopt",
            schema.Adopt(
                uffd_fd=uffd_fd, ahead_bytes=policy.ahead_bytes, behind_bytes=policy.behind_bytes
            ),
            schema.Attached,
            DETACH_SECONDS,
        )
    await announce_commit(migration)  # idempotent


async def _is_attached(migration: Migration) -> bool:
    try:
        await migration.destination.call("qpc-stats", schema.Empty(), schema.HandlerStats)
    except OutcomeUnknownError:
        raise
    except QpostcopyError:
        return False
    return True


async def settle_guest(migration: Migration) -> None:
    """The guest runs at the destination, or was not meant to: found out by asking.

    `paused` after the commit, with no RESUME known, means that `cont` never arrived.

    :raise GuestUnsettledError: QEMU does not answer; its main loop may wait for a page.
    """
    if not migration.state.was_running or migration.state.resumed_seconds is not None:
        return
    mark = migration.book.mark
    try:
        status = await migration.destination.query("query-status", QUERY_SECONDS)
        if status.get("status") == "paused":
            await send_cont(migration)
        elif status.get("running") is not True:
            return  # a state of the guest's own: shutdown, suspended, guest-panicked
    except QpostcopyError as error:
        raise GuestUnsettledError(
            f"it is not known yet whether the guest runs at the destination: {error}"
        ) from error
    early = migration.book.find(lambda seen: seen.is_("destination", "RESUME"))
    note_resumed(migration, 0 if early else mark)


async def leave_companions(migration: Migration) -> None:
    """Hang up on both; they go on by themselves."""
    for side in (migration.source, migration.destination):
        with suppress(QpostcopyError):
            await side.hang_up()
