"""Get hold of a userfaultfd that belongs to a QEMU's address space.

Why: a userfaultfd acts on the address space of the process that created it, and
stock QEMU hands none out. So QEMU is made to create one (core/inject.c), and we
take a duplicate. QEMU's own copy stays open on purpose: it keeps the registered
ranges alive when we are killed, and the next handler finds it there (`adopt`).

What is privileged (ptrace, pidfd_getfd) is done by a short-lived process of its
own, inject_helper.py; the descriptor comes back over a socket. Guarantees: a
recycled pid is never touched (start time and pidfd are both checked); no
descriptor but a userfaultfd is ever taken or closed; the helper is not killed,
not even when it is late: its death could leave QEMU with borrowed registers.

The order that survives a crash at any point (registration.py keeps to it): write
down `find_userfaultfds`, `obtain`, write down `fd_in_target`, then UFFDIO_API. A
crash before the second note leaves an *orphan*: not in the list of the first,
and never initialised, which tells it from one that QEMU opened itself since.
`find_orphans` names it. After the second note the number is known. Either is
ended by `close_in_target`.

Two ways. A QEMU that may create userfaultfds (root, or sysctl
vm.unprivileged_userfaultfd=1) is made to call userfaultfd(2). Any other says
EPERM, which changes nothing; then somebody lends it an open /dev/userfaultfd
(lending.py) and it is made to ask that for one. Which, is found by trying: what
decides (capabilities in which user namespace, sysctl, security modules) is the
kernel's to know, and a QEMU that needs no loan should not depend on its monitor.
"""

from __future__ import annotations

import array
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qpostcopy.errors import QpostcopyError
from qpostcopy.process import Process

USERFAULTFD_LINK = "anon_inode:[userfaultfd]"
#: Whoever has it open may create userfaultfds that see the kernel's faults too (Linux 6.1).
DEVICE = Path("/dev/userfaultfd")
#: Starting an interpreter and importing the core, on a busy machine.
HELPER_START_SECONDS = 15.0
DEADLINE_SECONDS = 5.0
_MESSAGE_BYTES = 4096


class AttachError(QpostcopyError):
    """No userfaultfd of that QEMU could be had, taken or closed."""


class AttachRefusedError(AttachError):
    """QEMU is in a state that we do not touch (stopped, traced), or is not ours to touch."""


class AttachNotPermittedError(AttachRefusedError):
    """The kernel lets this QEMU create no userfaultfd by itself; nothing was changed."""


class AttachGoneError(AttachError):
    """The QEMU process, or the descriptor in it, is not there any more."""


class AttachTimeoutError(AttachError):
    """QEMU could not be stopped for an instant before the deadline."""


class HelperLostError(AttachError):
    """The helper was killed: nobody knows what it has made QEMU do."""


#: What the helper reports -> what is raised here.
ERRORS: dict[str, type[AttachError]] = {
    "failed": AttachError,
    "refused": AttachRefusedError,
    "not-permitted": AttachNotPermittedError,
    "gone": AttachGoneError,
    "timeout": AttachTimeoutError,
}


@dataclass(frozen=True, slots=True)
class Obtained:
    """A userfaultfd, seen from both sides.

    :ivar fd_in_target: its number inside QEMU; stays open there.
    :ivar uffd: our duplicate (taken: the caller closes it), close-on-exec.
    """

    fd_in_target: int
    uffd: int


def obtain(
    pid: int,
    deadline_seconds: float = DEADLINE_SECONDS,
    *,
    start_ticks: int | None = None,
    lent_fd: int | None = None,
) -> Obtained:
    """Have process `pid` create a userfaultfd, and take a duplicate. UFFDIO_API is still to do.

    :param start_ticks: when the process started, as `Process` has it; None: as it is now.
    :param lent_fd: number there of an open /dev/userfaultfd, to ask for one.
    :raise AttachNotPermittedError: it may not, without such a descriptor.
    :raise AttachRefusedError: stopped by a signal, traced, not ours to trace, not 64-bit.
    :raise AttachGoneError: there is no such process any more.
    :raise AttachTimeoutError: it could not be stopped in time.
    :raise HelperLostError: it may have created one, or be about to.
    """
    lent = -1 if lent_fd is None else lent_fd
    reply, fd = _ask_helper("obtain", pid, lent, deadline_seconds, start_ticks)
    return Obtained(fd_in_target=reply, uffd=_received(fd))


def adopt(
    pid: int,
    fd_in_target: int,
    deadline_seconds: float = DEADLINE_SECONDS,
    *,
    start_ticks: int | None = None,
) -> int:
    """Take a duplicate of the userfaultfd that a handler before us left in QEMU (taken).

    It is initialised: never UFFDIO_API it again.

    :raise AttachGoneError: the process, or a userfaultfd of that number, is not there.
    :raise AttachError: it was never initialised: an orphan, to be closed.
    """
    _, fd = _ask_helper("adopt", pid, fd_in_target, deadline_seconds, start_ticks)
    return _received(fd)


