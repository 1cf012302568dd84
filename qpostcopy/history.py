"""What earlier migrations of this host tell about a VM that a migration did not touch.

A plan says where its VM should be; after an earlier migration it is no longer
there, and after two not even where the first one took it. Guarantees: `source` is
never said of a VM that is known to have left it, nor `destination` of one that is
known to have left that.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from qpostcopy.process import Process
from qpostcopy.report import Location
from qpostcopy.state import SideState, StateDirectory

#: Run states of a QEMU whose VM is not there: it was given away, or has yet to come.
_WITHOUT_VM = frozenset({"postmigrate", "inmigrate"})


def moved_before(
    source_qmp: str,
    destination_qmp: str,
    source_qemu: Process | None,
    source_status: str | None = None,
) -> Location:
    """Where the VM is: at its source, unless a committed migration took it from there.

    :param source_qemu: who listens at `source_qmp` now, if that is known: one that was
        started since is a source like any other.
    :param source_status: its run state, if that is known; what this host does not remember
        may show in it.
    """
    place = _remembered(source_qmp, destination_qmp, source_qemu)
    return "unknown" if place == "source" and source_status in _WITHOUT_VM else place


def _remembered(source_qmp: str, destination_qmp: str, source_qemu: Process | None) -> Location:

    def is_source(side: SideState) -> bool:
        return _is_at(side, source_qmp) if source_qemu is None else side.qemu == source_qemu

    committed = [other.state for other in StateDirectory.all() if other.committed]
    for index, state in reversed(list(enumerate(committed))):
        if not is_source(state.source) and not is_source(state.destination):
            continue
        later = ((other.source, other.destination) for other in committed[index + 1 :])
        there = _moved_on(state.destination, later)
        if is_source(there):
            return "source"  # it was brought here
        alive = there.qemu is not None and there.qemu.alive()
        return "destination" if alive and _is_at(there, destination_qmp) else "unknown"
    return "source"


def _moved_on(there: SideState, later: Iterable[tuple[SideState, SideState]]) -> SideState:
    """Where a VM that came to `there` is after all these, oldest first."""
    for source, destination in later:
        if source.qemu == there.qemu:
            there = destination
    return there


def _is_at(side: SideState, qmp: str) -> bool:
    """By the socket, whichever way it is written."""
    return os.path.realpath(side.qmp) == os.path.realpath(qmp)
