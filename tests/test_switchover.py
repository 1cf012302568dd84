"""The order of the steps, what events mean before the commit, and the hook of the tests."""

from __future__ import annotations

import asyncio
import os
import signal
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qpostcopy import switchover
from qpostcopy.migration import Migration, TroubleError, error_code, together, trouble
from qpostcopy.prepare import PREPARE
from qpostcopy.process import Process
from qpostcopy.qmp.events import Event
from qpostcopy.qmp.monitor import MonitorHeldError
from qpostcopy.side import EventBook, Seen
from qpostcopy.switchover import COMMIT, SWITCHOVER, run_steps


def names(steps: tuple[Any, ...]) -> list[str]:
    return [step.__name__ for step in steps]


def test_the_record_is_the_last_step_that_can_be_taken_back() -> None:
    assert names(SWITCHOVER)[-1] == "record_commit"
    assert names(COMMIT) == ["announce_commit", "start_guest", "start_push"]


def test_the_handler_serves_before_the_device_state_is_loaded() -> None:
    order = names(SWITCHOVER)
    assert (
        order.index("stop_source") < order.index("serve_loading") < order.index("load_device_state")
    )


@pytest.mark.parametrize(
    ("remaining_bytes", "seconds"), [(0, 14.0), (64 << 10, 15.0), (1 << 20, 30.0), (1 << 30, 60.0)]
)
def test_how_long_the_load_may_take(remaining_bytes: int, seconds: float) -> None:
    assert switchover.load_seconds(remaining_bytes) == seconds


def test_the_destination_is_held_before_anything_can_start_it() -> None:
    order = names((*PREPARE, *SWITCHOVER))
    assert order.index("judge_both_sides") < order.index("hold_destination")
    assert order.index("hold_destination") < order.index("attach")
    assert order.index("attach") < order.index("listen_for_device_state")


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("QPC_QEMU_GONE", {}, "qemu-gone"),
        ("QPC_FATAL", {"reason": "x"}, "companion-fatal"),
        ("QPC_LANE_LOST", {"lane": "demand", "reason": "x"}, "lane-lost"),
        ("QPC_MONITOR_LOST", {"reason": "x"}, "monitor-lost"),
        ("companion-lost", {"reason": "x"}, "companion-lost"),
        ("MIGRATION", {"status": "failed"}, "migration-failed"),
        ("MIGRATION", {"status": "active"}, None),
        ("QPC_PLACED", {}, None),
        ("STOP", {}, None),
    ],
)
def test_what_an_event_means_before_the_commit(
    name: str, data: dict[str, object], code: str | None
) -> None:
    error = trouble(Seen("destination", Event(name, data)))
    assert (error.code if error else None) == code


def test_the_book_keeps_what_came_early_and_wakes_who_waits() -> None:
    async def body() -> None:
        book = EventBook()
        book.put("source", Event("MIGRATION", {"status": "setup"}))
        mark = book.mark
        waiting = asyncio.create_task(
            book.wait(lambda seen: seen.migration("source", "setup"), since=mark)
        )
        early = await book.wait(lambda seen: seen.migration("source", "setup"))
        await asyncio.sleep(0)
        assert not waiting.done()
        book.put("destination", Event("MIGRATION", {"status": "setup"}))
        book.put("source", Event("RTC_CHANGE", {}))
        assert book.mark == mark + 1, "events that nobody looks at are not kept"
        await asyncio.sleep(0)
        assert not waiting.done()
        book.put("source", Event("MIGRATION", {"status": "setup"}))
        assert (await waiting) is not early

    asyncio.run(body())


def test_together_leaves_nothing_running() -> None:
    done: list[str] = []

    async def fails() -> None:
        raise ValueError("first")

    async def late() -> None:
        await asyncio.sleep(0.01)
        done.append("late")

    async def body() -> None:
        with pytest.raises(ValueError, match="first"):
            await together(fails(), late())
        assert done == ["late"]

    asyncio.run(body())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TroubleError("lane-lost", "x"), "lane-lost"),
        (MonitorHeldError("x"), "monitor-held"),
        (AssertionError("x"), "assertion"),
    ],
)
def test_codes_of_errors(error: Exception, code: str) -> None:
    assert error_code(error) == code


@pytest.mark.parametrize(
    ("hook", "signals"),
    [
        ("second:before SIGKILL controller", [(11, signal.SIGKILL, ["first"])]),
        ("second:after SIGSTOP handler", [(22, signal.SIGSTOP, ["first", "second"])]),
        ("second:after SIGSTOP destination", []),
        (
            "second:before SIGSTOP handler; second:after SIGKILL controller",
            [(22, signal.SIGSTOP, ["first"]), (11, signal.SIGKILL, ["first", "second"])],
        ),
        ("third:after SIGKILL controller", []),
        ("", []),
    ],
)
def test_the_hook_of_the_tests(
    monkeypatch: pytest.MonkeyPatch, hook: str, signals: list[tuple[int, int, list[str]]]
) -> None:
    ran: list[str] = []
    sent: list[tuple[int, int, list[str]]] = []

    async def first(_: Migration) -> None:
        ran.append("first")

    async def second(_: Migration) -> None:
        ran.append("second")

    nobody = SimpleNamespace(companion=None, qemu=None)
    state = SimpleNamespace(
        controller=Process(pid=11, start_ticks=1),
        source=nobody,
        destination=SimpleNamespace(companion=Process(pid=22, start_ticks=1), qemu=None),
    )
    monkeypatch.setenv(switchover.TEST_SIGNAL_VARIABLE, hook)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number, list(ran))))
    migration = cast(Migration, SimpleNamespace(state=state))
    asyncio.run(run_steps(migration, (first, second)))
    assert ran == ["first", "second"]
    assert sent == signals
