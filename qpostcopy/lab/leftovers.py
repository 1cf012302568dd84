"""What a migration must not leave behind, looked for where it would be.

A range still registered in QEMU would hang the guest once nobody serves it; a
userfaultfd left there would turn such ranges into silent zeroes on its close.
"""

from __future__ import annotations

from pathlib import Path

#: VmFlags of proc(5): registered with a userfaultfd for missing, protected, minor faults.
_REGISTERED = frozenset({"um", "uw", "ui"})


def processes_naming(path: Path) -> list[str]:
    """Processes with that path in their command line: `PID COMMAND`."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it has just ended
        line = b" ".join(words).decode(errors="replace").strip()
        if str(path) in line:
            found.append(f"{entry.name} {line}")
    return found


def sockets_below(directory: Path) -> list[Path]:
    """Sockets anywhere below a directory."""
    if not directory.exists():
        return []
    return sorted(path for path in directory.rglob("*") if path.is_socket())


def registered_ranges(pid: int) -> list[str]:
    """Address ranges of a process that are registered with a userfaultfd."""
    found, last_range = [], ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if name == "VmFlags:":
            if _REGISTERED & set(rest.split()):
                found.append(last_range)
        elif not name.endswith(":"):
            last_range = name
    return found


def userfaultfds(pid: int) -> list[int]:
    """File descriptors of a process that are userfaultfds."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue  # closed meanwhile
        if "[userfaultfd]" in target:
            found.append(int(entry.name))
    return sorted(found)
