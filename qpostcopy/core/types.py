"""What the core speaks of: RAM blocks and where QEMU maps them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from qpostcopy.core.calls import ffi

PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class RamBlock:
    """A RAM block by the name that QEMU gives it; whole pages."""

    name: str
    size_bytes: int

    @property
    def pages(self) -> int:
        return self.size_bytes // PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Mapping:
    """One VMA of a RAM block in QEMU; `block` is an index, all else bytes."""

    block: int
    hva: int
    length_bytes: int
    offset_bytes: int


def page_counts(blocks: tuple[RamBlock, ...]) -> Any:
    """`uint64_t[]` of the pages of each block."""
    return ffi.new("uint64_t[]", [block.pages for block in blocks])


@dataclass(frozen=True, slots=True)
class HandlerCounters:
    """What a userfault handler counted; pages are 4 KiB, each counted once.

    `histogram` is (upper end in us, faults) of each bucket that is not empty, ascending.
    """

    total_pages: int
    remaining_pages: int
    hole_pages: int
    zero_pages: int
    push_pages: int
    demand_pages: int
    around_pages: int
    duplicate_pages: int
    discarded_pages: int
    stray_pages: int
    push_bytes: int
    demand_bytes: int
    wire_bytes: int
    faults: int
    local_faults: int
    fault_max_us: int
    traced_faults: int
    untraced_faults: int
    histogram: tuple[tuple[float, int], ...]


@dataclass(frozen=True, slots=True)
class SourceCounters:
    """What a page server counted since it was made."""

    requests: int
    demand_pages: int
    around_pages: int
    push_pages: int
    hole_pages: int
    zero_pages: int
    wire_bytes: int
    push_done: bool


def plain_counters(raw: Any, kind: type[Any]) -> dict[str, Any]:
    """The members of a C struct of counters that are fields of `kind` too."""
    return {
        field.name: getattr(raw, field.name) for field in fields(kind) if hasattr(raw, field.name)
    }
