"""The fault trace that every migration leaves in its state directory.

The handler that attaches begins the file, one that takes over goes on with it,
and whoever closes its core last has finished it. A trace is a gain for the next
migration, never a reason to lose this one: what keeps it from being written is
told, and all else goes on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from qpostcopy.core import CoreError, HandlerCore, RamBlock
from qpostcopy.state import FAULT_TRACE
from qpostcopy.trace import TracedBlock, TraceError, decode, encode_head, read_blocks

log = logging.getLogger(__name__)

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


def record(
    core: HandlerCore, blocks: Sequence[RamBlock], state_dir: Path, *, fresh: bool
) -> str | None:
    """Have the core record faults; why it does not, or None. Blocking.

    :param fresh: begin a trace; else go on with a dead handler's.
    """
    path = state_dir / FAULT_TRACE
    try:
        core.record(path, _begin(path, blocks) if fresh else _go_on(path, blocks))
    except (CoreError, TraceError, OSError) as error:
        log.warning("no fault trace is written: %s", error)
        if fresh:
            path.unlink(missing_ok=True)
        return str(error)
    return None


def forget(state_dir: Path) -> None:
    """Of a migration that was never committed: its guest has asked for nothing there."""
    (state_dir / FAULT_TRACE).unlink(missing_ok=True)


def _begin(path: Path, blocks: Sequence[RamBlock]) -> int:
    """A new trace, without records; where they will begin."""
    head = encode_head(_traced(blocks))
    decode(head)  # more blocks, or longer names, than a trace can have?
    path.unlink(missing_ok=True)  # of a handler that died before the commit
    with os.fdopen(os.open(path, _NEW, 0o600), "wb") as file:
        file.write(head)
    return len(head)


def _go_on(path: Path, blocks: Sequence[RamBlock]) -> int:
    """Where the records of the trace that is there begin. They are not read: a guest waits.

    :raise TraceError: it is damaged, or not of this VM.
    """
    traced = _traced(blocks)
    if read_blocks(path) != traced:
        raise TraceError(f"{path} is of other RAM blocks")
    return len(encode_head(traced))


def _traced(blocks: Sequence[RamBlock]) -> tuple[TracedBlock, ...]:
    return tuple(TracedBlock(block.name, block.size_bytes) for block in blocks)
