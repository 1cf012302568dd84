"""One side of a migration, as the controller sees it: a companion with QEMU behind it.

Guarantees: a companion is detached (a session of its own) and outlives the
controller; `ensure` uses a living one before it starts another; every event of
QEMU and companion lands in one `EventBook`, stamped at receipt, so that nobody
misses one that came early; killing QEMU ends only in
proof. All that is about processes of this host is here: a remote side is
another Side.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from qpostcopy.environment import LOG_LEVEL_VARIABLE
from qpostcopy.errors import QpostcopyError, RefusedError, StateLostError
from qpostcopy.netns import expect_enterable, inside
from qpostcopy.process import Process
from qpostcopy.qmp import schema
from qpostcopy.qmp.client import EndpointClient, EndpointConnectError, rebuild_error
from qpostcopy.qmp.connection import EXECUTE_SECONDS, ConnectionLostError
from qpostcopy.qmp.events import Event
from qpostcopy.qmp.sockets import CannotConnectError, connect_socket, peer_pid
from qpostcopy.state import StateDirectory

log = logging.getLogger(__name__)

Role = Literal["source", "destination"]
Reply = TypeVar("Reply", bound=schema.Model)

COMPANIONS: dict[Role, str] = {"source": "page-server", "destination": "handler"}

#: Put into the book by us when a companion hangs up.
COMPANION_LOST = "companion-lost"
#: Events that some step or guard looks at; others are not kept.
KEPT = frozenset(schema.EVENTS) | {COMPANION_LOST, "MIGRATION", "STOP", "RESUME", "SHUTDOWN"}

START_SECONDS = 20.0
RECONNECT_SECONDS = 3.0
KILL_COMMAND_SECONDS = 2.0
GONE_SECONDS = 15.0
QUIT_SECONDS = 3.0


class CompanionStartError(QpostcopyError):
    """A companion process did not start; its own words are in the message."""


class NotProvenGoneError(StateLostError):
    """The destination QEMU was sent SIGKILL and still exists."""


@dataclass(frozen=True, slots=True)
class Seen:
    """An event, and the side that it came from."""

    role: Role
    event: Event

    def migration(self, role: Role, *statuses: str) -> bool:
        """Whether it is QEMU's MIGRATION event of that side with one of these statuses."""
        return self.is_(role, "MIGRATION") and self.event.data.get("status") in statuses

    def is_(self, role: Role, *names: str) -> bool:
        return self.role == role and self.event.name in names


class EventBook:
    """The events of both sides in the order of receipt, and a way to wait for one."""

    def __init__(self) -> None:
        self._seen: list[Seen] = []
        self._more = asyncio.Event()

    @property
    def mark(self) -> int:
        """The place in the book of the next event."""
        return len(self._seen)

    def put(self, role: Role, event: Event) -> None:
        if event.name in KEPT:
            self._seen.append(Seen(role, event))
            self._more.set()
            self._more = asyncio.Event()

    def find(self, matches: Callable[[Seen], bool], since: int = 0) -> Seen | None:
        """The first match from `since` on, or None."""
        return next((seen for seen in self._seen[since:] if matches(seen)), None)

    async def wait(self, matches: Callable[[Seen], bool], since: int = 0) -> Seen:
        """The first match from `since` on; waits for it without a limit of its own."""
        while True:
            mark = self.mark
            if found := self.find(matches, since):
                return found
            since = mark
            await self._more.wait()


