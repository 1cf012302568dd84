"""Taking a destination's RAM into our hands, and giving it back.

    obtain a userfaultfd -> register every mapping -> punch the RAM empty -> verify

In this order no page can slip in unseen: once a range is registered, QEMU's own
threads wait instead of filling a hole, so what appears after the punch was
written past QEMU, and the verification finds it. If any step fails, all earlier
ones are undone, and nothing of ours stays in QEMU or in the state directory.

`handler.json` in the state directory says what was taken, so that a successor
can take it over although QEMU's monitor hangs, and so that a userfaultfd that a
crash left behind is closed. It is written before QEMU is touched and is the last
that goes: as long as something of ours may be in QEMU (stopped or traced, it
cannot close anything), it is there, and `close_leftovers` can be tried again.
A userfaultfd of QEMU's own is never closed.

Everything here blocks: call it from a thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from qpostcopy import regions
from qpostcopy.core import (
    PAGE_BYTES,
    CoreError,
    HandlerCore,
    Mapping,
    RamBlock,
    uffd_api,
    uffd_register_missing,
    uffd_unregister,
)
from qpostcopy.errors import QpostcopyError, RefusedError, StateLostError
from qpostcopy.process import Process
from qpostcopy.qmp import schema
from qpostcopy.state import write_durably
from qpostcopy.uffd import attach
from qpostcopy.uffd.attach import (
    AttachError,
    AttachGoneError,
    AttachNotPermittedError,
    AttachTimeoutError,
    HelperLostError,
    Obtained,
)

log = logging.getLogger(__name__)

OBTAIN_SECONDS = 10.0
RECORD = "handler.json"
#: What the core keeps beside it (core/handler.py).
MAP_FILES = ("placed.*", "zero.*", "counters")


class UnsafeRamError(RefusedError):
    """The destination's RAM must not be touched as it is; nothing was."""


class RamNotEmptyError(RefusedError):
    """Somebody writes into the destination's RAM past its QEMU."""


class LeftInQemuError(QpostcopyError):
    """Something of ours could not be taken out of QEMU."""


class NothingToAdoptError(StateLostError):
    """The state directory does not describe what is in this QEMU."""


class Lending(Protocol):
    """Who lends QEMU an open /dev/userfaultfd; see lending.Lender."""

    def lend(self) -> int: ...

    def take_back(self) -> None: ...


class Record(schema.Model):
    """handler.json. `uffd_fd` None: the injection may or may not have happened.

    `lent`: QEMU may have a descriptor of /dev/userfaultfd from us.
    """

    version: int = 1
    process: Process
    userfaults_before: tuple[int, ...]
    uffd_fd: int | None
    lent: bool = False
    blocks: tuple[schema.BlockFacts, ...]


@dataclass(frozen=True, slots=True)
class Registration:
    """What we hold of QEMU. `uffd` is our duplicate, owned."""

    process: Process
    uffd: int
    uffd_fd: int
    blocks: tuple[schema.BlockFacts, ...]

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def ram_blocks(self) -> tuple[RamBlock, ...]:
        return ram_blocks(self.blocks)

    @property
    def mappings(self) -> tuple[Mapping, ...]:
        """Every mapping of every block."""
        return tuple(
            Mapping(index, facts.hva, facts.length_bytes, facts.offset_bytes)
            for index, block in enumerate(self.blocks)
            for facts in block.mappings
        )

    @property
    def described(self) -> schema.Attached:
        return schema.Attached(
            uffd_fd=self.uffd_fd,
            ranges=len(self.mappings),
            registered_bytes=sum(mapping.length_bytes for mapping in self.mappings),
        )


def in_gpa_order(blocks: Sequence[schema.BlockFacts]) -> tuple[schema.BlockFacts, ...]:
    """The order of blocks on both sides: by guest physical address."""
    return tuple(sorted(blocks, key=lambda block: block.first_gpa))


