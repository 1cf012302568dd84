"""What is left after trouble upon trouble: results, sources that come late, silence.

As in test_controller.py the sides are miniatures; what a real QEMU can be made
to do is in tests/vm.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from qpostcopy import controller as controller_module
from qpostcopy import postcopy, recovery
from qpostcopy.errors import OutcomeUnknownError, UsageError
from qpostcopy.phases import Phase
from qpostcopy.preflight import Finding
from qpostcopy.process import Process
from qpostcopy.qmp.client import RemoteRefusedError
from qpostcopy.qmp.connection import CommandError
from qpostcopy.state import FAULT_TRACE, StateDirectory
from tests.controller_runs import (
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

NO_LOCK = CommandError("cont", "GenericError", 'Failed to get "write" lock')


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture(autouse=True)
def miniature(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_miniature(world, tmp_path, monkeypatch)


# --- the end is an end --------------------------------------------------------------------


@pytest.mark.parametrize("at", ["quit", "write_result"])
@pytest.mark.parametrize("step", ["attach", "confirm"])
def test_killed_while_it_concludes_a_rollback(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, at: str
) -> None:
    directory = start(tmp_path)

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        replace_step(patch, step, Killed())
        with pytest.raises(Killed):
            migrate(directory)
    with monkeypatch.context() as patch:
        if at == "quit":
            patch.setattr("tests.fake_world.FakeSide.quit", die)
        else:
            patch.setattr(StateDirectory, "write_result", die)
        with pytest.raises(Killed):
            migrate(directory, resuming=True)
    assert migrate(directory, resuming=True).ended == ("rolled-back", 4, "source")
    is_back(world)


@pytest.mark.parametrize(
    ("phase", "ended"),
    [
        (Phase.ROLLED_BACK, ("rolled-back", 4, "source")),
        (Phase.FAILED, ("failed", 11, "source")),
    ],
)
def test_a_terminal_phase_without_a_result_is_only_concluded(
    world: World, tmp_path: Path, phase: Phase, ended: tuple[str, int, str]
) -> None:
    directory = start(tmp_path)
    directory.update_side("source", qemu=Process(pid=1, start_ticks=1))
    directory.update(phase=phase, migrate_sent=True, was_running=True)
    assert migrate(directory, resuming=True).ended == ended
    assert world.log == []
    assert all(side.quits for side in world.sides.values())


def test_the_result_is_there_before_the_last_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = start(tmp_path)
    found: list[bool] = []
    replace_step(monkeypatch, "attach", OutcomeUnknownError("made up"))

    def look(controller: Any) -> None:
        told = controller._on_phase

        def on_phase(old: Phase, new: Phase) -> None:
            found.append(directory.read_result() is not None)
            told(old, new)

        controller._migration.machine._notify = on_phase

    run = migrate(directory, meanwhile=look)
    assert found == [True]
    assert run.directory.state.phase is Phase.ROLLED_BACK
    last = [message for message in run.messages if message["type"] == "phase"][-1]
    assert (last["phase"], last["vm_location"]) == ("rolled-back", "source")


def test_the_last_phase_tells_the_right_place(world: World, tmp_path: Path) -> None:
    world.kill_works = False
    world.stream_bytes = 1 << 30
    run = migrate(start(tmp_path))
    last = [message for message in run.messages if message["type"] == "phase"][-1]
    assert (last["phase"], last["vm_location"]) == ("rollback-failed", "unknown")


# --- a source that comes late -------------------------------------------------------------


def test_a_monitor_that_is_late_is_waited_for(world: World, tmp_path: Path) -> None:
    """The page server is new, and QEMU's main loop has not taken its connection yet."""
    world.stream_bytes = 1 << 30
    refusals = iter([True] * 4)

    def late(world: World, act: Act) -> object:
        if not world.destination.alive and next(refusals, False):
            raise RemoteRefusedError("query-migrate", "MonitorHeldError", "not yet", None)
        return act()

    world.faults["source", "query-migrate"] = late
    assert migrate(start(tmp_path)).ended == ("rolled-back", 4, "source")
    is_back(world)


