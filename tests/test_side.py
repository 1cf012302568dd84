"""What a side knows of its QEMU without asking anybody."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qpostcopy.lab.vm import Vm, VmSpec
from qpostcopy.netns import NetnsAbsentError
from qpostcopy.process import Process
from qpostcopy.side import EventBook, Side
from qpostcopy.state import StateDirectory
from tests.companions import MIB, CompanionProcess, memfd_backends
from tests.networks import ip, namespace, namespace_named, namespace_of, remove_namespace
from tests.qmp.support import private_directory


@pytest.fixture
def side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Side:
    monkeypatch.setenv("QPOSTCOPY_RUN_DIR", str(tmp_path))
    directory = StateDirectory.create(
        "web1",
        plan_text="version: 1\n",
        profile="sequential",
        source_qmp=Path("/run/a.qmp"),
        destination_qmp=Path("/run/b.qmp"),
    )
    return Side("destination", directory, EventBook(), None)


def test_the_command_line_of_a_qemu(side: Side) -> None:
    assert side.qemu_arguments() == ()
    child = subprocess.Popen(["sleep", "60"])
    try:
        side._directory.update_side("destination", qemu=Process.of(child.pid))
        assert side.qemu_arguments() == ("sleep", "60")
    finally:
        child.kill()
        child.wait()
    assert side.qemu_arguments() == (), "it cannot be read any more: nothing is guessed"


def test_no_connection_is_no_answer(side: Side) -> None:
    assert asyncio.run(side.answers(1.0)) is False


@pytest.mark.vm
@pytest.mark.root
def test_a_companion_that_nobody_wrote_down_is_found() -> None:
    """Its controller died between its start and the note: two of them would help nobody."""
    with private_directory() as path, pytest.MonkeyPatch.context() as patch:
        patch.setenv("QPOSTCOPY_RUN_DIR", str(path / "run"))
        with Vm("vm", VmSpec(memfd_backends(32 * MIB), paused=True), path) as vm:
            directory = StateDirectory.create(
                "web1",
                plan_text="version: 1\n",
                profile="sequential",
                source_qmp=vm.qmp_path,
                destination_qmp=vm.qmp_path,
            )
            lost = CompanionProcess("page-server", vm, directory.path)

            async def body() -> None:
                await lost.start()
                await lost.hang_up()
                side = Side("source", directory, EventBook(), None)
                assert await side.ensure() is False, "no second one was started"
                companion = directory.state.source.companion
                assert lost.process is not None
                assert companion == Process.of(lost.process.pid)
                await side.quit()
                assert await lost.wait() == 0

            try:
                asyncio.run(body())
            finally:
                lost.end()


@pytest.mark.vm
@pytest.mark.root
def test_without_its_network_a_companion_is_good_for_a_way_back_only() -> None:
    with private_directory() as path, pytest.MonkeyPatch.context() as patch:
        patch.setenv("QPOSTCOPY_RUN_DIR", str(path / "run"))
        spec = VmSpec(memfd_backends(32 * MIB), paused=True)
        with Vm("vm", spec, path) as vm, namespace("west") as name:
            directory = StateDirectory.create(
                "web1",
                plan_text="version: 1\n",
                profile="sequential",
                source_qmp=vm.qmp_path,
                destination_qmp=vm.qmp_path,
            )
            side = Side("source", directory, EventBook(), None, name)

            async def body() -> None:
                assert await side.ensure(network=False)
                assert namespace_of(companion_of(directory)) == namespace_named(name)
                remove_namespace(name)
                await side.quit()
                with pytest.raises(NetnsAbsentError):
                    await side.ensure()
                assert await side.ensure(network=False)
                assert namespace_of(companion_of(directory)) == namespace_of(os.getpid())
                assert (await side.query("query-status"))["status"] == "prelaunch"
                with pytest.raises(NetnsAbsentError):
                    await side.ensure()  # it would bring up lanes
                ip("netns", "add", name)
                assert not await side.ensure(network=False)
                assert await side.ensure()
                assert namespace_of(companion_of(directory)) == namespace_named(name)
                assert not await side.ensure()
                await side.quit()

            asyncio.run(body())


def companion_of(directory: StateDirectory) -> int:
    companion = directory.state.source.companion
    assert companion is not None
    return companion.pid


@pytest.mark.vm
@pytest.mark.root
def test_a_companion_ends_if_nobody_hears_that_it_is_ready() -> None:
    spec = VmSpec(memfd_backends(32 * MIB), paused=True)
    with private_directory() as path, Vm("vm", spec, path) as vm:
        read_fd, write_fd = os.pipe()
        command = [sys.executable, "-m", "qpostcopy", "page-server", "--id", "t-1"]
        command += ["--qmp", str(vm.qmp_path), "--state-dir", str(path)]
        command += ["--control", str(path / "c.sock"), "--ready-fd", str(write_fd)]
        os.close(read_fd)
        ended = subprocess.run(command, pass_fds=[write_fd], stderr=subprocess.PIPE, timeout=30)
        os.close(write_fd)
        assert b"whoever started us is dead" in ended.stderr
        assert not (path / "c.sock").exists()
