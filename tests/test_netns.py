"""A command is started in the network namespace that is named, or it is said why not."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from qpostcopy import netns
from qpostcopy.errors import ExitCode
from qpostcopy.netns import NetnsAbsentError, NetnsClosedError, expect_enterable, hint, inside
from tests.networks import namespace, namespace_named, namespace_of


def test_our_own_needs_nothing() -> None:
    expect_enterable(None)
    assert inside(None) == []


def test_one_that_is_not_there() -> None:
    with pytest.raises(NetnsAbsentError, match="there is no network namespace nowhere") as caught:
        expect_enterable("nowhere")
    assert caught.value.exit_code is ExitCode.REFUSED
    assert "ip netns add nowhere" in str(caught.value.remedy)


def test_a_file_that_is_no_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This is what a deleted one leaves where its mount was not to be seen."""
    monkeypatch.setattr(netns, "DIRECTORY", tmp_path)
    (tmp_path / "west").touch()
    with pytest.raises(NetnsClosedError, match="west cannot be entered: nsenter: ") as caught:
        expect_enterable("west")
    assert caught.value.exit_code is ExitCode.REFUSED


def test_without_nsenter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "DIRECTORY", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "west").touch()
    with pytest.raises(NetnsClosedError, match="No such file or directory: 'nsenter'") as caught:
        expect_enterable("west")
    assert "util-linux" in str(caught.value.remedy)


@pytest.mark.root
def test_a_command_in_there_keeps_its_pid() -> None:
    with namespace("west") as name:
        expect_enterable(name)
        said = subprocess.Popen(
            [*inside(name), "sh", "-c", "echo $$; read line"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert said.stdout is not None
        assert int(said.stdout.readline()) == said.pid
        assert namespace_of(said.pid) == namespace_named(name)
        said.communicate()


@pytest.mark.root
@pytest.mark.parametrize("number", [errno.EADDRNOTAVAIL, errno.ENETUNREACH])
def test_an_address_that_is_not_there_is_explained(number: int) -> None:
    ask = "import sys; from qpostcopy.netns import hint; print(hint(OSError(int(sys.argv[1]), '')))"
    with namespace("west") as name, namespace("east"):
        command = [*inside(name), sys.executable, "-c", ask, str(number)]
        assert f"`ip -n {name} link set lo up`" in subprocess.check_output(command, text=True)


def test_other_trouble_is_not_the_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "namespace_name", lambda: "west")
    assert hint(OSError(errno.EADDRINUSE, "")) == ""
    assert "west" in hint(OSError(errno.EADDRNOTAVAIL, ""))


@pytest.mark.root
def test_without_the_right() -> None:
    try_it = "import sys; from qpostcopy.netns import *; expect_enterable(sys.argv[1])"
    with namespace("west") as name:
        without = ["setpriv", "--bounding-set=-sys_admin", "--"]
        tried = subprocess.run(
            [*without, sys.executable, "-c", try_it, name], stderr=subprocess.PIPE, text=True
        )
    assert tried.returncode == 1
    assert "NetnsClosedError" in tried.stderr
    assert "Operation not permitted" in tried.stderr
