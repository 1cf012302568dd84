"""Which QEMU is meant, and what is said if it cannot be had."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qpostcopy.bench import qemus
from qpostcopy.bench.qemus import NoQemuError, find_qemus
from qpostcopy.errors import ExitCode

pytestmark = pytest.mark.vm

NAME = "qemu-system-x86_64"


@pytest.fixture(scope="module")
def installed() -> str:
    """The first two numbers of the version of this machine's QEMU."""
    said = subprocess.run([NAME, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.match(r"QEMU emulator version (\d+\.\d+)\.", said)
    assert found, said
    return found[1]


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def refusal(*words: str) -> NoQemuError:
    with pytest.raises(NoQemuError) as caught:
        find_qemus(words)
    assert caught.value.exit_code is ExitCode.USAGE
    assert caught.value.remedy
    return caught.value


def test_the_installed_one_is_found_by_its_version(installed: str) -> None:
    (qemu,) = find_qemus([installed]).values()
    assert qemu.name == installed
    assert qemu.executable == shutil.which(NAME)
    # As it writes it itself, to the patch level.
    assert re.match(rf"{re.escape(installed)}\.\d+", qemu.version)


def test_one_is_found_by_its_path(installed: str) -> None:
    path = shutil.which(NAME)
    assert path
    assert find_qemus([path]) == find_qemus([installed])


def test_the_whole_version_is_kept(tmp_path: Path) -> None:
    """What a distribution made of it counts: runs of two builds are not put together."""
    said = "QEMU emulator version 9.2.1 (Debian 1:9.2.1+ds-1)"
    path = script(tmp_path / "qemu", f"echo '{said}'; echo 'Copyright (c) Fabrice Bellard'")
    assert find_qemus([path]) == {"9.2": ("9.2", path, "9.2.1 (Debian 1:9.2.1+ds-1)")}


def test_another_version_than_the_installed_one(installed: str) -> None:
    error = refusal("2.12")
    assert str(error) == f"--qemu 2.12: the installed QEMU is {installed}"
    assert error.remedy == f"say --qemu {installed}, one of 5.2, 10.0, or the path of another"


@pytest.mark.parametrize("word", ["/no/such/qemu", "/etc/passwd", "no-such-qemu"])
def test_what_is_no_executable(word: str) -> None:
    assert str(refusal(word)) == f"--qemu {word}: {word} is not an executable"


def test_nothing_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    error = refusal("7.2")
    assert str(error) == f"--qemu 7.2: {NAME} is not an executable"
    assert "install qemu-system-x86" in str(error.remedy)


def test_what_is_no_qemu() -> None:
    assert str(refusal("/bin/true")) == "--qemu /bin/true: /bin/true does not tell a version"


def test_what_cannot_be_run(tmp_path: Path) -> None:
    """Executable, to look at it."""
    path = tmp_path / "qemu"
    path.write_bytes(b"\x7fELF, or so it says")
    path.chmod(0o755)
    assert "Exec format error" in str(refusal(str(path)))


def test_what_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(qemus, "_VERSION_SECONDS", 0.2)
    path = script(tmp_path / "qemu", "exec sleep 600")
    assert "timed out after 0.2 seconds" in str(refusal(path))


def test_the_same_version_twice(installed: str, tmp_path: Path) -> None:
    found = shutil.which(NAME)
    assert found
    link = tmp_path / "qemu"
    link.symlink_to(found)
    error = refusal(installed, str(link))
    assert str(error) == (
        f"--qemu {link}: {link} is QEMU {installed}, and so is {find_qemus([found])[installed][1]}"
    )


def test_one_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    script(tmp_path / "scripts" / "get-qemu", 'echo "get-qemu: $1 is gone" >&2; exit 3')
    monkeypatch.setattr(qemus, "_ROOT", tmp_path)
    error = refusal("10.0")
    assert str(error) == "--qemu: cannot get the QEMU of Debian trixie: get-qemu: trixie is gone"
