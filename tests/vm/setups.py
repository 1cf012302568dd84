"""The set-ups that operators have, a row each; tests/vm/test_setups.py plays every one.

A row says how both QEMUs are started. What differs from the first row (QEMU 7.2
of Debian 12, root, TCG, RAM in memfds, no devices) is what the row is about.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from qpostcopy.lab.guest import find_bare_image, find_image
from qpostcopy.lab.vm import Backend, Boot, VmSpec
from tests.vm.debian import qemu_of

MIB = 1 << 20


def memfds(sizes: tuple[int, ...]) -> tuple[Backend, ...]:
    """A backend of each size, in a memfd: mem-path=/proc/self/fd/N."""
    return tuple(Backend(f"ram{n}", size, mem_path=None) for n, size in enumerate(sizes))


def linux() -> Boot:
    """Debian's cloud kernel and our workload, at a rate that any machine holds."""
    return Boot(*find_image(), words=("workload=service", "rate=500"))


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
)
