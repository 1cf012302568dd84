"""What the machine can do at best: `scripts/bench limits`.

Measured without QEMU and without the engine, by a small C program of its own
(scripts/limits), so that a reader of the benchmark knows how far from the limit
each engine is. The figures are taken in turn, several times each, so that a
machine whose speed drifts treats them alike; before each of them as much memory
is touched and freed as it will use.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import Field

from qpostcopy.bench.statistics import summarize
from qpostcopy.core import PAGE_BYTES
from qpostcopy.errors import QpostcopyError
from qpostcopy.lab.warm import touch_and_free
from qpostcopy.qmp.schema import Model

_SOURCES = Path(__file__).resolve().parents[2] / "scripts" / "limits"
_CFLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wconversion", "-pthread")
_BUILD_SECONDS = 120.0
#: Of one figure, once: this, and what a transfer takes on a link slower than any we mean.
_SECONDS = 120.0
_SLOWEST_BYTES_PER_SECOND = 1 << 20
_SERVER_END_SECONDS = 10.0
#: Buffers of the program and of its sockets.
_BUFFERS_BYTES = 32 << 20
#: What a page request is answered with on the engine's demand lane: a header and the page.
_PAGE_ANSWER_BYTES = 24 + PAGE_BYTES


class LimitsError(QpostcopyError):
    """A limit could not be measured."""


# --- what is measured ---------------------------------------------------------------------


class Measured(Model):
    """One figure, taken several times; the unit is in the name of what holds it.

    :ivar low: with `high`, the interval in which the true median lies (statistics.Summary).
    """

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        summary = summarize(values)
        return cls(
            median=summary.median, low=summary.low, high=summary.high, samples=summary.values
        )


class Latency(Model):
    """Percentiles of many equal events; each sample is the percentile of one series of them."""

    p50_us: Measured
    p90_us: Measured
    p99_us: Measured


class Limits(Model):
    """What the machine can do at best, between two places.

    `fault_poll` and the round trips say how busy the machine was, too: where cores
    sleep, most of the time goes into waking one; where they do not, both threads
    may share a core, as they always do in `fault_same_core`.
    """

    size_bytes: int = Field(description="moved by each transfer")
    socket_bytes_per_second: Measured = Field(
        description="one TCP connection: 1 MiB writes from a warm buffer, read into another"
    )
    place_bytes_per_second: Measured = Field(
        description="the same, each MiB then placed by one UFFDIO_COPY in a shared memfd mapping"
    )
    fault_poll: Latency = Field(
        description="a fault, from touch to return, served by a thread that waits in poll()"
    )
    fault_same_core: Latency = Field(
        description="the same, on the core of who touches: no sleeping core has to be woken"
    )
    fault_spin: Latency = Field(description="the same, anywhere, the thread spins")
    byte_roundtrip: Latency = Field(description="a request of 24 bytes, answered by one byte")
    page_roundtrip: Latency = Field(description="a request of 24 bytes, answered by 24 + 4096")


class _Transfer(Model):
    """As the program prints it."""

    bytes: int
    us: float


class _Series(Model):
    """As the program prints it."""

    count: int
    p50_us: float
    p90_us: float
    p99_us: float


@dataclass(frozen=True, slots=True)
class Place:
    """Where one end is.

    :ivar address: a numeric one, to listen at or to come from.
    :ivar netns: path of a network namespace, e.g. /run/netns/NAME; None: our own.
    """

    address: str = "127.0.0.1"
    netns: Path | None = None

    def command(self, *words: str) -> tuple[str, ...]:
        """That command, run there."""
        return words if self.netns is None else ("nsenter", f"--net={self.netns}", "--", *words)


HERE = Place()


# --- measuring ----------------------------------------------------------------------------


def measure_limits(
    size_bytes: int = 512 << 20,
    source: Place = HERE,
    destination: Place = HERE,
    *,
    cache: Path,
    repeats: int = 5,
    events: int = 2000,
) -> Limits:
    """Measure all figures. Takes about two seconds a repeat on loopback.

    :param size_bytes: of each transfer; a multiple of the page size.
    :param source: where the sender and answerer is, which listens there.
    :param destination: where who asks and receives is.
    :param cache: folder for the built program; it is made.
    :param repeats: how often each figure is taken.
    :param events: faults and round trips in one series of them.
    :raise LimitsError: the program cannot be built or did not succeed.
    """
    program = build(cache)
    with _server(program, source) as port:
        bench = _Bench(program, destination, (source.address, str(port)), size_bytes, events)
        rounds = [bench.take() for _ in range(repeats)]
    return Limits(
        size_bytes=size_bytes,
        socket_bytes_per_second=Measured.of([each.socket for each in rounds]),
        place_bytes_per_second=Measured.of([each.place for each in rounds]),
        fault_poll=_latency([each.fault_poll for each in rounds]),
        fault_same_core=_latency([each.fault_same_core for each in rounds]),
        fault_spin=_latency([each.fault_spin for each in rounds]),
        byte_roundtrip=_latency([each.byte_roundtrip for each in rounds]),
        page_roundtrip=_latency([each.page_roundtrip for each in rounds]),
    )


def _latency(series: Sequence[_Series]) -> Latency:
    return Latency(
        p50_us=Measured.of([each.p50_us for each in series]),
        p90_us=Measured.of([each.p90_us for each in series]),
        p99_us=Measured.of([each.p99_us for each in series]),
    )


@dataclass(frozen=True, slots=True)
class _Round:
    """Every figure once. Transfers in bytes per second."""

    socket: float
    place: float
    fault_poll: _Series
    fault_same_core: _Series
    fault_spin: _Series
    byte_roundtrip: _Series
    page_roundtrip: _Series


@dataclass(frozen=True, slots=True)
class _Bench:
    """:ivar server: address and port."""

    program: Path
    destination: Place
    server: tuple[str, str]
    size_bytes: int
    events: int

    def take(self) -> _Round:
        return _Round(
            socket=self._transfer("socket", 0),
            place=self._transfer("place", self.size_bytes),
            fault_poll=self._faults("poll"),
            fault_same_core=self._faults("same-core"),
            fault_spin=self._faults("spin"),
            byte_roundtrip=self._roundtrips(1),
            page_roundtrip=self._roundtrips(_PAGE_ANSWER_BYTES),
        )

    def _transfer(self, name: str, placed_bytes: int) -> float:
        said = self._run(placed_bytes, name, *self.server, str(self.size_bytes))
        transfer = _Transfer.model_validate_json(said)
        return transfer.bytes / transfer.us * 1e6

    def _faults(self, waiting: str) -> _Series:
        said = self._run(self.events * PAGE_BYTES, "fault", waiting, str(self.events))
        return _Series.model_validate_json(said)

    def _roundtrips(self, answer_bytes: int) -> _Series:
        said = self._run(0, "roundtrip", *self.server, str(self.events), str(answer_bytes))
        return _Series.model_validate_json(said)

    def _run(self, placed_bytes: int, *words: str) -> str:
        """What the program prints, after its memory was warmed."""
        touch_and_free(placed_bytes + _BUFFERS_BYTES)
        seconds = _SECONDS + self.size_bytes / _SLOWEST_BYTES_PER_SECOND
        return _output(self.destination.command(str(self.program), *words), seconds)


@contextmanager
def _server(program: Path, place: Place) -> Iterator[int]:
    """The sender and answerer, while the context lasts; its port."""
    command = place.command(str(program), "serve", place.address)
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    except OSError as error:
        raise LimitsError(f"cannot run {command[0]}: {error.strerror}") from error
    try:
        assert process.stdout
        greeting = process.stdout.readline()
        if not greeting:
            raise _failure(command, process.wait(_SERVER_END_SECONDS), process.communicate()[1])
        yield json.loads(greeting)["port"]
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """It ends when its stdin is closed."""
    try:
        process.communicate(timeout=_SERVER_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


# --- the program --------------------------------------------------------------------------


def build(cache: Path) -> Path:
    """The program, built from the sources as they are unless that was done already.

    :raise LimitsError: there is no compiler or there are no sources, or they do not fit.
    """
    sources = sorted(_SOURCES.glob("*.[ch]"))
    if not sources:
        raise LimitsError(f"no sources in {_SOURCES}", remedy="run it in a checkout of qpostcopy")
    content = b"\0".join((" ".join(_CFLAGS).encode(), *(path.read_bytes() for path in sources)))
    program = cache / f"limits-{hashlib.sha256(content).hexdigest()[:12]}"
    if not program.exists():
        _compile([str(path) for path in sources if path.suffix == ".c"], program)
    return program


def _compile(sources: Sequence[str], program: Path) -> None:
    if shutil.which("gcc") is None:
        raise LimitsError(
            "no gcc in PATH: the program that measures the limits cannot be built",
            remedy="apt-get install gcc libc6-dev linux-libc-dev, or run scripts/setup",
        )
    program.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when it is whole: another benchmark may be looking for it.
    with tempfile.TemporaryDirectory(dir=program.parent) as work:
        built = Path(work) / "limits"
        _output(("gcc", *_CFLAGS, "-o", str(built), *sources), _BUILD_SECONDS)
        built.rename(program)


def _output(command: Sequence[str], seconds: float) -> str:
    """stdout of a command that succeeded."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except OSError as error:
        raise LimitsError(f"cannot run {command[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise LimitsError(f"{' '.join(command)}: not done in {seconds:.0f} s") from error
    if done.returncode:
        raise _failure(command, done.returncode, done.stderr)
    return done.stdout


def _failure(command: Sequence[str], code: int, said: str) -> LimitsError:
    """In one line: the first that names an error, or else the last that was said."""
    lines = said.strip().splitlines() or [f"exit code {code}"]
    named = (line for line in lines if "error" in line)
    return LimitsError(f"{' '.join(command)}: {next(named, lines[-1])}")
