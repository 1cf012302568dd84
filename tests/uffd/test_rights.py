"""What preflight is told of QEMU's rights, against what then happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from qpostcopy.uffd import attach, rights
from tests.uffd.victims import (
    SYS_PAUSE,
    filtered_command,
    lesser_command,
    user_command,
    victim,
)

pytestmark = pytest.mark.root


def said_by(pid: int, *under: str) -> list[str]:
    """Both words, of a process of ours that is started so."""
    ask = (
        "import json, sys; from qpostcopy.uffd.rights import *; pid = int(sys.argv[1]);"
        "print(json.dumps([way_to_userfaultfd(pid), filter_refusal(pid)]))"
    )
    command = [*under, sys.executable, "-c", ask, str(pid)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: list[str] = json.loads(done.stdout)
    return found


def test_root_may() -> None:
    with victim("ppoll") as target:
        assert rights.way_to_userfaultfd(target.pid) == "own"
        assert rights.filter_refusal(target.pid) == ""
        os.close(attach.obtain(target.pid).uffd)
        assert target.end().startswith("ok ")


def test_an_unprivileged_one_needs_a_loan() -> None:
    with victim("ppoll", under=user_command()) as target:
        assert rights.way_to_userfaultfd(target.pid) == "lent"
        with pytest.raises(attach.AttachNotPermittedError):
            attach.obtain(target.pid)
        assert target.end().startswith("ok ")


def test_all_rights_in_another_user_namespace_are_none() -> None:
    with victim("ppoll", under=["unshare", "--user", "--map-root-user", "--"]) as target:
        assert rights.way_to_userfaultfd(target.pid) == "lent"
        with pytest.raises(attach.AttachNotPermittedError):
            attach.obtain(target.pid)
        assert target.end().startswith("ok ")


def test_no_device_to_lend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rights, "DEVICE", tmp_path / "userfaultfd")
    with victim("ppoll", under=user_command()) as target:
        assert rights.way_to_userfaultfd(target.pid) == "none"


def test_a_machine_that_lets_everybody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with victim("ppoll", under=user_command()) as target:
        for text in ("1\n", None):
            sysctl = tmp_path / "unprivileged_userfaultfd"
            sysctl.write_text(text) if text else sysctl.unlink()
            monkeypatch.setattr(rights, "_SYSCTL", sysctl)
            assert rights.way_to_userfaultfd(target.pid) == "own"


@pytest.mark.parametrize(
    ("how", "word"),
    [
        (None, ""),
        ("no-admin", "without CAP_SYS_ADMIN"),
        ("filtered", "under a seccomp filter ourselves"),
    ],
)
def test_a_filter_in_the_way(how: Literal["no-admin", "filtered"] | None, word: str) -> None:
    """The same three that test_attach_inject.py tries out."""
    command = lesser_command(how) if how else []
    with victim("ppoll", under=filtered_command(SYS_PAUSE)) as target:
        _, refusal = said_by(target.pid, *command)
        assert word in refusal
        assert bool(refusal) is bool(word)
    with victim("ppoll") as target:
        assert said_by(target.pid, *command)[1] == ""


def test_a_kernel_without_the_means(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rights, "_CHECKPOINT_RESTORE", tmp_path / "none")
    with victim("ppoll", under=filtered_command(SYS_PAUSE)) as target:
        assert "CONFIG_CHECKPOINT_RESTORE" in rights.filter_refusal(target.pid)
