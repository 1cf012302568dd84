"""The set-ups that operators have, a row each; tests/vm/test_setups.py plays every one.

A row says how both QEMUs are started. What differs from the first row (QEMU 7.2
of Debian 12, root, TCG, RAM in memfds, no devices) is what the row is about.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest

from qpostcopy.lab.guest import find_bare_image, find_image
from qpostcopy.lab.vm import Backend, Boot, VmSpec
from tests.vm.debian import qemu_of
from tests.vm.devices import Devices, Disk

MIB = 1 << 20


def memfds(sizes: tuple[int, ...]) -> tuple[Backend, ...]:
    """A backend of each size, in a memfd: mem-path=/proc/self/fd/N."""
    return tuple(Backend(f"ram{n}", size, mem_path=None) for n, size in enumerate(sizes))


def directories(sizes: tuple[int, ...]) -> tuple[Backend, ...]:
    """mem-path=/dev/shm: QEMU makes a file there and unlinks it."""
    return tuple(Backend(f"ram{n}", size) for n, size in enumerate(sizes))


def files(sizes: tuple[int, ...]) -> tuple[Backend, ...]:
    """mem-path=/dev/shm/FILE, another one on each side."""
    return tuple(Backend(f"ram{n}", size, own_file=True) for n, size in enumerate(sizes))


def file_and_directory(sizes: tuple[int, ...]) -> tuple[Backend, ...]:
    """Of each in turn."""
    return tuple((files, directories)[n % 2](sizes)[n] for n in range(len(sizes)))


def every_kind(sizes: tuple[int, ...]) -> tuple[Backend, ...]:
    """Of each in turn."""
    kinds = (memfds, directories, files)
    return tuple(kinds[n % len(kinds)](sizes)[n] for n in range(len(sizes)))


def linux(*words: str) -> Boot:
    """Debian's cloud kernel and our workload, at a rate that any machine holds."""
    return Boot(*find_image(), words=("workload=service", "rate=500", *words))


def bare() -> Boot:
    """The guest without an operating system: a KVM that cannot run Linux runs it."""
    return Boot(find_bare_image())


def require_kvm() -> None:
    """Skip the test where KVM cannot be used."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no KVM: /dev/kvm cannot be opened")


@dataclass(frozen=True, slots=True)
class Setup:
    """One row.

    :ivar name: of the row, and of its tests.
    :ivar vm: how both sides are started; its `backends` are not looked at.
    :ivar there: fields of `vm` that are others at the destination.
    :ivar suite: the Debian suite whose QEMU runs at the source; "": the one that is installed.
    :ivar suite_there: the same for the destination.
    :ivar backends: makes the memory backends of these sizes.
    :ivar boot: makes what the guest boots; called when it is needed.
    :ivar sizes: of the RAM blocks where no guest runs, bytes.
    :ivar guest_sizes: of the RAM blocks of the guest, bytes.
    :ivar devices: that the guest works on while it moves (devices.py).
    :ivar hole_factor: of how much of RAM nothing is written where no guest runs (bytes_case.py).
    """

    name: str
    vm: VmSpec = field(default_factory=lambda: VmSpec(()))
    there: dict[str, Any] = field(default_factory=dict)
    suite: str = ""
    suite_there: str = ""
    backends: Callable[[tuple[int, ...]], tuple[Backend, ...]] = memfds
    boot: Callable[[], Boot] = linux
    sizes: tuple[int, ...] = (34 * MIB,)
    guest_sizes: tuple[int, ...] = (160 * MIB,)
    devices: Devices | None = None
    hole_factor: int = 1

    def with_more(self, arguments: tuple[str, ...]) -> Setup:
        """The same with more of QEMU's arguments on both sides."""
        return replace(self, vm=replace(self.vm, more=(*self.vm.more, *arguments)))

    def source(self, sizes: tuple[int, ...], **more: Any) -> VmSpec:
        """The source, its RAM of these sizes. :param more: fields of VmSpec."""
        return self._side(self.suite, sizes, more)

    def destination(self, sizes: tuple[int, ...], **more: Any) -> VmSpec:
        """The destination, waiting."""
        return replace(self._side(self.suite_there, sizes, more), incoming=True, **self.there)

    def _side(self, suite: str, sizes: tuple[int, ...], more: dict[str, Any]) -> VmSpec:
        if self.vm.accelerator == "kvm":
            require_kvm()
        qemu = qemu_of(suite) if suite else self.vm.qemu
        return replace(self.vm, qemu=qemu, backends=self.backends(sizes), **more)


