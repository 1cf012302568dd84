"""Handler and page server between two real QEMUs, driven directly: no controller.

The destination stays `inmigrate`; what its QEMU reads by itself (HMP `xp`, in its
main loop) stands for the guest that faults.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from qpostcopy.errors import OutcomeUnknownError, RefusedError
from qpostcopy.lab.vm import Backend, Vm, VmSpec
from qpostcopy.qmp import schema
from qpostcopy.qmp.client import RemoteError
from qpostcopy.qmp.connection import ConnectionLostError
from qpostcopy.uffd.attach import find_userfaultfds
from tests.companions import (
    MIB,
    PAGE,
    CompanionProcess,
    Pair,
    assert_same_ram,
    connected,
    fill,
    memfd_backends,
    until,
    vm_pair,
)
from tests.qmp.support import private_directory

pytestmark = [pytest.mark.vm, pytest.mark.root]

SECONDS = 60.0


def run(main: Coroutine[Any, Any, None]) -> None:
    async def body() -> None:
        async with asyncio.timeout(SECONDS):
            await main

    asyncio.run(body())


def registered_ranges(pid: int) -> int:
    """VMAs of the process that a userfaultfd holds for missing pages."""
    flags = re.findall(r"^VmFlags:(.*)$", Path(f"/proc/{pid}/smaps").read_text(), re.MULTILINE)
    return sum(" um" in line for line in flags)


def fill_source(pair: Pair) -> None:
    for backend in pair.source_vm.spec.backends:
        fill(pair.source_vm.ram_fd(backend.name), backend.size_bytes, backend.name.encode())


def peek(vm: Vm, client_execute: Any, address: int) -> Coroutine[Any, Any, object]:
    """Have QEMU's main loop read guest memory: a fault if the page is missing."""
    command = {"command-line": f"xp /1xb {address:#x}"}
    reply: Coroutine[Any, Any, object] = client_execute("human-monitor-command", command)
    return reply


def assert_nothing_left(pair: Pair) -> None:
    assert find_userfaultfds(pair.destination_vm.pid) == ()
    assert registered_ranges(pair.destination_vm.pid) == 0


def assert_counts_add_up(stats: schema.HandlerStats, pair: Pair) -> None:
    assert stats.total_pages == pair.source_vm.spec.ram_bytes // PAGE
    assert stats.remaining_pages == 0
    assert stats.stray_pages == 0
    assert stats.total_pages == sum(
        (
            stats.hole_pages,
            stats.zero_pages,
            stats.precopy_pages,
            stats.push_pages,
            stats.demand_pages,
            stats.around_pages,
        )
    )


@pytest.mark.parametrize(
    ("sizes", "push_lanes"), [((64 * MIB,), 1), ((48 * MIB + 12 * PAGE, 20 * MIB), 3)]
)
def test_every_byte_arrives(sizes: tuple[int, ...], push_lanes: int) -> None:
    async def body(pair: Pair) -> None:
        async with connected(pair):
            await pair.start()
            fill_source(pair)
            attached = await pair.attach()
            assert attached.registered_bytes >= pair.source_vm.spec.ram_bytes
            assert registered_ranges(pair.destination_vm.pid) == attached.ranges
            with pair.handler.client.subscribe("QPC_PLACED", "QPC_LANE_LOST") as events:
                await pair.open_lanes(push_lanes)
                await pair.serve()
                assert (await events.get(30)).name == "QPC_PLACED"
            assert_counts_add_up(await pair.handler_stats(), pair)
            await pair.detach()
            assert_same_ram(pair)
            assert_nothing_left(pair)
            await pair.detach()  # idempotent
            await asyncio.gather(pair.handler.quit(), pair.page_server.quit())
            assert "Traceback" not in pair.handler.log + pair.page_server.log
            assert "LANE_LOST" not in pair.page_server.log

    with private_directory() as directory, vm_pair(directory, memfd_backends(*sizes)) as pair:
        run(body(pair))


