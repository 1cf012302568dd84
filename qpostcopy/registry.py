"""Which migrations of this host a VM is part of: no VM may be in two.

Guarantee: between two controllers that begin at once, under `registry_lock`,
one sees the other. Nothing is kept for it: the state directories tell.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path

from qpostcopy.process import Process
from qpostcopy.state import StateDirectory, run_directory


@contextmanager
def registry_lock() -> Iterator[None]:
    """Serialize "is this VM already being migrated" between controllers."""
    fd = os.open(run_directory() / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def other_migration_of(directory: StateDirectory) -> StateDirectory | None:
    """An unfinished migration, other than this one, that one of our QEMUs is part of."""
    ours = {directory.state.source.qemu, directory.state.destination.qemu}
    return migration_of(ours, besides=directory)


def migration_of(
    qemus: Set[Process | None], besides: StateDirectory | None = None
) -> StateDirectory | None:
    """An unfinished migration that one of these QEMUs is part of."""
    for other in StateDirectory.all():
        theirs = {other.state.source.qemu, other.state.destination.qemu} - {None}
        is_ours = besides is not None and other.path == besides.path
        if qemus & theirs and not is_ours and not other.finished:
            return other
    return None


def migration_at(
    *sockets: str | Path, before: StateDirectory | None = None
) -> StateDirectory | None:
    """An unfinished migration that has the QEMU behind one of these monitors.

    For what comes before a monitor can be had: that migration holds it.

    :param before: only those that began earlier than this one, so that of two that begin at
        once not both give way.
    """
    wanted = {os.path.realpath(socket) for socket in sockets}
    for other in StateDirectory.all():
        if before is not None and not other.is_older_than(before):
            return None
        for side in (other.state.source, other.state.destination):
            there = side.qemu.alive() if side.qemu else other.controller_alive()
            if os.path.realpath(side.qmp) in wanted and there and not other.finished:
                return other
    return None
