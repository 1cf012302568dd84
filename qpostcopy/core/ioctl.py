"""A userfaultfd's control ioctls, and system calls run inside another process."""

from __future__ import annotations

from collections.abc import Sequence

from qpostcopy.core.calls import call, ffi, lib


def uffd_api(uffd: int) -> None:
    """UFFDIO_API with the features that we need; once in the life of a userfaultfd.

    :raise CoreSystemError: the kernel lacks MISSING_SHMEM, or it was done before.
    """
    call(lib.qpc_uffd_api, uffd)


def uffd_register_missing(uffd: int, hva: int, length_bytes: int) -> None:
    """Have missing pages of the range reported.

    :raise CoreSystemError: EBUSY: another userfaultfd has it.
    """
    call(lib.qpc_uffd_register_missing, uffd, hva, length_bytes)


def uffd_unregister(uffd: int, hva: int, length_bytes: int) -> None:
    """Give the range back; wakes whoever waits in it.

    :raise CoreSystemError: ENOMEM: the address space is gone, and the range with it.
    """
    call(lib.qpc_uffd_unregister, uffd, hva, length_bytes)


def uffd_wake(uffd: int, hva: int, length_bytes: int) -> None:
    """Wake every thread that waits in the range; it faults again if it must."""
    call(lib.qpc_uffd_wake, uffd, hva, length_bytes)


def inject_syscall(
    pid: int, number: int, args: Sequence[int], deadline_ms: int, *, start_ticks: int = 0
) -> int:
    """Have process `pid` run one system call; its raw result (a negative errno as it is).

    All of it happens on the calling thread, which ptrace demands.

    :param start_ticks: field 22 of /proc/PID/stat, so that a recycled pid is never hit; 0: any.
    :raise RefusedByCoreError: stopped by a signal, traced by another, not a 64-bit process.
    :raise TargetGoneError: no such process.
    :raise LaneTimeoutError: the deadline passed; the call did not run.
    """
    result = ffi.new("int64_t *")
    padded = [value & 0xFFFF_FFFF_FFFF_FFFF for value in args] + [0] * (6 - len(args))
    call(
        lib.qpc_inject_syscall_into,
        pid,
        start_ticks,
        number,
        ffi.new("uint64_t[6]", padded),
        deadline_ms,
        result,
    )
    return int(result[0])
