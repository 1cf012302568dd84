"""The host's end of the guest's serial port: what the guest reports, stamped by our clock.

A guest that moves goes on talking on another QEMU's serial port, in the middle
of a line if need be. `Guest` listens to all the ports it was given and joins
them into one stream, the older port first; a thread of its own stamps every
report with `time.monotonic()` as it comes in. Lines that are not the workload's
(the kernel's) are kept, for trouble. The protocol is in scripts/guest/workload.c.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from qpostcopy.errors import QpostcopyError, UsageError

T = TypeVar("T")

_OTHER_LINES_KEPT = 50
_CACHE = Path(__file__).resolve().parents[2] / ".cache" / "guest"


class GuestError(QpostcopyError):
    """The guest died, or did not say in time what was expected of it."""


class GuestImageError(UsageError):
    """There is no guest kernel and initramfs to boot."""


class Report(NamedTuple):
    """One line of progress: by our clock, and by the guest's. `port`: 0 is the source's."""

    port: int
    host_s: float
    guest_us: int
    sequence: int
    operations: int
    late_us: int
    corrupt: int


class Ready(NamedTuple):
    """Said once: memory is filled, the workload runs. `rate` 0: as fast as it can."""

    workload: str
    rate: int
    data_pages: int
    zero_pages: int
    total_pages: int


class Verified(NamedTuple):
    """Said after every byte of `pages` pages was checked."""

    pages: int
    corrupt: int


class Work(NamedTuple):
    """How far a device is (scripts/guest/devices.h): operations that came back right, and lost."""

    operations: int
    lost: int


class Guest:
    """Listens to one guest, wherever it runs.

    :param ports: connected sockets of its serial ports, borrowed; more may be
        added. They must be closed after `close`.
    """

    def __init__(self, *ports: socket.socket) -> None:
        self._changed = threading.Condition()
        self._ports: list[socket.socket] = []
        self._speaking: socket.socket | None = None
        self._buffer = b""
        self._reports: list[Report] = []
        self._ready: Ready | None = None
        self._verified: list[Verified] = []
        self._rates: list[int] = []
        self._work: dict[str, Work] = {}
        self._corrupt_lines: list[str] = []
        self._other_lines: deque[str] = deque(maxlen=_OTHER_LINES_KEPT)
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        for port in ports:
            self.add(port)
        self._thread = threading.Thread(target=self._listen, name="guest")
        self._thread.start()

    def add(self, port: socket.socket) -> None:
        """Listen to one more port, e.g. the destination's."""
        with self._changed:
            self._ports.append(port)
        self._wake.send(b"+")

    def close(self) -> None:
        """Stop listening."""
        self._wake.send(b"q")
        self._thread.join()
        self._selector.close()
        self._wake.close()
        self._woken.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- what it said ------------------------------------------------------------------------

    @property
    def reports(self) -> list[Report]:
        """All reports so far, a copy."""
        with self._changed:
            return list(self._reports)

    @property
    def work(self) -> dict[str, Work]:
        """How far each device is, by its name, a copy; empty without the word devices=on."""
        with self._changed:
            return dict(self._work)

    @property
    def corrupt_lines(self) -> list[str]:
        """What the guest said of its first corrupt pages."""
        with self._changed:
            return list(self._corrupt_lines)

    @property
    def other_lines(self) -> list[str]:
        """The last lines that were not the workload's: the kernel's, usually."""
        with self._changed:
            return list(self._other_lines)

    def wait_ready(self, limit_seconds: float) -> Ready:
        """Wait until memory is filled and the workload runs."""
        return self.wait_for(lambda: self._ready, "be ready", limit_seconds)

    def wait_work(self, at_least: Mapping[str, int], limit_seconds: float) -> None:
        """Wait until each of these devices has done that many operations."""

        def find() -> bool | None:
            done = {name: work.operations for name, work in self._work.items()}
            return all(done.get(name, 0) >= least for name, least in at_least.items()) or None

        try:
            self.wait_for(find, "work its devices", limit_seconds)
        except GuestError as error:
            raise GuestError(f"{error}; wanted {dict(at_least)}, got {self.work}") from error

    def wait_report_after(
        self, host_s: float, limit_seconds: float, *, port: int | None = None
    ) -> Report:
        """The first report that came in after a moment of our clock (on that port)."""

        def find() -> Report | None:
            # From the end: there may be many, and what is waited for is new.
            found = None
            for report in reversed(self._reports):
                if report.host_s <= host_s:
                    break
                if port in (None, report.port):
                    found = report
            return found

        return self.wait_for(find, "report", limit_seconds)

    def wait_for(self, find: Callable[[], T | None], what: str, limit_seconds: float) -> T:
        """Wait until `find`, called under the lock after every change, finds something.

        :raise GuestError: it did not in time.
        """
        deadline = time.monotonic() + limit_seconds
        with self._changed:
            while (found := find()) is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    last = "; ".join(list(self._other_lines)[-3:]) or "nothing else was said"
                    raise GuestError(f"the guest did not {what} within {limit_seconds} s ({last})")
                self._changed.wait(left)
        return found

    # --- commands ----------------------------------------------------------------------------

    def verify(self, limit_seconds: float) -> Verified:
        """Have every byte of the guest's memory checked; its requests wait meanwhile."""
        return self._ask("v", self._verified, "verify its memory", limit_seconds)

    def set_rate(self, requests_per_second: int, limit_seconds: float = 10.0) -> None:
        """Set the workload's rate (0: as fast as it can); returns once it is in force."""
        self._ask(f"r {requests_per_second}", self._rates, "set its rate", limit_seconds)

    def power_off(self) -> None:
        self._command("q")

    def _ask(self, line: str, answers: list[T], what: str, limit_seconds: float) -> T:
        """Send a command and wait for one more answer of its kind."""
        with self._changed:
            before = len(answers)
        self._command(line)
        return self.wait_for(
            lambda: answers[before] if len(answers) > before else None, what, limit_seconds
        )

    def _command(self, line: str) -> None:
        with self._changed:
            port = self._speaking
        if port is None:
            raise GuestError("the guest has not said anything yet")
        try:
            port.sendall(line.encode() + b"\n")
        except OSError as error:
            raise GuestError("the guest's serial port is closed") from error

    # --- the thread --------------------------------------------------------------------------

    def _listen(self) -> None:
        while True:
            ready = {key.fileobj for key, _ in self._selector.select()}
            now_s = time.monotonic()
            if self._woken in ready and not self._take_ports():
                return
            # Older ports first: what the source still had to say precedes the destination.
            for port in [port for port in self._ports if port in ready]:
                self._hear(port, now_s)

    def _take_ports(self) -> bool:
        """Begin to listen to ports that were added. False: we are to end."""
        if b"q" in self._woken.recv(64):
            return False
        known = {key.fileobj for key in self._selector.get_map().values()}
        for port in self._ports:
            if port not in known:
                port.setblocking(True)
                self._selector.register(port, selectors.EVENT_READ)
        return True

    def _hear(self, port: socket.socket, now_s: float) -> None:
        try:
            part = port.recv(65536)
        except ConnectionResetError:
            part = b""
        if not part:
            self._selector.unregister(port)
            return
        *lines, self._buffer = (self._buffer + part).split(b"\n")
        with self._changed:
            self._speaking = port
            index = self._ports.index(port)
            for line in lines:
                self._take_line(line.decode(errors="replace").strip(), index, now_s)
            self._changed.notify_all()

    def _take_line(self, line: str, port: int, now_s: float) -> None:
        kind, _, rest = line.partition(" ")
        try:
            match kind:
                case "@r":
                    sequence, guest_us, operations, late_us, corrupt = map(int, rest.split())
                    self._reports.append(
                        Report(port, now_s, guest_us, sequence, operations, late_us, corrupt)
                    )
                case "@ready":
                    workload, *numbers = rest.split()
                    rate, data_pages, zero_pages, total_pages = map(int, numbers)
                    self._ready = Ready(workload, rate, data_pages, zero_pages, total_pages)
                case "@v":
                    pages, corrupt = map(int, rest.split())
                    self._verified.append(Verified(pages, corrupt))
                case "@d":
                    name, *numbers = rest.split()
                    operations, lost = map(int, numbers)
                    self._work[name] = Work(operations, lost)
                case "@rate":
                    self._rates.append(int(rest))
                case "@c":
                    self._corrupt_lines.append(rest)
                case _:
                    self._other_lines.append(line)
        except ValueError:
            # The kernel may print into the middle of a line of ours.
            self._other_lines.append(line)


def find_image(kernel: Path | None = None, initrd: Path | None = None) -> tuple[Path, Path]:
    """The guest to boot: what was given, else what scripts/setup left in this checkout.

    :raise GuestImageError: one of them is not there; the remedy says how to get it.
    """
    given = ", or pass --kernel and --initrd"
    return (
        _existing(kernel or _CACHE / "vmlinuz", given),
        _existing(initrd or _CACHE / "initrd", given),
    )


def find_bare_image() -> Path:
    """The guest without an operating system (scripts/guest/bare), which any KVM can run.

    :raise GuestImageError: it is not there; the remedy says how to get it.
    """
    return _existing(_CACHE / "bare.elf")


def _existing(path: Path, or_else: str = "") -> Path:
    if not path.is_file():
        raise GuestImageError(
            f"no guest to boot: {path} does not exist",
            remedy=f"run scripts/setup in a checkout of qpostcopy, which makes one{or_else}",
        )
    return path
