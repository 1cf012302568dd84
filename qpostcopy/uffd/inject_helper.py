"""The privileged, short-lived process behind attach.py.

`python -m qpostcopy.uffd.inject_helper FD` reads one request from the socket FD,
does it, answers once and ends. Nothing can end it half way but SIGKILL: all
signals are blocked and the OOM killer is told to look elsewhere, because between
borrowing a thread's registers and giving them back, our death is QEMU's.

Whatever was created in QEMU and could not be handed over is closed there again.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

from qpostcopy.core import (
    CoreError,
    LaneTimeoutError,
    RefusedByCoreError,
    TargetGoneError,
    inject_syscall,
)
from qpostcopy.errors import QpostcopyError
from qpostcopy.process import Process
from qpostcopy.uffd.attach import (
    DEVICE,
    ERRORS,
    USERFAULTFD_LINK,
    AttachError,
    AttachGoneError,
    AttachNotPermittedError,
    AttachRefusedError,
    AttachTimeoutError,
    find_userfaultfds,
    is_device,
    is_initialized,
)

# x86_64, which inject.c demands; pidfd_getfd has one number everywhere.
SYS_CLOSE = 3
SYS_IOCTL = 16
SYS_USERFAULTFD = 323
SYS_PIDFD_GETFD = 438
#: For closing what could not be handed over.
UNDO_MS = 5000
#: _IO(USERFAULTFD_IOC, 0) of linux/userfaultfd.h
USERFAULTFD_IOC_NEW = 0xAA << 8

_PTRACE_REMEDY = (
    "run as root, or with CAP_SYS_PTRACE in QEMU's user namespace; a security module "
    "(Yama, SELinux, AppArmor) may forbid it too"
)
_FILTER_REMEDY = (
    "run as root (CAP_SYS_ADMIN) and under no seccomp filter of our own (containers and systemd's "
    "SystemCallFilter= have one), on a kernel with CONFIG_CHECKPOINT_RESTORE; or start QEMU "
    "without -sandbox"
)
#: errno of a call that QEMU ran -> what can be done about it.
_REMEDIES = {
    errno.ENOSYS: "a kernel with CONFIG_USERFAULTFD is needed",
    errno.EMFILE: "QEMU is at its limit of open files: `prlimit --nofile=... --pid ...` raises it",
    errno.ENFILE: "the machine is at its limit of open files: sysctl fs.file-max",
}


class Target:
    """One QEMU, proven to be the one that is meant. Close it."""

    def __init__(self, process: Process, deadline_ms: int) -> None:
        pidfd = process.open_pidfd()
        if pidfd is None:
            raise AttachGoneError(f"process {process.pid} has ended")
        self.process = process
        self.pid = process.pid
        self._pidfd = pidfd
        self._deadline_ms = deadline_ms

    def close(self) -> None:
        os.close(self._pidfd)

    def take_time(self) -> None:
        """Whoever asked does not wait any more, and what was begun must be undone."""
        self._deadline_ms = max(self._deadline_ms, UNDO_MS)

    def run(self, number: int, *args: int) -> int:
        """The raw result of a system call run by QEMU.

        :raise AttachError: a leaf that says why it did not run, and what to do.
        """
        try:
            return inject_syscall(
                self.pid,
                number,
                args,
                self._deadline_ms,
                start_ticks=self.process.start_ticks,
            )
        except CoreError as error:
            raise explain(error, self.pid) from error

    def duplicate(self, fd: int) -> int:
        """Our own copy of one of QEMU's descriptors, close-on-exec."""
        libc = ctypes.CDLL(None, use_errno=True)
        copy = int(libc.syscall(SYS_PIDFD_GETFD, self._pidfd, fd, 0))
        if copy >= 0:
            return copy
        reason = ctypes.get_errno()
        message = f"pidfd_getfd of descriptor {fd} of process {self.pid}: {os.strerror(reason)}"
        if reason == errno.ESRCH:
            raise AttachGoneError(message)
        if reason == errno.EPERM:
            raise AttachRefusedError(message, remedy=_PTRACE_REMEDY)
        raise AttachError(message)


def explain(error: CoreError, pid: int) -> AttachError:
    """The core's word, and what an operator can do about it."""
    said = f"cannot inject into process {pid}: {error.operation}"
    if isinstance(error, TargetGoneError):
        return AttachGoneError(said)
    if isinstance(error, LaneTimeoutError):
        return AttachTimeoutError(
            said, remedy="QEMU hangs in the kernel, most likely on its storage: look there first"
        )
    if not isinstance(error, RefusedByCoreError):
        return AttachError(f"{said}: {error}")
    # inject.c gives the tracer as the address, and the kernel's no as the errno.
    if tracer := error.address:
        remedy = f"end the debugger or tracer (pid {tracer}) that is attached to it"
        return AttachRefusedError(f"{said} ({tracer}: {command_of(tracer)})", remedy=remedy)
    if error.error_number == errno.EACCES:
        return AttachRefusedError(said, remedy=_FILTER_REMEDY)
    if error.error_number == errno.EPERM:
        return AttachRefusedError(said, remedy=_PTRACE_REMEDY)
    if is_stopped(pid):
        remedy = f"somebody sent SIGSTOP: `kill -CONT {pid}` lets it go on"
        return AttachRefusedError(said, remedy=remedy)
    machine = platform.machine()
    remedy = (
        f"only a 64-bit x86 QEMU that nobody stops can be attached to; this machine is {machine}"
    )
    return AttachRefusedError(said, remedy=remedy)