def close_in_target(
    pid: int,
    fd_in_target: int,
    deadline_seconds: float = DEADLINE_SECONDS,
    *,
    start_ticks: int | None = None,
) -> None:
    """Have QEMU close its copy. With the last copy, every range of it is unregistered.

    :raise AttachRefusedError, AttachGoneError, AttachTimeoutError: as `obtain` does.
    """
    _ask_helper("close", pid, fd_in_target, deadline_seconds, start_ticks)


def find_userfaultfds(pid: int) -> tuple[int, ...]:
    """Numbers of the userfaultfds that the process holds, its own ones included.

    :raise OSError: the process is gone, or /proc does not let us look.
    """
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since
            if str(entry.readlink()) == USERFAULTFD_LINK:
                found.append(int(entry.name))
    return tuple(sorted(found))


def find_devices(pid: int) -> tuple[int, ...]:
    """Numbers of the descriptors of /dev/userfaultfd that the process holds.

    :raise OSError: the process is gone, or there is no such device.
    """
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            if is_device(entry):
                found.append(int(entry.name))
    return tuple(sorted(found))


def is_device(path: Path) -> bool:
    """Whether it leads to /dev/userfaultfd, whatever it is called there."""
    status = path.stat()
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == DEVICE.stat().st_rdev


def is_initialized(pid: int, fd_in_target: int) -> bool:
    """Whether UFFDIO_API was done on it.

    fdinfo has a line `API: aa:FEATURES:IOCTLS` (userfaultfd_show_fdinfo in fs/userfaultfd.c);
    no feature at all means never: we always ask for some, as does QEMU.

    :raise OSError: no such process or descriptor.
    """
    text = Path(f"/proc/{pid}/fdinfo/{fd_in_target}").read_text()
    for line in text.splitlines():
        if line.startswith("API:"):
            return int(line.split()[1].split(":")[1], 16) != 0
    return False


def find_orphans(pid: int, before: tuple[int, ...]) -> tuple[int, ...]:
    """Userfaultfds that a crash left between injection and the note of their number.

    :param before: what `find_userfaultfds` said just before that injection.
    """
    new = (fd for fd in find_userfaultfds(pid) if fd not in before)
    return tuple(fd for fd in new if not is_initialized(pid, fd))


# --- the helper process -------------------------------------------------------------------


def _ask_helper(
    what: str, pid: int, fd: int, deadline_seconds: float, start_ticks: int | None
) -> tuple[int, int | None]:
    """Have one thing done; the number that it returns, and a descriptor if one came."""
    target = Process.of(pid)
    if target is None or start_ticks not in (None, target.start_ticks):
        raise AttachGoneError(f"process {pid} has ended")
    request = {
        "what": what,
        "pid": pid,
        "start_ticks": target.start_ticks,
        "fd": fd,
        "deadline_ms": int(deadline_seconds * 1000),
    }
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with its:
            process = _start_helper(its)
        ours.settimeout(deadline_seconds + HELPER_START_SECONDS)
        try:
            ours.send(json.dumps(request).encode())
            message, fds = _receive(ours)
        except TimeoutError as error:
            threading.Thread(target=process.wait, name="inject-helper", daemon=True).start()
            raise AttachTimeoutError(
                f"the injection helper (pid {process.pid}) is late; it may still hold QEMU {pid}",
                remedy="do not kill it: it lets QEMU go as soon as QEMU's system call returns",
            ) from error
        except OSError:  # it ended before it read what we asked
            message, fds = b"", []
    status = process.wait()
    return _read_reply(message, fds, status)


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One message and its descriptor. (socket.recv_fds ignores its flags in Python 3.11.)"""
    fds = array.array("i")
    space = socket.CMSG_SPACE(fds.itemsize)
    message, ancillary, _, _ = sock.recvmsg(_MESSAGE_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data)
    return message, list(fds)


def _start_helper(sock: socket.socket) -> subprocess.Popen[bytes]:
    """In a session of its own: a Ctrl-C for us must not reach it in mid-injection."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "qpostcopy.uffd.inject_helper", str(sock.fileno())],
        pass_fds=[sock.fileno()],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def _read_reply(message: bytes, fds: list[int], status: int) -> tuple[int, int | None]:
    if not message:
        raise HelperLostError(f"the injection helper ended (status {status}) without a word")
    reply = json.loads(message)
    if "error" in reply:
        for fd in fds:
            os.close(fd)
        raise ERRORS[reply["error"]](reply["message"], remedy=reply["remedy"])
    return int(reply["value"]), fds[0] if fds else None


def _received(fd: int | None) -> int:
    assert fd is not None, "the helper answered without a descriptor"
    return fd
