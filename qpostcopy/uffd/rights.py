"""Whether QEMU can be made to create a userfaultfd, told beforehand and from outside.

For preflight. What attach.py does is decided by trying, not by this: security
modules have their say too, and nobody can ask them beforehand.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Literal

from qpostcopy.uffd.attach import DEVICE

Way = Literal["own", "lent", "none"]

#: userfaultfd_syscall_allowed() in fs/userfaultfd.c: 1, or CAP_SYS_PTRACE in the first namespace.
_SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")
_CAP_SYS_ADMIN, _CAP_SYS_PTRACE = 21, 19
#: PROC_USER_INIT_INO of the kernel: the user namespace that a machine starts with.
_FIRST_USER_NAMESPACE = 0xEFFFFFFD
#: There is such a file only in kernels with CONFIG_CHECKPOINT_RESTORE.
_CHECKPOINT_RESTORE = Path("/proc/sys/kernel/ns_last_pid")


def way_to_userfaultfd(pid: int) -> Way:
    """`own`: the process may create one; `lent`: with our /dev/userfaultfd; `none`: not at all.

    `own`, too, of a process that we may not look at: that has a finding of its own.
    """
    try:
        if _may_by_itself(pid):
            return "own"
    except OSError:
        return "own"
    with suppress(OSError):
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
        return "lent"
    return "none"


def _may_by_itself(pid: int) -> bool:
    if not _SYSCTL.exists() or _SYSCTL.read_text().strip() != "0":
        return True  # before Linux 5.2, everybody might
    namespace = Path(f"/proc/{pid}/ns/user").stat().st_ino
    return namespace == _FIRST_USER_NAMESPACE and _has(str(pid), _CAP_SYS_PTRACE)


def filter_refusal(pid: int) -> str:
    """Why the process's seccomp filter cannot be suspended for our calls; empty: it can.

    What PTRACE_O_SUSPEND_SECCOMP asks for, see check_ptrace_options() in kernel/ptrace.c.
    """
    if not _filtered(str(pid)):
        return ""
    if _filtered("self"):
        return "we are under a seccomp filter ourselves"
    if not _has("self", _CAP_SYS_ADMIN):
        return "we run without CAP_SYS_ADMIN"
    return "" if _CHECKPOINT_RESTORE.exists() else "the kernel has no CONFIG_CHECKPOINT_RESTORE"


def _filtered(process: str) -> bool:
    return _status(process, "Seccomp") not in ("0", "")


def _has(process: str, capability: int) -> bool:
    return int(_status(process, "CapEff") or "0", 16) >> capability & 1 == 1


def _status(process: str, name: str) -> str:
    """A field of /proc/PID/status; empty: it cannot be read."""
    with suppress(OSError):
        text = Path(f"/proc/{process}/status").read_text()
        if found := re.search(rf"^{name}:\s+(\w+)", text, re.MULTILINE):
            return found[1]
    return ""
