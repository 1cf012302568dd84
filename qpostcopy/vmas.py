"""A process's mappings, as /proc/PID/maps and smaps show them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from qpostcopy.qmp.schema import MappingFacts


@dataclass(frozen=True, slots=True)
class Vma:
    """One mapping, as /proc/PID/maps or smaps shows it. `attributes` only from smaps."""

    start: int
    end: int
    permissions: str
    offset_bytes: int
    device: int
    inode: int
    path: str
    attributes: dict[str, str] = field(default_factory=dict)

    @property
    def file(self) -> tuple[int, int]:
        return self.device, self.inode

    @property
    def length_bytes(self) -> int:
        return self.end - self.start

    @property
    def flags(self) -> frozenset[str]:
        """Two-letter codes of VmFlags, proc(5)."""
        return frozenset(self.attributes.get("VmFlags", "").split())

    @property
    def page_bytes(self) -> int:
        return int(self.attributes.get("KernelPageSize", "4 kB").split()[0]) << 10

    def facts(self) -> MappingFacts:
        return MappingFacts(
            hva=self.start,
            length_bytes=self.length_bytes,
            offset_bytes=self.offset_bytes,
            dontfork="dc" in self.flags,
            huge_pages=self.attributes.get("THPeligible", "0") != "0",
            uffd_registered=bool(self.flags & {"um", "uw", "ui"}),
            locked="lo" in self.flags,
        )


def parse_vmas(text: str) -> list[Vma]:
    """The mappings in the text of a maps or smaps file."""
    found: list[Vma] = []
    for line in text.splitlines():
        words = line.split(None, 5)
        if words and "-" in words[0] and not words[0].endswith(":"):
            start, end = (int(part, 16) for part in words[0].split("-"))
            major, minor = (int(part, 16) for part in words[3].split(":"))
            path = words[5] if len(words) > 5 else ""
            file = (os.makedev(major, minor), int(words[4]))
            found.append(Vma(start, end, words[1], int(words[2], 16), *file, path))
        elif found:
            name, _, value = line.partition(":")
            found[-1].attributes[name] = value.strip()
    return found


def read_vmas(pid: int, *, attributes: bool = True) -> list[Vma]:
    """The process's mappings; with their flags, which takes longer.

    :raise OSError: it is gone, or not ours to look at.
    """
    name = "smaps" if attributes else "maps"
    return parse_vmas(Path(f"/proc/{pid}/{name}").read_text(errors="surrogateescape"))
