"""Companion processes, started as the controller starts them, for tests that drive them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qpostcopy.config import Profile
from qpostcopy.lab.vm import Backend, Vm, VmSpec
from qpostcopy.qmp import schema
from qpostcopy.qmp.client import EndpointClient, rebuild_error

MIGRATION_ID = "test-20260101T000000"
MIB = 1 << 20
READY_SECONDS = 20.0
PAGE = 4096


@dataclass
class CompanionProcess:
    """One companion and our connection to it."""

    name: str
    vm: Vm
    state_dir: Path
    process: subprocess.Popen[bytes] | None = None
    _client: EndpointClient | None = None

    @property
    def control(self) -> Path:
        return self.state_dir / f"{self.name}.sock"

    @property
    def client(self) -> EndpointClient:
        assert self._client is not None, "not started"
        return self._client

    @property
    def log(self) -> str:
        return (self.state_dir / f"{self.name}.log").read_text()

    async def start(self, *more: str) -> EndpointClient:
        """Start, wait for readiness, connect.

        :raise RemoteError: it says why it cannot.
        """
        read_fd, write_fd = os.pipe()
        command = [sys.executable, "-m", "qpostcopy", self.name]
        command += ["--qmp", str(self.vm.qmp_path), "--id", MIGRATION_ID]
        command += ["--state-dir", str(self.state_dir), "--control", str(self.control)]
        command += ["--ready-fd", str(write_fd), "--log-level", "debug", *more]
        with (self.state_dir / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(  # noqa: ASYNC220
                command, pass_fds=[write_fd], stdout=log, stderr=log, start_new_session=True
            )
        os.close(write_fd)
        with os.fdopen(read_fd) as ready:
            line = await asyncio.wait_for(asyncio.to_thread(ready.readline), READY_SECONDS)
        if line.strip() != "ready":
            assert line, self.log
            problem = json.loads(line)
            raise rebuild_error(self.name, problem["desc"], problem)
        self._client = await EndpointClient.connect(self.control)
        return self._client

    async def kill(self) -> None:
        """SIGKILL, as a crash or the OOM killer would."""
        assert self.process is not None
        self.process.kill()
        await self.wait()

    async def quit(self) -> None:
        """Ask it to end, and see that it does, well."""
        await self.client.call("qpc-quit", schema.Empty(), schema.Empty)
        assert await self.wait() == 0, self.log

    async def wait(self) -> int:
        assert self.process is not None
        status = await asyncio.wait_for(asyncio.to_thread(self.process.wait), READY_SECONDS)
        await self.hang_up()
        return status

    async def hang_up(self) -> None:
        if self._client is not None:
            await self._client.close()

    def end(self) -> None:
        """Whatever state it is in."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@dataclass
class Pair:
    """Two QEMUs and their companions."""

    source_vm: Vm
    destination_vm: Vm
    page_server: CompanionProcess
    handler: CompanionProcess
    token: str = field(default_factory=lambda: secrets.token_hex(32))

    @property
    def state_dir(self) -> Path:
        return self.handler.state_dir

    async def start(self) -> None:
        await asyncio.gather(self.page_server.start(), self.handler.start())

    async def attach(self, **changes: Any) -> schema.Attached:
        arguments = {
            "forbidden": self.source_files(),
            "ahead_bytes": 64 * 1024,
            "behind_bytes": 0,
        } | changes
        return await self.handler.client.call(
            "qpc-attach", schema.Attach(**arguments), schema.Attached, 60
        )

    async def adopt(self, uffd_fd: int) -> schema.Attached:
        arguments = schema.Adopt(uffd_fd=uffd_fd, ahead_bytes=64 * 1024, behind_bytes=0)
        return await self.handler.client.call("qpc-adopt", arguments, schema.Attached, 60)

    async def open_lanes(self, push_lanes: int = 1, device_state: bool = False) -> None:
        which = {"push_lanes": push_lanes, "device_state": device_state}
        both = {"host": "127.0.0.1", "token": self.token} | which
        listening = await self.handler.client.call(
            "qpc-listen", schema.Listen.model_validate(both | {"port": 0}), schema.Listening
        )
        await self.page_server.client.call(
            "qpc-connect",
            schema.Connect.model_validate(both | {"port": listening.port}),
            schema.Empty,
        )

    async def serve(
        self,
        push_bytes_per_second: int | None = None,
        profile: Mapping[str, object] | None = None,
        push: bool = True,
    ) -> None:
        content = profile or Profile(name="in-order").model_dump(mode="json")
        await self.page_server.client.call(
            "qpc-prepare",
            schema.Prepare(profile=dict(content), push_bytes_per_second=push_bytes_per_second),
            schema.Prepared,
        )
        await asyncio.gather(
            self.page_server.client.call("qpc-serve", schema.ServePages(push=push), schema.Empty),
            self.handler.client.call("qpc-serve", schema.Serve(), schema.Empty),
        )

    async def handler_stats(self) -> schema.HandlerStats:
        return await self.handler.client.call("qpc-stats", schema.Empty(), schema.HandlerStats)

    async def detach(self) -> None:
        await self.handler.client.call("qpc-detach", schema.Detach(), schema.Empty)

    async def hang_up(self) -> None:
        await self.handler.hang_up()
        await self.page_server.hang_up()

    def source_files(self) -> tuple[schema.FileIdentity, ...]:
        """What the source's RAM lies in."""
        return tuple(
            schema.FileIdentity(device=status.st_dev, inode=status.st_ino)
            for backend in self.source_vm.spec.backends
            for status in [os.fstat(self.source_vm.ram_fd(backend.name))]
        )


