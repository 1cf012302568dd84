"""Companion processes beside a real QEMU: readiness, lives, losses, what is passed through."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import stat
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from qpostcopy.errors import ExitCode, RefusedError
from qpostcopy.lab.vm import Vm, VmSpec
from qpostcopy.qmp import schema
from qpostcopy.qmp.client import EndpointClient, RemoteError
from qpostcopy.qmp.connection import CommandError
from qpostcopy.qmp.monitor import Monitor
from qpostcopy.qmp.server import method_name
from qpostcopy.source.server import PageServer
from qpostcopy.uffd.handler import Handler
from tests.companions import MIB, MIGRATION_ID, CompanionProcess, connected, memfd_backends
from tests.qmp.support import private_directory

Body = Callable[[CompanionProcess], Coroutine[Any, Any, None]]


@contextlib.contextmanager
def companion(name: str = "page-server") -> Iterator[CompanionProcess]:
    """A paused QEMU, and its companion to be started."""
    with private_directory() as directory:
        state = directory / "state"
        state.mkdir(mode=0o700)
        with Vm("vm", VmSpec(memfd_backends(32 * MIB), paused=True), directory) as vm:
            process = CompanionProcess(name, vm, state)
            try:
                yield process
            finally:
                process.end()


def run(body: Body, name: str = "page-server") -> None:
    async def main(process: CompanionProcess) -> None:
        async with asyncio.timeout(60), connected(process):
            await body(process)

    with companion(name) as process:
        asyncio.run(main(process))


@pytest.mark.parametrize(
    ("kind", "table"), [(PageServer, schema.PAGE_SERVER), (Handler, schema.HANDLER)]
)
def test_every_command_of_the_schema_has_a_method_and_the_reverse(
    kind: type, table: dict[str, object]
) -> None:
    methods = {name for name in dir(kind) if re.fullmatch(r"qpc_\w+", name)}
    assert methods == {method_name(command) for command in table}
    assert kind.commands is table  # type: ignore[attr-defined]


def oom_score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def may_lower_oom_score() -> bool:
    """A container may take CAP_SYS_RESOURCE (bit 24) even from root."""
    found = re.search(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return bool(int(found[1], 16) >> 24 & 1)


@pytest.mark.vm
@pytest.mark.root
@pytest.mark.parametrize("name", ["page-server", "handler"])
def test_it_comes_up_says_who_it_is_and_quits(name: str) -> None:
    async def body(process: CompanionProcess) -> None:
        client = await process.start()
        assert process.process is not None
        assert stat.S_IMODE(os.stat(process.control).st_mode) == 0o600  # noqa: PTH116
        assert await client.call("qpc-hello", schema.Empty(), schema.Hello) == schema.Hello(
            role="page-server" if name == "page-server" else "handler",
            version="0.1.0",
            migration_id=MIGRATION_ID,
            pid=process.process.pid,
            qemu_pid=process.vm.pid,
            monitor="held",
        )
        facts = await client.call("qpc-inspect", schema.Inspect(), schema.SideFacts)
        assert facts.pid == process.vm.pid
        assert facts.role == ("source" if name == "page-server" else "destination")
        assert [block.size_bytes for block in facts.blocks] == [32 * MIB]
        assert oom_score(process.process.pid) == (-1000 if may_lower_oom_score() else 0)
        await process.quit()
        assert not process.control.exists()

    run(body, name)


@pytest.mark.vm
@pytest.mark.root
def test_qemu_passes_through_to_several_clients() -> None:
    async def body(process: CompanionProcess) -> None:
        first = await process.start()
        second = await EndpointClient.connect(process.control)
        status = await second.execute("query-status")
        assert isinstance(status, dict)
        assert status["status"] == "prelaunch"
        with pytest.raises(CommandError, match="Device 'x' not found") as caught:
            await second.execute("device_del", {"id": "x"})
        assert caught.value.error_class == "DeviceNotFound"
        with first.subscribe("RESUME") as one, second.subscribe("RESUME") as two:
            await first.execute("cont")
            assert (await one.get(5)).name == (await two.get(5)).name == "RESUME"
        await second.close()

    run(body)


@pytest.mark.vm
@pytest.mark.root
def test_it_survives_sighup_and_its_clients_and_ends_on_sigterm() -> None:
    async def body(process: CompanionProcess) -> None:
        client = await process.start()
        assert process.process is not None
        process.process.send_signal(signal.SIGHUP)
        await client.close()
        again = await EndpointClient.connect(process.control)
        await again.call("qpc-hello", schema.Empty(), schema.Hello)
        await again.close()
        process.process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0

    run(body)


@pytest.mark.vm
@pytest.mark.root
def test_two_companions_on_one_socket_are_refused() -> None:
    async def body(process: CompanionProcess) -> None:
        await process.start()
        second = CompanionProcess(process.name, process.vm, process.state_dir)
        with pytest.raises(RefusedError, match="already listens"):
            await second.start()
        assert await second.wait() == ExitCode.REFUSED
        await process.client.call("qpc-hello", schema.Empty(), schema.Hello)

    run(body)


@pytest.mark.vm
@pytest.mark.root
def test_a_held_monitor_is_told_on_the_readiness_pipe() -> None:
    async def body(process: CompanionProcess) -> None:
        holder = await Monitor.connect(process.vm.qmp_path)
        with pytest.raises(RefusedError, match="held by another client") as caught:
            await process.start()
        assert caught.value.remedy
        assert await process.wait() == ExitCode.REFUSED
        assert not process.control.exists()
        await holder.close()

    run(body)


@pytest.mark.vm
@pytest.mark.root
def test_no_qemu_there_is_told_on_the_readiness_pipe() -> None:
    async def body(process: CompanionProcess) -> None:
        process.vm.kill()
        with pytest.raises(RefusedError, match=r"no QMP socket|nobody listens"):
            await process.start()
        assert await process.wait() == ExitCode.REFUSED

    run(body)


@pytest.mark.vm
@pytest.mark.root
def test_the_end_of_qemu_is_told_once_and_the_companion_stays() -> None:
    async def body(process: CompanionProcess) -> None:
        client = await process.start()
        with client.subscribe("QPC_QEMU_GONE", "QPC_MONITOR_LOST") as events:
            process.vm.kill()
            assert (await events.get(5)).name == "QPC_QEMU_GONE"
            with pytest.raises(RemoteError, match="query-status was not sent"):
                await client.execute("query-status")
            await client.call("qpc-hello", schema.Empty(), schema.Hello)
            await process.quit()
            assert not events._waiting, "a QEMU that ends loses no monitor"

    run(body)


@pytest.mark.vm
@pytest.mark.root
def test_a_hanging_qemu_does_not_hang_us() -> None:
    async def body(process: CompanionProcess) -> None:
        client = await process.start()
        process.vm.signal(signal.SIGSTOP)
        stuck = asyncio.create_task(client.execute("query-status"))
        for _ in range(3):
            await client.call("qpc-hello", schema.Empty(), schema.Hello, 2)
        assert not stuck.done()
        process.vm.signal(signal.SIGCONT)
        assert isinstance(await stuck, dict)

    run(body)


@contextlib.asynccontextmanager
async def relay(path: Path, target: Path) -> AsyncIterator[list[asyncio.StreamWriter]]:
    """A socket before QEMU's, whose connections a test can cut."""
    writers: list[asyncio.StreamWriter] = []
    tasks: list[asyncio.Task[None]] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(str(target))
        writers.extend((writer, far_writer))
        tasks.append(asyncio.create_task(pump(reader, far_writer)))
        tasks.append(asyncio.create_task(pump(far_reader, writer)))

    server = await asyncio.start_unix_server(accept, str(path))
    try:
        yield writers
    finally:
        server.close()
        for writer in writers:
            writer.close()
        await asyncio.gather(*tasks)


@pytest.mark.vm
@pytest.mark.root
def test_a_lost_monitor_is_told_and_comes_back_by_itself() -> None:
    async def body(process: CompanionProcess) -> None:
        target = process.vm.qmp_path
        path = target.with_name("relay.qmp")
        async with relay(path, target) as writers:
            process.vm.qmp_path = path
            client = await process.start("--pid", str(process.vm.pid))
            process.vm.qmp_path = target
            with client.subscribe("QPC_MONITOR_LOST") as events:
                for writer in writers:
                    writer.close()
                event = await events.get(10)
                assert isinstance(event.model, schema.MonitorLost)
            while True:
                with contextlib.suppress(RemoteError):
                    assert isinstance(await client.execute("query-status"), dict)
                    break
                await asyncio.sleep(0.05)
            hello = await client.call("qpc-hello", schema.Empty(), schema.Hello)
            assert hello.monitor == "held"
            await process.quit()

    run(body)
