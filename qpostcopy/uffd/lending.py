"""Lend QEMU our right to create userfaultfds, for the moment that it takes.

An unprivileged QEMU may not call userfaultfd(2) (sysctl vm.unprivileged_userfaultfd
is 0 unless somebody set it). Whoever holds an open /dev/userfaultfd may ask that
for one, so we open it and pass it over the monitor. The name under which QEMU
keeps it is fixed: whoever comes after a crash takes it back without knowing its
number, which only QEMU can safely close (it would close the number once more).

Blocking; for a thread that is not the event loop's (registration.py).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
from collections.abc import Coroutine

from qpostcopy.errors import QpostcopyError
from qpostcopy.qmp.holder import LEND_SECONDS, TAKE_BACK_SECONDS, MonitorHolder
from qpostcopy.uffd.attach import DEVICE, AttachError, AttachRefusedError, find_devices

NAME = "qpostcopy-userfaultfd"
#: The holder's own limits end it sooner.
_WAIT_SECONDS = 2 * (LEND_SECONDS + TAKE_BACK_SECONDS)


class Lender:
    """Lends to one QEMU. Make it in the event loop that the monitor belongs to."""

    def __init__(self, monitor: MonitorHolder, pid: int) -> None:
        self._monitor = monitor
        self._pid = pid
        self._loop = asyncio.get_running_loop()

    def lend(self) -> int:
        """QEMU has /dev/userfaultfd open; the number of the descriptor there.

        Whatever is raised, QEMU may have it: `take_back`.

        :raise QpostcopyError: there is no such device, or the monitor does not take it.
        """
        before = find_devices(self._pid)
        self._wait(self._lend())
        lent = set(find_devices(self._pid)) - set(before)
        if not lent:
            raise AttachError(f"QEMU {self._pid} took {DEVICE} and does not have it open")
        return max(lent)

    async def _lend(self) -> None:
        """Ours is open as long as this may send it: a late one must not send another's number."""
        ours = _open_device()
        try:
            await self._monitor.lend(ours, NAME)
        finally:
            os.close(ours)

    def take_back(self) -> None:
        """QEMU has nothing of ours under that name any more. Idempotent.

        :raise QpostcopyError: it may still have it.
        """
        self._wait(self._monitor.take_back(NAME))

    def _wait(self, work: Coroutine[None, None, None]) -> None:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            future.result(_WAIT_SECONDS)
        except (TimeoutError, concurrent.futures.CancelledError) as error:
            future.cancel()
            raise QpostcopyError("the handler is ending") from error


def _open_device() -> int:
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise AttachRefusedError(
            f"QEMU may not create a userfaultfd, and we cannot lend it {DEVICE}: {error.strerror}",
            remedy="run as root on Linux 6.1 or later (a container must be given the device), or "
            "set sysctl vm.unprivileged_userfaultfd=1, or run QEMU as root",
        ) from error
