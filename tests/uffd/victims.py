"""Building and running the victim (tests/c/victim.c) and the injector that works on it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qpostcopy.core.calls import lib

ROOT = Path(__file__).parents[2]
CORE = ROOT / "qpostcopy" / "core"
_WARNINGS = ["-std=gnu11", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-O1", "-g"]
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

#: `enum qpc_code` of core/error.h, as the injector prints it.
OK, TIMEOUT, GONE, REFUSED = lib.QPC_OK, lib.QPC_TIMEOUT, lib.QPC_GONE, lib.QPC_REFUSED

SYS_PAUSE = 34

STORM = [
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGHUP,
    signal.SIGRTMIN + 1,
    # These two come through every mask of ours: the one as a stop, the other beside the step's own.
    signal.SIGCONT,
    signal.SIGTRAP,
]


@functools.cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    made = tempfile.TemporaryDirectory(prefix="qpc-victim-")  # gone with the test process
    Path(made.name).chmod(0o755)  # for victims of other users
    return made


@functools.cache
def _build(name: str, *sources: Path) -> str:
    binary = str(Path(_directory().name) / name)
    flags = _SANITIZERS if sources else []  # the victim must be as plain as QEMU is
    files = [str(path) for path in (ROOT / "tests" / "c" / f"{name}.c", *sources)]
    command = ["gcc", *_WARNINGS, *flags, f"-I{CORE}", *files, "-o", binary, "-pthread"]
    subprocess.run(command, check=True)
    return binary


def victim_binary() -> str:
    return _build("victim")


@dataclass
class Victim:
    """A running victim; `end` makes it say what it thinks of its life."""

    process: subprocess.Popen[str]

    @property
    def pid(self) -> int:
        return self.process.pid

    def end(self) -> str:
        """SIGTERM, and its last line: "ok ROUNDS SIGNALS QUEUED", or "damaged: ..."."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.stdout
        said = self.process.stdout.read().strip()
        assert self.process.wait(20) == 0, said
        return said

    def stop(self) -> None:
        """SIGSTOP; on return it has stopped. SIGCONT is the caller's to send."""
        self.process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 10
        while self.state != "T":
            assert time.monotonic() < deadline, "it does not stop"
            time.sleep(0.002)

    @property
    def state(self) -> str:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]


def filtered_command(number: int) -> list[str]:
    """What comes before a command that is to be killed if it makes system call `number`."""
    return [_build("filtered"), str(number)]


def user_command(uid: int = 65534) -> list[str]:
    """What comes before a command that is to run without any right."""
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]


def lesser_command(how: Literal["no-admin", "filtered"]) -> list[str]:
    """What comes before a tracer that may not suspend another's filter."""
    if how == "filtered":
        return filtered_command(SYS_PAUSE)
    return ["setpriv", "--bounding-set=-sys_admin", "--"]


@contextlib.contextmanager
def victim(
    mode: str, *arguments: object, under: Sequence[str] = (), pass_fds: Sequence[int] = ()
) -> Iterator[Victim]:
    """A victim that is in its mode; killed at the end if it still runs.

    :param under: a command that starts it, e.g. `filtered_command`.
    :param pass_fds: descriptors of ours that it has, under the same numbers.
    """
    command = [*under, victim_binary(), mode, *map(str, arguments)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=pass_fds
    ) as process:
        assert process.stdout
        try:
            assert process.stdout.readline() == "ready\n"
            yield Victim(process)
        finally:
            process.kill()


@contextlib.contextmanager
def storm(target: Victim, pause_us: int, signals: list[int]) -> Iterator[Callable[[], int]]:
    """Signals in turn, all the time.

    Gives a function that ends the storm and says how many queued signals it sent.
    """
    numbers = [str(int(number)) for number in signals]
    command = [victim_binary(), "storm", str(target.pid), str(pause_us), *numbers]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:

        def end() -> int:
            process.terminate()
            said, _ = process.communicate()
            return int(said)

        try:
            yield end
        finally:
            process.terminate()


@dataclass
class Report:
    """What the injector says at the end."""

    code: int
    errno: int
    operation: str
    address: int
    done: int
    wrong: int
    refused: int
    result: int
    total_us: int
    worst_us: int


def inject(
    pid: int,
    count: int,
    deadline_ms: int,
    *what: object,
    goes_on: bool = False,
    under: Sequence[str] = (),
) -> Report:
    """Run the injector, under ASan and UBSan, to its end. :param under: as for `victim`."""
    binary = _build("injector", *(CORE / name for name in ("inject.c", "proc.c", "error.c")))
    environment = os.environ | ({"INJECTOR_GOES_ON": "1"} if goes_on else {})
    done = subprocess.run(
        [*under, binary, *map(str, (pid, count, deadline_ms, *what))],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Report(**json.loads(done.stdout))


class NoLender:
    """For a target that may create userfaultfds by itself."""

    def lend(self) -> int:
        raise AssertionError("nothing was to be lent")

    def take_back(self) -> None:
        raise AssertionError("nothing was lent")


NO_LENDER = NoLender()
