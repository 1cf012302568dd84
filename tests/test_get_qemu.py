"""scripts/get-qemu: a QEMU of another Debian suite that is that suite's through and through."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qpostcopy.lab.vm import Backend, Vm, VmSpec
from tests.qmp.support import private_directory
from tests.vm.debian import CACHE, ROOT, qemu_of
from tests.vm.setups import PLAIN, Setup

pytestmark = [pytest.mark.root, pytest.mark.slow]

SECONDS = 60.0
GONE = 3
MIB = 1 << 20
NOT_FOUND = HTTPStatus.NOT_FOUND


def get_qemu(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts/get-qemu", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@contextmanager
def mirror_that_says(signed: HTTPStatus, detached: HTTPStatus) -> Iterator[str]:
    """A mirror that says this to the two ways of asking for a suite; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(signed if self.path.endswith("/InRelease") else detached)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Not on the terminal."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/debian"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.vm
@pytest.mark.parametrize(("suite", "version"), [("trixie", (10, 0)), ("bullseye", (5, 2))])
def test_all_that_runs_is_of_the_suite(suite: str, version: tuple[int, int]) -> None:
    """Program, loader, libraries and modules; and the process that was started is QEMU."""
    # A device that is a module of QEMU's, where Debian builds modules.
    more = ("-device", "virtio-gpu-pci")
    spec = VmSpec((Backend("ram", 32 * MIB),), paused=True, qemu=qemu_of(suite), more=more)
    with private_directory() as directory, Vm("vm", spec, directory) as vm:
        told = vm.observer.version
        assert (told["major"], told["minor"]) == version
        words = [line.split() for line in Path(f"/proc/{vm.pid}/maps").read_text().splitlines()]
        code = {line[5] for line in words if len(line) > 5 and "x" in line[1]}
        files = {path for path in code if path.startswith("/")}
        assert any(path.endswith("/usr/bin/qemu-system-x86_64") for path in files)
        assert {path for path in files if not path.startswith(f"{CACHE / suite}/")} == set()


def test_a_tree_that_is_there_is_used_without_a_look_at_the_mirror() -> None:
    path = qemu_of("trixie")
    with mirror_that_says(NOT_FOUND, NOT_FOUND) as mirror:
        got = get_qemu("trixie", CACHE / "trixie", mirror)
    assert (got.returncode, got.stdout) == (0, f"{path}\n")
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize(
    ("signed", "detached", "code", "told"),
    [
        (NOT_FOUND, NOT_FOUND, GONE, "Debian suite no-such is gone from the mirror"),
        (NOT_FOUND, HTTPStatus.SERVICE_UNAVAILABLE, 1, "mmdebstrap failed"),
        (HTTPStatus.SERVICE_UNAVAILABLE, NOT_FOUND, 1, "mmdebstrap failed"),
    ],
)
def test_gone_is_told_from_other_trouble(
    tmp_path: Path, signed: HTTPStatus, detached: HTTPStatus, code: int, told: str
) -> None:
    with mirror_that_says(signed, detached) as mirror:
        got = get_qemu("no-such", tmp_path / "tree", mirror)
    assert (got.returncode, got.stdout) == (code, "")
    assert told in got.stderr
    assert not (tmp_path / "tree").exists()
    assert not (tmp_path / "tree.new").exists()


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    got = get_qemu("trixie", tmp_path)
    assert got.returncode == 1
    assert "holds no QEMU" in got.stderr
    assert (tmp_path / "mine").exists()


def test_words_that_are_missing() -> None:
    got = get_qemu("trixie")
    assert got.returncode == 2
    assert "SUITE DIR" in got.stderr


def test_a_set_up_runs_the_suites_that_it_names() -> None:
    setup = Setup("x", suite="bullseye", suite_there="trixie")
    sizes = (32 * MIB,)
    assert setup.source(sizes).qemu == qemu_of("bullseye")
    assert setup.destination(sizes).qemu == qemu_of("trixie")
    assert PLAIN.source(sizes).qemu == PLAIN.destination(sizes).qemu == "qemu-system-x86_64"
