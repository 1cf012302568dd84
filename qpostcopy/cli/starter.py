"""Start a controller: detached, and held back until it is told to go.

Until `go` nothing is touched, and if we die, are told to stop, or lose patience
before that, nothing ever will be: a controller whose standard input ends without
a byte ends by itself, and `abandon` sees to it.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time

from qpostcopy.cli.signals import Signals
from qpostcopy.errors import ExitCode, QpostcopyError
from qpostcopy.state import StateDirectory

START_SECONDS = 20.0
EXIT_SECONDS = 15.0
_TERMINATE_SECONDS = 2.0


class ControllerStartError(QpostcopyError):
    """The controller process did not start; nothing was touched."""


class NotResumedError(ControllerStartError):
    """As that, of a migration that is committed: its guest waits for a controller."""

    exit_code = ExitCode.INTERRUPTED


class ControllerProcess:
    """A controller that was started here."""

    def __init__(self, child: subprocess.Popen[bytes], signals: Signals) -> None:
        self._child = child
        self._signals = signals
        self.gone_ahead = False

    @classmethod
    def start(
        cls, directory: StateDirectory, signals: Signals, *, resume: bool
    ) -> ControllerProcess:
        """Start it; on return its socket accepts.

        :raise ControllerStartError: with the end of its log.
        :raise CancelledEarlyError: a second signal came meanwhile.
        """
        log_path = directory.path / "controller.log"
        ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                process = cls(_spawn(directory, ready_write, resume=resume), signals)
            finally:
                os.close(ready_write)
            ready = process._wait_ready(ready_read)
        finally:
            os.close(ready_read)
        if ready == b"ready\n":
            return process
        process.abandon()
        if ready is None:
            reason = f"not ready within {START_SECONDS:g} s"
        else:
            last = log_path.read_text(errors="replace").strip().rpartition("\n")[2]
            reason = last or "it says nothing"
        kind = NotResumedError if directory.committed else ControllerStartError
        untouched = "it changed nothing" if resume else "nothing was touched"
        again = f"; then: qpostcopy resume {directory.migration_id}" if resume else ""
        raise kind(
            f"the controller did not start ({untouched}): {reason}",
            remedy=f"its log is {log_path}: mend what it says{again}",
        )

    def go(self) -> None:
        """Let it begin."""
        if self.gone_ahead:
            return
        assert self._child.stdin is not None
        self.gone_ahead = True
        with contextlib.suppress(BrokenPipeError):  # it is dead: whoever watches it will see
            self._child.stdin.write(b"g")
            self._child.stdin.close()

    def abandon(self) -> None:
        """End it, unless it was told to go. On return it is gone, and nothing was touched."""
        if self.gone_ahead:
            return
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.terminate()
        try:
            self._child.wait(_TERMINATE_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def wait_end(self) -> None:
        """It ends soon after its result; a signal ends only the wait."""
        if self._child.poll() is not None:
            return
        pidfd = os.pidfd_open(self._child.pid)
        try:
            _readable(EXIT_SECONDS, pidfd, self._signals.fd)
        finally:
            os.close(pidfd)
        self._child.poll()

    def _wait_ready(self, fd: int) -> bytes | None:
        """What it says: `ready`, or nothing (it is dead); None: it takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            ready = _readable(left, fd, self._signals.fd)
            if fd in ready:
                return os.read(fd, 64)
            # The first is kept for the controller: it cancels, and writes that down.
            self._signals.take()
            if len(self._signals.names) > 1:
                self.abandon()
                raise self._signals.cancelled()
        return None


def _spawn(directory: StateDirectory, ready_fd: int, *, resume: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "qpostcopy.controller", str(directory.path)]
    command += ["--ready-fd", str(ready_fd)] + (["--resume"] if resume else [])
    with (directory.path / "controller.log").open("ab") as log_file:
        return subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=log_file,
            stderr=log_file,
            pass_fds=[ready_fd],
            start_new_session=True,
            cwd="/",
        )


def _readable(seconds: float, *fds: int) -> set[int]:
    """Which of them are readable, after at most so long."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(seconds * 1000)}