@contextlib.contextmanager
def vm_pair(directory: Path, backends: tuple[Backend, ...]) -> Iterator[Pair]:
    """A stopped source and a waiting destination, RAM in memfds; no companions started yet."""
    state_dir = directory / "state"
    state_dir.mkdir(mode=0o700)
    source = Vm("source", VmSpec(backends, paused=True), directory)
    destination = Vm("dest", VmSpec(backends, incoming=True), directory)
    with source, destination:
        pair = Pair(
            source,
            destination,
            CompanionProcess("page-server", source, state_dir),
            CompanionProcess("handler", destination, state_dir),
        )
        try:
            yield pair
        finally:
            pair.page_server.end()
            pair.handler.end()


@contextlib.asynccontextmanager
async def connected(who: CompanionProcess | Pair) -> AsyncIterator[None]:
    """Close our ends at the end, whatever the test did."""
    try:
        yield
    finally:
        await who.hang_up()


def memfd_backends(*sizes: int) -> tuple[Backend, ...]:
    """One backend of each size, each in a memfd."""
    return tuple(Backend(f"ram{n}", size, mem_path=None) for n, size in enumerate(sizes))


def fill(fd: int, size_bytes: int, seed: bytes) -> None:
    """Data, zeroes and holes by turns: a third of each, in runs of 1..64 pages."""
    offset, turn = 0, 0
    while offset < size_bytes:
        pages = 1 + (turn * 7 + len(seed)) % 64
        length = min(pages * PAGE, size_bytes - offset)
        if turn % 3 == 0:
            pattern = b"".join(
                (seed + (offset + at).to_bytes(8, "little")).ljust(64, b"#") * (PAGE // 64)
                for at in range(0, length, PAGE)
            )
            os.pwrite(fd, pattern, offset)
        elif turn % 3 == 1:
            os.pwrite(fd, bytes(length), offset)
        offset, turn = offset + length, turn + 1


def first_difference(left: int, right: int, size_bytes: int) -> int | None:
    """The first page that differs; read, not mapped: a hole stays a hole."""
    for offset in range(0, size_bytes, MIB):
        length = min(MIB, size_bytes - offset)
        ours, theirs = os.pread(left, length, offset), os.pread(right, length, offset)
        if ours != theirs:
            for at in range(0, length, PAGE):
                if ours[at : at + PAGE] != theirs[at : at + PAGE]:
                    return (offset + at) // PAGE
    return None


def assert_same_ram(pair: Pair) -> None:
    for backend in pair.source_vm.spec.backends:
        left = pair.source_vm.ram_fd(backend.name)
        right = pair.destination_vm.ram_fd(backend.name)
        assert first_difference(left, right, backend.size_bytes) is None, backend.name


async def until(pair: Pair, holds: Callable[[schema.HandlerStats], bool]) -> None:
    """Until the handler's counters say so; they have no event."""
    while True:
        if holds(await pair.handler_stats()):
            return
        await asyncio.sleep(0.02)
