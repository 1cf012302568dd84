"""The userfault handler's core: typed facade of handler.h and fault.c."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qpostcopy.core.calls import LaneEnd, call, ffi, lib, run_loop
from qpostcopy.core.types import (
    HandlerCounters,
    Mapping,
    RamBlock,
    page_counts,
    plain_counters,
)


class HandlerCore:
    """Places the pages of one guest, and counts them.

    Lives as long as the migration; lanes come and go (`stop`, join, `reset`,
    then new loops and `wake_all`). The run_ methods block with the GIL
    released; whoever starts a thread for one joins it before `reset` or `close`.

    :param uffd: userfaultfd of QEMU's address space; borrowed.
    :param mappings: every mapping of every block, registered already.
    :param map_directory: gets placed.NAME and zero.NAME of each block, and `counters`.
    :param fresh: the files must not exist yet; else a dead handler's are taken over.
    :raise CoreError: files, memory, or a block that is not mapped as a whole.
    """

    def __init__(
        self,
        uffd: int,
        blocks: Sequence[RamBlock],
        mappings: Sequence[Mapping],
        map_directory: Path,
        *,
        ahead_pages: int,
        behind_pages: int,
        fresh: bool,
    ) -> None:
        self._blocks = tuple(blocks)
        paths = [
            map_directory / f"{kind}.{file_name(block.name)}"
            for block in blocks
            for kind in ("placed", "zero")
        ]
        keep = [ffi.new("char[]", bytes(path)) for path in paths]
        counters = ffi.new("char[]", bytes(map_directory / "counters"))
        tables = (page_counts(self._blocks), ffi.new("char *[]", keep), _mapping_table(mappings))
        config = ffi.new(
            "struct qpc_handler_config *",
            {
                "uffd": uffd,
                "block_count": len(self._blocks),
                "block_pages": tables[0],
                "map_paths": tables[1],
                "counter_path": counters,
                "mapping_count": len(mappings),
                "mappings": tables[2],
                "ahead_pages": ahead_pages,
                "behind_pages": behind_pages,
                "fresh": fresh,
            },
        )
        out = ffi.new("struct qpc_handler **")
        call(lib.qpc_handler_create, out, config)
        self._handler: Any = out[0]

    @property
    def done_fd(self) -> int:
        """Eventfd: readable once every page is placed or known to be zero."""
        return int(lib.qpc_handler_done_fd(self._handler))

    def record(self, trace: Path, records_offset: int) -> None:
        """From now on faults go to this trace file, too (qpostcopy.trace has written its head).

        :raise CoreError: there is no room for it; all else works without.
        """
        path = ffi.new("char[]", bytes(trace))
        call(lib.qpc_handler_record, self._handler, path, records_offset)

    def adopt(self, ram_fds: Sequence[int]) -> None:
        """What the RAM files hold was placed before: ask them (SEEK_DATA), by block."""
        call(lib.qpc_handler_adopt, self._handler, ffi.new("int[]", list(ram_fds)))

    def commit(self) -> None:
        """From now on a page that somebody else wrote is counted; before, it is fatal."""
        lib.qpc_handler_commit(self._handler)

    def send_have(self, demand_fd: int) -> None:
        """First thing on a demand lane: what need not be sent, then START."""
        call(lib.qpc_handler_send_have, self._handler, demand_fd)

    def run_demand(self, demand_fd: int) -> LaneEnd:
        """Serve faults and the demand lane until told otherwise.

        :raise CoreError: the loop cannot go on.
        """
        return run_loop(lib.qpc_handler_run_demand, self._handler, demand_fd)

    def run_push(self, push_fd: int) -> LaneEnd:
        """Take what one push lane brings; DONE when the page server says it was all."""
        return run_loop(lib.qpc_handler_run_push, self._handler, push_fd)

    def run_local(self) -> LaneEnd:
        """While there are no lanes: answer the faults that need none, until stopped."""
        return run_loop(lib.qpc_handler_run_local, self._handler)

    def wake_all(self) -> None:
        """Have every unanswered fault raised again."""
        call(lib.qpc_handler_wake_all, self._handler)

    def stop(self) -> None:
        """Every running loop returns STOPPED; from any thread."""
        lib.qpc_handler_stop(self._handler)

    def reset(self) -> None:
        """After all loops were joined: ready for the next lanes."""
        lib.qpc_handler_reset(self._handler)

    def stats(self) -> HandlerCounters:
        raw = ffi.new("struct qpc_handler_counters *")
        lib.qpc_handler_counters_read(self._handler, raw)
        histogram = tuple(
            (float(lib.qpc_bucket_upper_us(index)), int(count))
            for index, count in enumerate(raw.fault_buckets)
            if count
        )
        return HandlerCounters(**plain_counters(raw, HandlerCounters), histogram=histogram)

    def close(self) -> None:
        """After all loops were joined. Idempotent."""
        if self._handler is not None:
            lib.qpc_handler_destroy(self._handler)
            self._handler = None


def file_name(block: str) -> str:
    """A RAM block's name as part of a file name (it may be a QOM path)."""
    return block.replace("%", "%25").replace("/", "%2F")


def _mapping_table(mappings: Sequence[Mapping]) -> Any:
    table = ffi.new("struct qpc_mapping[]", len(mappings))
    for entry, mapping in zip(table, mappings, strict=True):
        entry.block = mapping.block
        entry.hva = mapping.hva
        entry.length_bytes = mapping.length_bytes
        entry.offset_bytes = mapping.offset_bytes
    return table
