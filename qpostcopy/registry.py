"""Which migrations of this host a VM is part of: no VM may be in two.

Guarantee: of two controllers that begin at once with a QEMU in common, one has
it and the other sees that. Nothing is kept for it: the state directories tell.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qpostcopy.process import Process
from qpostcopy.state import StateDirectory, run_directory

if TYPE_CHECKING:
    from qpostcopy.side import Role


def claim(directory: StateDirectory, qemus: Mapping[Role, Process]) -> StateDirectory | None:
    """Have these QEMUs, unless an unfinished migration has one: then that.

    That a migration knows its QEMUs is no claim: else two would see each other and both give way.
    """
    with _registry_lock():
        other = migration_of(set(qemus.values()), besides=directory, claimed_only=True)
        if other is None:
            for role, qemu in qemus.items():
                directory.update_side(role, qemu=qemu)
            directory.update(claimed=True)
    return other


@contextmanager
def _registry_lock() -> Iterator[None]:
    """One controller at a time looks and writes."""
    fd = os.open(run_directory() / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def migration_of(
    qemus: Set[Process], besides: StateDirectory | None = None, *, claimed_only: bool = False
) -> StateDirectory | None:
    """An unfinished migration that one of these QEMUs is part of.

    :param claimed_only: not one that has yet to look whether another is there.
    """
    for other in StateDirectory.all():
        if claimed_only and not other.state.claimed:
            continue
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
