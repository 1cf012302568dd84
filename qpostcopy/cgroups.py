"""How much memory a process's control groups leave it.

Pages that we place are charged to QEMU's memory cgroup (UFFDIO_COPY charges the
owner of the address space), and a QEMU above its limit is killed by the kernel.
So the tightest limit on the way up from QEMU's own cgroup counts. cgroup v2 and
v1 are both read; what is not mounted where we can see it has no limit for us.

Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of Linux.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qpostcopy.qmp.schema import MemoryLimit

#: v1 writes "no limit" as the largest multiple of a page; nobody has an exbibyte.
_NO_LIMIT_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class _Files:
    """What a version of cgroups calls its files."""

    limit: str
    usage: str
    cache_prefix: str


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_V2 = _Files("memory.max", "memory.current", "")


def memory_limit(pid: int, proc: Path = Path("/proc")) -> MemoryLimit | None:
    """The tightest memory limit over a process; None: there is none that we can see.

    :param proc: where to look for the process and for what is mounted.
    """
    limits = [
        limit
        for group, files in _groups_of(pid, proc)
        if (limit := _read(group, files)) is not None
    ]
    return min(limits, key=lambda limit: limit.available_bytes, default=None)


def _groups_of(pid: int, proc: Path) -> Iterator[tuple[Path, _Files]]:
    """The process's memory cgroup and all above it, to the top of what is mounted."""
    with suppress(OSError):
        for line in (proc / str(pid) / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            for top, root in _mounts(proc, controllers):
                with suppress(ValueError):  # it lies outside of what is mounted there
                    below = PurePosixPath(path).relative_to(root)
                    for group in (below, *below.parents):
                        yield top / group, _V1 if controllers else _V2


def _mounts(proc: Path, controller: str) -> Iterator[tuple[Path, str]]:
    """(mount point, cgroup at its top) of each hierarchy of that controller; "" is v2."""
    text = (proc / "self" / "mountinfo").read_text(errors="surrogateescape")
    for line in text.splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        words = fields.split()
        is_wanted = (
            kind == "cgroup" and controller in options.split(",")
            if controller
            else kind == "cgroup2"
        )
        if is_wanted:
            yield Path(words[4]), words[3]


def _read(group: Path, files: _Files) -> MemoryLimit | None:
    with suppress(OSError, ValueError):  # the top has no such file; `max` is no number
        limit = int((group / files.limit).read_text())
        if limit < _NO_LIMIT_BYTES:
            used = int((group / files.usage).read_text()) - _cache_bytes(group, files)
            return MemoryLimit(path=str(group / files.limit), available_bytes=max(0, limit - used))
    return None


def _cache_bytes(group: Path, files: _Files) -> int:
    """Page cache of files on disks: it goes before anybody is killed."""
    names = {f"{files.cache_prefix}{age}_file" for age in ("active", "inactive")}
    pairs = (line.split() for line in (group / "memory.stat").read_text().splitlines())
    return sum(int(value) for name, value in pairs if name in names)
