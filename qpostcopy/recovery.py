"""The ways back and the ways on, when something was killed, hung or said no.

Before the commit, `roll_back`: the destination cannot have run, and it never
will: it is put back to waiting if it was not told `migrate-incoming`, else it is
killed and proven gone, and only then may the source get a `cont`.

After the commit, `repair` and `settle_guest`: the guest belongs to the
destination; companions are restarted, a new session of lanes is opened, and a
`cont` whose reply was lost is settled by asking. The source gets no `cont` any
more, with one exception that `take_back_commit` proves to be none: the
destination died, or refused its `cont` and was killed, before it can have run the
guest; so it has not and never will.

All of it works from state.json, for a controller that was there and for one
that was started by `resume`.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from qpostcopy import stream
from qpostcopy.errors import OutcomeUnknownError, QpostcopyError, StateLostError, UsageError
from qpostcopy.migration import (
    COMMAND_SECONDS,
    QUERY_SECONDS,
    Migration,
    guest_ended,
    now_seconds,
    together,
    who_ended,
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
from qpostcopy.switchover import (
    ContRefusedError,
    announce_commit,
    note_resumed,
    send_cont,
    serve_pages,
)

log = logging.getLogger(__name__)

#: A QEMU on slow storage stands still for seconds; a source that stays stopped is worse.
SETTLE_SECONDS = 30.0
#: QEMU has no event for "the source's own attempt to start again is over".
_SETTLE_POLL_SECONDS = 0.05
DETACH_SECONDS = 30.0
#: MIGRATION states in which `migrate_cancel` has something to end.
_ACTIVE = frozenset({"setup", "active", "device", "pre-switchover", "wait-unplug"})
_UNSETTLED = _ACTIVE | {"cancelling"}
#: Run states that are the guest's own doing (or its disk's): `cont` would not put it back.
_GUESTS_OWN_STATES = frozenset(
    {"shutdown", "suspended", "guest-panicked", "io-error", "internal-error", "watchdog"}
)


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
    if state.incoming_sent or state.attach_sent:
        await migration.destination.kill_qemu()
        migration.say("info", "the destination QEMU was ended; start it again to try again")
    else:
        migration.warn("the destination QEMU may be left without autostart; it holds no guest")


async def _release_destination(migration: Migration) -> None:
    """Undo prepare, in reverse. It has not been told `migrate-incoming`: it cannot run."""
    state = migration.state
    if not state.stop_sent:
        return
    await migration.destination.ensure(monitor=True, network=False)
    if state.attach_sent:
        await migration.destination.call(
            "qpc-detach", schema.Detach(), schema.Empty, DETACH_SECONDS
        )
    await _take_stream_back(migration, "destination")
    await restore_capabilities(migration, "destination")
    await _restore_autostart(migration)


async def _restore_autostart(migration: Migration) -> None:
    """`cont` while `inmigrate` only sets autostart again, unless it was off before our `stop`."""
    arguments = migration.destination.qemu_arguments()
    if not arguments:
        migration.warn("the destination QEMU is left without autostart: was it started with -S?")
        return
    if {"-S", "--S"} & set(arguments):
        return
    status = await migration.destination.query("query-status", QUERY_SECONDS)
    if status.get("status") == "inmigrate":
        await migration.destination.execute("cont", None, COMMAND_SECONDS)


async def _restore_source(migration: Migration) -> Location:
    """The source runs again, if it ran; what cannot be put back there costs a warning."""
    state = migration.state
    if state.source.qemu is None:
        return "source"  # not even looked at
    if await guest_ended(migration, "source"):
        return "ended"
    if not migration.source.qemu_alive():
        raise _source_lost(migration, f"its process has ended{who_ended(migration, 'source')}")
    try:
        if state.migrate_sent:
            await _settle_source(migration)
    except QpostcopyError as error:
        if await guest_ended(migration, "source"):
            return "ended"
        raise _source_lost(migration, str(error)) from error
    if state.source.capabilities is not None:
        await _restore_settings(migration, "source")
    return "source"


async def _settle_source(migration: Migration) -> None:
    """Cancel, wait until QEMU has done what it does by itself, then `cont` if need be.

    Whatever fails may work in a moment: a page server that was just started has no monitor
    yet, QEMU itself may say "Migration is not finalized yet". So all is asked again, until
    the time is over or there is no QEMU any more.
    """
    deadline = now_seconds() + SETTLE_SECONDS
    while True:
        try:
            await migration.source.ensure(network=False)
            problem = await _settle_once(migration)
            if not problem:
                return
        except QpostcopyError as error:
            problem = str(error)
        if now_seconds() > deadline:
            raise QpostcopyError(f"within {SETTLE_SECONDS:g} s it did not settle: {problem}")
        if not migration.source.qemu_alive():
            raise QpostcopyError(f"its process has ended{who_ended(migration, 'source')}")
        await asyncio.sleep(_SETTLE_POLL_SECONDS)


async def _settle_once(migration: Migration) -> str:
    """One look and the act that follows from it. What is not settled yet, or nothing."""
    moved = await migration.source.query("query-migrate", QUERY_SECONDS)
    if moved.get("status") in _ACTIVE:
        await migration.source.execute("migrate_cancel", None, COMMAND_SECONDS)
    if moved.get("status") in _UNSETTLED:
        return f"its migration is {moved.get('status')}"
    return "" if await _runs_as_before(migration) else "it does not run after `cont`"


async def _runs_as_before(migration: Migration) -> bool:
    """Query, `cont` only if it ran before and does not now, and query again."""
    if not migration.state.was_running:
        return True
    status = await migration.source.query("query-status", QUERY_SECONDS)
    if status.get("running") is True:
        return True
    if status.get("status") in _GUESTS_OWN_STATES:
        migration.warn(f"the guest is {status.get('status')} at the source, by its own doing")
        return True
    await migration.source.execute("cont", None, COMMAND_SECONDS)
    status = await migration.source.query("query-status", QUERY_SECONDS)
    return status.get("running") is True


def _source_lost(migration: Migration, why: str) -> SourceLostError:
    process = migration.source.qemu
    pid = process.pid if process else "?"
    if not migration.source.qemu_alive():
        return SourceLostError(
            f"before the commit the source QEMU (pid {pid}) was lost, and with it the VM's "
            f"memory: {why}",
            remedy="start the VM anew from its disk",
        )
    return SourceLostError(
        f"the destination cannot run, but the source QEMU (pid {pid}) does not run again yet: "
        f"{why}",
        remedy=f"try again with `qpostcopy resume {migration.state.migration_id}`; or by hand at "
        "the source's QMP: query-migrate, `migrate_cancel` if that is active or pre-switchover, "
        "then `cont`",
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
        await migration.side(role).ensure(monitor=True, network=False)
        await _take_stream_back(migration, role)
        await restore_capabilities(migration, role)
        if parameters := migration.state.side(role).parameters:
            await migration.side(role).execute(
                "migrate-set-parameters", parameters, COMMAND_SECONDS
            )
    except QpostcopyError as error:
        migration.warn(f"the {role} QEMU keeps our migration settings: {error}")


async def _take_stream_back(migration: Migration, role: Role) -> None:
    """The connection for device state, if QEMU was not told to use it yet."""
    with suppress(CommandError):  # it has none any more
        await migration.side(role).execute("closefd", {"fdname": stream.NAME}, COMMAND_SECONDS)


async def restore_settings(migration: Migration, role: Role) -> None:
    """As `_restore_settings`, for a side that is expected to be there."""
    if migration.side(role).qemu_alive():
        await _restore_settings(migration, role)


# --- between the record and `cont` --------------------------------------------------------


async def take_back_commit(migration: Migration) -> bool:
    """Undo the record if that is safe: the destination is proven gone and was never started.

    Then nothing but the source has ever run this guest, and nothing else ever can.
    """
    process = migration.destination.qemu
    if not never_started(migration) or process is None:
        return False
    if not await asyncio.to_thread(process.wait_gone, 0.0):
        return False
    migration.directory.erase_commit()
    return True


def never_started(migration: Migration) -> bool:
    """Whether the guest cannot have run at the destination: no `cont` can have been executed."""
    return migration.machine.phase is Phase.SWITCHOVER and not migration.state.cont_sent


async def give_up_destination(migration: Migration) -> bool:
    """End a destination that will not run the guest, so that the source may. Whether that is done.

    The record is erased only once the process is proven gone.

    :raise NotProvenGoneError: it is still there; the record stands.
    """
    if not never_started(migration):
        return False
    await migration.destination.kill_qemu()
    return await take_back_commit(migration)


# --- after the commit ---------------------------------------------------------------------


async def repair(migration: Migration) -> int:
    """Living companions on both sides and a new session of lanes, serving.

    Returns the place in the event book from which on trouble concerns the new session.

    :raise PagesLostError: the source's memory is gone.
    :raise QpostcopyError: it did not work this time.
    """
    await together(_ensure_page_server(migration), ensure_handler(migration))
    await open_lanes(migration, device_state=False)
    mark = migration.book.mark
    # Even if it was not started just now: who started it may have died before this.
    await _compile_some_order(migration)
    # At once: what the handler has may be more than fits a socket that nobody reads.
    await together(serve_faults(migration), serve_pages(migration, push=True))
    return mark


async def _compile_some_order(migration: Migration) -> None:
    """The profile's order, or that of addresses: the guest needs its pages in any order.

    It was compiled before the commit, but a trace may have been damaged since.
    """
    try:
        await compile_push_order(migration)
    except UsageError as error:
        migration.warn(f"the pages are pushed in address order from now on: {error}")
        profile = migration.plan.profile.model_copy(update={"push": ()})
        await compile_push_order(migration, profile)


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


async def ensure_handler(migration: Migration, *, network: bool = True) -> None:
    """A living handler that holds the userfaultfd that QEMU kept open, told of the commit.

    :param network: see Side.ensure.
    """
    started = await migration.destination.ensure(network=network)
    if started or not await _is_attached(migration):
        policy, uffd_fd = migration.plan.profile.fault, migration.state.uffd_fd
        assert uffd_fd is not None, "committed without a userfaultfd"
        adopted = await migration.destination.call(
            "qpc-adopt",
            schema.Adopt(
                uffd_fd=uffd_fd, ahead_bytes=policy.ahead_bytes, behind_bytes=policy.behind_bytes
            ),
            schema.Attached,
            DETACH_SECONDS,
        )
        migration.note_trace(adopted)
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
    :raise ContRefusedError: it will not run the guest, and never did.
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
    except ContRefusedError:
        raise
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