#: As distributions and libvirt confine it.
SANDBOX = (
    "-sandbox",
    "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
)
#: Users without any right or group, to whom nothing of ours belongs; 65534 is `nobody`.
NOBODY, NOBODY_ELSE = 65534, 65533


def with_disks(name: str, *disks: Disk) -> Setup:
    """A row whose guest works on these disks and on a device of each other kind."""
    boot = partial(linux, "drivers=on", "devices=on")
    return Setup(name, boot=boot, devices=Devices(disks))


#: What everything else is compared with.
PLAIN = Setup("plain")
#: EPERM: it is lent /dev/userfaultfd. Our state directory is closed to both, and theirs to each
#: other.
UNPRIVILEGED = Setup(
    "unprivileged-sandbox",
    VmSpec((), more=SANDBOX, user=NOBODY),
    there={"user": NOBODY_ELSE},
)
KVM = Setup("kvm", VmSpec((), accelerator="kvm"), boot=bare, guest_sizes=(16 * MIB,))

ROWS: tuple[Setup, ...] = (
    PLAIN,
    # Root may create a userfaultfd; the filter is suspended for the call.
    Setup("sandbox-root", VmSpec((), more=SANDBOX)),
    UNPRIVILEGED,
    Setup("two-nodes", sizes=(18 * MIB, 22 * MIB), guest_sizes=(96 * MIB, 64 * MIB)),
    Setup("bare", boot=bare, guest_sizes=(16 * MIB,)),
    KVM,
    Setup("qemu-10.0", suite="trixie", suite_there="trixie"),
    Setup("qemu-5.2", suite="bullseye", suite_there="bullseye"),
    Setup("qemu-7.2-to-10.0", VmSpec((), machine="pc-q35-7.2"), suite_there="trixie"),
    Setup("qemu-5.2-to-7.2", VmSpec((), machine="pc-q35-5.2"), suite="bullseye"),
    Setup(
        "qemu-5.2-to-10.0",
        VmSpec((), machine="pc-q35-5.2"),
        suite="bullseye",
        suite_there="trixie",
    ),
    replace(UNPRIVILEGED, name="unprivileged-5.2", suite="bullseye", suite_there="bullseye"),
    replace(UNPRIVILEGED, name="unprivileged-10.0", suite="trixie", suite_there="trixie"),
    replace(KVM, name="kvm-5.2", suite="bullseye", suite_there="bullseye"),
    replace(KVM, name="kvm-10.0", suite="trixie", suite_there="trixie"),
    Setup("tmpfs-directory", backends=directories),
    Setup("tmpfs-file", backends=files),
    Setup(
        "memfd-directory-file",
        backends=every_kind,
        sizes=(18 * MIB, 10 * MIB, 6 * MIB),
        guest_sizes=(64 * MIB, 64 * MIB, 32 * MIB),
    ),
    # From 8.1 on, QEMU itself looks whether RAM is a named file.
    Setup(
        "file-directory-10.0",
        suite="trixie",
        suite_there="trixie",
        backends=file_and_directory,
        sizes=(18 * MIB, 22 * MIB),
        guest_sizes=(96 * MIB, 64 * MIB),
    ),
    # q35 puts what is beyond 96 MiB above 4 GiB: the guest is small, and has RAM on both sides.
    Setup(
        "pci-hole",
        vm=VmSpec((), more=("-machine", "max-ram-below-4g=96M")),
        # Else Linux sets 64 MiB aside for devices that cannot reach above 4 GiB.
        boot=partial(linux, "swiotlb=noforce"),
        sizes=(128 * MIB,),
        hole_factor=20,
    ),
    # By itself it does so from 2.75 GiB on; 2 GiB are below.
    Setup(
        "3328-mib",
        boot=partial(linux, "fill=96"),
        sizes=(3328 * MIB,),
        guest_sizes=(3328 * MIB,),
        hole_factor=500,
    ),
    with_disks("devices-buffered", Disk(), Disk(iothread=True)),
    with_disks(
        "devices-direct",
        Disk("none"),
        Disk("none", iothread=True),
        Disk("none", "native"),
        Disk("none", "native", iothread=True),
    ),
    with_disks("devices-io-uring", Disk("none", "io_uring"), Disk("none", "io_uring", True)),
)
