"""What a run is played on: two VMs, a link between them, and a guest that is at work.

Every engine gets the same: the same guest, namespaces of its own, memory that was
just touched and freed. Guest RAM is what suits the engine best: a shared file for
ours, which needs one, QEMU's default for QEMU's own where that is faster. Nothing
outlives the stage; what a killed benchmark left, the next one removes.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from qpostcopy.bench.engine import Pair
from qpostcopy.bench.link import Ends, open_link
from qpostcopy.bench.model import Cell
from qpostcopy.bench.own_engine import run_directory
from qpostcopy.bench.usage import processes_of
from qpostcopy.lab.guest import Guest, Ready
from qpostcopy.lab.vm import Backend, Boot, Vm, VmSpec
from qpostcopy.lab.warm import touch_and_free_elsewhere

_BOOT_SECONDS = 120.0
#: The one workload whose rate is calibrated, and the same for all engines.
SERVICE = "service"
_TMPFS = Path("/dev/shm")
_PREFIX = "qpostcopy-bench"
_KILL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Conditions:
    """What all runs of a session share.

    :ivar qemus: executable by short name.
    :ivar rates: of `service`, by `rate_key`; empty while they are calibrated.
    :ivar environment: is added to that of our own processes.
    :ivar failures: below which logs and state of runs that failed are kept; None: they are not.
    """

    session: str
    kernel: Path
    initrd: Path
    qemus: Mapping[str, str]
    rates: Mapping[str, int] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    failures: Path | None = None

    def rate_words(self, cell: Cell) -> tuple[str, ...]:
        rate = self.rates.get(rate_key(cell))
        return (f"rate={rate}",) if cell.workload == SERVICE and rate else ()


def rate_key(cell: Cell) -> str:
    """What the rate that a guest holds depends on."""
    return f"{cell.qemu}/{cell.memory_mib}"


@dataclass
class Stage:
    """Two VMs and a guest that reports."""

    cell: Cell
    conditions: Conditions
    pair: Pair
    guest: Guest
    ready: Ready

    @property
    def memory_bytes(self) -> int:
        return self.cell.memory_mib << 20


@contextmanager
def stage(cell: Cell, conditions: Conditions, *, shared: bool) -> Iterator[Stage]:
    """A guest at work in the source, and a destination that waits; all gone afterwards.

    :param shared: guest RAM is a file on tmpfs; else QEMU's default, anonymous memory.
    """
    with ExitStack() as held:
        _sweep()
        directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}-{os.getpid()}-", dir=_TMPFS))
        held.callback(shutil.rmtree, directory, ignore_errors=True)
        held.callback(_end_companions, directory)
        ends = held.enter_context(open_link(cell.link))
        touch_and_free_elsewhere(2 * cell.memory_mib << 20)
        backend = _backend(cell, shared=shared)
        source = _vm("source", cell, conditions, backend, ends, directory)
        destination = _vm("destination", cell, conditions, backend, ends, directory)
        for vm in (source, destination):
            held.callback(vm.kill)
        source.start()
        # Closed before the VMs: it listens to their sockets.
        guest = held.enter_context(Guest(source.serial))
        ready = guest.wait_ready(_BOOT_SECONDS)
        destination.start()
        guest.add(destination.serial)
        pair = Pair(source, destination, ends, directory, conditions.environment)
        yield Stage(cell, conditions, pair, guest, ready)


def _sweep() -> None:
    """Remove the directories of benchmarks that are dead."""
    for path in _TMPFS.glob(f"{_PREFIX}-*"):
        match = re.match(rf"{_PREFIX}-(\d+)-", path.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            shutil.rmtree(path, ignore_errors=True)


def _end_companions(directory: Path) -> None:
    """A migration that did not come to its end leaves them, for `resume`."""
    for process in processes_of(run_directory(directory)).values():
        process.kill(_KILL_SECONDS)


def _backend(cell: Cell, *, shared: bool) -> Backend:
    size_bytes = cell.memory_mib << 20
    if shared:
        return Backend("ram", size_bytes)
    return Backend("ram", size_bytes, mem_path=None, share=False, kind="memory-backend-ram")


def _vm(
    name: str,
    cell: Cell,
    conditions: Conditions,
    backend: Backend,
    ends: Ends,
    directory: Path,
) -> Vm:
    incoming = name == "destination"
    words = (f"workload={cell.workload}", *conditions.rate_words(cell))
    spec = VmSpec(
        backends=(backend,),
        incoming=incoming,
        boot=Boot(conditions.kernel, conditions.initrd, words),
        qemu=conditions.qemus[cell.qemu],
        netns=(ends.destination if incoming else ends.source).netns,
    )
    return Vm(name, spec, directory)


def calibrate(cell: Cell, conditions: Conditions) -> int:
    """The rate that this guest holds, in requests a second; 0: the workload has none."""
    with stage(cell, conditions, shared=True) as staged:
        return staged.ready.rate
