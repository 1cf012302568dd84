"""One place where a C call becomes a result or an exception.

Every fallible function of the core takes an error record last and returns a
code; `call` makes the record, and `ERRORS` says which exception a code becomes.
A test proves the table complete.
"""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Any

from qpostcopy.core._core import ffi, lib
from qpostcopy.errors import QpostcopyError

__all__ = [
    "ERRORS",
    "CoreError",
    "CoreMemoryError",
    "CoreSystemError",
    "LaneBrokenError",
    "LaneClosedError",
    "LaneEnd",
    "LaneProtocolError",
    "LaneTimeoutError",
    "LoopStoppedError",
    "RefusedByCoreError",
    "StrayPageError",
    "TargetGoneError",
    "call",
    "ffi",
    "lib",
    "run_loop",
]


class CoreError(QpostcopyError):
    """The C core reports.

    :ivar operation: which call, in words.
    :ivar error_number: errno, or 0.
    :ivar address: host virtual address or offset, as `operation` makes clear; 0: none.
    """

    def __init__(self, operation: str, error_number: int, address: int, length: int) -> None:
        parts = [operation]
        if address or length:
            parts.append(f"at {address:#x}, length {length}")
        if error_number:
            parts.append(os.strerror(error_number))
        super().__init__(": ".join(parts))
        self.operation = operation
        self.error_number = error_number
        self.address = address
        self.length = length


class LoopStoppedError(CoreError):
    """The call was asked to stop."""


class LaneClosedError(CoreError):
    """The peer closed the lane."""


class LaneBrokenError(CoreError):
    """A system call on a lane failed; `error_number` says how. A new lane may mend it."""


class LaneTimeoutError(CoreError):
    """A deadline passed."""


class LaneProtocolError(CoreError):
    """The peer sent what no sane peer sends."""


class TargetGoneError(CoreError):
    """QEMU, or its address space, is gone."""


class StrayPageError(CoreError):
    """A page that only we may place was written by somebody else; fatal before the commit."""


class RefusedByCoreError(CoreError):
    """The target is in a state that we do not touch."""


class CoreSystemError(CoreError):
    """A system call failed; `error_number` says how."""


class CoreMemoryError(CoreError):
    """No memory."""


#: The exception of each code that is not success.
ERRORS: dict[int, type[CoreError]] = {
    lib.QPC_STOPPED: LoopStoppedError,
    lib.QPC_CLOSED: LaneClosedError,
    lib.QPC_LANE: LaneBrokenError,
    lib.QPC_TIMEOUT: LaneTimeoutError,
    lib.QPC_PROTOCOL: LaneProtocolError,
    lib.QPC_GONE: TargetGoneError,
    lib.QPC_STRAY: StrayPageError,
    lib.QPC_REFUSED: RefusedByCoreError,
    lib.QPC_SYSTEM: CoreSystemError,
    lib.QPC_NO_MEMORY: CoreMemoryError,
}


def call(function: Any, *arguments: Any) -> None:
    """Call a function of the core that takes an error record last.

    :raise CoreError: the leaf that `ERRORS` names for the code.
    """
    error = ffi.new("struct qpc_error *")
    code = function(*arguments, error)
    if code == lib.QPC_OK:
        return
    operation = ffi.string(error.operation).decode()
    raise ERRORS[code](operation, error.error_number, error.address, error.length)


class LaneEnd(StrEnum):
    """How a blocking loop ended when nothing was wrong with it."""

    DONE = "done"
    STOPPED = "stopped"
    CLOSED = "closed"


def run_loop(function: Any, *arguments: Any) -> LaneEnd:
    """Run one of the core's blocking loops, the GIL released.

    :raise CoreError: what is neither a stop, nor the peer's close, nor an end.
    """
    try:
        call(function, *arguments)
    except LoopStoppedError:
        return LaneEnd.STOPPED
    except LaneClosedError:
        return LaneEnd.CLOSED
    return LaneEnd.DONE
