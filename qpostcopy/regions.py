"""Where a guest's RAM is: which files, mapped where in QEMU, seen by the guest at which address.

QEMU names its memory backends and says how it made them; /proc/PID says what
was really mapped. Both are asked, and the kernel's word counts: a block has a
file here only if QEMU maps that very file. Guarantees: looking changes nothing
(no path of QEMU's is opened, no page is touched), and a RAM file is opened only
through the mapping or the descriptor that QEMU itself holds, then compared by
device and inode. A path could lead to another VM's memory by now.

    query-memdev, qom-get /objects/ID   names, sizes, kinds, paths, sharing
    info ramblock                       what else travels in QEMU's stream
    info mtree -f                       guest physical addresses, for the order
    /proc/PID/smaps                     mappings and their flags

QMP has none of the two `info` (as of QEMU 10.0): their text is parsed, for 5.2 to 10.0.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import re
import stat
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpostcopy.errors import QpostcopyError
from qpostcopy.qmp.connection import CommandError
from qpostcopy.qmp.schema import BlockFacts
from qpostcopy.vmas import Vma, read_vmas

Execute = Callable[[str, dict[str, object]], Awaitable[object]]

#: GPA of a block that the guest does not see at present: it sorts behind all others.
UNMAPPED_GPA = (1 << 63) - 1

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


class RegionsError(QpostcopyError):
    """QEMU's RAM is not where it was, or QEMU's answer makes no sense."""


# --- what QEMU says -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RamBlockRow:
    """One line of `info ramblock`. `hva` from QEMU 8.0 on."""

    name: str
    page_bytes: int
    used_bytes: int
    hva: int | None


@dataclass(frozen=True, slots=True)
class Backend:
    """One memory backend object, as QEMU describes it."""

    name: str
    kind: str
    size_bytes: int
    share: bool
    mem_path: str | None

    @property
    def block_names(self) -> frozenset[str]:
        """Its RAM block's name: the id, or its QOM path (x-use-canonical-path-for-ramblock-id)."""
        return frozenset({self.name, f"/objects/{self.name}"})


_RAMBLOCK = re.compile(
    r"^\s*(?P<name>\S.*?)\s+(?P<page>\d+) (?P<unit>[KMGT]?i?B)\s+0x[0-9a-f]+\s+"
    r"(?P<used>0x[0-9a-f]+)\s+0x[0-9a-f]+(?:\s+(?P<hva>0x[0-9a-f]+))?"
)
_FLAT_RANGE = re.compile(
    r"^\s+(?P<start>[0-9a-f]{16})-[0-9a-f]{16} \(prio -?\d+, [^)]*\): "
    r"(?P<name>.*?)(?: @[0-9a-f]{16})?(?: KVM)?$"
)


def parse_ramblocks(text: str) -> list[RamBlockRow]:
    """The rows of `info ramblock`; lines that are none are passed over."""
    rows = []
    for line in text.splitlines():
        if found := _RAMBLOCK.match(line):
            rows.append(
                RamBlockRow(
                    name=found["name"],
                    page_bytes=int(found["page"]) * _UNITS[found["unit"]],
                    used_bytes=int(found["used"], 16),
                    hva=int(found["hva"], 16) if found["hva"] else None,
                )
            )
    return rows


def parse_first_gpas(text: str) -> dict[str, int]:
    """Lowest guest physical address of each region in `info mtree -f`.

    Only the flat view of the address space "memory" counts: others show the
    same RAM as a device or a CPU in SMM sees it. Overlays (PAM, SMRAM, the PCI
    hole) split a block into several ranges there.
    """
    lowest: dict[str, int] = {}
    wanted = in_header = False
    for line in text.splitlines():
        if line.startswith("FlatView"):
            wanted, in_header = False, True
        elif in_header and line.lstrip().startswith('AS "memory",'):
            wanted = True
        elif found := _FLAT_RANGE.match(line):
            in_header = False
            if wanted:
                start = int(found["start"], 16)
                lowest[found["name"]] = min(start, lowest.get(found["name"], start))
    return lowest


async def _human(execute: Execute, line: str) -> str:
    reply = await execute("human-monitor-command", {"command-line": line})
    if not isinstance(reply, str):
        raise RegionsError(f"QEMU answered `{line}` with {reply!r}, not with text")
    return reply.replace("\r", "")


async def _property(execute: Execute, path: str, name: str) -> Any:
    """A QOM property, or None: this kind of object has no such."""
    with suppress(CommandError):
        return await execute("qom-get", {"path": path, "property": name})
    return None


