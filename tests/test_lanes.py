"""How the end of a loop is judged, and that nobody leaves a thread behind."""

from __future__ import annotations

import asyncio
import errno
import gc
import threading

import pytest

from qpostcopy.core import (
    CoreError,
    CoreSystemError,
    LaneBrokenError,
    LaneClosedError,
    LaneEnd,
    LaneProtocolError,
    LaneTimeoutError,
    StrayPageError,
    TargetGoneError,
)
from qpostcopy.lanes import Outcome, in_thread, is_harmless, is_lane_trouble
from tests.qmp.support import run


def failed(kind: type[CoreError], operation: str = "some call") -> CoreError:
    return kind(operation, errno.EIO, 0, 0)


@pytest.mark.parametrize(
    ("outcome", "harmless", "lane"),
    [
        (LaneEnd.STOPPED, True, False),
        (LaneEnd.DONE, True, False),
        (LaneEnd.CLOSED, False, True),
        (failed(LaneClosedError), False, True),
        (failed(LaneTimeoutError), False, True),
        (failed(LaneProtocolError), False, True),
        (failed(LaneBrokenError, "recv"), False, True),
        (failed(CoreSystemError, "place a page beside a lane"), False, False),
        (failed(TargetGoneError), False, False),
        (failed(StrayPageError), False, False),
        (RuntimeError("a bug"), False, False),
    ],
    ids=str,
)
def test_what_the_end_of_a_loop_means(outcome: Outcome, harmless: bool, lane: bool) -> None:
    assert (is_harmless(outcome), is_lane_trouble(outcome)) == (harmless, lane)


def test_in_thread_gives_what_the_call_gives() -> None:
    def divide(value: int, by: int) -> float:
        return value / by

    async def body() -> None:
        assert await in_thread(divide, 6, by=3) == 2
        with pytest.raises(ZeroDivisionError):
            await in_thread(divide, 6, 0)

    run(body)


@pytest.mark.parametrize("fails", [False, True])
def test_who_is_cancelled_waits_for_the_thread(fails: bool) -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def blocking() -> None:
        begun.set()
        may_end.wait(10)
        ended.set()
        if fails:
            raise RuntimeError("nobody wants to know")

    async def body() -> None:
        complaints: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
        task = asyncio.create_task(in_thread(blocking))
        await asyncio.to_thread(begun.wait, 10)
        for _ in range(3):  # being asked again changes nothing
            task.cancel()
            await asyncio.sleep(0)
        assert not task.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()
        del task
        gc.collect()
        assert complaints == []

    run(body)
