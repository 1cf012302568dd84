"""Two real QEMUs, a plan, and the `qpostcopy` command: what the tests of this folder share.

The guest is no Linux: QEMU's firmware runs (or QEMU is started with `-S`), RAM
is filled by the test through the memfd, so a migration takes a second or two.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import pytest

from qpostcopy.config import load_plan
from qpostcopy.controller import Controller
from qpostcopy.lab.leftovers import (
    processes_naming,
    registered_ranges,
    sockets_below,
    userfaultfds,
)
from qpostcopy.lab.observer import ObserverError, ObserverTimeoutError
from qpostcopy.lab.vm import Vm, VmSpec
from qpostcopy.process import Process
from qpostcopy.state import StateDirectory
from qpostcopy.switchover import TEST_SIGNAL_VARIABLE
from tests.messages import documented_stream
from tests.vm.devices import Host
from tests.vm.setups import PLAIN, Setup

PAGE = 4096
MIB = 1 << 20
#: Below this is the firmware's; a running one writes there.
FREE_FROM = 4 * MIB
#: RAM is compared in parts: a large one would not fit twice.
CHUNK_BYTES = 16 * MIB
SECONDS = 90.0


@dataclass
class Ended:
    """A command that has ended."""

    rc: int
    out: str
    err: str

    @property
    def messages(self) -> list[dict[str, Any]]:
        return documented_stream(self.out)

    @property
    def result(self) -> dict[str, Any]:
        """The one result of a `--json` stream, its last line."""
        results = [message for message in self.messages if message["type"] == "result"]
        assert len(results) == 1, self.out + self.err
        assert results[0] == self.messages[-1]
        assert results[0]["rc"] == self.rc
        return results[0]

    @property
    def ended(self) -> tuple[str, int, str]:
        return self.result["status"], self.rc, self.result["vm_location"]


class Scene:
    """A source and a waiting destination; a context manager.

    :param setup: how both are started.
    :param sizes: of the RAM blocks, bytes.
    :param running: the firmware runs, else QEMU stays at `-S`.
    :param push: the plan's limits.push: slow enough to act in the midst of postcopy.
    """

    def __init__(
        self,
        directory: Path,
        *,
        setup: Setup = PLAIN,
        sizes: tuple[int, ...] = (32 * MIB,),
        running: bool = True,
        after: str = "keep",
        push: str = "unlimited",
    ) -> None:
        self.directory = directory
        self.run_directory = directory / "run"
        self.plan = directory / "plan.yaml"
        self._running = running
        self._host = Host(setup.devices, directory) if setup.devices else None
        setup = setup.with_more(self._host.arguments if self._host else ())
        self._waiting = setup.destination(sizes)
        self.source = self._vm("source", setup.source(sizes, paused=not running))
        self.destination = self._vm("destination", self._waiting)
        self._rest = f"limits: {{push: {push}}}\n"
        self._write_plan(after)

    def _vm(self, name: str, spec: VmSpec) -> Vm:
        """A QEMU whose firmware tells what it does (SeaBIOS's debug port)."""
        file = f"file,id=firmware,path={self._firmware_log(name)}"
        port = "isa-debugcon,iobase=0x402,chardev=firmware"
        more = ("-chardev", file, "-device", port)
        return Vm(name, replace(spec, more=(*spec.more, *more)), self.directory)

    def _firmware_log(self, name: str) -> Path:
        return self.directory / f"{name}.firmware"

    def _write_plan(self, after: str) -> None:
        self.plan.write_text(
            "version: 1\nname: t\n"
            f"source: {{qmp: {self.source.qmp_path}, after: {after}}}\n"
            f"destination: {{qmp: {self.destination.qmp_path}}}\n{self._rest}"
        )

    def move_on(self) -> None:
        """What was the destination is the source of the next migration."""
        self.source = self.destination
        self.destination = self._vm("third", self._waiting).start()
        self._write_plan("keep")

    def __enter__(self) -> Scene:
        self.source.start()
        self.destination.start()
        if self._running:
            # Until then its code is all over RAM, and filling that would reset the VM.
            log = self._firmware_log("source")
            wait_until(lambda: b"No bootable device" in log.read_bytes(), "the firmware's end")
        return self

    def __exit__(self, *_: object) -> None:
        self.source.kill()
        self.destination.kill()
        for process in self._ours():
            process.kill(5.0)
        if self._host:
            self._host.close()

    def _ours(self) -> list[Process]:
        found = [Process.of(int(line.split()[0])) for line in processes_naming(self.run_directory)]
        return [process for process in found if process is not None]

    # --- RAM ------------------------------------------------------------------------------

    def fill(self, seed: int, share: float = 0.6) -> None:
        """Data, zero pages and holes, above the firmware's part."""
        chance = random.Random(seed)
        for fd, size in self._blocks(self.source):
            for offset in range(FREE_FROM, size - PAGE + 1, PAGE):
                kind = chance.random()
                if kind < share:
                    os.pwrite(fd, chance.randbytes(PAGE), offset)
                elif kind < share + 0.1:
                    os.pwrite(fd, bytes(PAGE), offset)

    def ram(self, vm: Vm, start: int = FREE_FROM) -> list[bytes]:
        return [os.pread(fd, size - start, start) for fd, size in self._blocks(vm)]

    def assert_same_ram(self, start: int = FREE_FROM) -> None:
        pairs = zip(self._blocks(self.source), self._blocks(self.destination), strict=True)
        for (left, size), (right, _) in pairs:
            for offset in range(start, size, CHUNK_BYTES):
                length = min(CHUNK_BYTES, size - offset)
                same = all(_is_hole(fd, offset, length) for fd in (left, right)) or (
                    os.pread(left, length, offset) == os.pread(right, length, offset)
                )
                assert same, f"RAM differs within {length} bytes at {offset:#x}"

    @staticmethod
    def _blocks(vm: Vm) -> list[tuple[int, int]]:
        return [(vm.ram_fd(b.name), b.size_bytes) for b in vm.spec.backends]

    # --- the command ----------------------------------------------------------------------

    def popen(
        self, *arguments: str, at: str = "", through: Sequence[str] = ()
    ) -> subprocess.Popen[str]:
        """Start a verb.

        :param at: what TEST_SIGNAL_VARIABLE is set to.
        :param through: a command that runs it, e.g. one that takes rights away.
        """
        return subprocess.Popen(
            [*through, sys.executable, "-m", "qpostcopy", *arguments],
            env=self.environment(at),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def environment(self, at: str = "") -> dict[str, str]:
        return environment_of(self.run_directory, at)

    def run(self, *arguments: str, at: str = "", through: Sequence[str] = ()) -> Ended:
        return finish(self.popen(*arguments, at=at, through=through))

    def migrate(self, *, at: str = "") -> Ended:
        return self.run("migrate", str(self.plan), "--json", at=at)

    def start_migrate(self, *, at: str = "") -> subprocess.Popen[str]:
        return self.popen("migrate", str(self.plan), "--json", at=at)

    def run_controller(self, *, at: str) -> StateDirectory:
        """A controller without a viewer (who would recover at once), to its own end."""
        directory = self._new_state()
        subprocess.run(
            [sys.executable, "-m", "qpostcopy.controller", str(directory.path)],
            env=self.environment(at),
            input=b"go",
            stderr=subprocess.DEVNULL,
            timeout=SECONDS,
            check=False,
        )
        return StateDirectory.open(directory.path)

    def run_controller_here(self) -> dict[str, Any]:
        """As `run_controller`, in this process, which starts half a second sooner; its result."""
        directory = self._new_state()

        async def main() -> None:
            controller = Controller(directory, load_plan(self.plan), resuming=False)
            await controller.listen()
            async with asyncio.timeout(SECONDS):
                await controller.run()

        with self._run_directory_set():
            asyncio.run(main())
        result = directory.read_result()
        assert result is not None
        return result

    @contextmanager
    def _run_directory_set(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QPOSTCOPY_RUN_DIR", str(self.run_directory))
            yield

    def _new_state(self) -> StateDirectory:
        with self._run_directory_set():
            return StateDirectory.create(
                "t",
                plan_text=self.plan.read_text(),
                profile="sequential",
                source_qmp=self.source.qmp_path,
                destination_qmp=self.destination.qmp_path,
            )

    @property
    def state(self) -> StateDirectory:
        """The latest state directory, as it is on disk now."""
        return StateDirectory.open(max(p for p in self.run_directory.iterdir() if p.is_dir()))

    def logs(self) -> str:
        return "\n".join(
            f"--- {path}\n{path.read_text(errors='replace')}"
            for path in sorted(self.run_directory.rglob("*.log"))
        )

    # --- who runs -------------------------------------------------------------------------

    def assert_back(self) -> None:
        """It runs at the source, the destination has never run and never can."""
        assert resumes(self.destination) == 0
        assert status(self.source) == "running"
        if self.destination.alive:
            assert status(self.destination) == "inmigrate"
            assert capabilities(self.destination) == set()
            assert_clean(self.destination)
        assert capabilities(self.source) == set()
        self.assert_nothing_left()

    def assert_moved(self) -> None:
        """It runs at the destination, the source never ran again."""
        assert status(self.destination) == "running"
        assert resumes(self.destination) == 1
        assert resumes(self.source) == 0
        assert capabilities(self.destination) == set()
        assert_clean(self.destination)
        self.assert_nothing_left()

    def assert_nothing_left(self) -> None:
        """No process and no socket of ours."""
        wait_until(lambda: not self._ours(), "processes of ours end")
        assert sockets_below(self.run_directory) == []


def _is_hole(fd: int, offset: int, length: int) -> bool:
    """Whether that part of a file has no data: it reads as zeroes, and need not be read."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) >= offset + length
    except OSError as error:
        if error.errno == errno.ENXIO:
            return True
        raise


def environment_of(run_directory: Path, at: str = "") -> dict[str, str]:
    """Of a command whose state directories are there; `at` as in Scene.popen."""
    ours = {"QPOSTCOPY_RUN_DIR": str(run_directory), TEST_SIGNAL_VARIABLE: at}
    return dict(os.environ) | ours


def assert_clean(vm: Vm) -> None:
    """Nothing of ours in QEMU."""
    assert registered_ranges(vm.pid) == []
    assert userfaultfds(vm.pid) == []


def status(vm: Vm) -> str:
    try:
        return vm.observer.status()
    except (ObserverError, ObserverTimeoutError):
        return "gone" if not vm.alive else "hangs"


def capabilities(vm: Vm) -> set[str]:
    """Those that are on."""
    listed = vm.observer.execute("query-migrate-capabilities")
    return {item["capability"] for item in listed if item["state"]}


def resumes(vm: Vm) -> int:
    """How often QEMU told its observer that vCPUs were started (RESUME), though it be dead now."""
    status(vm)  # reads what has come in, to the end of it if QEMU is dead
    return vm.observer.heard("RESUME")


def finish(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=SECONDS)
    return Ended(process.returncode, out, err)


def read_until_phase(process: subprocess.Popen[str], phase: str) -> str:
    """Read a `--json` stream until that phase; what was read."""
    read = ""
    for line in cast(IO[str], process.stdout):
        read += line
        message = json.loads(line)
        if message["type"] == "phase" and message["phase"] == phase:
            return read
    raise AssertionError(f"no phase {phase}: {read}{cast(IO[str], process.stderr).read()}")


def read_stderr_until(process: subprocess.Popen[str], text: str) -> None:
    """Read its words for people up to a line with that text."""
    for line in cast(IO[str], process.stderr):
        if text in line:
            return
    raise AssertionError(f"it never said: {text}")


@contextmanager
def held_back(scene: Scene) -> Iterator[None]:
    """A destination that does not answer keeps a migration in prepare."""
    scene.destination.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        scene.destination.signal(signal.SIGCONT)


def finish_after(process: subprocess.Popen[str], read: str) -> Ended:
    """As `finish`, after `read_until_phase`."""
    ended = finish(process)
    return Ended(ended.rc, read + ended.out, ended.err)


def wait_until(condition: Callable[[], bool], what: str, within_seconds: float = 20.0) -> None:
    """Bounded polling, for what tells nobody when it happens."""
    deadline = time.monotonic() + within_seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_seconds} s: {what}"
        time.sleep(0.02)


def kill(process: Process | None) -> None:
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
