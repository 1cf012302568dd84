"""Network namespaces for tests: named as `ip netns` names them, gone at the end."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qpostcopy.netns import DIRECTORY


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


@contextmanager
def namespace(name: str) -> Iterator[str]:
    """A namespace of its own for this process's tests; its full name."""
    full = f"qpc-test-{os.getpid()}-{name}"
    ip("netns", "add", full)
    try:
        yield full
    finally:
        if (DIRECTORY / full).exists():  # not taken away by the test itself
            remove_namespace(full)


def remove_namespace(full_name: str) -> None:
    """As a teardown does: processes in there stay, and nobody can enter any more."""
    ip("netns", "delete", full_name)


@dataclass(frozen=True, slots=True)
class Link:
    """Two namespaces, one wire."""

    west: str
    east: str
    east_address: str = "10.9.0.2"

    def received_bytes(self, name: str) -> int:
        """What came into that namespace from the other, by the kernel's count."""
        (told,) = json.loads(ip("-n", name, "-s", "-j", "link", "show", "wire"))
        return int(told["stats64"]["rx"]["bytes"])

    def buffer_little(self) -> None:
        """What the west sends from now on is hardly more than what is under way."""
        little = "net.ipv4.tcp_wmem=4096 8192 16384"
        ip("netns", "exec", self.west, "sysctl", "-qw", little)

    def cut(self) -> None:
        ip("-n", self.east, "link", "set", "wire", "down")


@contextmanager
def link() -> Iterator[Link]:
    """Both ends are up. It goes with its namespaces."""
    with namespace("west") as west, namespace("east") as east:
        ends = ("wire", "netns", west, "type", "veth", "peer", "name", "wire", "netns", east)
        ip("link", "add", *ends)
        for name, address in ((west, "10.9.0.1/24"), (east, "10.9.0.2/24")):
            ip("-n", name, "addr", "add", address, "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
        yield Link(west, east)


def namespace_of(pid: int) -> int:
    """What tells the network namespace of a process from others."""
    return Path(f"/proc/{pid}/ns/net").stat().st_ino


def namespace_named(name: str) -> int:
    return (DIRECTORY / name).stat().st_ino
