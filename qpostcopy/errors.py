"""What can go wrong, and the exit code each kind of trouble ends in.

The tree (leaves live beside the code that raises them):

    QpostcopyError                 1   unexpected
      UsageError                   2   plan, profile or flags are wrong
      RefusedError                 3   preflight says no; nothing was touched
      RolledBackError              4   failed before the commit; runs at the source
      BeforeSwitchTimeoutError     5   `limits.before_switch` passed
      InterruptedMigrationError   10   failed after the commit; `resume` goes on
      StateLostError              11   nothing can be resumed; says what is left
      OutcomeUnknownError          1   a command was sent, its reply never came
      CoreError                    1   the C core reports (core/__init__.py)

Every message says where the VM is when that is not obvious, and `remedy` says
what the operator can do.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """Exit codes of the `qpostcopy` command (docs: the README's table)."""

    COMPLETED = 0
    UNEXPECTED = 1
    USAGE = 2
    REFUSED = 3
    ROLLED_BACK = 4
    TIMED_OUT = 5
    INTERRUPTED = 10
    FAILED = 11
    SIGINT = 130
    SIGTERM = 143


class QpostcopyError(Exception):
    """Base of everything that this package raises on purpose.

    :param message: one line for the operator.
    :param remedy: what to do about it, one line, or None.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.UNEXPECTED

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.remedy = remedy


class UsageError(QpostcopyError):
    """Plan, profile or flags are wrong; nothing was touched."""

    exit_code = ExitCode.USAGE


class RefusedError(QpostcopyError):
    """Preflight refused; nothing was touched."""

    exit_code = ExitCode.REFUSED


class RolledBackError(QpostcopyError):
    """The migration failed before the commit; the VM runs at the source."""

    exit_code = ExitCode.ROLLED_BACK


class BeforeSwitchTimeoutError(QpostcopyError):
    """`limits.before_switch` passed; the VM runs at the source."""

    exit_code = ExitCode.TIMED_OUT


class InterruptedMigrationError(QpostcopyError):
    """Failed after the commit: the VM is at the destination and waits on missing pages."""

    exit_code = ExitCode.INTERRUPTED


class StateLostError(QpostcopyError):
    """The migration cannot go on; the message says what is left and where."""

    exit_code = ExitCode.FAILED


class OutcomeUnknownError(QpostcopyError):
    """A command was sent and its reply did not come: it may or may not have run.

    Never assume either; query the state that it would have changed.
    """
