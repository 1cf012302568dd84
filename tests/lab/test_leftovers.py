"""What is left behind is found: each kind is left behind here, by us."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qpostcopy.core import uffd_api, uffd_register_missing, uffd_unregister
from qpostcopy.lab.leftovers import (
    processes_naming,
    registered_ranges,
    sockets_below,
    userfaultfds,
)

_USERFAULTFD = 323  # x86-64
_BYTES = 1 << 20


@pytest.fixture
def uffd() -> Iterator[int]:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    uffd_api(fd)
    yield fd
    os.close(fd)


@pytest.mark.root
def test_a_userfaultfd_is_found(uffd: int) -> None:
    assert userfaultfds(os.getpid()) == [uffd]


@pytest.mark.root
def test_a_registered_range_is_found(uffd: int) -> None:
    assert registered_ranges(os.getpid()) == []
    with mmap.mmap(-1, _BYTES) as region:
        hva = ctypes.addressof(holder := ctypes.c_char.from_buffer(region))
        uffd_register_missing(uffd, hva, _BYTES)
        found = registered_ranges(os.getpid())
        uffd_unregister(uffd, hva, _BYTES)
        del holder
    assert [int(name.partition("-")[0], 16) for name in found] == [hva]


def test_sockets_are_found_and_files_are_not(tmp_path: Path) -> None:
    (tmp_path / "state.json").touch()
    (tmp_path / "deep").mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "deep" / "s"))
        assert sockets_below(tmp_path) == [tmp_path / "deep" / "s"]
    assert sockets_below(tmp_path / "nowhere") == []


def test_a_process_is_found_by_a_path_in_its_arguments(tmp_path: Path) -> None:
    code = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout
        child.stdout.readline()
        assert [line.partition(" ")[0] for line in processes_naming(tmp_path)] == [str(child.pid)]
        child.communicate()
    assert processes_naming(tmp_path) == []
