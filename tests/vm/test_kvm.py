"""KVM reaches guest memory from kernel mode: such faults are served too.

A userfaultfd that serves only faults of user mode (`UFFD_USER_MODE_ONLY`), or
one without the right to the others, would move a guest under TCG and break one
under KVM. That KVM's faults came as we think is looked up in the kernel, while
the handler is held up and a vCPU waits.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from qpostcopy.lab.vm import Vm
from qpostcopy.process import Process
from qpostcopy.state import StateDirectory
from tests.qmp.support import private_directory
from tests.vm.scene import finish_after, read_until_phase, wait_until
from tests.vm.series import Series
from tests.vm.setups import ROWS

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.slow]

KVM = next(row for row in ROWS if row.name == "kvm")
#: ioctl(2) on x86-64, and KVM_RUN: _IO(KVMIO, 0x80) of linux/kvm.h.
_IOCTL, _KVM_RUN = 16, 0xAE80
#: Where it waits for a page: there, or (asynchronous page faults) for a worker that does.
_WAITS = {"handle_userfault", "kvm_vcpu_block"}


@pytest.fixture
def series() -> Iterator[Series]:
    with private_directory() as directory, Series(directory, KVM) as made:
        yield made


def vcpu_thread(vm: Vm) -> Path:
    (vcpu,) = vm.observer.execute("query-cpus-fast")
    return Path(f"/proc/{vm.pid}/task/{vcpu['thread-id']}")


def waits_in_kvm_run(thread: Path) -> bool:
    """Whether it sleeps in the ioctl KVM_RUN, for a page. (The bare guest never halts.)"""
    call = (thread / "syscall").read_text().split()
    if len(call) < 3 or (int(call[0]), int(call[2], 16)) != (_IOCTL, _KVM_RUN):
        return False
    return (thread / "wchan").read_text() in _WAITS


def companion_of(series: Series) -> Process:
    latest = max(series.run_directory.iterdir())
    companion = StateDirectory.open(latest).state.destination.companion
    assert companion is not None
    return companion


def test_faults_of_kernel_mode_are_served(series: Series) -> None:
    there = series.next_destination()
    thread = vcpu_thread(there)
    viewer = series.start(there, profile="sequential", push="8MiB/s")
    read = read_until_phase(viewer, "postcopy")
    handler = companion_of(series)
    os.kill(handler.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: waits_in_kvm_run(thread), "the vCPU waits for a page, in KVM_RUN")
    finally:
        with suppress(ProcessLookupError):
            os.kill(handler.pid, signal.SIGCONT)
    ended = finish_after(viewer, read)
    series.arrive(there, ended)
    assert ended.result["faults"]["count"] > 0
    series.verify()
    series.guest.power_off()
    assert there.wait(20) == 0
