"""A process that is proven to be the one we mean, and proven to be gone.

Guarantees: no signal ever reaches a process that merely inherited a pid (the
pidfd is taken first, the start time is compared after); "gone" means that every
thread has ended, so that none of its vCPUs can run again.
"""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


# No pydantic model, though state.json holds some: the injection helper starts faster without.
@dataclass(frozen=True, slots=True)
class Process:
    """A process, proven by its start time: a pid alone may be someone else's by now."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has this pid now, or None."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # proc(5): field 2 may hold spaces and brackets; field 22 is the start time.
        return cls(pid=pid, start_ticks=int(stat.rpartition(")")[2].split()[19]))

    def open_pidfd(self) -> int | None:
        """A pidfd of exactly this process (taken, close it), or None: it is gone."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        # Checked after the open: from here on the pidfd cannot mean another process.
        if Process.of(self.pid) == self:
            return fd
        os.close(fd)
        return None

    def alive(self) -> bool:
        """Whether any thread of it still runs (a zombie does not)."""
        fd = self.open_pidfd()
        if fd is None:
            return False
        try:
            return not _exited(fd, 0)
        finally:
            os.close(fd)

    def kill(self, wait_seconds: float) -> bool:
        """SIGKILL, and wait until it is gone. Whether it is proven gone."""
        fd = self.open_pidfd()
        if fd is None:
            return True
        try:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            return _exited(fd, wait_seconds)
        finally:
            os.close(fd)

    def wait_gone(self, wait_seconds: float) -> bool:
        """Wait until it is gone. Whether it is."""
        fd = self.open_pidfd()
        if fd is None:
            return True
        try:
            return _exited(fd, wait_seconds)
        finally:
            os.close(fd)


def _exited(pidfd: int, wait_seconds: float) -> bool:
    # pidfd_open(2): readable once the process, with all its threads, has ended.
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(wait_seconds * 1000))
