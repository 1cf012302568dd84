"""From the stop of the source to the running destination: switchover and commit.

Each step is a small function in one of the lists below; before each, state.json
says what the step is about to do, so that whatever is killed between any two
steps, recovery.py knows how to go on or back.

    SWITCHOVER  the source stops; device state flows; the destination loads and stays paused
    COMMIT      record_commit is the point of no return: `committed` is on disk, then `cont`,
                and only then the push, which would be in device state's way

Why it cannot end with both sides running: QEMU would start the destination by
itself, so it is told `stop` while `inmigrate` and loads into `paused`. The only
`cont` that the destination gets is in send_cont, after record_commit; the only
`cont` that the source gets is in recovery.py, when there is no record and the
destination is proven gone or was not even told `migrate-incoming`.

A step raises TroubleError (or any QpostcopyError); the caller rolls back.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Sequence

from qpostcopy import stream
from qpostcopy.errors import OutcomeUnknownError, QpostcopyError
from qpostcopy.migration import (
    COMMAND_SECONDS,
    QUERY_SECONDS,
    TIMEOUT_CODE,
    Migration,
    Step,
    TroubleError,
    now_seconds,
    together,
    trouble,
)
from qpostcopy.qmp import schema
from qpostcopy.qmp.connection import CommandError
from qpostcopy.side import Role, Seen
from qpostcopy.sidechecks import BACKEND_REMEDY

log = logging.getLogger(__name__)

STOP_SECONDS = 30.0
#: For the load itself; what crosses the link before has its own time, by load_seconds.
LOAD_SECONDS = 10.0
#: The guest stands still meanwhile: then it is better off at the source.
LOAD_MOST_SECONDS = 60.0
#: Half a megabit a second: a link that does not carry even that serves no page faults either.
SLOWEST_LINK_BYTES_PER_SECOND = 64 << 10
#: Roughly what QEMU sends besides blocks of RAM (design: 0.2 MB).
DEVICE_STATE_BYTES = 256 << 10
#: A source that has not stopped by then is asked what it sends.
LOOK_SECONDS = 1.0
#: The guest stands still meanwhile; a handler that takes longer is better replaced.
ANNOUNCE_SECONDS = 1.0
#: What QEMU's own stream may cover beyond the blocks that are not shared (design: trap 1).
STREAM_SLACK_BYTES = 4 << 20

#: Test hook, read here only: `STEP:before SIGNAL TARGET` (or `after`) sends a signal there,
#: e.g. `confirm:before SIGKILL controller`; several with `;`. _signal_for_test has the targets.
TEST_SIGNAL_VARIABLE = "QPOSTCOPY_TEST_SIGNAL"


class ContRefusedError(TroubleError):
    """The destination has the guest, paused, and will not run it: it never has."""


async def run_steps(migration: Migration, steps: Sequence[Step]) -> None:
    """Run the steps in order."""
    for step in steps:
        name = step.__name__
        _signal_for_test(migration, f"{name}:before")
        started = now_seconds()
        await step(migration)
        log.info("step %s took %.1f ms", name, (now_seconds() - started) * 1000)
        _signal_for_test(migration, f"{name}:after")


def _signal_for_test(migration: Migration, place: str) -> None:
    for one in os.environ.get(TEST_SIGNAL_VARIABLE, "").split(";"):
        wanted = one.split()
        if len(wanted) == 3 and wanted[0] == place:
            _send_for_test(migration, wanted[1], wanted[2])


def _send_for_test(migration: Migration, signal_name: str, target_name: str) -> None:
    state = migration.state
    targets = {
        "controller": state.controller,
        "page-server": state.source.companion,
        "handler": state.destination.companion,
        "source": state.source.qemu,
        "destination": state.destination.qemu,
    }
    if target := targets[target_name]:
        os.kill(target.pid, signal.Signals[signal_name])


# --- switchover ---------------------------------------------------------------------------


async def listen_for_device_state(migration: Migration) -> None:
    """From here on the destination may have loaded something: going back means killing it."""
    migration.directory.update(incoming_sent=True)
    await migration.destination.execute("migrate-incoming", {"uri": stream.URI}, COMMAND_SECONDS)


async def stop_source(migration: Migration) -> None:
    """`migrate`, until QEMU has stopped the guest and drained its I/O: RAM is final.

    Whether the guest runs is asked now, for it may be long since it was looked at; the STOP
    that QEMU then tells, or does not, is the last word on it.
    """
    status = await migration.source.query("query-status", QUERY_SECONDS)
    mark = migration.book.mark
    migration.directory.update(migrate_sent=True, was_running=status.get("running") is True)
    await migration.source.execute("migrate", {"uri": stream.URI}, COMMAND_SECONDS)
    await _wait_for_pre_switchover(migration, mark)
    # A guest that was paused already does not stop: no STOP, and no downtime.
    stop = migration.book.find(lambda seen: seen.is_("source", "STOP"), since=mark)
    if migration.state.was_running is not (stop is not None):
        migration.directory.update(was_running=stop is not None)
    if stop is not None:
        migration.directory.note(stopped_seconds=stop.event.received_seconds)


async def _wait_for_pre_switchover(migration: Migration, mark: int) -> None:
    """A QEMU that sends guest RAM by itself never gets there: what it loads at the destination
    faults, and nobody serves yet. So one that takes its time is asked what it sends.
    """
    what = "the source's pre-switchover"

    def arrived(seen: Seen) -> bool:
        return seen.migration("source", "pre-switchover")

    try:
        await migration.wait(what, arrived, LOOK_SECONDS, since=mark)
    except TroubleError as error:
        if error.code != TIMEOUT_CODE:
            raise
        sending = await migration.source.query("query-migrate", QUERY_SECONDS)
        if "ram" in sending:  # not yet there while it sets up
            _check_stream(migration, sending)
        await migration.wait(what, arrived, STOP_SECONDS, since=mark)


async def serve_loading(migration: Migration) -> None:
    """The page server answers, before QEMU can ask for a page while it loads.

    It does not push yet: device state has the link to itself while the guest stands still.
    """
    await serve_pages(migration, push=False)


async def serve_pages(migration: Migration, *, push: bool) -> None:
    """The page server goes to work.

    :param push: and sends what nobody asked for, too; else not before `start_push`.
    """
    await migration.source.call(
        "qpc-serve", schema.ServePages(push=push), schema.Empty, COMMAND_SECONDS
    )
    if push:
        _note_push(migration)


def _note_push(migration: Migration) -> None:
    """The push has begun; by new lanes, later, it only goes on."""
    if migration.state.served_seconds is None:
        migration.directory.note(served_seconds=now_seconds())


async def load_device_state(migration: Migration) -> None:
    """`migrate-continue`, until both say `completed`. The source's word alone means nothing.

    What the source is about to send is asked before: RAM in its stream (design: trap 1) must be
    refused before the guest stands still for the whole of it.
    """
    sending = await migration.source.query("query-migrate", QUERY_SECONDS)
    _check_stream(migration, sending)
    mark = migration.book.mark
    await migration.source.execute("migrate-continue", {"state": "pre-switchover"}, COMMAND_SECONDS)
    await _wait_until_loaded(migration, mark, load_seconds(_remaining_bytes(sending)))


def load_seconds(remaining_bytes: int) -> float:
    """How long the load may take.

    :param remaining_bytes: of QEMU's unshared blocks, which its stream carries.
    """
    crossing = (remaining_bytes + DEVICE_STATE_BYTES) / SLOWEST_LINK_BYTES_PER_SECOND
    return min(LOAD_MOST_SECONDS, LOAD_SECONDS + crossing)


def _remaining_bytes(moved: dict[str, object]) -> int:
    ram = moved.get("ram")
    remaining = ram.get("remaining") if isinstance(ram, dict) else None
    return remaining if isinstance(remaining, int) else 0


async def _wait_until_loaded(migration: Migration, mark: int, within_seconds: float) -> None:
    """Both sides' `completed`, under one deadline: the guest stands still."""
    role: Role = "source"
    try:
        async with asyncio.timeout(within_seconds):
            await migration.book.wait(lambda seen: seen.migration("source", "completed"), mark)
            role = "destination"
            await migration.book.wait(lambda seen: seen.migration("destination", "completed"), mark)
    except TimeoutError as error:
        address = migration.plan.lanes.listen
        raise TroubleError(
            TIMEOUT_CODE,
            f"the {role}'s completed did not come within {within_seconds:g} s: device state did "
            f"not get through the link to {address}, or was not loaded",
            remedy=f"see that {address} (lanes.listen) is within reach of the source, and what the "
            "destination QEMU says on its stderr",
        ) from error


