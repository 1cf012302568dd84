"""A QEMU process of ours: started as an operator would, watched, and never left behind.

Guarantees: when `start` returns, QEMU answers; the QEMU dies with the process
that started it, even if that is killed (unless asked to outlive it); Ctrl-C at
the terminal does not reach it. Serial port and observer are sockets on which we
listen before QEMU exists and which it inherits, so there is nothing to wait
for: a QEMU that cannot start closes them, and its log says why. The QMP socket
of the plan is one that QEMU makes itself: its peer must be QEMU, not us.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from qpostcopy.errors import QpostcopyError
from qpostcopy.lab.observer import Observer, ObserverError, ObserverTimeoutError
from qpostcopy.netns import inside
from qpostcopy.vmas import read_vmas

TMPFS = Path("/dev/shm")
KERNEL_LINE = "console=ttyS0 quiet panic=-1 tsc=reliable mitigations=off"

# The death signal of prctl(2) is sent when the *thread* that forked ends, so one
# thread that lives as long as the process does starts every QEMU.
_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vm-starter")


class VmError(QpostcopyError):
    """QEMU did not start, or ended when it should not have."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One memory backend of guest RAM.

    :param mem_path: a directory on tmpfs, a file, or None: a memfd that the Vm
        makes and keeps, reached as /proc/self/fd/N.
    :param own_file: `mem_path` is a directory in which each Vm names a file of
        its own, which goes when it goes.
    """

    name: str
    size_bytes: int
    mem_path: Path | None = TMPFS
    share: bool = True
    kind: str = "memory-backend-file"
    more: str = ""
    own_file: bool = False


@dataclass(frozen=True, slots=True)
class Boot:
    """What the guest boots.

    :param initrd: None: the kernel is no Linux, and takes no command line.
    :param words: are added to the kernel's command line.
    """

    kernel: Path
    initrd: Path | None = None
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class VmSpec:
    """How a QEMU is to be started. Several backends become one NUMA node each.

    :ivar netns: the network namespace (ip-netns(8)) that QEMU runs in; None: ours.
    :ivar user: uid and gid that QEMU runs as, without any right; None: ours. The VM's directory
        then belongs to that user, as an operator's /run/vm would, and must be reachable for it.
    """

    backends: tuple[Backend, ...]
    incoming: bool = False
    paused: bool = False
    boot: Boot | None = None
    qemu: str = "qemu-system-x86_64"
    machine: str = "q35"
    accelerator: str = "tcg"
    more: tuple[str, ...] = ()
    user: int | None = None
    netns: str | None = None
    outlives_us: bool = False

    @property
    def ram_bytes(self) -> int:
        return sum(backend.size_bytes for backend in self.backends)


class Vm:
    """One QEMU.

    :param directory: where its sockets and its log go; must exist, short enough
        for a socket's address.
    """

    def __init__(self, name: str, spec: VmSpec, directory: Path) -> None:
        self.name = name
        self.spec = spec
        self.qmp_path = directory / f"{name}.qmp"
        self.observer_path = directory / f"{name}.observer"
        self.serial_path = directory / f"{name}.serial"
        self.log_path = directory / f"{name}.log"
        self._memfds: dict[str, int] = {}
        self._boot_fds: dict[Path, int] = {}
        self._ram_fds: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._observer: Observer | None = None
        self._serial: socket.socket | None = None

    # --- what it is --------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        assert self._process, "not started"
        return self._process.pid

    @property
    def observer(self) -> Observer:
        assert self._observer, "not started"
        return self._observer

    @property
    def serial(self) -> socket.socket:
        """Our end of the guest's serial port; connected since before it ran."""
        assert self._serial, "not started"
        return self._serial

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def ram_fd(self, backend_name: str) -> int:
        """The file under a shared backend of any kind (borrowed); QEMU's own, if it made it.

        Asked once while QEMU lives, it can be read after QEMU's end.
        """
        if backend_name in self._memfds:
            return self._memfds[backend_name]
        if backend_name not in self._ram_fds:
            backend = next(b for b in self.spec.backends if b.name == backend_name)
            self._ram_fds[backend_name] = self._open_mapped(backend)
        return self._ram_fds[backend_name]

    def _open_mapped(self, backend: Backend) -> int:
        """Through the mapping: its path may be gone, or another file's by now."""
        named = self._path_in_maps(backend)
        for vma in read_vmas(self.pid, attributes=False):
            if vma.path.startswith(named) and vma.length_bytes == backend.size_bytes:
                return os.open(
                    f"/proc/{self.pid}/map_files/{vma.start:x}-{vma.end:x}",
                    os.O_RDWR | os.O_CLOEXEC,
                )
        raise VmError(f"QEMU {self.name} maps no file {named}* of {backend.size_bytes} bytes")

    def _path_in_maps(self, backend: Backend) -> str:
        """What the path of its mapping begins with."""
        if backend.kind != "memory-backend-file":
            return "/memfd:"
        path = self._mem_path(backend)
        # QEMU makes and unlinks a file of its own in a directory.
        return f"{path}/qemu_back_mem.{backend.name}." if Path(path).is_dir() else path

    def _mem_path(self, backend: Backend) -> str:
        if backend.name in self._memfds:
            return f"/proc/self/fd/{self._memfds[backend.name]}"
        if backend.own_file and backend.mem_path:
            name = f"{self.name}-{backend.name}-{self.qmp_path.parent.name}"
            return str(backend.mem_path / name)
        return str(backend.mem_path)

    # --- life --------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start QEMU and return once it answers.

        :raise VmError: it ended or hung; the message carries the end of its log.
        """
        serial, self._serial = _listener_and_client(self.serial_path)
        observer, observer_client = _listener_and_client(self.observer_path)
        try:
            self._make_memfds()
            self._prepare_for_user()
            passed = [serial.fileno(), observer.fileno(), *self._memfds.values()]
            passed += self._boot_fds.values()
            self._process = self._spawn(self.arguments(serial.fileno(), observer.fileno()), passed)
        finally:
            serial.close()
            observer.close()
            self._close_boot_files()
        try:
            self._observer = Observer(observer_client)
        except (ObserverError, ObserverTimeoutError) as error:
            observer_client.close()
            self.kill()
            log = self.log_path.read_text(errors="replace").strip()
            raise VmError(f"QEMU {self.name} did not start: {log or error}") from error
        return self

    def wait(self, limit_seconds: float) -> int:
        """Wait until QEMU has ended; its exit status.

        :raise VmError: it has not ended in time.
        """
        assert self._process, "not started"
        try:
            return self._process.wait(limit_seconds)
        except subprocess.TimeoutExpired as error:
            raise VmError(f"QEMU {self.name} (pid {self.pid}) has not ended") from error

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to QEMU, e.g. SIGSTOP; nothing if it has ended."""
        assert self._process, "not started"
        self._process.send_signal(number)

    def kill(self) -> None:
        """End QEMU now, if it has not ended, and give back all that we hold of it."""
        if self._process:
            self._process.kill()
            self._process.wait()
        self.release()

    def release(self) -> None:
        """Give back our sockets and RAM files; QEMU, if it runs, runs on."""
        for held in (self._observer, self._serial):
            if held:
                held.close()
        for fds in (self._memfds, self._ram_fds):
            for fd in fds.values():
                os.close(fd)
            fds.clear()
        paths = [self.observer_path, self.serial_path, self.qmp_path]
        paths += [Path(self._mem_path(b)) for b in self.spec.backends if b.own_file]
        for path in paths:
            if not self.alive:
                path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    # --- how it is started -------------------------------------------------------------------

    def arguments(self, serial_fd: int, observer_fd: int) -> list[str]:
        """The command line of QEMU; everything that is not the laboratory's own is what
        docs/your-vm.md tells an operator to use."""
        spec = self.spec
        line = [spec.qemu, "-name", self.name, "-nodefaults", "-display", "none", "-no-reboot"]
        line += self._memory_arguments()
        line += ["-qmp", f"unix:{self.qmp_path},server=on,wait=off"]
        line += ["-chardev", f"socket,id=observer,fd={observer_fd},server=on,wait=off"]
        line += ["-mon", "chardev=observer,mode=control"]
        line += ["-chardev", f"socket,id=serial,fd={serial_fd},server=on,wait=off"]
        line += ["-serial", "chardev:serial"]
        if spec.boot:
            line += ["-kernel", self._boot_path(spec.boot.kernel)]
        if spec.boot and spec.boot.initrd:
            words = " ".join((KERNEL_LINE, *spec.boot.words))
            line += ["-initrd", self._boot_path(spec.boot.initrd), "-append", words]
        if spec.incoming:
            line += ["-incoming", "defer"]
        if spec.paused:
            line += ["-S"]
        return line + list(spec.more)

    def _memory_arguments(self) -> list[str]:
        backends = self.spec.backends
        machine = f"{self.spec.machine},accel={self.spec.accelerator}"
        if len(backends) == 1:
            machine += f",memory-backend={backends[0].name}"
        line = ["-machine", machine, "-m", f"{self.spec.ram_bytes}b"]
        for backend in backends:
            line += ["-object", self._backend_argument(backend)]
            if len(backends) > 1:
                line += ["-numa", f"node,memdev={backend.name}"]
        return line

    def _backend_argument(self, backend: Backend) -> str:
        argument = f"{backend.kind},id={backend.name},size={backend.size_bytes}b"
        if backend.kind == "memory-backend-file":
            argument += f",mem-path={self._mem_path(backend)}"
        argument += f",share={'on' if backend.share else 'off'}"
        return f"{argument},{backend.more}" if backend.more else argument

    def _make_memfds(self) -> None:
        for backend in self.spec.backends:
            if backend.mem_path is None and backend.kind == "memory-backend-file":
                fd = os.memfd_create(f"{self.name}-{backend.name}")
                os.ftruncate(fd, backend.size_bytes)
                self._memfds[backend.name] = fd

    def _prepare_for_user(self) -> None:
        """What another user needs of ours: the directory, and files below closed directories."""
        if self.spec.user is None:
            return
        os.chown(self.qmp_path.parent, self.spec.user, self.spec.user)
        boot = self.spec.boot
        for path in filter(None, (boot.kernel, boot.initrd) if boot else ()):
            self._boot_fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def _close_boot_files(self) -> None:
        for fd in self._boot_fds.values():
            os.close(fd)
        self._boot_fds.clear()

    def _boot_path(self, path: Path) -> str:
        return f"/proc/self/fd/{self._boot_fds[path]}" if path in self._boot_fds else str(path)

    def _spawn(self, arguments: list[str], passed_fds: list[int]) -> subprocess.Popen[bytes]:
        options = [] if self.spec.outlives_us else ["--pdeathsig", "KILL"]
        if (user := self.spec.user) is not None:
            options += [f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        if options:
            arguments = ["setpriv", *options, "--", *arguments]
        # First of all: entering takes rights that setpriv may give up.
        arguments = [*inside(self.spec.netns), *arguments]

        def spawn() -> subprocess.Popen[bytes]:
            with self.log_path.open("wb") as log:
                return subprocess.Popen(
                    arguments,
                    pass_fds=passed_fds,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    # Its own session: Ctrl-C is for us.
                    start_new_session=True,
                )

        return _starter.submit(spawn).result()


def _listener_and_client(path: Path) -> tuple[socket.socket, socket.socket]:
    """A listening socket for QEMU to inherit, and our connection to it, already made."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    client = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        listener.listen(1)
        client.connect(str(path))
    except OSError:
        listener.close()
        client.close()
        raise
    return listener, client
