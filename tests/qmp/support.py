"""What the tests of the control protocol share: a service, an endpoint, a real QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any

from qpostcopy.errors import RefusedError
from qpostcopy.qmp import schema
from qpostcopy.qmp.server import Endpoint, PassThrough

SECONDS = 20.0


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run an async test body with a deadline of its own."""

    async def body() -> None:
        async with asyncio.timeout(SECONDS):
            await main()

    asyncio.run(body())


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    """A directory short enough for socket paths (108 bytes), mode 0700."""
    with tempfile.TemporaryDirectory(prefix="qpc-") as name:
        yield Path(name)


class ControllerService:
    """A controller that answers, and whose abort waits until it is let go."""

    def __init__(self) -> None:
        self.abort_begun = asyncio.Event()
        self.abort_may_end = asyncio.Event()
        self.abort_done = asyncio.Event()

    async def qpc_hello(self, _: schema.Empty) -> schema.Hello:
        return schema.Hello(
            role="controller",
            version="0",
            migration_id="m-1",
            pid=1,
            qemu_pid=None,
            monitor="none",
        )

    async def qpc_status(self, _: schema.Empty) -> schema.Status:
        raise RefusedError("no status today", remedy="ask tomorrow")

    async def qpc_abort(self, arguments: schema.Abort) -> schema.Empty:
        self.abort_begun.set()
        await self.abort_may_end.wait()
        self.abort_done.set()
        return schema.Empty()


@contextlib.asynccontextmanager
async def controller_endpoint(
    pass_through: PassThrough | None = None,
) -> AsyncIterator[tuple[Endpoint, ControllerService]]:
    """An endpoint of ours, listening; closed at the end."""
    with private_directory() as directory:
        service = ControllerService()
        endpoint = Endpoint(
            directory / "control.sock", schema.CONTROLLER, service, pass_through=pass_through
        )
        await endpoint.listen()
        try:
            yield endpoint, service
        finally:
            service.abort_may_end.set()
            await endpoint.close()


async def echo(command: str, arguments: Mapping[str, object] | None) -> object:
    """A pass-through that shows what it was given."""
    return {"command": command, "arguments": arguments}


@contextlib.contextmanager
def bare_qemu(directory: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A QEMU without a machine to speak of: enough for its monitor."""
    path = directory / "qemu.qmp"
    command = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-machine", "none"]
    command += ["-qmp", f"unix:{path},server=on,wait=off", "-S", *more]
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def wait_for_socket(path: Path) -> Path:
    """Until QEMU has made its socket; nothing tells, so look again."""
    while True:
        with contextlib.suppress(OSError), contextlib.closing(socket.socket(socket.AF_UNIX)) as s:
            s.connect(str(path))
            return path
        await asyncio.sleep(0.01)