def test_faults_are_answered_first_and_a_hole_without_the_network() -> None:
    async def body(pair: Pair) -> None:
        async with connected(pair):
            await pair.start()
            backend = pair.source_vm.spec.backends[0]
            fd = pair.source_vm.ram_fd(backend.name)
            os.pwrite(fd, b"\xa5", 40 * MIB)
            for offset in range(0, 32 * MIB, MIB):  # something to push meanwhile, slowly
                os.pwrite(fd, os.urandom(MIB), offset)
            await pair.attach()
            await pair.open_lanes()
            await pair.serve(push_bytes_per_second=MIB)
            execute = pair.handler.client.execute
            assert "0xa5" in str(await peek(pair.destination_vm, execute, 40 * MIB))
            stats = await pair.handler_stats()
            assert stats.demand_pages >= 1
            assert stats.remaining_pages > 0
            await until(pair, lambda stats: stats.hole_pages > 1000)  # the announcement
            assert "0x00" in str(await peek(pair.destination_vm, execute, 50 * MIB))
            assert (await pair.handler_stats()).faults.local >= 1
            committed = schema.Committed()
            await pair.handler.client.call("qpc-committed", committed, schema.Empty)
            with pytest.raises(RemoteError, match="still missing; detaching would"):
                await pair.detach()
            assert registered_ranges(pair.destination_vm.pid) > 0

    with private_directory() as directory, vm_pair(directory, memfd_backends(64 * MIB)) as pair:
        run(body(pair))


def test_a_killed_handler_is_replaced_though_qemu_hangs() -> None:
    """kill -9 in the middle, while QEMU's main loop waits for a page: no greeting then."""

    async def body(pair: Pair) -> None:
        async with connected(pair):
            await pair.start()
            fill_source(pair)
            attached = await pair.attach()
            await pair.open_lanes()
            with pair.page_server.client.subscribe("QPC_LANE_LOST") as lost:
                await pair.serve(push_bytes_per_second=4 * MIB)
                await some_pages(pair)
                await pair.handler.kill()
                assert (await lost.get(10)).name == "QPC_LANE_LOST"
            (pair.state_dir / "committed").touch()
            placed_before = await asyncio.to_thread(pages_in, pair.destination_vm)
            observer = pair.destination_vm.observer
            hang = asyncio.create_task(
                asyncio.to_thread(
                    observer.execute,
                    "human-monitor-command",
                    {"command-line": f"xp /1xb {60 * MIB:#x}"},
                )
            )
            await until_it_hangs(pair.destination_vm)
            pair.handler = CompanionProcess("handler", pair.destination_vm, pair.state_dir)
            client = await pair.handler.start("--pid", str(pair.destination_vm.pid))
            hello = await client.call("qpc-hello", schema.Empty(), schema.Hello)
            assert hello.monitor == "none"
            with pytest.raises(RemoteError, match="query-status was not sent"):
                await client.execute("query-status")
            assert await pair.adopt(attached.uffd_fd) == attached
            with pytest.raises(RemoteError, match="still missing"):
                await pair.detach()
            with client.subscribe("QPC_PLACED") as placed:
                await pair.open_lanes()
                await pair.serve()
                await placed.get(30)
            await hang
            stats = await pair.handler_stats()
            assert_counts_add_up(stats, pair)
            assert placed_before > 0
            await pair.detach()
            assert_same_ram(pair)
            assert_nothing_left(pair)
            status = await client.execute("query-status")  # the monitor came back by itself
            assert isinstance(status, dict)
            await asyncio.gather(pair.handler.quit(), pair.page_server.quit())

    with private_directory() as directory, vm_pair(directory, memfd_backends(64 * MIB)) as pair:
        run(body(pair))


def test_lost_lanes_are_told_and_a_new_session_goes_on() -> None:
    async def body(pair: Pair) -> None:
        async with connected(pair):
            await pair.start()
            fill_source(pair)
            await pair.attach()
            await pair.open_lanes(2)
            with pair.handler.client.subscribe("QPC_LANE_LOST", "QPC_PLACED") as events:
                await pair.serve(push_bytes_per_second=4 * MIB)
                await some_pages(pair)
                await pair.page_server.kill()
                assert (await events.get(10)).name == "QPC_LANE_LOST"
                pair.page_server = CompanionProcess("page-server", pair.source_vm, pair.state_dir)
                await pair.page_server.start("--pid", str(pair.source_vm.pid))
                await pair.open_lanes(1)
                await pair.serve()
                assert (await events.get(30)).name == "QPC_PLACED"
            assert_counts_add_up(await pair.handler_stats(), pair)
            await pair.detach()
            assert_same_ram(pair)

    with private_directory() as directory, vm_pair(directory, memfd_backends(64 * MIB)) as pair:
        run(body(pair))


