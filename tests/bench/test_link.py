"""Namespaces and what crosses them; real ones."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qpostcopy.bench.link import Ends, LinkError, open_link
from qpostcopy.bench.model import Link

pytestmark = pytest.mark.root

SIZE_BYTES = 32 << 20
RECEIVE = """
import socket, sys
listener = socket.create_server((sys.argv[1], 5001))
print("ready", flush=True)
connection, _ = listener.accept()
left = int(sys.argv[2])
while left:
    left -= len(connection.recv(min(left, 1 << 20)))
connection.sendall(b"!")
"""
SEND = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 5001))
connection.sendall(bytes(int(sys.argv[2])))
assert connection.recv(1) == b"!"
"""


def namespaces() -> set[str]:
    folder = Path("/run/netns")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def transfer_seconds(ends: Ends) -> float:
    address, size = ends.destination.address, str(SIZE_BYTES)
    receiver = subprocess.Popen(
        [*_inside(ends.destination.netns), sys.executable, "-c", RECEIVE, address, size],
        stdout=subprocess.PIPE,
    )
    with receiver:
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == b"ready\n"
        start_s = time.monotonic()
        sender = [*_inside(ends.source.netns), sys.executable, "-c", SEND, address, size]
        subprocess.run(sender, check=True, timeout=60)
        return time.monotonic() - start_s


def _inside(netns: str) -> list[str]:
    return ["nsenter", f"--net=/run/netns/{netns}", "--"]


@pytest.mark.parametrize("link", list(Link))
def test_what_crosses_it_is_counted_and_nothing_is_left(link: Link) -> None:
    before = namespaces()
    with open_link(link) as ends:
        assert namespaces() > before
        counted = ends.wire_bytes()
        transfer_seconds(ends)
        counted = ends.wire_bytes() - counted
        # Headers and acknowledgements come on top; Ethernet's smallest frames are no more than 8%.
        assert SIZE_BYTES < counted < 1.1 * SIZE_BYTES
    assert namespaces() == before


def test_a_gigabit_is_no_more_than_that() -> None:
    with open_link(Link.GIGABIT) as ends:
        seconds = transfer_seconds(ends)
    # What the bucket and the sockets hold may go at once; on a busy machine it takes longer.
    assert seconds > 0.9 * (SIZE_BYTES - (1 << 20)) * 8 / 1e9


def test_it_is_removed_after_an_error_too() -> None:
    before = namespaces()
    with pytest.raises(ZeroDivisionError), open_link(Link.GIGABIT):
        raise ZeroDivisionError
    assert namespaces() == before


def test_nobody_else_is_on_it() -> None:
    """A port that somebody listens to outside is free inside."""
    with socket.create_server(("127.0.0.1", 0)) as outside, open_link(Link.LOOPBACK) as ends:
        port = outside.getsockname()[1]
        bind = f"import socket; socket.create_server(('127.0.0.1', {port}))"
        command = [*_inside(ends.source.netns), sys.executable, "-c", bind]
        subprocess.run(command, check=True, timeout=30)


def test_what_a_dead_benchmark_left_is_removed() -> None:
    child = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    left = f"qpcbench-{int(child.stdout)}-0"
    mine = f"qpcbench-{os.getpid()}-kept"
    for name in (left, mine):
        subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        with open_link(Link.LOOPBACK):
            assert left not in namespaces()
            assert mine in namespaces()
    finally:
        subprocess.run(["ip", "netns", "delete", mine], check=True)


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LinkError, match="no ip in PATH") as caught, open_link(Link.LOOPBACK):
        pass
    assert caught.value.remedy == "apt-get install iproute2"
