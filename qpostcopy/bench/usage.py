"""CPU time and memory, of processes that may end before we look.

Our companions are detached: nobody but the kernel knows what they used once they
are gone. So the benchmark makes itself the reaper of its descendants
(prctl(2), PR_SET_CHILD_SUBREAPER): orphans become its children, and wait4(2) tells
what each of them, and whatever it waited for itself, has used. What ends in
another's care is told by the last look at it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from qpostcopy.bench.model import Usage
from qpostcopy.lab.vm import Vm
from qpostcopy.state import StateDirectory

_PR_SET_CHILD_SUBREAPER = 36
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_NANOSECONDS = 1e9
#: How long a companion may take to end after the command has.
_END_SECONDS = 5.0
_LOOK_SECONDS = 0.01


def become_reaper() -> None:
    """From now on the orphans among our descendants are ours to wait for."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")


def process_cpu_seconds(pid: int) -> float:
    """Of all its threads, those that have ended included; resolution 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


def thread_cpu_seconds(pid: int, tid: int) -> float:
    """Of one living thread, to the nanosecond."""
    return int(Path(f"/proc/{pid}/task/{tid}/schedstat").read_text().split()[0]) / _NANOSECONDS


def vcpu_cpu_seconds(vm: Vm) -> float:
    """Of all threads of a VM that run its guest."""
    vcpus = vm.observer.execute("query-cpus-fast")
    return sum(thread_cpu_seconds(vm.pid, vcpu["thread-id"]) for vcpu in vcpus)


def overhead_cpu_seconds(vm: Vm) -> float:
    """Of all threads of a VM's QEMU that do not run its guest."""
    return process_cpu_seconds(vm.pid) - vcpu_cpu_seconds(vm)


def stolen_and_all_ticks() -> tuple[int, int]:
    """CPU time that the machine's host kept for itself, and all of it, since boot."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[7], sum(ticks)


@dataclass
class CompanionUsage:
    """What the processes of one migration use: the controller, page server and handler.

    :param run_directory: below which its state directory is made.
    """

    run_directory: Path
    _pids: dict[str, int] = field(default_factory=dict)
    _seen: dict[str, Usage] = field(default_factory=dict)

    def look(self) -> None:
        """Note what is known now; cheap, to be called whenever something was told."""
        if len(self._pids) < 3:
            self._pids = self._find()
        for role, pid in self._pids.items():
            with suppress(OSError, ValueError):
                self._seen[role] = _usage_of_living(pid)

    def collect(self) -> dict[str, Usage]:
        """After the command has ended: by role; the sum is exact."""
        reaped = {role: usage for role, pid in self._pids.items() if (usage := _wait_for(pid))}
        seen = {role: usage for role, usage in self._seen.items() if role not in reaped}
        if (controller := reaped.get("controller")) is not None:
            # It waited for those itself, so its own account holds theirs.
            others = sum(usage.cpu_seconds for usage in seen.values())
            own = max(0.0, controller.cpu_seconds - others)
            reaped["controller"] = controller.model_copy(update={"cpu_seconds": own})
        return seen | reaped

    def _find(self) -> dict[str, int]:
        for path in self.run_directory.glob("*/state.json"):
            state = StateDirectory.open(path.parent).state
            processes = {
                "controller": state.controller,
                "page-server": state.side("source").companion,
                "handler": state.side("destination").companion,
            }
            return {role: process.pid for role, process in processes.items() if process}
        return {}


def _usage_of_living(pid: int) -> Usage:
    status = Path(f"/proc/{pid}/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return Usage(cpu_seconds=process_cpu_seconds(pid), peak_rss_bytes=int(peak.split()[1]) << 10)


def usage_of(rusage: resource.struct_rusage) -> Usage:
    """As wait4(2) gives it."""
    return Usage(
        cpu_seconds=rusage.ru_utime + rusage.ru_stime, peak_rss_bytes=rusage.ru_maxrss << 10
    )


def _wait_for(pid: int) -> Usage | None:
    """Of an orphan that is ours now, once it has ended; None if it was never ours, or stays."""
    deadline = time.monotonic() + _END_SECONDS
    while time.monotonic() < deadline:
        try:
            ended, _, rusage = os.wait4(pid, os.WNOHANG)
        except ChildProcessError:
            return None
        if ended:
            return usage_of(rusage)
        time.sleep(_LOOK_SECONDS)
    return None
