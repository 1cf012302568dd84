"""The drivers that the guest loads: the devices that QEMU gives it work."""

from __future__ import annotations

import pytest

from qpostcopy.lab.guest import Guest, find_image
from qpostcopy.lab.vm import Backend, Boot, Vm, VmSpec
from tests.qmp.support import private_directory
from tests.vm.scene import wait_until

pytestmark = pytest.mark.vm

MIB = 1 << 20
#: The workload leaves the kernel a little; of that the balloon takes some.
TARGET_BYTES = 156 * MIB


def test_the_balloon_inflates() -> None:
    boot = Boot(*find_image(), words=("workload=idle", "drivers=on"))
    spec = VmSpec((Backend("ram", 160 * MIB),), boot=boot, more=("-device", "virtio-balloon-pci"))
    with (
        private_directory() as directory,
        Vm("vm", spec, directory) as vm,
        Guest(vm.serial) as guest,
    ):
        guest.wait_ready(60)
        vm.observer.execute("balloon", {"value": TARGET_BYTES})
        wait_until(
            lambda: vm.observer.execute("query-balloon")["actual"] == TARGET_BYTES, "it inflates"
        )