async def _backends(execute: Execute) -> list[Backend]:
    listed = await execute("query-memdev", {})
    if not isinstance(listed, list):
        raise RegionsError(f"QEMU answered query-memdev with {listed!r}")
    found = []
    for item in listed:
        name = item.get("id")
        if name is None:  # not below /objects: nothing that a plan could name
            continue
        path = f"/objects/{name}"
        found.append(
            Backend(
                name=name,
                kind=await _property(execute, path, "type") or "unknown",
                size_bytes=item["size"],
                share=bool(await _property(execute, path, "share")),
                mem_path=await _property(execute, path, "mem-path"),
            )
        )
    return found


# --- both together ------------------------------------------------------------------------


async def discover_blocks(execute: Execute, pid: int) -> tuple[BlockFacts, ...]:
    """The guest's RAM blocks in order of guest physical address.

    A block whose file is not found, or that we may not look for, has no device
    and no mappings; it is for preflight to refuse it.

    :param execute: runs a command of QEMU's, e.g. `Monitor.execute`.
    :raise OSError: QEMU is gone.
    """
    backends = await _backends(execute)
    rows = {row.name: row for row in parse_ramblocks(await _human(execute, "info ramblock"))}
    first_gpas = parse_first_gpas(await _human(execute, "info mtree -f"))
    vmas: list[Vma] = []
    with suppress(PermissionError):
        vmas = await asyncio.to_thread(read_vmas, pid)
    located = await asyncio.to_thread(_locate_all, pid, backends, rows, vmas)
    blocks = [
        _facts(pid, backend, located.get(backend.name), rows, first_gpas, vmas)
        for backend in backends
        if backend.block_names & rows.keys()
    ]
    return tuple(sorted(blocks, key=lambda block: (block.first_gpa, block.name)))


async def discover_unshared_bytes(execute: Execute, blocks: Iterable[BlockFacts]) -> int:
    """Bytes of all RAM blocks that QEMU must carry itself: ROMs, video memory, unshared RAM."""
    ours = {
        name for block in blocks if block.share for name in (block.name, f"/objects/{block.name}")
    }
    rows = parse_ramblocks(await _human(execute, "info ramblock"))
    return sum(row.used_bytes for row in rows if row.name not in ours)


def _facts(
    pid: int,
    backend: Backend,
    file: tuple[int, int] | None,
    rows: Mapping[str, RamBlockRow],
    first_gpas: Mapping[str, int],
    vmas: Iterable[Vma],
) -> BlockFacts:
    mine = [vma for vma in vmas if vma.file == file]
    name = next(name for name in backend.block_names if name in rows)
    return BlockFacts(
        name=backend.name,
        size_bytes=backend.size_bytes,
        first_gpa=min(first_gpas.get(name, UNMAPPED_GPA) for name in backend.block_names),
        page_bytes=mine[0].page_bytes if mine else rows[name].page_bytes,
        share=backend.share,
        backend=backend.kind,
        mem_path=backend.mem_path,
        device=file[0] if file else None,
        inode=file[1] if file else None,
        filesystem=_filesystem(pid, mine[0]) if mine else None,
        allocated_bytes=_allocated_bytes(pid, mine[0]) if mine else 0,
        mappings=tuple(vma.facts() for vma in mine),
    )


def _locate_all(
    pid: int, backends: Iterable[Backend], rows: Mapping[str, RamBlockRow], vmas: list[Vma]
) -> dict[str, tuple[int, int]]:
    """Backend -> (device, inode) of the mapped file under it, where there is one."""
    backed = [vma for vma in vmas if vma.inode]
    located: dict[str, tuple[int, int]] = {}
    anonymous = []
    for backend in backends:
        row = next((rows[name] for name in backend.block_names if name in rows), None)
        file = _file_at(row.hva, backed) if row and row.hva else None
        file = file or _file_by_path(pid, backend, backed)
        if file:
            located[backend.name] = file
        elif backend.mem_path is None and backend.share:
            anonymous.append(backend)
    for backend in anonymous:
        # A memfd of QEMU's own has no name that leads back to it: its size must do.
        claimed = set(located.values())
        sized = {
            vma.file
            for vma in backed
            if vma.length_bytes == backend.size_bytes and "w" in vma.permissions
        } - claimed
        if (
            len(sized) == 1
            and sum(other.size_bytes == backend.size_bytes for other in anonymous) == 1
        ):
            located[backend.name] = sized.pop()
    return located