def test_sessions_can_follow_each_other_at_any_time() -> None:
    async def body(pair: Pair) -> None:
        async with connected(pair):
            await pair.start()
            fill_source(pair)
            await pair.attach()
            with pair.handler.client.subscribe("QPC_LANE_LOST", "QPC_PLACED") as events:
                for _ in range(3):
                    await pair.open_lanes()
                    await pair.serve(push_bytes_per_second=MIB)
                await pair.open_lanes()
                await pair.open_lanes(2)  # without serving in between
                await pair.serve()
                assert (await events.get(30)).name == "QPC_PLACED"  # and no LANE_LOST
            assert_counts_add_up(await pair.handler_stats(), pair)
            await pair.detach()
            assert_same_ram(pair)

    with private_directory() as directory, vm_pair(directory, memfd_backends(64 * MIB)) as pair:
        run(body(pair))


def test_the_source_itself_is_never_punched() -> None:
    """Trap 4: both QEMUs on the same file."""

    async def body(vm: Vm, handler: CompanionProcess) -> None:
        async with connected(handler):
            client = await handler.start()
            status = os.fstat(vm.ram_fd("ram0"))
            os.pwrite(vm.ram_fd("ram0"), b"precious", 8 * MIB)
            same = schema.FileIdentity(device=status.st_dev, inode=status.st_ino)
            with pytest.raises(RefusedError, match="same file"):
                await client.call(
                    "qpc-attach",
                    schema.Attach(forbidden=(same,), ahead_bytes=0, behind_bytes=0),
                    schema.Attached,
                )
            assert os.pread(vm.ram_fd("ram0"), 8, 8 * MIB) == b"precious"
            assert find_userfaultfds(vm.pid) == ()

    with private_directory() as directory:
        vm = Vm("dest", VmSpec(memfd_backends(32 * MIB), incoming=True), directory)
        state = directory / "state"
        state.mkdir(mode=0o700)
        handler = CompanionProcess("handler", vm, state)
        with vm:
            try:
                run(body(vm, handler))
            finally:
                handler.end()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (VmSpec(memfd_backends(32 * MIB), paused=True), "prelaunch, not waiting"),
        (VmSpec((Backend("ram0", 32 * MIB, share=False),), incoming=True), "not shared memory"),
    ],
    ids=["not-incoming", "not-shared"],
)
def test_a_destination_that_cannot_be_one_is_left_alone(spec: VmSpec, words: str) -> None:
    async def body(vm: Vm, handler: CompanionProcess) -> None:
        async with connected(handler):
            client = await handler.start()
            with pytest.raises(RefusedError, match=words):
                await client.call(
                    "qpc-attach",
                    schema.Attach(forbidden=(), ahead_bytes=0, behind_bytes=0),
                    schema.Attached,
                )
            assert find_userfaultfds(vm.pid) == ()
            assert not list(handler.state_dir.glob("placed*"))

    with private_directory() as directory:
        vm = Vm("dest", spec, directory)
        state = directory / "state"
        state.mkdir(mode=0o700)
        handler = CompanionProcess("handler", vm, state)
        with vm:
            try:
                run(body(vm, handler))
            finally:
                handler.end()


def test_commands_in_the_wrong_state_name_themselves() -> None:
    async def body(pair: Pair) -> None:
        async with connected(pair):
            await pair.start()
            client = pair.handler.client
            for call in (
                client.call("qpc-stats", schema.Empty(), schema.HandlerStats),
                client.call("qpc-serve", schema.Serve(), schema.Empty),
                client.call("qpc-committed", schema.Committed(), schema.Empty),
            ):
                with pytest.raises(RemoteError, match=r"qpc-.*: this handler is not attached"):
                    await call
            with pytest.raises(RemoteError, match="no handler of this migration left"):
                await pair.adopt(17)
            await pair.attach()
            with pytest.raises(RemoteError, match="qpc-attach: this handler is attached already"):
                await pair.attach()
            with pytest.raises(RemoteError, match="qpc-listen first"):
                await client.call("qpc-serve", schema.Serve(), schema.Empty)
            with pytest.raises(RemoteError, match="qpc-prepare first"):
                await pair.page_server.client.call("qpc-serve", schema.ServePages(), schema.Empty)
            await pair.detach()
            assert_nothing_left(pair)
            await pair.attach()  # and again, from the start
            await pair.detach()

    with private_directory() as directory, vm_pair(directory, memfd_backends(32 * MIB)) as pair:
        run(body(pair))


