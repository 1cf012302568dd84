"""Who runs the VM, when things go wrong that nothing real can be made to do.

The sides are miniatures (tests/fake_world.py) that check after every command
that never both run. What a real QEMU can be made to do is in tests/vm.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qpostcopy import controller as controller_module
from qpostcopy import postcopy
from qpostcopy.phases import Phase
from qpostcopy.switchover import COMMIT
from tests.controller_runs import (
    BEFORE_COMMIT,
    Act,
    Killed,
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
        ("source", "qpc-push"),
        ("destination", "qpc-committed"),  # whoever is to detach is told first, old or new
        ("destination", "qpc-detach"),
        ("source", "quit"),
    ]
    assert [entry for entry in world.log if entry in wanted] == wanted


def test_the_rate_of_the_push_counts_from_its_start(world: World, tmp_path: Path) -> None:
    """On a slow link the load of device state takes long, and no page is pushed meanwhile."""
    state = migrate(start(tmp_path)).directory.state
    assert state.served_seconds is not None
    assert state.resumed_seconds is not None
    assert state.served_seconds > state.resumed_seconds


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
PLACES += [(step.__name__, True) for step in COMMIT] + [("announce_commit", False)]


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
    assert committed is (step in {step.__name__ for step in COMMIT})
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
