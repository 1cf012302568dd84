"""QEMU's migration capabilities: each one that any of the QEMUs has was decided about."""

from __future__ import annotations

import pytest

from qpostcopy.lab.vm import Vm
from qpostcopy.prepare import _OFF, _ON
from tests.qmp.support import private_directory
from tests.vm.setups import Setup

pytestmark = [pytest.mark.vm, pytest.mark.slow]

#: Neither helps nor harms: block dirty bitmaps and the check of the VM's UUID are the operator's.
LEFT_AS_THEY_ARE = {"dirty-bitmaps", "validate-uuid"}


@pytest.mark.parametrize("suite", ["", "bullseye", "trixie"])
def test_each_is_switched_or_left_on_purpose(suite: str) -> None:
    spec = Setup("any", suite=suite).source((32 << 20,), paused=True)
    with private_directory() as directory, Vm("vm", spec, directory) as vm:
        listed = vm.observer.execute("query-migrate-capabilities")
    there = {item["capability"] for item in listed}
    switched = _ON["source"] | _ON["destination"]
    assert switched <= there
    assert there - switched - _OFF == LEFT_AS_THEY_ARE
