"""Who runs the VM, when things go wrong that nothing real can be made to do.

The sides are miniatures (tests/fake_world.py) that check after every command
that never both run. What a real QEMU can be made to do is in tests/vm.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from qpostcopy import controller as controller_module
from qpostcopy import postcopy
from qpostcopy.controller import AbortRefusedError, Controller
from qpostcopy.errors import OutcomeUnknownError, QpostcopyError
from qpostcopy.migration import TroubleError
from qpostcopy.phases import Phase
from qpostcopy.preflight import Finding
from qpostcopy.process import Process
from qpostcopy.qmp import schema
from tests.controller_runs import (
    BEFORE_COMMIT,
    SECONDS,
    Act,
    Killed,
    fail,
    hang,
    is_back,
    make_miniature,
    migrate,
    replace_step,
    start,
)
from tests.fake_world import World


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture(autouse=True)
def miniature(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_miniature(world, tmp_path, monkeypatch)


# --- all well -----------------------------------------------------------------------------


def test_a_migration(world: World, tmp_path: Path) -> None:
    run = migrate(start(tmp_path))
    assert run.ended == ("completed", 0, "destination")
    assert world.destination.running
    assert not world.source.alive
    assert not any(world.destination.capabilities.values())
    assert not world.sides["destination"].attached
    assert run.directory.committed
    assert [phase["name"] for phase in run.result["phases"]] == [
        "prepare",
        "switchover",
        "postcopy",
        "complete",
    ]
    assert run.result["downtime_ms"] >= 0
    assert world.got("destination", "cont") == 1


def test_the_stream_of_messages(tmp_path: Path) -> None:
    run = migrate(start(tmp_path))
    assert all(
        {"v", "type", "ts", "migration_id"} <= message.keys() and message["v"] == 1
        for message in run.messages
    )
    assert [message["type"] for message in run.messages].count("result") == 1
    assert run.messages[-1]["type"] == "result"
    assert run.messages[-1].items() >= run.result.items()
    phases = [message for message in run.messages if message["type"] == "phase"]
    assert [(message["phase"], message["vm_location"], message["abort_safe"]) for message in phases]
    assert phases[0]["abort_safe"] is True
    assert phases[-1]["vm_location"] == "destination"


def test_the_commands_come_in_the_order_that_makes_it_safe(world: World, tmp_path: Path) -> None:
    migrate(start(tmp_path))
    wanted = [
        ("destination", "stop"),
        ("destination", "qpc-attach"),
        ("destination", "qpc-serve"),
        ("destination", "migrate-incoming"),
        ("source", "migrate"),
        ("source", "qpc-serve"),
        ("source", "migrate-continue"),
        ("destination", "qpc-committed"),
        ("destination", "cont"),
        ("destination", "qpc-committed"),  # whoever is to detach is told first, old or new
        ("destination", "qpc-detach"),
        ("source", "quit"),
    ]
    assert [entry for entry in world.log if entry in wanted] == wanted


def test_keep_leaves_the_source_paused(world: World, tmp_path: Path) -> None:
    assert migrate(start(tmp_path, after="keep")).ended == ("completed", 0, "destination")
    assert world.source.alive
    assert world.source.status == "postmigrate"
    assert not any(world.source.capabilities.values())


def test_a_paused_guest_stays_paused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(running=False)
    monkeypatch.setattr(controller_module, "Side", world.make_side)
    run = migrate(start(tmp_path))
    assert run.ended == ("completed", 0, "destination")
    assert world.destination.status == "paused"
    assert world.got("destination", "cont") == 0
    assert run.result["downtime_ms"] is None


# --- before the commit: back --------------------------------------------------------------


@pytest.mark.parametrize("step", BEFORE_COMMIT)
def test_whatever_fails_before_the_commit_is_rolled_back(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    error = TroubleError("made-up", f"{step} failed")
    replace_step(monkeypatch, step, error, after=step != "record_commit")
    run = migrate(start(tmp_path))
    assert run.ended == ("rolled-back", 4, "source")
    assert run.result["error"]["code"] == "made-up"
    assert not run.directory.committed
    is_back(world)


@pytest.mark.parametrize("step", BEFORE_COMMIT)
def test_our_own_bugs_are_rolled_back_too(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    replace_step(monkeypatch, step, AssertionError("a bug"))
    run = migrate(start(tmp_path))
    if step == "record_commit":
        assert run.ended == ("completed", 0, "destination")
        return
    assert run.ended == ("rolled-back", 4, "source")
    is_back(world)


@pytest.mark.parametrize("step", BEFORE_COMMIT)
@pytest.mark.parametrize(("name", "rc"), [("SIGINT", 130), ("SIGTERM", 143), (None, 143)])
def test_abort_at_any_step(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    name: Any,
    rc: int,
) -> None:
    controllers: list[Controller] = []

    async def wait_for_abort() -> None:
        await controllers[0].qpc_abort(schema.Abort(signal=name))
        await asyncio.sleep(SECONDS)

    replace_step(monkeypatch, step, wait_for_abort, after=step != "record_commit")
    run = migrate(start(tmp_path), meanwhile=controllers.append)
    assert run.ended == ("cancelled", rc, "source")
    is_back(world)


def test_the_time_limit_before_the_switch(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang() -> None:
        await asyncio.sleep(SECONDS)

    replace_step(monkeypatch, "open_lanes", hang)
    run = migrate(start(tmp_path, before_switch="1s"))
    assert run.ended == ("timed-out", 5, "source")
    is_back(world)


def test_preflight_tells_all_its_findings(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = [Finding("a", "source", "a is bad", "mend a"), Finding("b", "both", "b", "mend b")]
    monkeypatch.setattr("qpostcopy.prepare.judge", lambda *_: findings)
    run = migrate(start(tmp_path))
    assert run.ended == ("refused", 3, "source")
    assert [found["code"] for found in run.result["error"]["findings"]] == ["a", "b"]
    changing = {"stop", "cont", "migrate", "migrate-set-capabilities", "qpc-attach", "kill"}
    assert not changing & {command for _, command in world.log}


def test_a_second_migration_of_the_same_qemu_is_refused(world: World, tmp_path: Path) -> None:
    first = start(tmp_path)
    first.update_side("source", qemu=Process(pid=1, start_ticks=1))
    run = migrate(start(tmp_path))
    assert run.ended == ("refused", 3, "source")
    (found,) = run.result["error"]["findings"]
    assert found["code"] == "already-migrating"
    assert first.migration_id in found["message"]


def test_a_destination_that_hangs_while_loading(world: World, tmp_path: Path) -> None:
    def source_only(world: World, act: Act) -> object:
        world.source.migration, world.source.status = "completed", "postmigrate"
        world.event("source", "MIGRATION", status="completed")
        hang(world, "destination", "query-status")
        hang(world, "destination", "query-migrate")
        return {}

    world.faults["source", "migrate-continue"] = source_only
    run = migrate(start(tmp_path))
    assert run.ended == ("rolled-back", 4, "source")
    assert run.result["error"]["code"] == "switchover-timeout"
    assert not world.destination.alive
    is_back(world)


def test_the_sources_completed_alone_means_nothing(world: World, tmp_path: Path) -> None:
    def fails_to_load(world: World, act: Act) -> object:
        world.source.migration, world.source.status = "completed", "postmigrate"
        world.event("source", "MIGRATION", status="completed")
        world.destination.alive = False
        world.event("destination", "MIGRATION", status="failed")
        world.event("destination", "QPC_QEMU_GONE")
        return {}

    world.faults["source", "migrate-continue"] = fails_to_load
    run = migrate(start(tmp_path))
    assert run.ended == ("rolled-back", 4, "source")
    is_back(world)


@pytest.mark.parametrize(
    ("role", "command", "reply"),
    [
        ("source", "query-migrate", {"status": "active"}),
        ("source", "query-migrate", {"status": "completed", "ram": {"total": 5_000_000}}),
        ("source", "query-migrate", {"status": "completed"}),
        ("source", "query-status", {"status": "finish-migrate", "running": False}),
        ("destination", "query-migrate", {"status": "active"}),
        ("destination", "query-status", {"status": "inmigrate", "running": False}),
        ("destination", "query-status", {"status": "running", "running": True}),
    ],
)
def test_every_condition_of_the_commit_is_needed(
    world: World, tmp_path: Path, role: str, command: str, reply: dict[str, object]
) -> None:
    """One lie at the confirming query, and nothing is committed."""

    def lie(world: World, act: Act) -> object:
        confirming = world.source.status == "postmigrate" and world.destination.alive
        return reply if confirming else act()

    world.faults[role, command] = lie
    run = migrate(start(tmp_path))
    assert run.ended == ("rolled-back", 4, "source")
    assert not run.directory.committed
    is_back(world)


@pytest.mark.parametrize(
    "event", ["QPC_FATAL", "QPC_LANE_LOST", "QPC_MONITOR_LOST", "companion-lost", "QPC_QEMU_GONE"]
)
def test_trouble_of_the_handler_before_the_commit(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    async def trouble() -> None:
        world.event("destination", event, reason="made up")
        await asyncio.sleep(SECONDS)

    replace_step(monkeypatch, "confirm", trouble)
    run = migrate(start(tmp_path))
    assert run.ended == ("rolled-back", 4, "source")
    is_back(world)


def test_trouble_in_the_last_moment_is_seen_by_the_commit_itself(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def trouble() -> None:
        world.event("destination", "QPC_LANE_LOST", reason="made up")

    replace_step(monkeypatch, "confirm", trouble)
    run = migrate(start(tmp_path))
    assert run.ended == ("rolled-back", 4, "source")
    assert not run.directory.committed


def test_a_destination_that_will_not_die_keeps_the_source_stopped(
    world: World, tmp_path: Path
) -> None:
    world.kill_works = False
    world.stream_bytes = 1 << 30
    run = migrate(start(tmp_path))
    assert run.ended == ("failed", 11, "unknown")
    assert world.got("source", "cont") == 0
    assert not world.source.running


def test_a_source_that_starts_by_itself_gets_no_cont(world: World, tmp_path: Path) -> None:
    def by_itself(world: World, act: Act) -> object:
        world.source.migration, world.source.status = "failed", "running"
        world.event("source", "MIGRATION", status="failed")
        return {}

    world.faults["source", "migrate-continue"] = by_itself
    run = migrate(start(tmp_path))
    assert run.ended == ("rolled-back", 4, "source")
    assert world.got("source", "cont") == 0
    is_back(world)


def test_a_source_that_does_not_come_back(world: World, tmp_path: Path) -> None:
    world.stream_bytes = 1 << 30
    world.faults["source", "cont"] = lambda _world, _act: fail(QpostcopyError("disk locked"))
    run = migrate(start(tmp_path))
    assert run.ended == ("failed", 11, "source")
    assert "disk locked" in run.result["error"]["message"]
    assert run.result["error"]["remedy"]


def test_a_source_that_needs_a_moment_is_asked_again(world: World, tmp_path: Path) -> None:
    world.stream_bytes = 1 << 30
    replies = iter([OutcomeUnknownError("cont: no reply"), None])

    def late(world: World, act: Act) -> object:
        error = next(replies)
        return fail(error) if error else act()

    world.faults["source", "cont"] = late
    assert migrate(start(tmp_path)).ended == ("rolled-back", 4, "source")
    is_back(world)


def test_a_guest_that_powers_off_at_the_source_is_no_failure(world: World, tmp_path: Path) -> None:
    def power_off(world: World, act: Act) -> object:
        world.source.alive = False
        world.event("source", "SHUTDOWN", guest=True, reason="guest-shutdown")
        world.event("source", "QPC_QEMU_GONE")
        return {}

    world.faults["source", "migrate"] = power_off
    run = migrate(start(tmp_path))
    assert run.ended == ("completed", 0, "ended")
    assert "error" not in run.result


# --- at the commit: ask -------------------------------------------------------------------


@pytest.mark.parametrize("executed", [True, False])
def test_a_lost_reply_to_cont_is_asked_for(world: World, tmp_path: Path, executed: bool) -> None:
    lost: list[bool] = []

    def lose(world: World, act: Act) -> object:
        if not lost:
            lost.append(True)
            if executed:
                act()
            raise OutcomeUnknownError("cont: no reply")
        return act()

    world.faults["destination", "cont"] = lose
    run = migrate(start(tmp_path))
    assert run.ended == ("completed", 0, "destination")
    assert world.destination.running
    assert world.got("source", "cont") == 0
    assert world.got("destination", "cont") == (1 if executed else 2)
    assert run.result["downtime_ms"] > 0


def test_a_destination_that_dies_at_cont_never_starts_the_source(
    world: World, tmp_path: Path
) -> None:
    def die(world: World, act: Act) -> object:
        world.destination.alive = False
        world.event("destination", "QPC_QEMU_GONE")
        raise OutcomeUnknownError("cont: no reply")

    world.faults["destination", "cont"] = die
    run = migrate(start(tmp_path))
    assert run.ended == ("failed", 11, "ended")
    assert world.got("source", "cont") == 0
    assert world.source.alive


def test_a_destination_that_dies_before_cont_is_taken_back(world: World, tmp_path: Path) -> None:
    """It never ran and never will: the source may, and the record is undone."""

    def die(world: World, act: Act) -> object:
        world.destination.alive = False
        world.event("destination", "QPC_QEMU_GONE")
        return act()

    world.faults["destination", "qpc-committed"] = die
    run = migrate(start(tmp_path))
    assert run.ended == ("rolled-back", 4, "source")
    assert not run.directory.committed
    is_back(world)


@pytest.mark.parametrize("told", [False, True])
def test_resume_after_the_destinations_death_too(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """Killed between the record and `cont`, or right after `cont`: only the first goes back."""
    directory = start(tmp_path)
    with monkeypatch.context() as patch:
        step = "start_guest" if told else "announce_commit"
        replace_step(patch, step, Killed())
        with pytest.raises(Killed):
            migrate(directory)
    world.destination.alive = False
    run = migrate(directory, resuming=True)
    if told:
        assert run.ended == ("failed", 11, "ended")
        assert world.got("source", "cont") == 0
    else:
        assert run.ended == ("rolled-back", 4, "source")
        is_back(world)


def test_a_cont_that_is_never_answered_ends_interrupted(world: World, tmp_path: Path) -> None:
    hang(world, "destination", "cont")
    run = migrate(start(tmp_path))
    assert run.ended == ("interrupted", 10, "destination")
    assert world.got("source", "cont") == 0
    assert not any(side.quits for side in world.sides.values())


def test_abort_after_the_commit_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controllers: list[Controller] = []

    def abort(world: World, act: Act) -> object:
        with pytest.raises(AbortRefusedError, match="VM is at the destination"):
            controllers[0]._request_abort("SIGINT")
        return act()

    world.faults["destination", "cont"] = abort
    run = migrate(start(tmp_path), meanwhile=controllers.append)
    assert run.ended == ("completed", 0, "destination")


# --- after the commit: on -----------------------------------------------------------------


def test_lost_lanes_are_opened_again(world: World, tmp_path: Path) -> None:
    world.placed_at_once = False

    def lose_once(world: World, act: Act) -> object:
        act()
        if world.got("destination", "qpc-committed") == 1:
            world.event("destination", "QPC_LANE_LOST", lane="demand", reason="made up")
        world.placed_at_once = True
        return {}

    world.faults["destination", "cont"] = lose_once
    run = migrate(start(tmp_path))
    assert run.ended == ("completed", 0, "destination")


def test_a_new_handler_adopts(world: World, tmp_path: Path) -> None:
    world.placed_at_once = False

    def die(world: World, act: Act) -> object:
        act()
        side = world.sides["destination"]
        side.up = side.attached = False
        world.event("destination", "companion-lost", reason="killed")
        world.placed_at_once = True
        return {}

    world.faults["destination", "cont"] = die
    run = migrate(start(tmp_path))
    assert run.ended == ("completed", 0, "destination")
    assert world.got("destination", "qpc-adopt") == 1
    assert world.got("destination", "qpc-attach") == 1
    assert world.got("destination", "qpc-committed") == 3


def test_repairs_are_bounded_and_then_resume_goes_on(world: World, tmp_path: Path) -> None:
    world.placed_at_once = False

    def lose(world: World, act: Act) -> object:
        reply = act()
        if world.destination.running:  # before the commit it would be rolled back
            world.event("destination", "QPC_LANE_LOST", lane="demand", reason="made up")
        return reply

    world.faults["source", "qpc-serve"] = world.faults["destination", "cont"] = lose
    directory = start(tmp_path)
    run = migrate(directory)
    assert run.ended == ("interrupted", 10, "destination")
    assert run.directory.state.phase is Phase.INTERRUPTED
    assert not any(side.quits for side in world.sides.values())
    assert world.got("source", "qpc-connect") == 1 + postcopy.REPAIRS

    world.faults.clear()
    world.placed_at_once = True
    run = migrate(directory, resuming=True)
    assert run.ended == ("completed", 0, "destination")
    assert world.got("destination", "cont") == 1


def test_a_guest_that_powers_off_at_the_destination(world: World, tmp_path: Path) -> None:
    world.placed_at_once = False

    def power_off(world: World, act: Act) -> object:
        act()
        world.destination.alive = False
        world.event("destination", "SHUTDOWN", guest=True, reason="guest-shutdown")
        world.event("destination", "QPC_QEMU_GONE")
        return {}

    world.faults["destination", "cont"] = power_off
    run = migrate(start(tmp_path))
    assert run.ended == ("completed", 0, "ended")
    assert not world.source.alive


def test_a_bug_after_the_commit_is_interrupted(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def bug(*_: object, **__: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(controller_module, "run_postcopy", bug)
    run = migrate(start(tmp_path))
    assert run.ended == ("interrupted", 10, "destination")
    assert world.destination.running


# --- resume -------------------------------------------------------------------------------


#: Between any two steps; what follows record_commit is "before announce_commit".
PLACES = [(step, after) for step in BEFORE_COMMIT for after in (False, True)][:-1]
PLACES += [("announce_commit", False), ("announce_commit", True), ("start_guest", True)]


@pytest.mark.parametrize(("step", "after"), PLACES)
def test_a_controller_killed_at_any_step_is_resumed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    directory = start(tmp_path)
    with monkeypatch.context() as patch:
        replace_step(patch, step, Killed(), after=after)
        with pytest.raises(Killed):
            migrate(directory)
    committed = directory.committed
    assert committed is (step in ("announce_commit", "start_guest"))
    run = migrate(directory, resuming=True)
    if committed:
        assert run.ended == ("completed", 0, "destination")
        assert world.destination.running
        assert world.got("source", "cont") == 0
    else:
        assert run.ended == ("rolled-back", 4, "source")
        is_back(world)


@pytest.mark.parametrize("function", ["run_postcopy", "complete"])
def test_a_controller_killed_after_the_switchover_is_resumed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    async def die(*_: object) -> None:
        raise Killed

    directory = start(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(controller_module, function, die)
        with pytest.raises(Killed):
            migrate(directory)
    run = migrate(directory, resuming=True)
    assert run.ended == ("completed", 0, "destination")
    assert world.got("destination", "cont") == 1
    assert not world.source.alive
    assert run.result["pages"]["total"] == 256
