"""Unix sockets: connecting with a deadline, asking who is there, listening in private."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import struct
from enum import StrEnum
from pathlib import Path

from qpostcopy.errors import QpostcopyError, RefusedError

#: A listener whose backlog is full says EAGAIN, and nothing tells when that ends.
_BACKLOG_POLL_SECONDS = 0.02
_BACKLOG = 16


class SocketInUseError(RefusedError):
    """Another process already listens on this control socket."""


class ConnectFailure(StrEnum):
    """Why connecting did not work."""

    ABSENT = "absent"
    REFUSED = "refused"
    FORBIDDEN = "forbidden"
    SILENT = "silent"
    FOREIGN = "foreign"
    INVALID = "invalid"


class CannotConnectError(QpostcopyError):
    """Connecting did not work; Monitor and EndpointClient turn it into leaves of theirs."""

    def __init__(self, failure: ConnectFailure, message: str) -> None:
        super().__init__(message)
        self.failure = failure


async def connect_socket(path: Path, what: str, deadline: float) -> socket.socket:
    """A connected stream socket.

    asyncio's own connect takes the EAGAIN of a full backlog on a unix socket for
    "in progress" and then reports success, so we ask by ourselves.
    """
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        while True:
            try:
                sock.connect(str(path))
                return sock
            except BlockingIOError as error:
                if loop.time() >= deadline:
                    message = f"{what} {path} does not accept: its backlog is full"
                    raise CannotConnectError(ConnectFailure.SILENT, message) from error
            await asyncio.sleep(_BACKLOG_POLL_SECONDS)
    except OSError as error:
        sock.close()
        message = f"{what} {path}: {error.strerror or error}"
        raise CannotConnectError(_failure_of(error), message) from error
    except BaseException:
        sock.close()
        raise


def _failure_of(error: OSError) -> ConnectFailure:
    """The one place that classifies the errno of a connect."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return ConnectFailure.ABSENT
    if error.errno in (errno.EACCES, errno.EPERM):
        return ConnectFailure.FORBIDDEN
    if error.errno == errno.ECONNREFUSED:
        return ConnectFailure.REFUSED
    return ConnectFailure.INVALID


def peer_pid(sock: socket.socket) -> int:
    """The process at the other end of a unix socket (for a listener: who called listen)."""
    size = struct.calcsize("3i")
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return int(struct.unpack("3i", credentials)[0])


def bind_private(path: Path) -> socket.socket:
    """A listening, non-blocking unix socket of mode 0600.

    Its directory must be the caller's alone: that, not the mode, is what keeps
    others away before the mode is set.

    :raise SocketInUseError: somebody listens there.
    :raise RefusedError: the directory is open to others, or the path is no socket.
    """
    _check_directory(path.parent)
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise RefusedError(f"cannot listen on {path}: {error.strerror or error}") from error
    finally:
        os.umask(before)
    return listener


def _check_directory(directory: Path) -> None:
    try:
        status = directory.stat()
    except OSError as error:
        raise RefusedError(f"{directory}: {error.strerror}") from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise RefusedError(
            f"{directory} is open to other users; a control socket there could be replaced",
            remedy=f"chmod 700 {directory}",
        )


def _remove_stale(path: Path) -> None:
    """Remove a socket file that nobody listens on any more."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise RefusedError(f"{path} exists and is not a socket", remedy="move it away")
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                path.unlink(missing_ok=True)
                return
            if error.errno != errno.EAGAIN:
                raise RefusedError(f"{path}: {error.strerror}") from error
    raise SocketInUseError(
        f"another process already listens on {path}", remedy="end it, or use its socket"
    )