def ram_blocks(blocks: Sequence[schema.BlockFacts]) -> tuple[RamBlock, ...]:
    """As the core and the hello know them."""
    return tuple(RamBlock(block.name, block.size_bytes) for block in blocks)


# --- taking -------------------------------------------------------------------------------


def refuse_unsafe(
    blocks: Sequence[schema.BlockFacts], forbidden: Sequence[schema.FileIdentity]
) -> None:
    """Refuse what punching would destroy, or what we could not serve. Touches nothing.

    :raise UnsafeRamError: with the first finding.
    """
    sources = {(file.device, file.inode) for file in forbidden}
    if not blocks:
        raise UnsafeRamError("the destination QEMU has no RAM block of its own to fill")
    for block in blocks:
        if (block.device, block.inode) in sources:
            raise UnsafeRamError(
                f"RAM block {block.name} of the destination is the same file as the source's "
                f"({block.mem_path}): emptying it would destroy the running guest",
                remedy="give each QEMU a file of its own: mem-path=/dev/shm with a directory "
                "makes QEMU create one",
            )
        if not block.share or block.page_bytes != PAGE_BYTES or not block.mappings:
            raise UnsafeRamError(
                f"RAM block {block.name} is not shared memory of {PAGE_BYTES}-byte pages",
                remedy="start QEMU with -object memory-backend-file,mem-path=/dev/shm,share=on,...",
            )
        if any(mapping.uffd_registered for mapping in block.mappings):
            raise UnsafeRamError(
                f"RAM block {block.name} already has a userfaultfd: another migration into this "
                "QEMU is running, or was not ended",
                remedy="end the other migration, or start this QEMU anew",
            )


def take(
    pid: int,
    blocks: tuple[schema.BlockFacts, ...],
    state_dir: Path,
    others: Sequence[str],
    lender: Lending,
) -> Registration:
    """Obtain, register, punch, verify; all of it, or nothing.

    :param others: processes besides QEMU that map the RAM; any is a reason to refuse.
    :param lender: for a QEMU that may not create a userfaultfd by itself.
    :raise RefusedError, CoreError, AttachError: it did not work, and nothing of ours stayed.
    :raise LeftInQemuError: nor could it be undone; `close_leftovers` can be tried again.
    """
    if others:
        raise UnsafeRamError(
            f"other processes map the destination's RAM: {', '.join(others)}",
            remedy="end them; a page that they touch would hide a fault",
        )
    close_leftovers(pid, state_dir, lender)
    process = Process.of(pid)
    if process is None:
        raise UnsafeRamError(f"the destination QEMU (pid {pid}) has ended")
    registration = _obtain(process, blocks, state_dir, lender)
    try:
        uffd_api(registration.uffd)
        for mapping in registration.mappings:
            uffd_register_missing(registration.uffd, mapping.hva, mapping.length_bytes)
        _empty(pid, blocks)
    except Exception as error:
        undo(registration, state_dir, error)
        raise
    return registration


def _obtain(
    process: Process, blocks: tuple[schema.BlockFacts, ...], state_dir: Path, lender: Lending
) -> Registration:
    """A userfaultfd, on record before and after."""
    before = attach.find_userfaultfds(process.pid)
    record = Record(process=process, userfaults_before=before, uffd_fd=None, blocks=blocks)
    _write_record(state_dir, record)
    try:
        try:
            obtained = attach.obtain(process.pid, OBTAIN_SECONDS, start_ticks=process.start_ticks)
        except AttachNotPermittedError as error:
            log.info("%s: lending it %s", error, attach.DEVICE)
            obtained = _obtain_lent(record, state_dir, lender)
    except (AttachTimeoutError, HelperLostError, LeftInQemuError):
        raise  # there may be one yet: the record stays
    except Exception as error:
        if orphans := _orphans_in(record):
            raise LeftInQemuError(
                f"{error}; and userfaultfd {', '.join(map(str, orphans))} stays in the "
                f"destination QEMU",
                remedy=error.remedy if isinstance(error, QpostcopyError) else None,
            ) from error
        _forget(state_dir)
        raise
    registration = Registration(process, obtained.uffd, obtained.fd_in_target, blocks)
    try:
        _write_record(state_dir, record.model_copy(update={"uffd_fd": obtained.fd_in_target}))
    except Exception as error:
        undo(registration, state_dir, error)
        raise
    return registration