def is_stopped(pid: int) -> bool:
    """Whether it is stopped by a signal now."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "T"


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "in another pid namespace" if pid == 0 else "gone"


# --- what can be asked --------------------------------------------------------------------


def create(target: Target, lent_fd: int) -> int:
    """Have QEMU create a userfaultfd; its number there.

    :param lent_fd: number there of an open /dev/userfaultfd; -1: it needs none.
    :raise AttachNotPermittedError: it needs one.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    if lent_fd < 0:
        what, fd = "userfaultfd()", target.run(SYS_USERFAULTFD, flags)
    else:
        require_device(target, lent_fd)
        what = f"USERFAULTFD_IOC_NEW on descriptor {lent_fd}"
        fd = target.run(SYS_IOCTL, lent_fd, USERFAULTFD_IOC_NEW, flags)
    if fd >= 0:
        return fd
    said = f"{what} in process {target.pid}: {os.strerror(-fd)}"
    if -fd == errno.EPERM and lent_fd < 0:
        remedy = "lend it /dev/userfaultfd, or set sysctl vm.unprivileged_userfaultfd=1"
        raise AttachNotPermittedError(said, remedy=remedy)
    if remedy_or_none := _REMEDIES.get(-fd):
        raise AttachRefusedError(said, remedy=remedy_or_none)
    raise AttachError(said)


def obtain(target: Target, lent_fd: int) -> tuple[int, int]:
    """(number in QEMU, our duplicate) of a new userfaultfd."""
    before = find_userfaultfds(target.pid)
    fd = create(target, lent_fd)
    if fd in before or fd not in find_userfaultfds(target.pid):
        # A result that is not what the kernel shows: nothing may be built on it.
        raise AttachError(f"process {target.pid} reported descriptor {fd}, which is not new there")
    try:
        return fd, target.duplicate(fd)
    except AttachError:
        target.take_time()
        close(target, fd)
        raise


def adopt(target: Target, fd: int) -> int:
    """Our duplicate of a userfaultfd that was initialised before."""
    require_userfaultfd(target, fd)
    if not is_initialized(target.pid, fd):
        raise AttachError(
            f"userfaultfd {fd} of process {target.pid} was never initialised",
            remedy="it is the rest of an injection that was cut short: close it, attach anew",
        )
    return target.duplicate(fd)


def close(target: Target, fd: int) -> None:
    """Have QEMU close a userfaultfd, and nothing else."""
    require_userfaultfd(target, fd)
    result = target.run(SYS_CLOSE, fd)
    # Linux has closed it even when it says EINTR or EIO: close(2).
    if result == -errno.EBADF:
        raise AttachGoneError(f"descriptor {fd} of process {target.pid} was closed meanwhile")


def require_userfaultfd(target: Target, fd: int) -> None:
    link = Path(f"/proc/{target.pid}/fd/{fd}")
    try:
        kind = str(link.readlink())
    except OSError as error:
        raise AttachGoneError(f"process {target.pid} has no descriptor {fd}") from error
    if kind != USERFAULTFD_LINK:
        raise AttachGoneError(f"descriptor {fd} of process {target.pid} is no userfaultfd: {kind}")


def require_device(target: Target, fd: int) -> None:
    try:
        if is_device(Path(f"/proc/{target.pid}/fd/{fd}")):
            return
    except OSError as error:
        raise AttachGoneError(f"descriptor {fd} of process {target.pid}: {error}") from error
    raise AttachGoneError(f"descriptor {fd} of process {target.pid} is not {DEVICE}")


# --- the process --------------------------------------------------------------------------


def answer(sock: socket.socket, target: Target, what: str, fd: int) -> None:
    """Do what was asked and hand the result over, or undo it."""
    if what == "close":
        close(target, fd)
        send(sock, {"value": fd}, [])
    elif what == "adopt":
        send(sock, {"value": fd}, [adopt(target, fd)])
    else:
        created, copy = obtain(target, fd)
        try:
            send(sock, {"value": created}, [copy])
        except OSError:  # whoever asked is gone: leave nothing behind
            target.take_time()
            close(target, created)
            raise


def send(sock: socket.socket, reply: dict[str, object], fds: list[int]) -> None:
    socket.send_fds(sock, [json.dumps(reply).encode()], fds)


def serve(sock: socket.socket) -> None:
    request = json.loads(sock.recv(4096))
    process = Process(pid=request["pid"], start_ticks=request["start_ticks"])
    try:
        target = Target(process, request["deadline_ms"])
        try:
            answer(sock, target, request["what"], request["fd"])
        finally:
            target.close()
    except (QpostcopyError, OSError) as error:
        kind = next((name for name, leaf in ERRORS.items() if type(error) is leaf), "failed")
        remedy = error.remedy if isinstance(error, QpostcopyError) else None
        with suppress(OSError):
            send(sock, {"error": kind, "message": str(error), "remedy": remedy}, [])


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    with suppress(OSError):  # without the right to, we are as likely to be killed as anyone
        Path("/proc/self/oom_score_adj").write_text("-1000")
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        serve(sock)


if __name__ == "__main__":
    main()