class Side:
    """One side on this host.

    :param plan_pid: QEMU's pid if the plan names it; else whoever listens on its socket.
    :param netns: the network namespace that its companions are started in; None: ours.
    """

    def __init__(
        self,
        role: Role,
        directory: StateDirectory,
        book: EventBook,
        plan_pid: int | None,
        netns: str | None = None,
    ) -> None:
        self.role: Role = role
        self.name = COMPANIONS[role]
        self._directory = directory
        self._book = book
        self._plan_pid = plan_pid
        self._netns = netns
        self._client: EndpointClient | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._child: subprocess.Popen[bytes] | None = None
        #: the companion was started by us, and not in its network namespace
        self._outside = False

    @property
    def control(self) -> Path:
        return self._directory.path / f"{self.name}.sock"

    @property
    def qemu(self) -> Process | None:
        return self._directory.state.side(self.role).qemu

    async def ensure(self, *, monitor: bool = False, network: bool = True) -> bool:
        """Be connected to a living companion. Whether a new one was started for that.

        On return state.json names QEMU's process.

        :param monitor: one that has lost its QEMU's monitor will not do.
        :param network: it will bring up lanes. A new one that will not need not be in its network
            namespace, if that is gone: what brings a stopped VM back needs no network. One that
            was started so is replaced before lanes.

        :raise CompanionStartError: it could not be started.
        :raise RefusedError: it could not get its QEMU's monitor, or into its network namespace.
        """
        if network and self._outside:
            await self._replace_outsider()
        if self._client is not None and self._client.connected:
            if await self._answers(self._client, monitor):
                return False
            await self.hang_up()
        if await self._connect_living(monitor):
            return False
        netns = await self._namespace(network)
        await self._start(netns)
        self._outside = netns != self._netns
        return True

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        timeout_seconds: float = EXECUTE_SECONDS,
    ) -> object:
        """Run a command of QEMU; see EndpointClient.execute for what it raises."""
        return await self._connected().execute(command, arguments, timeout_seconds)

    async def query(
        self, command: str, timeout_seconds: float = EXECUTE_SECONDS
    ) -> dict[str, object]:
        """A command of QEMU that returns an object."""
        reply = await self.execute(command, None, timeout_seconds)
        if not isinstance(reply, dict):
            raise QpostcopyError(f"{command}: QEMU returned {reply!r}, not an object")
        return reply

    async def call(
        self,
        command: str,
        arguments: schema.Model,
        reply: type[Reply],
        timeout_seconds: float = EXECUTE_SECONDS,
    ) -> Reply:
        """Run a command of the companion; see EndpointClient.call for what it raises."""
        return await self._connected().call(command, arguments, reply, timeout_seconds)

    async def kill_qemu(self) -> None:
        """SIGKILL this side's QEMU; on return it is proven gone.

        The companion is asked first (it is the one who can, on another host), but
        a companion that hangs or is dead must not keep a second VM alive.

        :raise NotProvenGoneError: it is still there.
        """
        with suppress(QpostcopyError):
            await self.call("qpc-kill", schema.Kill(), schema.Empty, KILL_COMMAND_SECONDS)
        process = self.qemu
        assert process is not None, "killed before its pid was recorded"
        if not await asyncio.to_thread(process.kill, GONE_SECONDS):
            raise NotProvenGoneError(
                f"the {self.role} QEMU (pid {process.pid}) does not end after SIGKILL, so the "
                "guest must not run anywhere else",
                remedy=f"find out why pid {process.pid} hangs in the kernel; once it is gone: "
                f"qpostcopy resume {self._directory.migration_id}",
            )

    def qemu_alive(self) -> bool:
        """Whether this side's QEMU process exists (True while its pid is not known yet)."""
        return self.qemu is None or self.qemu.alive()

    def qemu_arguments(self) -> tuple[str, ...]:
        """QEMU's command line; empty if it cannot be read (any more)."""
        try:
            line = Path(f"/proc/{self.qemu.pid}/cmdline").read_bytes() if self.qemu else b""
        except OSError:
            return ()
        return tuple(os.fsdecode(line).split("\0")[:-1])

    async def answers(self, within_seconds: float) -> bool:
        """Whether the companion says a word; one that lives may hang all the same."""
        client = self._client
        return client is not None and await self._answers(client, False, within_seconds)

    async def quit(self) -> None:
        """End the companion: by request, else by SIGKILL. Never fails."""
        with suppress(QpostcopyError):
            await self.call("qpc-quit", schema.Empty(), schema.Empty, QUIT_SECONDS)
        await self.hang_up()
        companion = self._directory.state.side(self.role).companion
        if companion is None:
            return
        if not await asyncio.to_thread(companion.wait_gone, QUIT_SECONDS):
            log.warning("%s (pid %d) does not quit: killed", self.name, companion.pid)
            await asyncio.to_thread(companion.kill, QUIT_SECONDS)
        self._reap()
        self.control.unlink(missing_ok=True)

    async def hang_up(self) -> None:
        """Leave the companion running; only our connection ends."""
        client, self._client = self._client, None
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.cancel()
            await asyncio.wait([watcher])
        if client is not None:
            await client.close()

    def _connected(self) -> EndpointClient:
        if self._client is None:
            raise ConnectionLostError(f"the {self.name} is not connected")
        return self._client

    async def _answers(
        self, client: EndpointClient, monitor: bool, within_seconds: float = RECONNECT_SECONDS
    ) -> bool:
        try:
            hello = await client.call("qpc-hello", schema.Empty(), schema.Hello, within_seconds)
        except QpostcopyError as error:
            log.warning("the %s does not answer: %s", self.name, error)
            return False
        return hello.monitor == "held" or not monitor

    async def _connect_living(self, monitor: bool) -> bool:
        """Connect to the companion that is there already, if it lives and answers.

        One that lives and does not answer is ended: two would be worse than none.
        """
        companion = self._directory.state.side(self.role).companion
        if companion is None or not companion.alive():
            self._reap()
            companion = await self._unrecorded()
            if companion is None:
                return False
            log.warning("%s (pid %d) was never written down", self.name, companion.pid)
            self._directory.update_side(self.role, companion=companion)
        with suppress(EndpointConnectError):
            client = await EndpointClient.connect(self.control, RECONNECT_SECONDS)
            if await self._answers(client, monitor):
                self._adopt(client)
                return True
            await client.close()
        log.warning("%s (pid %d) lives but does not answer: killed", self.name, companion.pid)
        await asyncio.to_thread(companion.kill, QUIT_SECONDS)
        self._reap()
        return False

    async def _unrecorded(self) -> Process | None:
        """Whoever listens on our control socket: its controller died before it noted that."""
        deadline = asyncio.get_running_loop().time() + RECONNECT_SECONDS
        try:
            with await connect_socket(self.control, f"the {self.name}", deadline) as sock:
                return Process.of(peer_pid(sock))
        except CannotConnectError:
            return None

    async def _namespace(self, needed: bool) -> str | None:
        """Which network namespace a companion is to be started in; None: ours.

        :raise RefusedError: it is needed, and cannot be entered.
        """
        try:
            await asyncio.to_thread(expect_enterable, self._netns)
        except RefusedError as error:
            if needed:
                raise
            log.warning("the %s is started outside its network namespace: %s", self.name, error)
            return None
        return self._netns

    async def _replace_outsider(self) -> None:
        """End it, unless it may be the last that has the guest's pages, or there is no better.

        :raise RefusedError: its namespace still cannot be entered.
        """
        await asyncio.to_thread(expect_enterable, self._netns)
        if not self.qemu_alive():
            return
        log.info("the %s is started anew, in its network namespace", self.name)
        await self.quit()
        self._outside = False

    async def _start(self, netns: str | None) -> None:
        ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
        try:
            self._child = self._spawn(ready_write, netns)
        finally:
            os.close(ready_write)
        try:
            companion = Process.of(self._child.pid)
            self._directory.update_side(self.role, companion=companion)
            await self._wait_ready(ready_read)
        finally:
            os.close(ready_read)
        client = await EndpointClient.connect(self.control, RECONNECT_SECONDS)
        self._adopt(client)
        await self._learn_qemu(client)
        log.info("%s is up (pid %d)", self.name, self._child.pid)

    async def _learn_qemu(self, client: EndpointClient) -> None:
        """Which process QEMU is: known from the first moment, so that its end is, too."""
        if self.qemu is not None:
            return
        hello = await client.call("qpc-hello", schema.Empty(), schema.Hello, RECONNECT_SECONDS)
        if hello.qemu_pid is not None and (qemu := Process.of(hello.qemu_pid)) is not None:
            self._directory.update_side(self.role, qemu=qemu)

    def _spawn(self, ready_fd: int, netns: str | None) -> subprocess.Popen[bytes]:
        command = [*inside(netns), sys.executable, "-m", "qpostcopy", self.name]
        command += ["--qmp", self._directory.state.side(self.role).qmp]
        if (pid := self.qemu.pid if self.qemu else self._plan_pid) is not None:
            command += ["--pid", str(pid)]
        command += ["--id", self._directory.migration_id, "--state-dir", str(self._directory.path)]
        command += ["--control", str(self.control), "--ready-fd", str(ready_fd)]
        if level := os.environ.get(LOG_LEVEL_VARIABLE):
            command += ["--log-level", level]
        with (self._directory.path / f"{self.name}.log").open("ab") as log_file:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                pass_fds=[ready_fd],
                start_new_session=True,
                cwd="/",
            )

    async def _wait_ready(self, fd: int) -> None:
        """Until the companion says that it is ready, or why it is not."""
        try:
            async with asyncio.timeout(START_SECONDS):
                said = await _read_line(fd)
        except TimeoutError as error:
            raise CompanionStartError(
                f"the {self.name} was not ready within {START_SECONDS:g} s"
            ) from error
        if said.strip() == b"ready":
            return
        with suppress(ValueError):
            data = json.loads(said)
            if isinstance(data, dict):
                raise rebuild_error(self.name, str(data.get("desc", said)), data)
        raise CompanionStartError(f"the {self.name} did not start: {self._last_log_line()}")

    def _last_log_line(self) -> str:
        lines = (self._directory.path / f"{self.name}.log").read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it says nothing")

    def _adopt(self, client: EndpointClient) -> None:
        self._client = client
        client.on_event(lambda event: self._book.put(self.role, event))
        self._watcher = asyncio.create_task(self._watch(client))

    async def _watch(self, client: EndpointClient) -> None:
        error = await client.wait_lost()
        if error is not None:
            self._book.put(self.role, Event(COMPANION_LOST, {"reason": str(error)}))

    def _reap(self) -> None:
        if self._child is not None and self._child.poll() is not None:
            self._child = None


async def _read_line(fd: int) -> bytes:
    """One line, or what there is when the other end closes."""
    loop = asyncio.get_running_loop()
    said = b""
    while not said.endswith(b"\n"):
        readable: asyncio.Future[None] = loop.create_future()
        loop.add_reader(fd, readable.set_result, None)
        try:
            await readable
        finally:
            loop.remove_reader(fd)
        more = os.read(fd, 4096)
        if not more:
            break
        said += more
    return said
