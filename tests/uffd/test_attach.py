"""Obtaining, adopting and closing a userfaultfd, on victims and on a real QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qpostcopy.core import (
    CoreSystemError,
    inject_syscall,
    uffd_api,
    uffd_register_missing,
    uffd_unregister,
)
from qpostcopy.lab.vm import Backend, Vm, VmSpec
from qpostcopy.process import Process
from qpostcopy.qmp.monitor import Monitor
from qpostcopy.qmp.schema import BlockFacts
from qpostcopy.regions import discover_blocks
from qpostcopy.uffd import attach, inject_helper
from tests.uffd.victims import Victim, storm, victim

pytestmark = pytest.mark.root

MIB = 1 << 20


@pytest.fixture
def target() -> Iterator[Victim]:
    """Sleeps most of the time, as QEMU's main thread does, and is well at the end."""
    with victim("ppoll") as one:
        yield one
        one.process.send_signal(signal.SIGCONT)  # a test that failed may have left it stopped
        assert one.end().startswith("ok ")


def until_no_helper(pid: int) -> None:
    """Helpers that we did not wait for end by themselves; wait until none works on `pid`."""
    end = time.monotonic() + 10
    while any("inject_helper" in command for command in _our_children()):
        assert time.monotonic() < end
        time.sleep(0.01)
    gc.collect()


def _our_children() -> list[str]:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [Path(f"/proc/{pid}/cmdline").read_text() for pid in children]


def test_obtain_then_close(target: Victim) -> None:
    obtained = attach.obtain(target.pid)
    try:
        assert attach.find_userfaultfds(target.pid) == (obtained.fd_in_target,)
        assert not attach.is_initialized(target.pid, obtained.fd_in_target)
        assert not os.get_inheritable(obtained.uffd)
        uffd_api(obtained.uffd)  # works once only: ours is the very same userfaultfd
        assert attach.is_initialized(target.pid, obtained.fd_in_target)
        attach.close_in_target(target.pid, obtained.fd_in_target)
        assert attach.find_userfaultfds(target.pid) == ()
    finally:
        os.close(obtained.uffd)


def test_obtain_in_a_signal_storm(target: Victim) -> None:
    with storm(target, 300, [signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT]):
        obtained = attach.obtain(target.pid, 10)
    os.close(obtained.uffd)
    assert attach.find_userfaultfds(target.pid) == (obtained.fd_in_target,)


def test_adopt_gives_the_same_userfaultfd(target: Victim) -> None:
    obtained = attach.obtain(target.pid)
    uffd_api(obtained.uffd)
    os.close(obtained.uffd)  # as the handler's death does
    adopted = attach.adopt(target.pid, obtained.fd_in_target)
    try:
        link = Path(f"/proc/self/fd/{adopted}").readlink()
        assert str(link) == attach.USERFAULTFD_LINK
        inode = Path(f"/proc/{target.pid}/fd/{obtained.fd_in_target}").stat().st_ino
        assert os.fstat(adopted).st_ino == inode
    finally:
        os.close(adopted)


def test_a_rest_of_an_injection_is_recognised_and_closed(target: Victim) -> None:
    own = attach.obtain(target.pid)  # stands for a userfaultfd of QEMU's own
    uffd_api(own.uffd)
    before = attach.find_userfaultfds(target.pid)
    crashed = attach.obtain(target.pid)
    os.close(crashed.uffd)
    os.close(own.uffd)
    assert attach.find_orphans(target.pid, before) == (crashed.fd_in_target,)
    with pytest.raises(attach.AttachError, match="never initialised"):
        attach.adopt(target.pid, crashed.fd_in_target)
    attach.close_in_target(target.pid, crashed.fd_in_target)
    assert attach.find_orphans(target.pid, before) == ()
    assert attach.find_userfaultfds(target.pid) == before


def test_nothing_but_a_userfaultfd_is_taken_or_closed(target: Victim) -> None:
    for fd in (1, 99):
        with pytest.raises(attach.AttachGoneError, match=f"descriptor {fd}"):
            attach.close_in_target(target.pid, fd)
        with pytest.raises(attach.AttachGoneError, match=f"descriptor {fd}"):
            attach.adopt(target.pid, fd)
    assert Path(f"/proc/{target.pid}/fd/1").exists()


def test_a_stopped_process_is_refused_with_its_remedy(target: Victim) -> None:
    target.stop()
    with pytest.raises(attach.AttachRefusedError, match="stopped by a signal") as caught:
        attach.obtain(target.pid)
    assert caught.value.remedy
    assert f"kill -CONT {target.pid}" in caught.value.remedy
    target.process.send_signal(signal.SIGCONT)
    assert attach.find_userfaultfds(target.pid) == ()


