"""Before the commit: whatever fails, the VM is back at its source.

As in test_controller.py the sides are miniatures; what a real QEMU can be made
to do is in tests/vm.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from qpostcopy import switchover
from qpostcopy.controller import Controller
from qpostcopy.errors import OutcomeUnknownError, QpostcopyError
from qpostcopy.migration import TroubleError
from qpostcopy.preflight import Finding
from qpostcopy.process import Process
from qpostcopy.qmp import schema
from qpostcopy.registry import claim
from tests.controller_runs import (
    BEFORE_COMMIT,
    SECONDS,
    Act,
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
    assert claim(first, {"source": Process(pid=1, start_ticks=1)}) is None
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
    assert "link to 127.0.0.1" in run.result["error"]["message"]
    assert "lanes.listen" in run.result["error"]["remedy"]
    assert not world.destination.alive
    is_back(world)


def test_a_slow_link_has_its_time(world: World, tmp_path: Path) -> None:
    """By what is to cross it: more than the load itself may take."""

    def source_first(world: World, act: Act) -> object:
        world.source.migration, world.source.status = "completed", "postmigrate"
        world.event("source", "MIGRATION", status="completed")
        late_seconds = 2 * switchover.LOAD_SECONDS
        asyncio.get_running_loop().call_later(late_seconds, world.sides["destination"].load)
        return {}

    world.faults["source", "migrate-continue"] = source_first
    world.remaining_bytes = 10 * switchover.SLOWEST_LINK_BYTES_PER_SECOND
    assert migrate(start(tmp_path)).ended == ("completed", 0, "destination")


def test_both_sides_load_under_one_deadline(world: World, tmp_path: Path) -> None:
    """A source that has used it up leaves the destination none."""

    def source_late(world: World, act: Act) -> object:
        def complete() -> None:
            world.source.migration, world.source.status = "completed", "postmigrate"
            world.event("source", "MIGRATION", status="completed")

        loop = asyncio.get_running_loop()
        loop.call_later(0.7 * switchover.LOAD_SECONDS, complete)
        loop.call_later(1.4 * switchover.LOAD_SECONDS, world.sides["destination"].load)
        return {}

    world.faults["source", "migrate-continue"] = source_late
    run = migrate(start(tmp_path))
    assert run.ended == ("rolled-back", 4, "source")
    assert run.result["error"]["code"] == "switchover-timeout"


def test_ram_in_the_stream_is_refused_before_it_is_sent(world: World, tmp_path: Path) -> None:
    """Its transfer would be downtime."""
    world.announced_bytes = 1 << 30
    run = migrate(start(tmp_path))
    assert run.ended == ("rolled-back", 4, "source")
    assert run.result["error"]["code"] == "ram-in-stream"
    assert world.got("source", "migrate-continue") == 0
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
