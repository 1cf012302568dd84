"""`qpostcopy migrate`, run as an operator would run it: a child process and its messages."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

Message = dict[str, Any]


class Migrated(NamedTuple):
    """What that command left.

    :ivar rusage: its own and that of the processes that it waited for.
    :ivar interrupted: a signal that meant us was handed on to it.
    """

    status: int
    rusage: resource.struct_rusage
    interrupted: bool = False


def run_migrate(
    plan: Path,
    run_directory: Path,
    show: Callable[[Message], None],
    environment: Mapping[str, str] | None = None,
    started: Callable[[int], None] = lambda pid: None,
) -> Migrated:
    """Run the command to its end, and hand on each of its messages.

    :param run_directory: below which the state directory is made.
    :param environment: is added to ours.
    :param started: called with its pid.
    """
    command = [sys.executable, "-m", "qpostcopy", "migrate", str(plan), "--json"]
    variables = os.environ | {"QPOSTCOPY_RUN_DIR": str(run_directory)} | dict(environment or {})
    with (
        # A group of its own: it gets the signals that we hand on, once.
        subprocess.Popen(command, stdout=subprocess.PIPE, env=variables, process_group=0) as child,
        _handed_on(child) as signals,
    ):
        assert child.stdout
        started(child.pid)
        for line in child.stdout:
            show(json.loads(line))
        _, status, rusage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    return Migrated(child.returncode, rusage, signals.any)


class _handed_on:
    """While open, SIGINT and SIGTERM that reach us go to a child, whose result we want."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        self._before: dict[signal.Signals, Any] = {}
        self.any = False

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._hand_on)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hand_on(self, number: int, _frame: FrameType | None) -> None:
        self.any = True
        self._child.send_signal(number)
