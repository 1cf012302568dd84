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
from qpostcopy.lab.vm import Vm, VmError
from qpostcopy.process import Process
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
    """Of all threads of a VM that run its guest.

    :raise VmError: it has ended.
    """
    vcpus = vm.observer.execute("query-cpus-fast")
    try:
        return sum(thread_cpu_seconds(vm.pid, vcpu["thread-id"]) for vcpu in vcpus)
    except OSError as error:
        raise VmError(f"QEMU {vm.name} (pid {vm.pid}) has ended") from error


def overhead_cpu_seconds(vm: Vm) -> float:
    """Of all threads of a VM's QEMU that do not run its guest; raises as `vcpu_cpu_seconds`."""
    return process_cpu_seconds(vm.pid) - vcpu_cpu_seconds(vm)


def stolen_and_all_ticks() -> tuple[int, int]:
    """CPU time that the machine's host kept for itself, and all of it, since boot."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[7], sum(ticks)


def processes_of(run_directory: Path) -> dict[str, Process]:
    """Those of the one migration below a run directory, by role; alive or not."""
    for path in run_directory.glob("*/state.json"):
        state = StateDirectory.open(path.parent).state
        processes = {
            "controller": state.controller,
            "page-server": state.side("source").companion,
            "handler": state.side("destination").companion,
        }
        return {role: process for role, process in processes.items() if process}
    return {}


@dataclass
class MigrationUsage:
    """What the processes of one migration use: the command, controller, page server and handler.

    :param run_directory: below which its state directory is made.
    """

    run_directory: Path
    _pids: dict[str, int] = field(default_factory=dict)
    _seen: dict[str, Usage] = field(default_factory=dict)

    def started(self, pid: int) -> None:
        """The command itself."""
        self._pids["cli"] = pid

    def look(self) -> None:
        """Note what is known now; cheap, to be called whenever something was told."""
        if len(self._pids) < 4:
            self._pids |= self._find()
        for role, pid in self._pids.items():
            with suppress(OSError, ValueError):
                self._seen[role] = _usage_of_living(pid)

    def collect(self, command: resource.struct_rusage) -> dict[str, Usage]:
        """By role, after the command has ended. The sum of the CPU time is exact.

        :param command: of the command, as wait4(2) gave it.
        """
        exact = {"cli": _cpu_seconds(command)}
        for role, pid in self._pids.items():
            if role != "cli" and (seconds := _wait_for(pid)) is not None:
                exact[role] = seconds
        # Whoever waited for the others: its account holds theirs.
        parent = "controller" if "controller" in exact else "cli"
        others = {role: usage for role, usage in self._seen.items() if role not in exact}
        exact[parent] -= sum(usage.cpu_seconds for usage in others.values())
        return {
            role: usage.model_copy(update={"cpu_seconds": exact.get(role, usage.cpu_seconds)})
            for role, usage in self._seen.items()
        }

    def _find(self) -> dict[str, int]:
        return {role: process.pid for role, process in processes_of(self.run_directory).items()}


def _usage_of_living(pid: int) -> Usage:
    # Not of rusage: there, a process that was just forked counts its parent's memory.
    status = Path(f"/proc/{pid}/status").read_text()
    peaks = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    if not peaks:
        raise ProcessLookupError(f"{pid} has just ended")
    kib = int(peaks[0].split()[1])
    return Usage(cpu_seconds=process_cpu_seconds(pid), peak_rss_bytes=kib << 10)


def _cpu_seconds(rusage: resource.struct_rusage) -> float:
    return rusage.ru_utime + rusage.ru_stime


def _wait_for(pid: int) -> float | None:
    """CPU time of an orphan that is ours now, once it has ended; None if it was never ours."""
    deadline = time.monotonic() + _END_SECONDS
    while time.monotonic() < deadline:
        try:
            ended, _, rusage = os.wait4(pid, os.WNOHANG)
        except ChildProcessError:
            return None
        if ended:
            return _cpu_seconds(rusage)
        time.sleep(_LOOK_SECONDS)
    return None
