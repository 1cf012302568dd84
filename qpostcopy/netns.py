"""Network namespaces, by their names of `ip netns`: how a process of ours is started in one.

nsenter(1) enters and then becomes the command, under the same pid, so nobody
else need know of it. Only the network is another in there: files, unix sockets
with a path, /proc and rights stay as they are. Whether one can be entered is not
concluded from rights and files but tried.
"""

from __future__ import annotations

import errno
import os
import subprocess
from contextlib import suppress
from pathlib import Path

from qpostcopy.errors import RefusedError

#: Where ip-netns(8) keeps them: a mount for each.
DIRECTORY = Path("/run/netns")
_TRY_SECONDS = 5.0
#: What a namespace without this address, or without a way to it, says.
_NO_NETWORK = frozenset({errno.EADDRNOTAVAIL, errno.ENETUNREACH, errno.EHOSTUNREACH})


class NetnsAbsentError(RefusedError):
    """There is no namespace of this name."""


class NetnsClosedError(RefusedError):
    """There is one, and we cannot enter it."""


def inside(name: str | None) -> list[str]:
    """The words before a command that is to run in there; None: in our own namespace."""
    return [] if name is None else ["nsenter", f"--net={DIRECTORY / name}", "--"]


def expect_enterable(name: str | None) -> None:
    """Enter it once, to do nothing. Blocking, for some milliseconds.

    :raise NetnsAbsentError, NetnsClosedError: it cannot be entered.
    """
    if name is None:
        return
    if not (DIRECTORY / name).exists():
        raise NetnsAbsentError(
            f"there is no network namespace {name}: {DIRECTORY / name} is not there",
            remedy=f"ip netns add {name}, and give it its addresses; or correct netns in the plan "
            "(`ip netns list` names those that are)",
        )
    if problem := _try(name):
        raise NetnsClosedError(
            f"the network namespace {name} cannot be entered: {problem}",
            remedy="run qpostcopy as root (CAP_SYS_ADMIN), with nsenter (Debian: util-linux) in "
            f"PATH; if it is no namespace: ip netns delete {name}, and add it again",
        )


def namespace_name() -> str | None:
    """Of the network namespace that we are in; None: it has no name that can be seen."""
    ours = Path("/proc/self/ns/net").stat()
    with suppress(OSError):
        for place in DIRECTORY.iterdir():
            with suppress(OSError):
                if os.path.samestat(place.stat(), ours):
                    return place.name
    return None


def hint(error: OSError) -> str:
    """To be added to a remedy: what to see to in the namespace that we are in; often nothing."""
    name = namespace_name() if error.errno in _NO_NETWORK else None
    if name is None:
        return ""
    return (
        f"; see what the network namespace {name} has (`ip -n {name} address`): the loopback of a "
        f"new one is down until `ip -n {name} link set lo up`"
    )


def _try(name: str) -> str:
    """Why it cannot be entered; empty: it can."""
    try:
        tried = subprocess.run(
            [*inside(name), "true"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TRY_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = tried.stderr.decode(errors="replace").strip()
    return "" if tried.returncode == 0 else said or f"exit code {tried.returncode}"
