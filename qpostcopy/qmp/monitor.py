"""QEMU's monitor: the one client that a QEMU socket serves, and what may go wrong with it.

A socket that another client holds accepts the connection and never greets, as
does a QEMU whose main loop is blocked; there is no telling them apart from
outside, so the message names both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from qpostcopy.errors import RefusedError
from qpostcopy.qmp.connection import (
    CONNECT_SECONDS,
    CommandError,
    Connection,
)
from qpostcopy.qmp.sockets import CannotConnectError, ConnectFailure

__all__ = [
    "CommandError",
    "Monitor",
    "MonitorAbsentError",
    "MonitorConnectError",
    "MonitorForeignError",
    "MonitorHeldError",
]


class MonitorConnectError(RefusedError):
    """QEMU's monitor cannot be had; nothing was touched."""


class MonitorAbsentError(MonitorConnectError):
    """No QEMU listens there."""


class MonitorHeldError(MonitorConnectError):
    """The socket accepts and never greets: another client holds it, or QEMU hangs."""


class MonitorForeignError(MonitorConnectError):
    """Something listens there, but it is not a QMP monitor."""


class Monitor(Connection):
    """A held monitor of one QEMU."""

    WHAT = "QEMU's monitor"

    @classmethod
    async def connect(cls, path: Path, timeout_seconds: float = CONNECT_SECONDS) -> Self:
        """Connect and negotiate.

        :raise MonitorConnectError: one of its leaves, with a remedy.
        """
        try:
            return await cls._open(path, timeout_seconds)
        except CannotConnectError as error:
            raise _refusal(path, error) from error


def _refusal(path: Path, error: CannotConnectError) -> MonitorConnectError:
    start = f"start QEMU with -qmp unix:{path},server=on,wait=off"
    match error.failure:
        case ConnectFailure.ABSENT:
            return MonitorAbsentError(f"no QMP socket at {path}", remedy=start)
        case ConnectFailure.REFUSED:
            return MonitorAbsentError(
                f"nobody listens on {path}: its QEMU has ended, or it is not a socket",
                remedy=start,
            )
        case ConnectFailure.FORBIDDEN:
            remedy = "run as root, or as the user that QEMU runs as"
            return MonitorConnectError(str(error), remedy=remedy)
        case ConnectFailure.SILENT:
            return MonitorHeldError(
                f"QEMU's monitor {path} is held by another client, or QEMU hangs",
                remedy="QEMU serves one client a socket: end the other one, or give qpostcopy "
                "a -qmp socket of its own",
            )
        case ConnectFailure.INVALID:
            return MonitorAbsentError(str(error), remedy=start)
        case ConnectFailure.FOREIGN:
            return MonitorForeignError(str(error), remedy=f"{path} must be QMP: {start}")