def test_a_rollback_that_fails_is_tried_again_by_resume(world: World, tmp_path: Path) -> None:
    world.stream_bytes = 1 << 30
    world.faults["source", "cont"] = lambda _world, _act: fail(NO_LOCK)
    directory = start(tmp_path)
    run = migrate(directory)
    assert run.ended == ("failed", 11, "source")
    assert run.directory.state.phase is Phase.ROLLBACK_FAILED
    remedy = run.result["error"]["remedy"]
    assert f"qpostcopy resume {directory.migration_id}" in remedy
    assert remedy.index("migrate_cancel") < remedy.index("`cont`")

    assert migrate(directory, resuming=True).ended == ("failed", 11, "source")
    world.faults.clear()
    run = migrate(directory, resuming=True)
    assert run.ended == ("rolled-back", 4, "source")
    assert run.directory.state.phase is Phase.ROLLED_BACK
    is_back(world)


@pytest.mark.parametrize("status", ["io-error", "internal-error", "watchdog", "shutdown"])
def test_a_state_of_the_guests_own_is_left_alone(world: World, tmp_path: Path, status: str) -> None:
    def ends_so(world: World, act: Act) -> object:
        world.source.migration, world.source.status = "failed", status
        world.event("source", "MIGRATION", status="failed")
        return {}

    world.faults["source", "migrate-continue"] = ends_so
    run = migrate(start(tmp_path))
    assert run.ended == ("rolled-back", 4, "source")
    assert world.got("source", "cont") == 0
    assert any(status in warning for warning in run.result["warnings"])


