"""The QEMUs to measure, each known by its version's first two numbers."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from qpostcopy.errors import UsageError

#: Where each version comes from: what is installed here, or a Debian suite.
_SUITES = {"5.2": "bullseye", "10.0": "trixie"}
_ROOT = Path(__file__).resolve().parents[2]
_VERSION_SECONDS = 20.0


class Qemu(NamedTuple):
    """`name` 10.0, `version` "10.0.8 (Debian ...)"."""

    name: str
    executable: str
    version: str


class NoQemuError(UsageError):
    """It cannot be had, or is no QEMU."""


def find_qemus(words: Iterable[str]) -> dict[str, Qemu]:
    """By name.

    :param words: each a version (7.2: the installed one; 5.2 and 10.0 are fetched once), or
        the path of a QEMU.
    :raise NoQemuError: one of them cannot be had, or two are of the same version.
    """
    found: dict[str, Qemu] = {}
    for word in words:
        qemu = _find(word)
        if qemu.name in found:
            raise NoQemuError(
                f"--qemu {word}: {qemu.executable} is QEMU {qemu.name}, and so is "
                f"{found[qemu.name].executable}",
                remedy="give each version once",
            )
        found[qemu.name] = qemu
    return found


def _find(word: str) -> Qemu:
    executable = _fetch(_SUITES[word]) if word in _SUITES else _installed(word)
    said = _version_of(executable, word)
    match = re.search(r"version ((\d+\.\d+)\S*(?: \(.*\))?)", said)
    if match is None:
        raise NoQemuError(
            f"--qemu {word}: {executable} does not tell a version", remedy="give a QEMU's path"
        )
    if re.fullmatch(r"\d+\.\d+", word) and match[2] != word:
        raise NoQemuError(
            f"--qemu {word}: the installed QEMU is {match[2]}",
            remedy=f"say --qemu {match[2]}, one of {', '.join(_SUITES)}, or the path of another",
        )
    return Qemu(match[2], executable, match[1])


def _version_of(executable: str, word: str) -> str:
    try:
        return subprocess.run(
            [executable, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_VERSION_SECONDS,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoQemuError(
            f"--qemu {word}: {executable} --version: {error}", remedy="give a QEMU's path"
        ) from error


def _installed(word: str) -> str:
    name = "qemu-system-x86_64" if re.fullmatch(r"\d+\.\d+", word) else word
    executable = shutil.which(name)
    if executable is None:
        raise NoQemuError(
            f"--qemu {word}: {name} is not an executable",
            remedy="install qemu-system-x86, or give the path of a QEMU",
        )
    return executable


def _fetch(suite: str) -> str:
    got = subprocess.run(
        [_ROOT / "scripts" / "get-qemu", suite, _ROOT / ".cache" / "qemu" / suite],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if got.returncode:
        raise NoQemuError(
            f"--qemu: cannot get the QEMU of Debian {suite}: {got.stderr.strip()}",
            remedy="give the path of one",
        )
    return got.stdout.strip()