def _obtain_lent(record: Record, state_dir: Path, lender: Lending) -> Obtained:
    """As attach.obtain, with a loan that is on record as long as QEMU may have it."""
    process = record.process
    _write_record(state_dir, record.model_copy(update={"lent": True}))
    try:
        obtained = attach.obtain(
            process.pid, OBTAIN_SECONDS, start_ticks=process.start_ticks, lent_fd=lender.lend()
        )
    except AttachTimeoutError:
        raise  # a late helper may still use it
    except Exception as error:
        _take_back(process, lender, error)
        raise
    try:
        _take_back(process, lender, None)
    except LeftInQemuError:
        os.close(obtained.uffd)
        with contextlib.suppress(AttachError, LeftInQemuError, OSError):  # else it is an orphan
            _close_in(process, obtained.fd_in_target)
        raise
    return obtained


def _take_back(process: Process, lender: Lending, reason: Exception | None) -> None:
    """The loan is over. :param reason: why so early."""
    try:
        lender.take_back()
    except QpostcopyError as error:
        if process.alive():
            raise LeftInQemuError(
                (f"{reason}; and " if reason else "")
                + f"our descriptor of {attach.DEVICE} may stay in the destination QEMU: {error}",
                remedy=error.remedy,
            ) from (reason or error)


def _empty(pid: int, blocks: Sequence[schema.BlockFacts]) -> None:
    """Punch every block, then look at all of them once more."""
    with contextlib.ExitStack() as files:
        fds = []
        for block in blocks:
            fds.append(regions.open_ram(pid, block, True))
            files.callback(os.close, fds[-1])
        for fd, block in zip(fds, blocks, strict=True):
            regions.punch_empty(fd, block.size_bytes)
        for fd, block in zip(fds, blocks, strict=True):
            if not regions.is_empty(fd):
                raise RamNotEmptyError(
                    f"RAM block {block.name} does not stay empty: somebody else writes into it",
                    remedy="find who has the file open or mapped (fuser, /proc/*/maps), end it",
                )


# --- taking over --------------------------------------------------------------------------


def adopt(pid: int, uffd_fd: int, state_dir: Path) -> Registration:
    """Take over what a dead handler left in QEMU. Needs no monitor.

    :raise NothingToAdoptError: it is not there, or it is not what was recorded.
    """
    record = read_record(state_dir)
    if record is None or record.uffd_fd != uffd_fd or record.process != Process.of(pid):
        raise NothingToAdoptError(
            f"no handler of this migration left userfaultfd {uffd_fd} in QEMU {pid}; "
            "pages that are missing there cannot be served"
        )
    start_ticks = record.process.start_ticks
    uffd = attach.adopt(pid, uffd_fd, start_ticks=start_ticks)
    return Registration(record.process, uffd, uffd_fd, record.blocks)


def tell_what_is_there(registration: Registration, core: HandlerCore) -> None:
    """Have the core ask the RAM files what was placed before it began."""
    with contextlib.ExitStack() as files:
        fds = []
        for block in registration.blocks:
            fds.append(regions.open_ram(registration.pid, block, False))
            files.callback(os.close, fds[-1])
        core.adopt(fds)


# --- giving back --------------------------------------------------------------------------


