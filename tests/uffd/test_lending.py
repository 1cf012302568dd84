"""QEMU without the right to create a userfaultfd: it is lent one, and nothing of it stays."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from qpostcopy.core import uffd_api
from qpostcopy.errors import QpostcopyError
from qpostcopy.lab.vm import Vm, VmSpec
from qpostcopy.lanes import in_thread
from qpostcopy.process import Process
from qpostcopy.qmp import schema
from qpostcopy.qmp.connection import ConnectionLostError
from qpostcopy.qmp.holder import MonitorHolder
from qpostcopy.uffd import attach, lending
from qpostcopy.uffd import registration as ram
from qpostcopy.uffd.lending import Lender
from tests.companions import CompanionProcess, memfd_backends
from tests.qmp.support import private_directory, run
from tests.uffd.victims import Victim, user_command, victim
from tests.vm.setups import NOBODY, SANDBOX

pytestmark = pytest.mark.root

MIB = 1 << 20


@pytest.fixture
def device() -> Iterator[int]:
    """/dev/userfaultfd, open."""
    fd = os.open(attach.DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def target(device: int) -> Iterator[Victim]:
    """Stands in for an unprivileged QEMU that was lent the device."""
    with victim("ppoll", under=user_command(), pass_fds=[device]) as one:
        yield one
        assert one.end().startswith("ok ")


# --- what QEMU is made to do --------------------------------------------------------------


def test_without_a_loan_it_is_not_permitted(target: Victim) -> None:
    with pytest.raises(attach.AttachNotPermittedError, match="Operation not permitted") as caught:
        attach.obtain(target.pid)
    assert "unprivileged_userfaultfd" in str(caught.value.remedy)
    assert attach.find_userfaultfds(target.pid) == ()


def test_obtain_through_the_device_then_close(target: Victim, device: int) -> None:
    assert attach.find_devices(target.pid) == (device,)
    obtained = attach.obtain(target.pid, lent_fd=device)
    try:
        uffd_api(obtained.uffd)
        assert attach.find_userfaultfds(target.pid) == (obtained.fd_in_target,)
        attach.close_in_target(target.pid, obtained.fd_in_target)
        assert attach.find_userfaultfds(target.pid) == ()
        assert attach.find_devices(target.pid) == (device,)
    finally:
        os.close(obtained.uffd)


@pytest.mark.parametrize(("fd", "said"), [(1, "is not /dev/userfaultfd"), (99, "No such file")])
def test_nothing_but_the_device_is_asked(target: Victim, fd: int, said: str) -> None:
    with pytest.raises(attach.AttachGoneError, match=said):
        attach.obtain(target.pid, lent_fd=fd)
    assert attach.find_userfaultfds(target.pid) == ()


def test_a_limit_of_open_files_is_named() -> None:
    with victim("ppoll") as target:
        resource.prlimit(target.pid, resource.RLIMIT_NOFILE, (3, 3))
        with pytest.raises(attach.AttachRefusedError, match=os.strerror(errno.EMFILE)) as caught:
            attach.obtain(target.pid)
        assert "prlimit" in str(caught.value.remedy)
        assert target.end().startswith("ok ")


# --- the loan on record -------------------------------------------------------------------


class FakeLender:
    """Lends what the target inherited; fails where a test wants it to, as a lost monitor would."""

    def __init__(self, device: int, *, lends: bool = True, takes_back: bool = True) -> None:
        self.device = device
        self.lends = lends
        self.takes_back = takes_back
        self.out = False

    def lend(self) -> int:
        self.out = True
        if not self.lends:
            raise ConnectionLostError("the monitor is lost")
        return self.device

    def take_back(self) -> None:
        if not self.takes_back:
            raise ConnectionLostError("the monitor is lost")
        self.out = False


def test_a_loan_ends_with_the_taking(target: Victim, device: int, tmp_path: Path) -> None:
    lender = FakeLender(device)
    taken = ram.take(target.pid, (), tmp_path, (), lender)
    assert not lender.out
    record = ram.read_record(tmp_path)
    assert record is not None
    assert (record.uffd_fd, record.lent) == (taken.uffd_fd, False)
    ram.give_back(taken, tmp_path)
    assert attach.find_userfaultfds(target.pid) == ()
    assert list(tmp_path.iterdir()) == []


def test_a_loan_that_failed_is_taken_back(target: Victim, device: int, tmp_path: Path) -> None:
    lender = FakeLender(device, lends=False)
    with pytest.raises(ConnectionLostError):
        ram.take(target.pid, (), tmp_path, (), lender)
    assert not lender.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lends", [True, False])
def test_what_cannot_be_taken_back_stays_on_record(
    target: Victim, device: int, tmp_path: Path, lends: bool
) -> None:
    """The monitor was lost: before QEMU was asked for a userfaultfd, or after."""
    lender = FakeLender(device, lends=lends, takes_back=False)
    ours = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):  # the second finds what the first left, and cannot end it either
        with pytest.raises(ram.LeftInQemuError, match="/dev/userfaultfd may stay"):
            ram.take(target.pid, (), tmp_path, (), lender)
        record = ram.read_record(tmp_path)
        assert record is not None
        assert record.lent
        assert attach.find_userfaultfds(target.pid) == ()
    assert len(list(Path("/proc/self/fd").iterdir())) == ours
    lender.takes_back = True
    ram.close_leftovers(target.pid, tmp_path, lender)
    assert not lender.out
    assert list(tmp_path.iterdir()) == []


def test_a_crash_after_the_call_leaves_an_orphan_and_a_loan(
    target: Victim, device: int, tmp_path: Path
) -> None:
    process = Process.of(target.pid)
    assert process
    record = ram.Record(process=process, userfaults_before=(), uffd_fd=None, lent=True, blocks=())
    ram._write_record(tmp_path, record)
    lender = FakeLender(device)
    os.close(attach.obtain(target.pid, lent_fd=lender.lend()).uffd)
    ram.close_leftovers(target.pid, tmp_path, lender)
    assert attach.find_userfaultfds(target.pid) == ()
    assert not lender.out
    assert list(tmp_path.iterdir()) == []


def test_what_a_late_helper_may_still_ask_is_left_to_it(
    target: Victim, device: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = attach.obtain

    def late(*args: object, **options: object) -> attach.Obtained:
        if options.get("lent_fd") is not None:
            raise attach.AttachTimeoutError("late")
        return real(target.pid)

    monkeypatch.setattr(attach, "obtain", late)
    lender = FakeLender(device)
    with pytest.raises(attach.AttachTimeoutError):
        ram.take(target.pid, (), tmp_path, (), lender)
    assert lender.out
    record = ram.read_record(tmp_path)
    assert record is not None
    assert record.lent


# --- a real QEMU --------------------------------------------------------------------------


@contextlib.contextmanager
def confined_qemu() -> Iterator[tuple[Vm, Path]]:
    """A destination without rights, and an empty state directory."""
    spec = VmSpec(memfd_backends(16 * MIB), incoming=True, more=SANDBOX, user=NOBODY)
    with (
        private_directory() as directory,
        tempfile.TemporaryDirectory() as state,
        Vm("vm", spec, directory) as vm,
    ):
        yield vm, Path(state)


@contextlib.asynccontextmanager
async def holding(vm: Vm) -> AsyncIterator[MonitorHolder]:
    """Its monitor, held."""
    holder = MonitorHolder(vm.qmp_path, on_event=lambda _: None, on_lost=lambda _: None)
    holder.start()
    try:
        await holder.first_answer()
        yield holder
    finally:
        await holder.close()


def assert_nothing_lent(vm: Vm) -> None:
    assert attach.find_devices(vm.pid) == ()
    assert attach.find_userfaultfds(vm.pid) == ()
    assert vm.observer.execute("query-fdsets") == []
    assert vm.alive


@pytest.mark.vm
def test_lent_and_taken_back() -> None:
    """And again, over a loan that somebody before us has left."""

    async def body() -> None:
        with confined_qemu() as (vm, _):
            async with holding(vm) as holder:
                lender = Lender(holder, vm.pid)
                first = await in_thread(lender.lend)
                assert attach.find_devices(vm.pid) == (first,)
                second = await in_thread(lender.lend)
                assert attach.find_devices(vm.pid) == (second,)
                obtained = await in_thread(attach.obtain, vm.pid, lent_fd=second)
                os.close(obtained.uffd)
                await in_thread(lender.take_back)
                await in_thread(lender.take_back)
                await in_thread(attach.close_in_target, vm.pid, obtained.fd_in_target)
                assert_nothing_lent(vm)

    run(body)


@pytest.mark.vm
def test_a_monitor_that_is_lost_meanwhile_comes_back() -> None:
    async def body() -> None:
        with confined_qemu() as (vm, _):
            async with holding(vm) as holder:
                lender = Lender(holder, vm.pid)
                await in_thread(lender.lend)
                monitor = await holder.first_answer()
                await monitor.close()
                assert len(attach.find_devices(vm.pid)) == 1
                await in_thread(lender.take_back)
                assert_nothing_lent(vm)

    run(body)


@pytest.mark.vm
def test_a_monitor_that_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qpostcopy.qmp.holder.TAKE_BACK_SECONDS", 0.2)

    async def body() -> None:
        with confined_qemu() as (vm, _):
            async with holding(vm) as holder:
                lender = Lender(holder, vm.pid)
                await in_thread(lender.lend)
                await holder.close()
                with pytest.raises(ConnectionLostError, match="closefd was not sent"):
                    await in_thread(lender.take_back)

    run(body)


@pytest.mark.vm
def test_a_handler_that_was_killed_in_mid_loan() -> None:
    """The descriptor was sent, its name was not: QEMU closes it with the connection."""

    async def body() -> None:
        with confined_qemu() as (vm, _):
            device = os.open(attach.DEVICE, os.O_RDWR | os.O_CLOEXEC)
            async with holding(vm) as holder:
                monitor = await holder.first_answer()
                monitor.send_fd(device)
                os.close(device)
                await monitor.execute("query-name")  # QEMU has read what came before
                assert len(attach.find_devices(vm.pid)) == 1
            async with holding(vm):  # QEMU greets once it is rid of the last client
                assert_nothing_lent(vm)

    run(body)


@pytest.mark.vm
@pytest.mark.parametrize("asked", [False, True])
def test_a_handler_that_was_killed_meanwhile(asked: bool) -> None:
    """Before QEMU was asked for a userfaultfd, or after: the next handler ends both."""

    async def body() -> None:
        with confined_qemu() as (vm, state_dir):
            process = Process.of(vm.pid)
            assert process
            async with holding(vm) as holder:
                record = ram.Record(
                    process=process, userfaults_before=(), uffd_fd=None, lent=True, blocks=()
                )
                ram._write_record(state_dir, record)
                lent = await in_thread(Lender(holder, vm.pid).lend)
                if asked:
                    os.close((await in_thread(attach.obtain, vm.pid, lent_fd=lent)).uffd)
            assert attach.find_devices(vm.pid) == (lent,)
            handler = CompanionProcess("handler", vm, state_dir)
            try:
                client = await handler.start()
                await client.call("qpc-detach", schema.Detach(), schema.Empty)
                assert_nothing_lent(vm)
                await handler.quit()
            finally:
                handler.end()
            assert not (state_dir / ram.RECORD).exists()

    run(body)


@pytest.mark.vm
def test_no_device_to_lend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lending, "DEVICE", tmp_path / "userfaultfd")

    async def body() -> None:
        with confined_qemu() as (vm, state_dir):
            async with holding(vm) as holder:
                lender = Lender(holder, vm.pid)
                with pytest.raises(attach.AttachRefusedError, match="cannot lend it") as caught:
                    await in_thread(ram.take, vm.pid, (), state_dir, (), lender)
                assert "Linux 6.1" in str(caught.value.remedy)
                assert list(state_dir.iterdir()) == []
                assert_nothing_lent(vm)

    run(body)


def test_a_loop_that_is_ending() -> None:
    """Its thread gets an error, not a wait for ever."""

    async def body() -> None:
        holder = MonitorHolder(Path("/none"), on_event=lambda _: None, on_lost=lambda _: None)
        lender = Lender(holder, 1)
        began = asyncio.Event()

        async def never(name: str) -> None:
            began.set()
            await asyncio.Event().wait()

        holder.take_back = never  # type: ignore[method-assign]
        thread = asyncio.create_task(asyncio.to_thread(lender.take_back))
        await began.wait()
        ours = asyncio.current_task()
        for task in asyncio.all_tasks() - {ours, thread}:
            task.cancel()
        with pytest.raises(QpostcopyError, match="is ending"):
            await thread

    run(body)


def test_a_loan_that_is_late_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The descriptor is ours until nobody can send it any more: its number is no other's."""
    monkeypatch.setattr(lending, "_WAIT_SECONDS", 0.05)

    async def body() -> None:
        holder = MonitorHolder(Path("/none"), on_event=lambda _: None, on_lost=lambda _: None)
        lender = Lender(holder, os.getpid())
        open_at_the_end = asyncio.Queue[bool]()

        async def late(fd: int, name: str) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                open_at_the_end.put_nowait(attach.is_device(Path(f"/proc/self/fd/{fd}")))

        holder.lend = late  # type: ignore[method-assign]
        with pytest.raises(QpostcopyError):
            await asyncio.to_thread(lender.lend)
        async with asyncio.timeout(5):
            assert await open_at_the_end.get()
        assert attach.find_devices(os.getpid()) == ()

    run(body)
