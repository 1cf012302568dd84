#!/usr/bin/env python3
"""Writes an initramfs of one program and its drivers: `initramfs.py OUTPUT INIT DRIVER...`.

The archive is made here, byte for byte reproducible and without a tool's
version in it, so that the cache's hash means what it says. The format is
"newc" of the kernel's Documentation/driver-api/early-userspace/buffer-format.rst:
a header of 110 ASCII characters, the name, the data, each padded to 4 bytes.
"""

import stat
import sys
from pathlib import Path


def member(name: str, mode: int, data: bytes = b"") -> bytes:
    """One archive member, owned by root, dated 1970."""
    raw_name = name.encode() + b"\0"
    # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw_name), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return padded(header + raw_name) + padded(data)


def padded(part: bytes) -> bytes:
    return part + b"\0" * (-len(part) % 4)


def main() -> None:
    output, init, *drivers = map(Path, sys.argv[1:])
    archive = b"".join(member(name, stat.S_IFDIR | 0o755) for name in ("dev", "proc", "drivers"))
    archive += member("init", stat.S_IFREG | 0o755, init.read_bytes())
    for driver in drivers:
        archive += member(f"drivers/{driver.name}", stat.S_IFREG | 0o644, driver.read_bytes())
    output.write_bytes(archive + member("TRAILER!!!", 0))


main()
