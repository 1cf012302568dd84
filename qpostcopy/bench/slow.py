"""A userfault handler that is slower on purpose: the benchmark must show by how much.

The product is untouched: a library that is preloaded into it (scripts/slow/slow_faults.c)
holds back each answer to a page fault, and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

from qpostcopy.errors import QpostcopyError

_SOURCE = Path(__file__).resolve().parents[2] / "scripts" / "slow" / "slow_faults.c"
_COMMAND = ("gcc", "-std=gnu11", "-O2", "-shared", "-fPIC", "-pthread")
#: What the loader takes for the end of a path in LD_PRELOAD.
_SEPARATORS = frozenset(": ")


class SlowLibraryError(QpostcopyError):
    """The library that makes the handler slow cannot be built, or not be loaded."""


def build_slow_library(cache: Path) -> Path:
    """The library, absolute, below `cache`; built unless it is there already.

    :raise SlowLibraryError: there is no gcc, or it failed.
    """
    key = hashlib.sha256(_SOURCE.read_bytes() + repr(_COMMAND).encode()).hexdigest()[:16]
    library = cache.resolve() / f"slow_faults-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        # Another benchmark may build it at the same time.
        unfinished = library.with_suffix(f".{os.getpid()}")
        _build(unfinished)
        unfinished.rename(library)
    return library


def slow_environment(library: Path, delay_us: int) -> dict[str, str]:
    """What to add to the environment of `qpostcopy migrate`; its companions inherit it.

    :param delay_us: by how much each page fault is answered later; at most a minute.
    :raise SlowLibraryError: the loader would not find a library of that name.
    """
    if _SEPARATORS & set(str(library)):
        raise SlowLibraryError(
            f"LD_PRELOAD takes no path with a space or a colon: {library}",
            remedy="use a checkout in another directory",
        )
    return {"LD_PRELOAD": str(library), "QPOSTCOPY_SLOW_FAULTS_US": str(delay_us)}


def _build(output: Path) -> None:
    try:
        subprocess.run(
            [*_COMMAND, "-o", str(output), str(_SOURCE)], check=True, capture_output=True, text=True
        )
    except FileNotFoundError as error:
        raise SlowLibraryError(
            "gcc is not installed", remedy="as root: apt-get install gcc"
        ) from error
    except subprocess.CalledProcessError as error:
        raise SlowLibraryError(f"gcc cannot build {_SOURCE}: {error.stderr.strip()}") from error
