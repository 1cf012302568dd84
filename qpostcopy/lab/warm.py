"""Touch-and-free: makes the machine hand us memory before the clock runs.

A machine that is itself a guest may have given its free memory back to its
host; the first touch of such a page then costs many times that of a warm one,
and every engine looks slow alike (design: "Cold memory"). What is about to be
timed touches as much memory as it will allocate, right before.
"""

from __future__ import annotations

import mmap
import subprocess
import sys

from qpostcopy.core import PAGE_BYTES
from qpostcopy.errors import QpostcopyError


class NoMemoryError(QpostcopyError):
    """There is not so much memory."""


def touch_and_free(size_bytes: int) -> None:
    """Write one byte into each page of so much fresh memory, and give it back."""
    pages = -(-size_bytes // PAGE_BYTES)
    if pages <= 0:
        return
    with mmap.mmap(-1, pages * PAGE_BYTES) as region, memoryview(region) as view:
        # Huge pages would be handed out again as huge pages; a migration takes small ones.
        region.madvise(mmap.MADV_NOHUGEPAGE)
        view[::PAGE_BYTES] = b"\1" * pages


def touch_and_free_elsewhere(size_bytes: int) -> None:
    """The same in a process of its own, so that no thread of ours has to wait for it.

    For who stamps what comes in meanwhile: touching holds Python's lock for long.

    :raise NoMemoryError: there is not so much.
    """
    command = [sys.executable, "-m", "qpostcopy.lab.warm", str(size_bytes)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise NoMemoryError(
            f"cannot touch {size_bytes >> 20} MiB of memory: {said or f'status {done.returncode}'}",
            remedy="use a smaller guest (--memory), or end what holds the memory",
        )


if __name__ == "__main__":
    touch_and_free(int(sys.argv[1]))
