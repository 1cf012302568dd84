"""What an operator is told to do when QEMU cannot be injected into."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from qpostcopy.core import (
    CoreError,
    CoreSystemError,
    LaneTimeoutError,
    RefusedByCoreError,
    TargetGoneError,
)
from qpostcopy.uffd.attach import (
    AttachError,
    AttachGoneError,
    AttachRefusedError,
    AttachTimeoutError,
)
from qpostcopy.uffd.inject_helper import explain
from tests.uffd.victims import victim

US = os.getpid()


@pytest.mark.parametrize(
    ("error", "leaf", "remedy"),
    [
        (TargetGoneError("wait", 0, 0, 0), AttachGoneError, None),
        (LaneTimeoutError("wait", 0, 0, 0), AttachTimeoutError, "storage"),
        (CoreSystemError("step", errno.EIO, 0, 0), AttachError, None),
        (RefusedByCoreError("no", errno.EPERM, US, 0), AttachRefusedError, f"pid {US}"),
        (RefusedByCoreError("no", errno.EPERM, 0, 0), AttachRefusedError, "CAP_SYS_PTRACE"),
        (RefusedByCoreError("no", errno.EACCES, 0, 0), AttachRefusedError, "CAP_SYS_ADMIN"),
        (RefusedByCoreError("no", 0, 0, 0), AttachRefusedError, "64-bit x86"),
        (RefusedByCoreError("no", errno.ENOSYS, 0, 0), AttachRefusedError, "64-bit x86"),
    ],
)
def test_the_remedy_follows_from_codes_and_numbers(
    error: CoreError, leaf: type[AttachError], remedy: str | None
) -> None:
    explained = explain(error, US)
    assert type(explained) is leaf
    assert error.operation in str(explained)
    assert remedy in str(explained.remedy) if remedy else explained.remedy is None


def test_a_process_that_is_stopped_can_go_on() -> None:
    with victim("spin") as target:
        target.stop()
        explained = explain(RefusedByCoreError("no", 0, 0, 0), target.pid)
        assert f"kill -CONT {target.pid}" in str(explained.remedy)
        target.process.send_signal(signal.SIGCONT)
        assert target.end().startswith("ok ")
