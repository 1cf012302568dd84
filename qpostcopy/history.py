"""What earlier migrations of this host tell about a VM that a migration did not touch.

A plan says where its VM should be; after an earlier migration it is no longer
there. Guarantee: `source` is never said of a VM that is known to have left it.
"""

from __future__ import annotations

from qpostcopy.process import Process
from qpostcopy.report import Location
from qpostcopy.state import StateDirectory


def moved_before(source_qmp: str, destination_qmp: str, source_qemu: Process | None) -> Location:
    """Where the VM is: at its source, unless a committed migration took it from there.

    :param source_qemu: who listens at `source_qmp` now, if that is known: one that was
        started since is a source like any other.
    """
    for other in reversed(list(StateDirectory.all())):
        ends = other.state.source, other.state.destination
        if not other.committed or source_qmp not in (side.qmp for side in ends):
            continue
        left, there = ends
        if there.qmp == source_qmp:
            return "source"  # that one brought it here
        if source_qemu is not None and source_qemu != left.qemu:
            return "source"
        alive = there.qemu is not None and there.qemu.alive()
        return "destination" if alive and there.qmp == destination_qmp else "unknown"
    return "source"