def give_back(registration: Registration, state_dir: Path) -> None:
    """Unregister everything, close both ends, verify. A dead QEMU has nothing of ours.

    If it raises, our duplicate and the record are still there: call it again.

    :raise CoreError, AttachError, LeftInQemuError: something stayed.
    """
    try:
        for mapping in registration.mappings:
            uffd_unregister(registration.uffd, mapping.hva, mapping.length_bytes)
        _close_in(registration.process, registration.uffd_fd)
    except (CoreError, AttachError, OSError):
        # The kernel says ENOMEM for an address space that is gone.
        if registration.process.alive():
            raise
        log.info("QEMU is gone, and everything of ours with it")
    os.close(registration.uffd)
    _forget(state_dir)


def undo(registration: Registration, state_dir: Path, reason: Exception) -> None:
    """Give back what was only just taken, as much of it as there is, because of `reason`.

    :raise LeftInQemuError: QEMU kept something; the record stays, for `close_leftovers`.
    """
    for mapping in registration.mappings:
        with contextlib.suppress(CoreError):  # never registered, or an end is near
            uffd_unregister(registration.uffd, mapping.hva, mapping.length_bytes)
    os.close(registration.uffd)
    try:
        _close_in(registration.process, registration.uffd_fd)
    except (AttachError, LeftInQemuError, OSError) as error:
        if registration.process.alive():
            raise LeftInQemuError(
                f"{reason}; and our userfaultfd {registration.uffd_fd} stays in the destination "
                f"QEMU: {error}",
                remedy=error.remedy if isinstance(error, QpostcopyError) else None,
            ) from reason
    _forget(state_dir)


def let_go(registration: Registration) -> None:
    """Close our duplicate only; QEMU's copy keeps every range registered."""
    os.close(registration.uffd)


def close_leftovers(pid: int, state_dir: Path, lender: Lending) -> None:
    """Close what a predecessor of this migration left in QEMU before the commit.

    Closing the last descriptor unregisters its ranges.

    :raise AttachError, LeftInQemuError: not now; the record stays, call it again.
    """
    record = read_record(state_dir)
    if record is not None and record.process == Process.of(pid):
        for fd in _ours_in(record):
            log.warning("closing userfaultfd %d that an earlier handler left in QEMU", fd)
            _close_in(record.process, fd)
        if record.lent:
            log.warning("taking %s back that an earlier handler lent QEMU", attach.DEVICE)
            _take_back(record.process, lender, None)
    _forget(state_dir)


def _ours_in(record: Record) -> tuple[int, ...]:
    """Our userfaultfds in QEMU, which may have opened some of its own since the record."""
    if record.uffd_fd is None:
        return attach.find_orphans(record.process.pid, record.userfaults_before)
    there = attach.find_userfaultfds(record.process.pid)
    return (record.uffd_fd,) if record.uffd_fd in there else ()


def _orphans_in(record: Record) -> tuple[int, ...]:
    """What an attempt of ours that failed has left in QEMU, if that is still there.

    :raise OSError: QEMU lives and cannot be looked at.
    """
    if not record.process.alive():
        return ()
    try:
        return attach.find_orphans(record.process.pid, record.userfaults_before)
    except OSError:
        if record.process.alive():
            raise
        return ()


def _close_in(process: Process, fd: int) -> None:
    # Gone: an attempt before this one was late, and closed it after all.
    with contextlib.suppress(AttachGoneError):
        attach.close_in_target(process.pid, fd, start_ticks=process.start_ticks)
    if fd in attach.find_userfaultfds(process.pid):
        raise LeftInQemuError(f"userfaultfd {fd} is still open in QEMU {process.pid}")


def _forget(state_dir: Path) -> None:
    """Nothing of ours is in QEMU: nothing is to be known about it. The record goes last."""
    for pattern in (*MAP_FILES, RECORD):
        for path in state_dir.glob(pattern):
            path.unlink(missing_ok=True)


def read_record(state_dir: Path) -> Record | None:
    """What handler.json says; None: there is none that makes sense."""
    try:
        return Record.model_validate_json((state_dir / RECORD).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        log.warning("%s: %s", RECORD, error)
        return None


def _write_record(state_dir: Path, record: Record) -> None:
    write_durably(state_dir / RECORD, record.model_dump_json())
