"""SIGINT and SIGTERM, from before there is a migration until its exit code is known.

A signal must neither kill the command while the migration that it started goes
on, nor change an exit code that is known already. So it only becomes readable
on a descriptor, and whoever waits looks at that too: the start of a controller,
the viewer, the wait for its end. Guarantee: once installed, nothing is lost and
nothing is interrupted. The handlers stay until the process ends.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import Literal

from qpostcopy.errors import ExitCode, QpostcopyError

Name = Literal["SIGINT", "SIGTERM"]
_NAMES: dict[int, Name] = {signal.SIGINT: "SIGINT", signal.SIGTERM: "SIGTERM"}


class CancelledEarlyError(QpostcopyError):
    """A signal came before the migration began: nothing was touched."""

    code = "cancelled"


class InterruptedEarlyError(CancelledEarlyError):
    """By SIGINT."""

    exit_code = ExitCode.SIGINT


class TerminatedEarlyError(CancelledEarlyError):
    """By SIGTERM."""

    exit_code = ExitCode.SIGTERM


class Signals:
    """The signals that came.

    :ivar fd: readable while some were not taken yet.
    :ivar names: those that were taken, in order.
    """

    def __init__(self) -> None:
        self.fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.names: list[Name] = []

    @classmethod
    def install(cls) -> Signals:
        """From now on signals are kept here."""
        signals = cls()
        for number in _NAMES:
            signal.signal(number, signals._on_signal)
        return signals

    def take(self) -> list[Name]:
        """Those that came since the last call, in order; never waits."""
        with suppress(BlockingIOError):
            new = [_NAMES[number] for number in os.read(self.fd, 64)]
            self.names += new
            return new
        return []

    def cancel_if_any(self) -> None:
        """For a moment at which nothing has been touched.

        :raise CancelledEarlyError: a signal came.
        """
        self.take()
        if self.names:
            raise self.cancelled()

    def cancelled(self) -> CancelledEarlyError:
        """The error that says so."""
        name = self.names[0]
        leaf = InterruptedEarlyError if name == "SIGINT" else TerminatedEarlyError
        return leaf(f"cancelled by {name} before the migration began; nothing was touched")

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        with suppress(BlockingIOError):  # thousands wait to be taken: one more says nothing new
            os.write(self._write_fd, bytes([number]))
