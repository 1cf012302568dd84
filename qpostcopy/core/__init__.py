"""The C core: all that happens for each page, and its typed facade.

Python starts, stops and configures; loops run in C with the GIL released. No
Python runs for a page, and nothing here touches memory that can fault.
"""

from qpostcopy.core.calls import (
    CoreError,
    CoreMemoryError,
    CoreSystemError,
    LaneBrokenError,
    LaneClosedError,
    LaneEnd,
    LaneProtocolError,
    LaneTimeoutError,
    LoopStoppedError,
    RefusedByCoreError,
    StrayPageError,
    TargetGoneError,
)
from qpostcopy.core.handler import HandlerCore
from qpostcopy.core.hello import Hello, HelloError, LaneKind, greet, welcome
from qpostcopy.core.ioctl import (
    inject_syscall,
    uffd_api,
    uffd_register_missing,
    uffd_unregister,
    uffd_wake,
)
from qpostcopy.core.source import SourceCore
from qpostcopy.core.types import PAGE_BYTES, HandlerCounters, Mapping, RamBlock, SourceCounters

__all__ = [
    "PAGE_BYTES",
    "CoreError",
    "CoreMemoryError",
    "CoreSystemError",
    "HandlerCore",
    "HandlerCounters",
    "Hello",
    "HelloError",
    "LaneBrokenError",
    "LaneClosedError",
    "LaneEnd",
    "LaneKind",
    "LaneProtocolError",
    "LaneTimeoutError",
    "LoopStoppedError",
    "Mapping",
    "RamBlock",
    "RefusedByCoreError",
    "SourceCore",
    "SourceCounters",
    "StrayPageError",
    "TargetGoneError",
    "greet",
    "inject_syscall",
    "uffd_api",
    "uffd_register_missing",
    "uffd_unregister",
    "uffd_wake",
    "welcome",
]