def test_a_crash_between_attach_and_its_reply_is_cleaned_up_by_the_next_attach() -> None:
    async def body(pair: Pair) -> None:
        async with connected(pair):
            await pair.start()
            await pair.attach()
            await pair.handler.kill()  # the controller never heard of it: it begins anew
            assert len(find_userfaultfds(pair.destination_vm.pid)) == 1
            pair.handler = CompanionProcess("handler", pair.destination_vm, pair.state_dir)
            await pair.handler.start()
            with pytest.raises(RefusedError, match="already has a userfaultfd"):
                await pair.attach()
            await pair.detach()
            assert_nothing_left(pair)
            await pair.attach()
            await pair.detach()
            assert_nothing_left(pair)

    with private_directory() as directory, vm_pair(directory, memfd_backends(32 * MIB)) as pair:
        run(body(pair))


def test_a_running_source_is_not_served() -> None:
    async def body(pair: Pair) -> None:
        async with connected(pair):
            await pair.start()
            await pair.attach()
            await pair.open_lanes()
            await pair.page_server.client.execute("cont")
            with pytest.raises(RefusedError, match="running, not stopped"):
                await pair.serve()

    with private_directory() as directory, vm_pair(directory, memfd_backends(32 * MIB)) as pair:
        run(body(pair))


def test_lanes_refuse_what_does_not_fit() -> None:
    async def body(pair: Pair) -> None:
        async with connected(pair):
            await pair.start()
            await pair.attach()
            token, pair.token = pair.token, "00" * 32
            listening = await pair.handler.client.call(
                "qpc-listen",
                schema.Listen(host="127.0.0.1", port=0, push_lanes=1, token=token),
                schema.Listening,
            )
            with socket.create_connection(("127.0.0.1", listening.port)) as stranger:
                stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
                wrong = schema.Connect(
                    host="127.0.0.1", port=listening.port, push_lanes=1, token=pair.token
                )
                with pytest.raises(RemoteError, match="token differs"):
                    await pair.page_server.client.call("qpc-connect", wrong, schema.Empty)
                right = wrong.model_copy(update={"token": token})
                await pair.page_server.client.call("qpc-connect", right, schema.Empty)
                await pair.serve()

    with private_directory() as directory, vm_pair(directory, memfd_backends(32 * MIB)) as pair:
        run(body(pair))


def test_qemu_can_be_killed_though_it_hangs() -> None:
    async def body(pair: Pair) -> None:
        async with connected(pair):
            await pair.start()
            await pair.attach()
            client = pair.handler.client
            with client.subscribe("QPC_QEMU_GONE", "QPC_MONITOR_LOST") as events:
                with pytest.raises(OutcomeUnknownError):  # nobody serves: the main loop hangs
                    command = {"command-line": "xp /1xb 0x100000"}
                    await client.execute("human-monitor-command", command, 0.5)
                await client.call("qpc-stats", schema.Empty(), schema.HandlerStats, 2)
                await client.call("qpc-kill", schema.Kill(), schema.Empty)
                assert not pair.destination_vm.alive
                assert (await events.get(5)).name == "QPC_QEMU_GONE"
                await client.call("qpc-kill", schema.Kill(), schema.Empty)  # idempotent
                await pair.detach()  # nothing of ours is left in a process that is gone
                await pair.handler.quit()
                with pytest.raises(ConnectionLostError):  # and nothing was told meanwhile
                    await events.get(5)

    with private_directory() as directory, vm_pair(directory, memfd_backends(32 * MIB)) as pair:
        run(body(pair))


async def some_pages(pair: Pair) -> None:
    """Until some pages were pushed, and not all."""
    await until(pair, lambda stats: stats.push_pages > 100)
    assert (await pair.handler_stats()).remaining_pages, "all pages came too soon for this test"


async def until_it_hangs(vm: Vm) -> None:
    """Until a thread of QEMU waits in handle_userfault; /proc is all that tells."""
    while True:
        if any("userfault" in channel for channel in wait_channels(vm.pid)):
            return
        await asyncio.sleep(0.02)


def wait_channels(pid: int) -> list[str]:
    """Where in the kernel each thread of a process sleeps."""
    return [(task / "wchan").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]


def pages_in(vm: Vm) -> int:
    """Pages that the destination's RAM files hold."""
    return sum(
        os.fstat(vm.ram_fd(backend.name)).st_blocks * 512 // PAGE for backend in vm.spec.backends
    )