@pytest.mark.parametrize("step", ["inspect", "hold_destination", "attach", "load_device_state"])
def test_a_source_that_is_gone_is_lost_and_not_rolled_back(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async def die() -> None:
        world.source.alive = False
        world.event("source", "QPC_QEMU_GONE")
        await asyncio.sleep(1)

    replace_step(monkeypatch, step, die, after=False)
    run = migrate(start(tmp_path))
    assert run.ended == ("failed", 11, "ended")
    assert run.directory.state.phase is Phase.FAILED
    assert "from its disk" in run.result["error"]["remedy"]


def test_a_page_server_that_cannot_be_had_costs_a_running_source_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lose() -> None:
        side = world.sides["source"]
        side.up = False
        world.faults["source", "ensure"] = lambda _world, _act: fail(OutcomeUnknownError("none"))
        world.event("source", "companion-lost", reason="killed")
        await asyncio.sleep(1)

    replace_step(monkeypatch, "open_lanes", lose)
    run = migrate(start(tmp_path))
    assert run.ended == ("rolled-back", 4, "source")
    assert any("keeps our migration settings" in warning for warning in run.result["warnings"])


@pytest.mark.parametrize("step", ["open_lanes", "load_device_state"])
def test_a_network_that_is_gone_with_its_companions_costs_no_vm(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async def tear_down() -> None:
        world.without_network |= {"source", "destination"}
        for side in world.sides.values():
            side.up = False
        world.event("source", "companion-lost", reason="killed")
        await asyncio.sleep(1)

    replace_step(monkeypatch, step, tear_down)
    run = migrate(start(tmp_path))
    assert run.ended == ("rolled-back", 4, "source")
    is_back(world)


# --- after the commit ---------------------------------------------------------------------


def test_a_handler_that_is_dead_when_all_is_placed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one holds nothing until it adopts: only then can it let go."""

    async def kill_first(migration: Any, location: Any) -> Any:
        world.sides["destination"].up = world.sides["destination"].attached = False
        return await postcopy.complete(migration, location)

    monkeypatch.setattr(controller_module, "complete", kill_first)
    run = migrate(start(tmp_path))
    assert run.ended == ("completed", 0, "destination")
    assert world.got("destination", "qpc-adopt") == 1
    assert run.result["warnings"] == []
    assert run.result["pages"]["total"] == 256


def test_a_successor_that_cannot_go_on_with_the_trace(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its predecessor has left is no trace that anybody should use: told, not named."""

    async def kill_first(migration: Any, location: Any) -> Any:
        (migration.directory.path / FAULT_TRACE).write_bytes(b"damaged")
        world.sides["destination"].up = world.sides["destination"].attached = False
        return await postcopy.complete(migration, location)

    def adopt(_: World, act: Act) -> object:
        return act().model_copy(update={"untraced": "is cut off"})

    monkeypatch.setattr(controller_module, "complete", kill_first)
    world.faults["destination", "qpc-adopt"] = adopt
    run = migrate(start(tmp_path))
    assert run.ended == ("completed", 0, "destination")
    assert run.result["warnings"] == ["the faults of this migration are not recorded: is cut off"]
    assert run.result["trace"] is None


def test_nothing_is_left_in_qemu_though_the_network_is_gone(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def tear_down_first(migration: Any, location: Any) -> Any:
        world.without_network |= {"source", "destination"}
        for side in world.sides.values():
            side.up = side.attached = False
        return await postcopy.complete(migration, location)

    monkeypatch.setattr(controller_module, "complete", tear_down_first)
    run = migrate(start(tmp_path))
    assert run.ended == ("completed", 0, "destination")
    assert run.result["warnings"] == []
    assert not world.sides["destination"].attached
    assert not world.source.alive


def test_a_repair_needs_the_network(world: World, tmp_path: Path) -> None:
    """Lanes from anywhere else would reach nobody, or the wrong one: `resume` can try again."""
    world.placed_at_once = False

    def tear_down(world: World, act: Act) -> object:
        reply = act()
        world.without_network.add("destination")
        world.sides["destination"].up = False
        world.event("destination", "companion-lost", reason="killed")
        return reply

    world.faults["destination", "cont"] = tear_down
    directory = start(tmp_path)
    run = migrate(directory)
    assert run.ended == ("interrupted", 10, "destination")
    assert "no such network namespace" in run.result["error"]["message"]
    world.without_network.clear()
    world.placed_at_once = True
    assert migrate(directory, resuming=True).ended == ("completed", 0, "destination")


@pytest.mark.parametrize("lost", ["reply", "handler"])
def test_a_detach_whose_reply_is_lost_is_no_trouble(
    world: World, tmp_path: Path, lost: str
) -> None:
    """The record of what is in QEMU is gone: nothing is to be adopted, nothing to be told."""

    def lose(world: World, act: Act) -> object:
        act()
        if lost == "handler":
            world.sides["destination"].up = False
        raise OutcomeUnknownError("qpc-detach: no reply")

    world.faults["destination", "qpc-detach"] = lose
    run = migrate(start(tmp_path))
    assert run.ended == ("completed", 0, "destination")
    assert run.result["warnings"] == []
    assert world.got("destination", "qpc-detach") == 1


@pytest.mark.parametrize("role", ["source", "destination"])
def test_a_companion_that_hangs_in_postcopy_is_replaced(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    monkeypatch.setattr(postcopy, "PROBE_SECONDS", 0.01)
    world.placed_at_once = False

    def hangs(world: World, act: Act) -> object:
        act()
        world.hung.add(role)
        world.faults[role, "ensure"] = come_back
        return {}

    def come_back(world: World, act: Act) -> object:
        world.placed_at_once = True
        return act()

    world.faults["destination", "cont"] = hangs
    run = migrate(start(tmp_path))
    assert run.ended == ("completed", 0, "destination")
    said = [message["message"] for message in run.messages if message["type"] == "log"]
    assert any("does not answer" in text for text in said)


def test_an_order_that_is_lost_after_the_commit_costs_a_warning(
    world: World, tmp_path: Path
) -> None:
    """A new page server compiles anew, and the trace is damaged by then."""
    world.placed_at_once = False
    tried: list[object] = []

    def damaged(world: World, act: Act) -> object:
        tried.append(act)
        if len(tried) == 1:
            raise UsageError("push-0.trace: is damaged")
        world.placed_at_once = True
        return act()

    def lose(world: World, act: Act) -> object:
        reply = act()
        world.faults["source", "qpc-prepare"] = damaged
        world.event("destination", "QPC_LANE_LOST", lane="demand", reason="made up")
        return reply

    world.faults["destination", "cont"] = lose
    run = migrate(start(tmp_path))
    assert run.ended == ("completed", 0, "destination")
    assert len(tried) == 2
    assert any("address order" in warning for warning in run.result["warnings"])


@pytest.mark.parametrize("reason", ["host-signal", "host-qmp-quit"])
def test_a_destination_that_somebody_ended_is_not_ended_by_itself(
    world: World, tmp_path: Path, reason: str
) -> None:
    world.placed_at_once = False

    def end(world: World, act: Act) -> object:
        act()
        world.destination.alive = False
        world.event("destination", "SHUTDOWN", guest=False, reason=reason)
        world.event("destination", "QPC_QEMU_GONE")
        return {}

    world.faults["destination", "cont"] = end
    run = migrate(start(tmp_path))
    assert run.ended == ("failed", 11, "ended")
    assert reason in run.result["error"]["message"]
    assert "disk has moved on" in run.result["error"]["message"]
    assert world.source.alive
    assert world.got("source", "quit") == 0


def test_what_is_said_of_a_vm_that_never_got_cont(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(running=False)
    make_miniature(world, tmp_path, monkeypatch)
    world.placed_at_once = False

    def die(world: World, act: Act) -> object:
        world.destination.alive = False
        world.event("destination", "QPC_LANE_LOST", lane="demand", reason="made up")
        return act()

    monkeypatch.setattr("qpostcopy.controller.run_postcopy", run_later(world, die))
    run = migrate(start(tmp_path))
    assert run.ended == ("failed", 11, "ended")
    assert "never got a `cont`" in run.result["error"]["message"]
    assert "disk has moved" not in run.result["error"]["message"]


def run_later(world: World, die: Any) -> Any:
    """run_postcopy whose first count of the pages is the destination's last moment."""

    async def run(migration: Any, problem: str) -> Any:
        world.faults["destination", "qpc-stats"] = die
        return await postcopy.run_postcopy(migration, problem)

    return run


# --- before anything ----------------------------------------------------------------------


def test_a_profile_that_does_not_fit_is_a_usage_error(world: World, tmp_path: Path) -> None:
    class RemoteSchedule(UsageError):
        pass

    error = RemoteSchedule("profile: step 2: no block pc.ram7", remedy="name one of: ram")
    world.faults["source", "qpc-prepare"] = lambda _world, _act: fail(error)
    run = migrate(start(tmp_path))
    assert run.ended == ("error", 2, "source")
    assert "pc.ram7" in run.result["error"]["message"]
    assert not {"stop", "cont", "migrate", "qpc-attach"} & {name for _, name in world.log}


def test_remarks_of_preflight_are_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = Finding("older-qemu", "both", "7.2 to 5.2", "move to a newer one")
    monkeypatch.setattr("qpostcopy.prepare.remark", lambda *_: [odd])
    run = migrate(start(tmp_path))
    assert run.ended == ("completed", 0, "destination")
    assert any("7.2 to 5.2" in warning for warning in run.result["warnings"])


def test_a_hung_source_is_waited_for_no_longer_than_said(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "SETTLE_SECONDS", 0.3)
    world.stream_bytes = 1 << 30

    def then_hang(world: World, act: Act) -> object:
        if not world.destination.alive:
            hang(world, "source", "query-status")
        return act()

    world.faults["source", "query-migrate"] = then_hang
    run = migrate(start(tmp_path))
    assert run.ended == ("failed", 11, "source")
    assert "did not settle" in run.result["error"]["message"]
