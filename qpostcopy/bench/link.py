"""What lies between the two ends: network namespaces, made for one run and removed after it.

    loopback   one namespace, its lo: both ends are neighbours, nothing limits them
    1gbit      two namespaces joined by a veth pair; each end sends 1 Gbit/s at most
               (tbf), as a network card of that speed would

Each run has fresh namespaces, so nothing but the migration is on the wire, and the
counters of the interfaces are its bytes. The names carry our pid: what a killed
benchmark left behind is found and removed by the next one.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from qpostcopy.bench.model import Link
from qpostcopy.errors import QpostcopyError
from qpostcopy.netns import DIRECTORY, inside

_PREFIX = "qpcbench"
_INTERFACE = "link0"
#: A burst of a millisecond: a segment of 64 KiB passes whole. The queue holds 8 ms more.
_SHAPING = ("rate", "1gbit", "burst", "128kb", "limit", "1mb")
_COMMAND_SECONDS = 20.0

_REMEDY = "the kernel must have network namespaces, veth and tbf (CONFIG_NET_SCH_TBF), and we root"

_numbers = itertools.count()


class LinkError(QpostcopyError):
    """The link could not be made."""


@dataclass(frozen=True, slots=True)
class End:
    """One end: what is there lives in this namespace and has this address."""

    netns: str
    address: str
    interface: str

    @property
    def netns_path(self) -> Path:
        return DIRECTORY / self.netns

    def sent_bytes(self) -> int:
        """What this end's interface has sent so far, headers included."""
        table = _run(*inside(self.netns), "cat", "/proc/self/net/dev")
        for line in table.splitlines():
            name, _, counters = line.partition(":")
            if name.strip() == self.interface:
                return int(counters.split()[8])  # proc(5): the ninth is transmitted bytes
        raise LinkError(f"no interface {self.interface} in namespace {self.netns}")


@dataclass(frozen=True, slots=True)
class Ends:
    """Both; the same namespace on loopback."""

    source: End
    destination: End

    def wire_bytes(self) -> int:
        """What was on the wire so far, both directions together."""
        return sum(end.sent_bytes() for end in {self.source, self.destination})


@contextmanager
def open_link(link: Link) -> Iterator[Ends]:
    """A link that exists until the context ends.

    :raise LinkError: not root, or iproute2 is missing, or the kernel cannot do it.
    """
    _check_possible()
    _sweep()
    name = f"{_PREFIX}-{os.getpid()}-{next(_numbers)}"
    with ExitStack() as undo:
        match link:
            case Link.LOOPBACK:
                yield _loopback(name, undo)
            case Link.GIGABIT:
                yield _gigabit(name, undo)


def _loopback(name: str, undo: ExitStack) -> Ends:
    _add_namespace(name, undo)
    end = End(name, "127.0.0.1", "lo")
    return Ends(end, end)


def _gigabit(name: str, undo: ExitStack) -> Ends:
    source = End(f"{name}-s", "10.0.0.1", _INTERFACE)
    destination = End(f"{name}-d", "10.0.0.2", _INTERFACE)
    for end in (source, destination):
        _add_namespace(end.netns, undo)
    veth = ("type", "veth", "peer", "name", _INTERFACE, "netns", destination.netns)
    _run("ip", "-n", source.netns, "link", "add", _INTERFACE, *veth)
    for end in (source, destination):
        ip = ("ip", "-n", end.netns)
        _run(*ip, "address", "add", f"{end.address}/30", "dev", _INTERFACE)
        _run(*ip, "link", "set", _INTERFACE, "up")
        _run("tc", "-n", end.netns, "qdisc", "add", "dev", _INTERFACE, "root", "tbf", *_SHAPING)
    return Ends(source, destination)


def _add_namespace(name: str, undo: ExitStack) -> None:
    _run("ip", "netns", "add", name)
    undo.callback(_run, "ip", "netns", "delete", name)
    _run("ip", "-n", name, "link", "set", "lo", "up")


def _check_possible() -> None:
    if os.geteuid() != 0:
        raise LinkError("network namespaces need root", remedy="run scripts/bench as root")
    for tool, package in (("ip", "iproute2"), ("tc", "iproute2"), ("nsenter", "util-linux")):
        if shutil.which(tool) is None:
            raise LinkError(f"no {tool} in PATH", remedy=f"apt-get install {package}")


def _sweep() -> None:
    """Remove the namespaces of benchmarks that are dead."""
    for path in DIRECTORY.glob(f"{_PREFIX}-*") if DIRECTORY.is_dir() else ():
        match = re.match(rf"{_PREFIX}-(\d+)-", path.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            _run("ip", "netns", "delete", path.name)


def _run(*command: str) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LinkError(f"{' '.join(command)}: {error}", remedy=_REMEDY) from error
    if done.returncode:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        raise LinkError(f"{' '.join(command)}: {said}", remedy=_REMEDY)
    return done.stdout
