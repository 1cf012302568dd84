"""What both companions share: a process beside one QEMU that holds its monitor.

    controller, CLI  <--QMP-->  companion  <--QMP-->  QEMU
                      (control socket)    (monitor)

Guarantees: the control socket works whether or not QEMU answers (a destination
in postcopy may hang until we serve it); readiness is told once, on a pipe, with
the reason if there is none; once that was heard, the death of a controller, of its
terminal, or of the monitor ends nothing here; QEMU's own end is noticed through a pidfd.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qpostcopy import __version__, inspect
from qpostcopy.errors import ExitCode, QpostcopyError, RefusedError
from qpostcopy.qmp import schema
from qpostcopy.qmp.events import Event
from qpostcopy.qmp.holder import ATTEMPT_SECONDS, MonitorHolder
from qpostcopy.qmp.server import CommandTable, Endpoint, error_data

log = logging.getLogger(__name__)

#: The first attempt, where nothing can be done without the monitor.
FIRST_ANSWER_SECONDS = 5.0
#: Where QEMU's pid is known we come up without it: it may hang until we serve it.
MOMENT_SECONDS = 0.5
#: Longest a command that we pass through may take; its sender has a limit of its own.
PASS_THROUGH_SECONDS = 60.0
#: QEMU closes its monitor a moment before its process has ended.
_EXIT_SECONDS = 1.0
_KILL_SECONDS = 15.0
_OOM_NEVER = "-1000"


class WrongStateError(QpostcopyError):
    """The command does not fit the state that this companion is in."""


class NoSuchQemuError(RefusedError):
    """There is no process with QEMU's pid."""


class QemuWillNotEndError(QpostcopyError):
    """QEMU was sent SIGKILL and is still there."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a companion is started with; see the options of `qpostcopy handler`."""

    qmp: Path
    pid: int | None
    migration_id: str
    state_dir: Path
    control: Path
    ready_fd: int | None = None


