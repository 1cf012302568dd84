"""Is a migration's controller dead, at work, or does it live and say nothing?

A controller that hangs holds the lock and looks alive to everybody, while its
source may stand still: `resume` must be able to go on without it. Guarantees:
only a process that is proven to be this migration's controller is ever killed,
and only after it left a question unanswered for a while; on return it is gone,
and with it the lock.
"""

from __future__ import annotations

import asyncio
import time
from enum import StrEnum

from qpostcopy.errors import QpostcopyError
from qpostcopy.qmp import schema
from qpostcopy.qmp.client import EndpointAbsentError, EndpointClient
from qpostcopy.state import CONTROL_SOCKET, StateDirectory

#: A living controller answers within milliseconds: it blocks on nothing.
SILENT_SECONDS = 10.0
_KILL_SECONDS = 10.0


class ControllerWillNotEndError(QpostcopyError):
    """A silent controller was sent SIGKILL and is still there."""


class ControllerState(StrEnum):
    """What can be told of a controller from outside."""

    DEAD = "dead"
    ALIVE = "alive"
    SILENT = "silent"


async def controller_state(
    directory: StateDirectory, within_seconds: float = SILENT_SECONDS
) -> ControllerState:
    """Ask the controller for a word. Changes nothing.

    :param within_seconds: how long it may take; longer is SILENT.
    """
    deadline = time.monotonic() + within_seconds
    while directory.controller_alive():
        left = deadline - time.monotonic()
        if left <= 0:
            return ControllerState.SILENT
        try:
            client = await EndpointClient.connect(directory.path / CONTROL_SOCKET, left)
        except EndpointAbsentError:
            await _gone_within(directory, min(left, 0.2))  # it comes up, or it is ending
            continue
        except QpostcopyError:
            continue
        try:
            await client.call("qpc-hello", schema.Empty(), schema.Hello, left)
            return ControllerState.ALIVE
        except QpostcopyError:
            continue
        finally:
            await client.close()
    return ControllerState.DEAD


async def end_silent_controller(
    directory: StateDirectory, within_seconds: float = SILENT_SECONDS
) -> ControllerState:
    """As `controller_state`, but one that is silent is killed: DEAD or ALIVE is returned.

    :raise ControllerWillNotEndError: it hangs in the kernel.
    """
    state = await controller_state(directory, within_seconds)
    controller = directory.state.controller
    if state is not ControllerState.SILENT or controller is None:
        return state
    if not await asyncio.to_thread(controller.kill, _KILL_SECONDS):
        raise ControllerWillNotEndError(
            f"the controller of {directory.migration_id} (pid {controller.pid}) says nothing and "
            "does not end after SIGKILL",
            remedy=f"find out why pid {controller.pid} hangs in the kernel, then: "
            f"qpostcopy resume {directory.migration_id}",
        )
    return ControllerState.DEAD


async def _gone_within(directory: StateDirectory, seconds: float) -> bool:
    controller = directory.state.controller
    return controller is None or await asyncio.to_thread(controller.wait_gone, seconds)
