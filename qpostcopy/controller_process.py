"""The process around a controller: its lock, its lives, and its start.

`python -m qpostcopy.controller STATE_DIR [--resume] [--ready-fd N]`; the run
begins with a byte on its standard input, so that its starter can connect first.
If that ends without one, its starter is dead or has thought better of it: then
this process ends, and nothing was touched.

Guarantees: one controller at a time works on a state directory; one that comes
to a migration that is over changes nothing there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import select
import signal
import sys
from pathlib import Path

from qpostcopy.config import load_plan
from qpostcopy.controller import Controller
from qpostcopy.environment import LOG_LEVEL_VARIABLE
from qpostcopy.errors import ExitCode, QpostcopyError
from qpostcopy.process import Process
from qpostcopy.state import StateDirectory

log = logging.getLogger(__name__)

#: Longest wait for whoever started us to connect.
GO_SECONDS = 30.0


def main(arguments: list[str] | None = None) -> int:
    """Entry of `python -m qpostcopy.controller`."""
    parser = argparse.ArgumentParser(prog="qpostcopy.controller")
    parser.add_argument("state_dir", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--ready-fd", type=int)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    logging.basicConfig(
        stream=sys.stderr,
        level=os.environ.get(LOG_LEVEL_VARIABLE, "info").upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        directory = StateDirectory.open(options.state_dir)
        with directory.lock():
            if directory.finished:
                return _report_finished(directory, options.ready_fd)
            return asyncio.run(_run(directory, options.resume, options.ready_fd))
    except QpostcopyError as error:
        print(f"qpostcopy: error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # no room for the state, most likely
        log.exception("the state directory cannot be used")
        print(f"qpostcopy: error: {error}", file=sys.stderr)
        return ExitCode.UNEXPECTED


def _report_finished(directory: StateDirectory, ready_fd: int | None) -> int:
    """Somebody else brought it to its end while we were started."""
    result = directory.read_result()
    assert result is not None, "finished without a result"
    _tell_ready(ready_fd)
    return int(str(result.get("rc", ExitCode.UNEXPECTED.value)))


async def _run(directory: StateDirectory, resuming: bool, ready_fd: int | None) -> ExitCode:
    plan = load_plan(directory.path / "plan.yaml")
    controller = Controller(directory, plan, resuming=resuming)
    directory.update(controller=Process.of(os.getpid()))
    await controller.listen()
    _tell_ready(ready_fd)
    if not await asyncio.to_thread(_wait_for_go):
        await controller.hang_up()
        return ExitCode.UNEXPECTED
    if resuming:
        # What can be improved on is no result: who watches from now on waits for ours.
        (directory.path / "result.json").unlink(missing_ok=True)
    return await controller.run()


def _tell_ready(ready_fd: int | None) -> None:
    if ready_fd is not None:
        with contextlib.suppress(BrokenPipeError):
            os.write(ready_fd, b"ready\n")
        os.close(ready_fd)


def _wait_for_go() -> bool:
    """Whether a byte came on our standard input, before its end and before too long."""
    poll = select.poll()
    poll.register(sys.stdin.fileno(), select.POLLIN | select.POLLHUP)
    return bool(poll.poll(GO_SECONDS * 1000)) and bool(os.read(sys.stdin.fileno(), 1))
