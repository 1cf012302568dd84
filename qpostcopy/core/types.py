"""What the core speaks of: RAM blocks and where QEMU maps them."""

from __future__ import annotations

from dataclasses import dataclass
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