async def confirm(migration: Migration) -> None:
    """Ask both once more: all that a commit needs must be so now, not by events alone."""
    source_moved, source_status, moved, status = await together(
        migration.source.query("query-migrate", QUERY_SECONDS),
        migration.source.query("query-status", QUERY_SECONDS),
        migration.destination.query("query-migrate", QUERY_SECONDS),
        migration.destination.query("query-status", QUERY_SECONDS),
    )
    _expect("source", "migration", source_moved, "completed")
    _expect("source", "state", source_status, "postmigrate")
    _expect("destination", "migration", moved, "completed")
    if status.get("running") is not False or status.get("status") == "inmigrate":
        raise TroubleError(
            "destination-not-paused", f"the destination is {status.get('status')}, not paused"
        )
    _check_stream(migration, source_moved)
    migration.loaded_status = str(status.get("status"))


def _expect(role: Role, what: str, reply: dict[str, object], wanted: str) -> None:
    if reply.get("status") != wanted:
        raise TroubleError(
            f"{role}-not-{wanted}",
            f"the {role}'s {what} is {reply.get('status')}, not {wanted}",
        )


def _check_stream(migration: Migration, moved: dict[str, object]) -> None:
    """QEMU must not move guest RAM by itself: it would lie over pages of ours.

    `ram.total` is the size of the blocks that its stream covers, whatever they hold and however
    often they are sent (QAPI MigrationStats; QEMU's ram_bytes_total leaves out those ignored).
    """
    ram = moved.get("ram")
    covered = ram.get("total") if isinstance(ram, dict) else None
    unshared = migration.state.unshared_bytes
    if not isinstance(covered, int) or covered >= unshared + STREAM_SLACK_BYTES:
        raise TroubleError(
            "ram-in-stream",
            f"QEMU's own stream covers {covered} bytes of RAM, more than its unshared blocks "
            f"({unshared}) explain: x-ignore-shared did not skip the guest's",
            remedy=f"start both anew; {BACKEND_REMEDY}",
        )