def test_a_recycled_pid_is_not_touched(target: Victim) -> None:
    process = Process.of(target.pid)
    assert process
    with pytest.raises(attach.AttachGoneError, match="has ended"):
        attach.obtain(target.pid, start_ticks=process.start_ticks - 1)
    assert attach.find_userfaultfds(target.pid) == ()


def test_a_process_that_has_ended() -> None:
    with victim("exit", 0) as target:
        target.process.wait()
        with pytest.raises(attach.AttachGoneError, match="has ended"):
            attach.obtain(target.pid)


def test_the_address_space_of_a_process_that_has_ended() -> None:
    """What the kernel says when a range is to be given back to nobody."""
    with victim("ppoll") as target:
        obtained = attach.obtain(target.pid)
        try:
            uffd_api(obtained.uffd)
            target.process.kill()
            target.process.wait()
            with pytest.raises(CoreSystemError) as caught:
                uffd_unregister(obtained.uffd, 0x10000, 0x1000)
            assert caught.value.error_number == errno.ENOMEM
        finally:
            os.close(obtained.uffd)


def test_a_late_helper_lives_on_and_leaves_nothing(
    target: Victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """We gave up before it was ready; what it then created, it closed again."""
    monkeypatch.setattr(attach, "HELPER_START_SECONDS", 0.001)
    with pytest.raises(attach.AttachTimeoutError, match="is late") as caught:
        attach.obtain(target.pid, 0.001)
    assert caught.value.remedy
    until_no_helper(target.pid)
    assert attach.find_userfaultfds(target.pid) == ()


def test_what_is_undone_has_time_of_its_own(
    target: Victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever gave it a millisecond does not wait any more; the descriptor must go all the same."""
    process = Process.of(target.pid)
    assert process is not None
    deadlines_ms = []

    def inject(pid: int, number: int, args: tuple[int, ...], ms: int, *, start_ticks: int) -> int:
        deadlines_ms.append(ms)
        return inject_syscall(pid, number, args, 5000, start_ticks=start_ticks)

    monkeypatch.setattr(inject_helper, "inject_syscall", inject)
    ours, its = socket.socketpair()
    ours.close()
    helper_target = inject_helper.Target(process, 1)
    with its, contextlib.closing(helper_target), pytest.raises(OSError):
        inject_helper.answer(its, helper_target, "obtain", -1)
    gc.collect()
    assert deadlines_ms == [1, inject_helper.UNDO_MS]
    assert attach.find_userfaultfds(target.pid) == ()


def test_a_helper_that_cannot_start(target: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/true")
    with pytest.raises(attach.HelperLostError, match="without a word"):
        attach.obtain(target.pid)


# --- a real QEMU --------------------------------------------------------------------------


async def blocks_of(vm: Vm) -> tuple[BlockFacts, ...]:
    monitor = await Monitor.connect(vm.qmp_path)
    try:
        return await discover_blocks(monitor.execute, vm.pid)
    finally:
        await monitor.close()


@pytest.mark.vm
def test_registration_outlives_us_in_qemu(tmp_path: Path) -> None:
    """The net under a guest: our death leaves the ranges registered, QEMU's own fd holds them."""
    spec = VmSpec((Backend("ram0", 64 * MIB), Backend("ram1", 32 * MIB)), incoming=True)
    with Vm("qemu", spec, tmp_path) as vm:
        obtained = attach.obtain(vm.pid)
        uffd_api(obtained.uffd)
        mappings = [one for block in asyncio.run(blocks_of(vm)) for one in block.mappings]
        for mapping in mappings:
            uffd_register_missing(obtained.uffd, mapping.hva, mapping.length_bytes)
        os.close(obtained.uffd)

        def registered() -> list[bool]:
            blocks = asyncio.run(blocks_of(vm))
            return [one.uffd_registered for block in blocks for one in block.mappings]

        assert registered() == [True] * len(mappings)
        os.close(attach.adopt(vm.pid, obtained.fd_in_target))
        attach.close_in_target(vm.pid, obtained.fd_in_target)
        assert registered() == [False] * len(mappings)
        assert vm.alive


@pytest.mark.vm
def test_every_thread_of_qemu_sandboxed(tmp_path: Path) -> None:
    """-sandbox on is how distributions run it."""
    sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    spec = VmSpec((Backend("ram0", 64 * MIB),), paused=True, more=("-sandbox", sandbox))
    with Vm("qemu", spec, tmp_path) as vm:
        obtained = attach.obtain(vm.pid)
        os.close(obtained.uffd)
        attach.close_in_target(vm.pid, obtained.fd_in_target)
        assert vm.alive
        assert attach.find_userfaultfds(vm.pid) == ()
