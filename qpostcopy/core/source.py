"""The page server's core: typed facade of source.h."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from qpostcopy.core.calls import LaneEnd, call, ffi, lib, run_loop
from qpostcopy.core.types import RamBlock, SourceCounters, page_counts, plain_counters


class SourceCore:
    """Answers and pushes the pages of one stopped guest.

    :param ram_fds: the RAM files, by block; borrowed, and only ever pread.
    :param push_from_fault: after a fault, push goes on from there (`fault.then: here`).
    :param push_bytes_per_second: limit of all push lanes together; None: unlimited.
    """

    def __init__(
        self,
        ram_fds: Sequence[int],
        blocks: Sequence[RamBlock],
        *,
        push_from_fault: bool,
        push_bytes_per_second: int | None,
    ) -> None:
        tables = (page_counts(tuple(blocks)), ffi.new("int[]", list(ram_fds)))
        config = ffi.new(
            "struct qpc_source_config *",
            {
                "block_count": len(blocks),
                "block_pages": tables[0],
                "ram_fds": tables[1],
                "push_from_fault": push_from_fault,
                "push_bytes_per_second": push_bytes_per_second or 0,
            },
        )
        out = ffi.new("struct qpc_source **")
        call(lib.qpc_source_create, out, config)
        self._source: Any = out[0]

    def set_schedule(self, extents: Iterable[tuple[int, int, int]] | array[int]) -> None:
        """The order of the push: (block index, first page, page count) of each extent.

        :param extents: triples, or an `array("Q")` with all of them flat.
        """
        flat = extents if isinstance(extents, array) else array("Q", chain.from_iterable(extents))
        assert flat.itemsize * 3 == ffi.sizeof("struct qpc_extent") and sys.byteorder == "little"
        table = ffi.from_buffer("struct qpc_extent[]", flat)
        call(lib.qpc_source_set_schedule, self._source, table, len(flat) // 3)

    def receive_have(self, demand_fd: int, deadline_ms: int) -> None:
        """Block until the handler's START; what it has will not be pushed.

        :raise LaneTimeoutError: it was silent for `deadline_ms`.
        """
        call(lib.qpc_source_receive_have, self._source, demand_fd, deadline_ms)

    def run_demand(self, demand_fd: int) -> LaneEnd:
        """Answer requests until told otherwise."""
        return run_loop(lib.qpc_source_run_demand, self._source, demand_fd)

    def run_scan(self) -> LaneEnd:
        """Find the holes, beside all sessions; done at once if they are all known."""
        return run_loop(lib.qpc_source_run_scan, self._source)

    def stop_scan(self) -> None:
        """`run_scan` ends at its next look, for good; one look can take ten seconds."""
        lib.qpc_source_stop_scan(self._source)

    def run_push(self, push_fd: int, index: int) -> LaneEnd:
        """Push until nothing is left; lane 0 announces the holes that are found."""
        return run_loop(lib.qpc_source_run_push, self._source, push_fd, index)

    def stop(self) -> None:
        """Every running loop but the scan returns STOPPED; from any thread."""
        lib.qpc_source_stop(self._source)

    def reset(self) -> None:
        """After these loops were joined: ready for the next lanes."""
        lib.qpc_source_reset(self._source)

    def stats(self) -> SourceCounters:
        raw = ffi.new("struct qpc_source_counters *")
        lib.qpc_source_counters_read(self._source, raw)
        return SourceCounters(**plain_counters(raw, SourceCounters))

    def close(self) -> None:
        """After all loops were joined. Idempotent."""
        if self._source is not None:
            lib.qpc_source_destroy(self._source)
            self._source = None