class Companion:
    """Base of PageServer and Handler: monitor, endpoint, QEMU's pidfd, and their lives."""

    role: Literal["page-server", "handler"]
    side: Literal["source", "destination"]
    commands: CommandTable

    def __init__(self, options: Options) -> None:
        self.options = options
        self.endpoint = Endpoint(
            options.control, self.commands, self, pass_through=self._pass_through
        )
        self.monitor = MonitorHolder(
            options.qmp,
            on_event=self._on_qemu_event,
            on_lost=self._on_monitor_lost,
            attempt_seconds=FIRST_ANSWER_SECONDS if options.pid is None else ATTEMPT_SECONDS,
        )
        self._pid = options.pid
        self._pidfd: int | None = None
        self._qemu_gone = asyncio.Event()
        self._quit = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pid(self) -> int:
        """QEMU's pid."""
        assert self._pid is not None, "asked for QEMU's pid before the start"
        return self._pid

    @property
    def qemu_gone(self) -> bool:
        return self._qemu_gone.is_set()

    # --- life -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start, tell readiness, serve until `qpc-quit` or a signal, clean up.

        :raise QpostcopyError: it cannot start; told on `ready_fd` too.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._quit.set)
        try:
            await self._start()
        except QpostcopyError as error:
            self._tell({"desc": str(error)} | error_data(error))
            await self._close()
            raise
        if self._tell(None):
            log.info("%s %s: serving QEMU %d", self.role, __version__, self.pid)
            await self._quit.wait()
        else:
            log.warning("whoever started us is dead and may not have written us down: we end")
        await self._close()

    async def close_service(self) -> None:
        """What the subclass has to end; nothing of QEMU's is changed."""

    async def _start(self) -> None:
        await self.endpoint.listen()
        self.monitor.start()
        await self._await_monitor()
        self._watch_qemu()

    async def _await_monitor(self) -> None:
        """Have the monitor, or (if QEMU's pid is known) know that it is only late."""
        limit = None if self._pid is None else MOMENT_SECONDS
        try:
            async with asyncio.timeout(limit):
                monitor = await self.monitor.first_answer()
        except TimeoutError:
            log.warning("QEMU's monitor does not answer yet; serving without it")
            return
        if self._pid is None:
            self._pid = monitor.peer_pid
        elif self._pid != monitor.peer_pid:
            log.warning(
                "pid %d was given; the monitor's socket was made by pid %d",
                self._pid,
                monitor.peer_pid,
            )

    def _watch_qemu(self) -> None:
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError as error:
            raise NoSuchQemuError(f"no process {self.pid}: {error.strerror}") from error
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_qemu_gone)

    async def _close(self) -> None:
        await self.endpoint.close()
        await self.close_service()
        await self.monitor.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._forget_pidfd()

    def _tell(self, problem: dict[str, object] | None) -> bool:
        """One line on the readiness pipe: `ready`, or the error as JSON. Whether anybody reads."""
        if self.options.ready_fd is None:
            return True
        line = "ready" if problem is None else json.dumps(problem)
        with os.fdopen(self.options.ready_fd, "wb", buffering=0) as pipe:
            try:
                pipe.write(line.encode() + b"\n")
            except OSError:
                return False
        return True

    # --- QEMU -------------------------------------------------------------------------------

    async def query_status(self, timeout_seconds: float) -> str:
        """QEMU's run state, e.g. `inmigrate`.

        :raise QpostcopyError: see MonitorHolder.execute.
        """
        status = await self.monitor.execute("query-status", None, timeout_seconds)
        return str(status.get("status")) if isinstance(status, dict) else "unknown"

    async def kill_qemu(self) -> None:
        """SIGKILL through the pidfd; on return QEMU is gone.

        :raise QemuWillNotEndError: it is not.
        """
        if self._pidfd is not None and not self._qemu_gone.is_set():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        if not await self.await_gone(_KILL_SECONDS):
            raise QemuWillNotEndError(
                f"QEMU (pid {self.pid}) is still there {_KILL_SECONDS:g} s after SIGKILL",
                remedy="it hangs in the kernel (storage?); do not run its guest elsewhere",
            )

    async def await_gone(self, timeout_seconds: float) -> bool:
        """Whether QEMU has ended, or does within that time; its pidfd tells."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._qemu_gone.wait()
        return self.qemu_gone

    async def await_monitor(self) -> None:
        """Before what cannot do without it; a monitor that is late gets its chance."""
        await self.monitor.wait(FIRST_ANSWER_SECONDS)

    def _is_committed(self) -> bool:
        """The controller's record of the commit: after it, the guest is the destination's."""
        return (self.options.state_dir / "committed").exists()

    def spawn(self, task: asyncio.Task[None]) -> None:
        """Keep a background task until it ends, or the companion does."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pass_through(self, command: str, arguments: Mapping[str, object] | None) -> object:
        return await self.monitor.execute(command, arguments, PASS_THROUGH_SECONDS)

    def _on_qemu_event(self, event: Event) -> None:
        self.endpoint.broadcast(event.name, event.data)

    def _on_monitor_lost(self, reason: str) -> None:
        self.spawn(asyncio.create_task(self._report_monitor_lost(reason)))

    async def _report_monitor_lost(self, reason: str) -> None:
        """Nothing false: the monitor of a QEMU that is ending is not lost."""
        if not await self.await_gone(_EXIT_SECONDS):
            self.endpoint.emit(schema.MonitorLost(reason=reason))

    def _on_qemu_gone(self) -> None:
        log.warning("QEMU (pid %d) has ended", self.pid)
        self._qemu_gone.set()
        self._forget_pidfd()
        self.spawn(asyncio.create_task(self.monitor.close("QEMU has ended")))
        self.endpoint.emit(schema.QemuGone())

    def _forget_pidfd(self) -> None:
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    # --- commands of both -------------------------------------------------------------------

    async def qpc_hello(self, _: schema.Empty) -> schema.Hello:
        return schema.Hello(
            role=self.role,
            version=__version__,
            migration_id=self.options.migration_id,
            pid=os.getpid(),
            qemu_pid=self._pid,
            monitor=self.monitor.state,
        )

    async def qpc_inspect(self, _: schema.Inspect) -> schema.SideFacts:
        await self.await_monitor()
        return await inspect.gather_facts(
            self.side, self.monitor.execute, self.pid, self.monitor.version
        )

    async def qpc_quit(self, _: schema.Empty) -> schema.Empty:
        self._quit.set()
        return schema.Empty()


def run_companion(kind: type[Companion], options: Options, log_level: str) -> ExitCode:
    """Run a companion in this process, to its end.

    :raise QpostcopyError: it could not start.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # without the right we are killed like anyone
        Path("/proc/self/oom_score_adj").write_text(_OOM_NEVER)

    async def main() -> None:
        await kind(options).run()

    asyncio.run(main())
    return ExitCode.COMPLETED