def _file_at(hva: int, backed: Iterable[Vma]) -> tuple[int, int] | None:
    return next((vma.file for vma in backed if vma.start <= hva < vma.end), None)


def _file_by_path(pid: int, backend: Backend, backed: list[Vma]) -> tuple[int, int] | None:
    """The file that mem-path names *and* QEMU maps."""
    if backend.mem_path is None:
        return None
    try:
        named = _as_qemu_sees(pid, backend.mem_path).stat()
    except OSError:
        return None
    if stat.S_ISDIR(named.st_mode):
        # QEMU makes and unlinks a file in there: qemu_back_mem.NAME.XXXXXX, "/" of NAME as "_".
        names = "|".join(re.escape(name.replace("/", "_")) for name in backend.block_names)
        pattern = re.compile(rf"/qemu_back_mem\.(?:{names})\.\w{{6}}(?: \(deleted\))?$")
        files = {vma.file for vma in backed if pattern.search(vma.path)}
        return files.pop() if len(files) == 1 else None
    file = (named.st_dev, named.st_ino)
    return file if any(vma.file == file for vma in backed) else None


def _as_qemu_sees(pid: int, path: str) -> Path:
    """A path of QEMU's, in its own mount namespace and root. For stat only, never to open."""
    process = f"/proc/{pid}"
    if found := re.match(r"^(?:/proc/(?:self|thread-self|\d+)/fd|/dev/fd)/(\d+)$", path):
        return Path(f"{process}/fd/{found[1]}")
    return Path(f"{process}/root{path}" if path.startswith("/") else f"{process}/cwd/{path}")


def _filesystem(pid: int, vma: Vma) -> str | None:
    """Type of the file system under a mapping; a memfd's is mounted nowhere."""
    if vma.page_bytes > os.sysconf("SC_PAGE_SIZE"):
        return "hugetlbfs"
    if vma.path.startswith(("/memfd:", "/dev/zero", "/SYSV")):
        return "tmpfs"
    device = f"{os.major(vma.device)}:{os.minor(vma.device)}"
    for line in Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == device:
            return rest.split()[0]
    return None


def _allocated_bytes(pid: int, vma: Vma) -> int:
    """Of the file: pages that are there. 0 where we may not look."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}").stat().st_blocks * 512
    return 0


# --- the files ----------------------------------------------------------------------------


def open_ram(pid: int, block: BlockFacts, writable: bool) -> int:
    """Open the file under a block through what QEMU itself holds; a new descriptor (taken).

    :raise RegionsError: QEMU does not hold that file any more, or we may not reach it.
    """
    wanted = (block.device, block.inode)
    refusal: OSError | None = None
    for way in _ways_to(pid, wanted):
        try:
            fd = os.open(way, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            refusal = error
            continue
        found = os.fstat(fd)
        if (found.st_dev, found.st_ino) == wanted:
            return fd
        os.close(fd)  # the mapping or descriptor was replaced between look and open
    raise RegionsError(
        f"cannot open the RAM file of block {block.name} through process {pid}"
        + (f": {refusal}" if refusal else ": it does not hold that file"),
        remedy="run as root; /proc/PID/map_files needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE",
    )


def _ways_to(pid: int, file: tuple[int | None, int | None]) -> Iterable[str]:
    """Mappings as they are now (registering splits and joins them), then descriptors."""
    process = Path(f"/proc/{pid}")
    with suppress(OSError):
        for vma in read_vmas(pid, attributes=False):
            if vma.file == file:
                yield f"{process}/map_files/{vma.start:x}-{vma.end:x}"
    with suppress(OSError):
        for entry in (process / "fd").iterdir():
            with suppress(OSError):
                found = entry.stat()
                if (found.st_dev, found.st_ino) == file:
                    yield str(entry)


def punch_empty(fd: int, size_bytes: int) -> None:
    """Drop every page of the file, keeping its size (fallocate(2), FALLOC_FL_PUNCH_HOLE).

    :raise RegionsError: the file system cannot.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    while libc.fallocate(fd, mode, 0, size_bytes):
        reason = ctypes.get_errno()
        if reason != errno.EINTR:
            raise RegionsError(
                f"punching a hole into the RAM file: {os.strerror(reason)}",
                remedy="guest RAM must be on tmpfs or a memfd, not sealed against writing",
            )


def is_empty(fd: int) -> bool:
    """Whether the file holds no page at all, swapped-out ones included (lseek(2), SEEK_DATA)."""
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return True
        raise
    return False