# --- commit -------------------------------------------------------------------------------


async def record_commit(migration: Migration) -> None:
    """The point of no return. Nothing is awaited between the last look and the record."""
    if found := migration.book.find(lambda seen: trouble(seen) is not None):
        error = trouble(found)
        assert error is not None
        raise error
    if not migration.destination.qemu_alive():
        raise TroubleError("qemu-gone", "the destination QEMU process has ended")
    migration.directory.record_commit()


async def announce_commit(migration: Migration) -> None:
    """Tell the handler that the guest may run from now on."""
    await migration.destination.call(
        "qpc-committed", schema.Committed(), schema.Empty, ANNOUNCE_SECONDS
    )


async def start_guest(migration: Migration) -> None:
    """`cont` to the destination, unless the guest was not running when we began.

    :raise OutcomeUnknownError: no reply; only a query can tell (recovery.settle_guest).
    """
    # A status of its own (shutdown, suspended, guest-panicked) came with the guest: keep it.
    if not migration.state.was_running or migration.loaded_status != "paused":
        return
    mark = migration.book.mark
    await send_cont(migration)
    note_resumed(migration, mark)


async def send_cont(migration: Migration) -> None:
    """The one `cont` of the destination, recorded before it can have been executed.

    :raise ContRefusedError: QEMU said no, and no earlier one can have run the guest.
    :raise OutcomeUnknownError: no reply.
    """
    sent_before = migration.state.cont_sent
    migration.directory.update(cont_sent=True)
    try:
        await migration.destination.execute("cont", None, COMMAND_SECONDS)
    except OutcomeUnknownError:
        raise
    except QpostcopyError as error:
        # Not sent, or sent and refused: one whose reply was lost may still have run it.
        migration.directory.update(cont_sent=sent_before)
        if isinstance(error, CommandError) and not sent_before:
            raise ContRefusedError(
                "cont-refused",
                f"the destination QEMU refused to run the guest: {error.desc}",
                remedy="mend that, start a new destination QEMU, and migrate again",
            ) from error
        raise


async def start_push(migration: Migration) -> None:
    """The rest of the pages begins to flow. Not before `cont`, which waits for nobody.

    If a controller dies before this, the page server begins by itself (schema.Push); if this
    fails, whoever repairs opens lanes that push at once.
    """
    await migration.source.call("qpc-push", schema.Push(), schema.Empty, COMMAND_SECONDS)
    _note_push(migration)


def note_resumed(migration: Migration, mark: int) -> None:
    """Stamp the end of the downtime: at the receipt of RESUME, or now."""
    seen = migration.book.find(lambda seen: seen.is_("destination", "RESUME"), since=mark)
    resumed = seen.event.received_seconds if seen else now_seconds()
    migration.directory.update(resumed_seconds=resumed)


SWITCHOVER: tuple[Step, ...] = (
    listen_for_device_state,
    stop_source,
    serve_loading,
    load_device_state,
    confirm,
    record_commit,
)
COMMIT: tuple[Step, ...] = (announce_commit, start_guest, start_push)
