"""At the commit: who may run the VM when replies are lost, late or a refusal.

As in test_controller.py the sides are miniatures; what a real QEMU can be made
to do is in tests/vm.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qpostcopy.controller import AbortRefusedError, Controller
from qpostcopy.errors import OutcomeUnknownError, QpostcopyError
from qpostcopy.migration import now_seconds
from qpostcopy.qmp.client import RemoteError
from qpostcopy.qmp.connection import CommandError
from qpostcopy.state import StateDirectory
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


@pytest.mark.parametrize(
    ("role", "command", "error", "told"),
    [
        ("source", "qpc-push", RemoteError("qpc-push", "CoreError", "no", None), "start push: "),
        ("source", "qpc-push", OutcomeUnknownError("qpc-push: no reply"), "start push: "),
        ("destination", "qpc-committed", OutcomeUnknownError("no reply"), "announce commit: "),
    ],
)
def test_a_push_that_does_not_begin_costs_one_repair(
    world: World,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    role: str,
    command: str,
    error: QpostcopyError,
    told: str,
) -> None:
    """Whether it failed itself or was not come to: new lanes push at once."""
    failed_seconds: list[float] = []

    def fail_once(world: World, act: Act) -> object:
        if failed_seconds:
            return act()
        failed_seconds.append(now_seconds())
        raise error

    world.faults[role, command] = fail_once
    run = migrate(start(tmp_path))
    assert run.ended == ("completed", 0, "destination")
    assert world.pushes == [False, True]
    assert world.got("destination", "cont") == 1
    assert [text for text in caplog.messages if text.startswith(f"after the commit: {told}")]
    began_seconds = run.directory.state.served_seconds
    assert began_seconds is not None
    assert began_seconds > failed_seconds[0]


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


# --- did it run ---------------------------------------------------------------------------


def test_a_guest_paused_after_the_inspection_stays_paused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def pause() -> None:
        world.source.status, world.was_running = "paused", False

    replace_step(monkeypatch, "serve_faults", pause)
    run = migrate(start(tmp_path))
    assert run.ended == ("completed", 0, "destination")
    assert world.got("destination", "cont") == 0
    assert world.destination.status == "paused"


def test_a_guest_started_after_the_inspection_runs_there(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.source.status = "paused"

    async def start_it() -> None:
        world.source.status = "running"

    replace_step(monkeypatch, "serve_faults", start_it)
    assert migrate(start(tmp_path)).ended == ("completed", 0, "destination")
    assert world.destination.running


def test_a_guest_paused_after_the_inspection_is_not_started_by_a_rollback(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def pause() -> None:
        world.source.status, world.was_running = "paused", False

    replace_step(monkeypatch, "serve_faults", pause)
    hang(world, "source", "migrate")
    assert migrate(start(tmp_path)).ended == ("rolled-back", 4, "source")
    assert world.got("source", "cont") == 0
    assert world.source.status == "paused"


def test_stop_is_the_last_word_on_whether_it_ran(world: World, tmp_path: Path) -> None:
    """Paused between the question and `migrate`: no STOP comes, and no `cont` goes out."""

    def pause_then_migrate(world: World, act: Act) -> object:
        world.source.status, world.was_running = "paused", False
        return act()

    world.faults["source", "migrate"] = pause_then_migrate
    run = migrate(start(tmp_path))
    assert run.ended == ("completed", 0, "destination")
    assert world.got("destination", "cont") == 0


def test_a_destination_started_with_S_keeps_its_autostart_off(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.destination.arguments += ("-S",)
    world.destination.autostart = False
    replace_step(monkeypatch, "attach", OutcomeUnknownError("made up"))
    assert migrate(start(tmp_path)).ended == ("rolled-back", 4, "source")
    assert world.got("destination", "cont") == 0
    assert not world.destination.autostart


# --- a `cont` that is refused -------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
def test_a_refused_cont_goes_back(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """It never ran there: that QEMU is proven dead, then the record goes, then the source runs."""
    erased: list[bool] = []
    erase = StateDirectory.erase_commit

    def note_and_erase(directory: StateDirectory) -> None:
        erased.append(world.destination.alive)
        erase(directory)

    monkeypatch.setattr(StateDirectory, "erase_commit", note_and_erase)
    if late:  # the first `cont` is the one after a repair
        replace_step(monkeypatch, "announce_commit", OutcomeUnknownError("lost"), after=False)
    world.faults["destination", "cont"] = lambda _world, _act: fail(NO_LOCK)
    run = migrate(start(tmp_path))
    assert run.ended == ("rolled-back", 4, "source")
    assert run.result["error"]["code"] == "cont-refused"
    assert "write" in run.result["error"]["message"]
    assert erased == [False]
    assert not run.directory.committed
    is_back(world)


def test_a_refused_cont_of_a_destination_that_will_not_die(world: World, tmp_path: Path) -> None:
    world.kill_works = False
    world.faults["destination", "cont"] = lambda _world, _act: fail(NO_LOCK)
    run = migrate(start(tmp_path))
    assert run.ended == ("interrupted", 10, "destination")
    assert "does not end" in run.result["error"]["message"]
    assert run.directory.committed
    assert world.got("source", "cont") == 0

    world.destination.alive = False
    run = migrate(run.directory, resuming=True)
    assert run.ended == ("rolled-back", 4, "source")
    assert not run.directory.committed
    is_back(world)


def test_a_refused_cont_after_a_lost_one_is_not_taken_back(world: World, tmp_path: Path) -> None:
    """The first may have run the guest: from then on only the destination may."""
    replies = iter([OutcomeUnknownError("cont: no reply"), NO_LOCK, None])

    def answer(world: World, act: Act) -> object:
        error = next(replies)
        return fail(error) if error else act()

    world.faults["destination", "cont"] = answer
    run = migrate(start(tmp_path))
    assert run.ended == ("completed", 0, "destination")
    assert world.got("source", "cont") == 0


def test_a_destination_that_dies_after_a_lost_and_a_refused_cont(
    world: World, tmp_path: Path
) -> None:
    """A refusal does not undo the one before it, which may have run the guest."""
    lost: list[bool] = []

    def lose_then_refuse_and_die(world: World, act: Act) -> object:
        if not lost:
            lost.append(True)
            raise OutcomeUnknownError("cont: no reply")
        world.destination.alive = False
        world.event("destination", "QPC_QEMU_GONE")
        raise NO_LOCK

    world.faults["destination", "cont"] = lose_then_refuse_and_die
    run = migrate(start(tmp_path))
    assert run.ended == ("failed", 11, "ended")
    assert run.directory.committed
    assert world.got("source", "cont") == 0
