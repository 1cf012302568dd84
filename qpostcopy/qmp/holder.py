"""Holds QEMU's monitor for as long as QEMU lives.

A monitor may be late (QEMU's main loop waits for a page that only we can
serve) or get lost; either way connecting goes on in the background, and what is
asked meanwhile gets an error at once instead of a wait. One attempt is one
connection: QEMU takes it up when it can, so long attempts beat many short ones,
which would only fill its backlog of two.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from qpostcopy.errors import QpostcopyError
from qpostcopy.qmp.connection import EXECUTE_SECONDS, CommandError, ConnectionLostError
from qpostcopy.qmp.events import Event
from qpostcopy.qmp.monitor import Monitor, MonitorConnectError, MonitorHeldError

log = logging.getLogger(__name__)

ATTEMPT_SECONDS = 60.0
LEND_SECONDS = 2.0
TAKE_BACK_SECONDS = 5.0
_BACKOFF_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)


class MonitorHolder:
    """Connects, holds, and connects again.

    :param on_event: gets QEMU's events.
    :param on_lost: told of each loss, with its reason.
    """

    def __init__(
        self,
        path: Path,
        *,
        on_event: Callable[[Event], None],
        on_lost: Callable[[str], None],
        attempt_seconds: float = ATTEMPT_SECONDS,
    ) -> None:
        self._path = path
        self._on_event = on_event
        self._on_lost = on_lost
        self._attempt_seconds = attempt_seconds
        self._monitor: Monitor | None = None
        self._problem: QpostcopyError = MonitorHeldError(
            f"QEMU's monitor {path} does not answer: another client holds it, or QEMU's main "
            "loop waits for a page",
            remedy="QEMU serves one client a socket: end the other one, if there is one",
        )
        self._task: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()
        self._lending = asyncio.Lock()
        self.state: Literal["held", "lost", "none"] = "none"
        self.version = "unknown"

    def start(self) -> None:
        """Begin to connect, in the background."""
        self._task = asyncio.create_task(self._hold())

    async def first_answer(self) -> Monitor:
        """The monitor, or why the first attempt failed.

        :raise MonitorConnectError: one of its leaves.
        """
        await self._settled.wait()
        if self._monitor is None:
            raise self._problem
        return self._monitor

    async def wait(self, timeout_seconds: float) -> None:
        """Give an attempt that is under way a chance, before something that needs it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._settled.wait()

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        timeout_seconds: float = EXECUTE_SECONDS,
    ) -> object:
        """Run a command of QEMU.

        :raise CommandError: it ran and failed.
        :raise MonitorConnectError, ConnectionLostError: it was not sent.
        :raise OutcomeUnknownError: it was sent, and no reply came.
        """
        if self._monitor is None:
            problem = self._problem
            raise type(problem)(f"{command} was not sent: {problem}", remedy=problem.remedy)
        return await self._monitor.execute(command, arguments, timeout_seconds)

    async def lend(self, fd: int, name: str) -> None:
        """Give QEMU a descriptor (borrowed: a copy goes there) under a name, with `getfd`.

        One that QEMU has under this name already is closed there. Not `add-fd`: after
        `remove-fd`, QEMU 5.2 and 7.2 close such a descriptor only once their guest runs.

        :raise QpostcopyError: as `execute`; QEMU may have it all the same.
        """
        async with self._lending:
            if self._monitor is not None:
                try:
                    self._monitor.send_fd(fd)
                except OSError as error:
                    raise ConnectionLostError(f"QEMU's monitor: {error}") from error
            await self.execute("getfd", {"fdname": name}, LEND_SECONDS)

    async def take_back(self, name: str) -> None:
        """Have QEMU close what it was lent under this name, if it still has it.

        A monitor that is lost gets the time to come back.

        :raise QpostcopyError: as `execute`; QEMU may have it still.
        """
        deadline = asyncio.get_running_loop().time() + TAKE_BACK_SECONDS
        while True:
            try:
                await self.execute("closefd", {"fdname": name}, LEND_SECONDS)
                return
            except CommandError:
                return  # the one thing that it can say: there is none
            except QpostcopyError:
                if asyncio.get_running_loop().time() > deadline:
                    raise
            await asyncio.sleep(_BACKOFF_SECONDS[0])

    async def close(self, reason: str = "QEMU's monitor was given back") -> None:
        """Give the monitor back, and connect no more. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            await monitor.close()
        if self.state == "held":
            self.state = "lost"
        self._problem = ConnectionLostError(reason)
        self._settled.set()

    async def _hold(self) -> None:
        failures = 0
        while True:
            try:
                monitor = await Monitor.connect(self._path, self._attempt_seconds)
            except (MonitorConnectError, OSError) as error:
                self._note(error if isinstance(error, MonitorConnectError) else _odd(error))
                await asyncio.sleep(_BACKOFF_SECONDS[min(failures, len(_BACKOFF_SECONDS) - 1)])
                failures += 1
                continue
            failures = 0
            await self._hold_one(monitor)

    async def _hold_one(self, monitor: Monitor) -> None:
        monitor.on_event(self._on_event)
        self._monitor, self.state, self.version = monitor, "held", monitor.version
        self._settled.set()
        log.info("QEMU's monitor is ours (QEMU %s)", monitor.version)
        error = await monitor.wait_lost()
        await monitor.close()
        self._monitor, self.state = None, "lost"
        self._note(error or ConnectionLostError("QEMU's monitor was given back"))
        self._on_lost(str(error))

    def _note(self, problem: QpostcopyError) -> None:
        if str(problem) != str(self._problem):
            log.warning("%s", problem)
        self._problem = problem
        self._settled.set()


def _odd(error: OSError) -> QpostcopyError:
    return MonitorConnectError(f"QEMU's monitor: {error}")
