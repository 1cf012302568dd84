"""Runs of a controller over the miniatures of tests/fake_world.py: what its tests share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qpostcopy import controller as controller_module
from qpostcopy import postcopy, recovery, switchover
from qpostcopy.config import load_plan
from qpostcopy.controller import Controller
from qpostcopy.migration import Step
from qpostcopy.prepare import PREPARE
from qpostcopy.state import StateDirectory
from qpostcopy.switchover import SWITCHOVER
from tests.fake_world import World, write_plan

SECONDS = 20.0
BEFORE_COMMIT = [step.__name__ for step in (*PREPARE, *SWITCHOVER)]
Act = Callable[[], Any]


@dataclass
class Run:
    """A migration that was run."""

    result: dict[str, Any]
    directory: StateDirectory
    messages: list[dict[str, Any]]

    @property
    def ended(self) -> tuple[str, int, str]:
        return self.result["status"], self.result["rc"], self.result["vm_location"]


class Killed(BaseException):
    """The controller is gone, in the midst of what it did."""


def make_miniature(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Miniature sides, no preflight, short limits."""
    monkeypatch.setenv("QPOSTCOPY_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(controller_module, "Side", world.make_side)
    monkeypatch.setattr("qpostcopy.prepare.judge", lambda *_: [])
    monkeypatch.setattr("qpostcopy.prepare.remark", lambda *_: [])
    monkeypatch.setattr(switchover, "LOAD_SECONDS", 0.2)
    monkeypatch.setattr(switchover, "SLOWEST_LINK_BYTES_PER_SECOND", 1 << 30)
    monkeypatch.setattr(switchover, "STOP_SECONDS", 0.2)
    monkeypatch.setattr(recovery, "SETTLE_SECONDS", 0.5)
    monkeypatch.setattr(postcopy, "_BACKOFF_SECONDS", 0.001)


def start(tmp_path: Path, **options: str) -> StateDirectory:
    plan = load_plan(write_plan(tmp_path / "plan.yaml", **options))
    return StateDirectory.create(
        plan.name,
        plan_text=plan.to_yaml(),
        profile=plan.profile_name,
        source_qmp=plan.source.qmp,
        destination_qmp=plan.destination.qmp,
    )


def migrate(
    directory: StateDirectory,
    *,
    resuming: bool = False,
    meanwhile: Callable[[Controller], Any] | None = None,
) -> Run:
    """Run a controller to its end."""

    async def body() -> Run:
        plan = load_plan(directory.path / "plan.yaml")
        controller = Controller(StateDirectory.open(directory.path), plan, resuming=resuming)
        messages: list[dict[str, Any]] = []
        controller._endpoint.emit = (  # type: ignore[method-assign]
            lambda event: messages.append(event.model_dump()["message"])
        )
        if meanwhile is not None:
            meanwhile(controller)
        async with asyncio.timeout(SECONDS):
            await controller.run()
        result = directory.read_result()
        assert result is not None
        return Run(result, StateDirectory.open(directory.path), messages)

    return asyncio.run(body())


def is_back(world: World) -> None:
    """The guest runs at the source as before; the destination waits as before, or is dead."""
    assert world.source.running
    assert not any(world.source.capabilities.values())
    assert world.source.parameters == {"max-bandwidth": 1 << 27, "downtime-limit": 300}
    if world.destination.alive:
        assert world.destination.status == "inmigrate"
        assert world.destination.autostart
        assert not any(world.destination.capabilities.values())
        assert not world.sides["destination"].attached
    assert all(side.quits for side in world.sides.values())


def replace_step(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    what: BaseException | Callable[[], Any],
    *,
    after: bool = True,
) -> None:
    """Make a step raise, or do something else, after (or before) it has done its work."""

    def wrap(step: Step) -> Step:
        async def replaced(migration: Any) -> None:
            if after:
                await step(migration)
            if isinstance(what, BaseException):
                raise what
            await what()
            if not after:
                await step(migration)

        replaced.__name__ = step.__name__
        return replaced

    for module, steps in (
        (controller_module, "PREPARE"),
        (controller_module, "SWITCHOVER"),
        (controller_module, "COMMIT"),
    ):
        listed = getattr(module, steps)
        new = tuple(wrap(step) if step.__name__ == name else step for step in listed)
        monkeypatch.setattr(module, steps, new)


def hang(world: World, role: str, command: str) -> None:
    async def wait() -> None:
        await asyncio.sleep(SECONDS)

    world.faults[role, command] = lambda _world, _act: wait()


def fail(error: BaseException) -> object:
    raise error
