"""The state directory of one migration: all that its processes must remember of it.

Guarantees: `state.json` is replaced whole or not at all and is on disk when
`update` returns; `committed` is a file of its own, so that the point of no
return is one directory entry and depends on nothing else being readable; one
controller at a time holds the lock. What is written here is enough to find out,
after any process was killed, where the VM is and who may run it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from qpostcopy.errors import (
    ExitCode,
    QpostcopyError,
    RefusedError,
    StateLostError,
    UsageError,
)
from qpostcopy.phases import Phase
from qpostcopy.process import Process
from qpostcopy.qmp.schema import Model

RUN_DIRECTORY = "/run/qpostcopy"
CONTROL_SOCKET = "controller.sock"
#: What the guest asked for, and when (qpostcopy.trace, docs/trace.md).
FAULT_TRACE = "faults.trace"
_ID = re.compile(r"^(?P<name>.+)-(?P<time>\d{8}T\d{6})$")


class UnknownMigrationError(UsageError):
    """No state directory of this ID or plan name."""


class RunDirectoryError(RefusedError):
    """The directory of the state directories cannot be used: nothing was touched."""

    code = "run-directory"


class StateUnreadableError(StateLostError):
    """`state.json` is missing or not what we wrote."""


class StateForbiddenError(StateUnreadableError):
    """It is somebody else's: nothing is wrong with it, and nothing of it can be told."""

    exit_code = ExitCode.UNEXPECTED
    code = "state-forbidden"


class ControllerAliveError(QpostcopyError):
    """Another controller holds this migration's lock."""


class SideState(Model):
    """What we know of one side, and how its QEMU was before we came."""

    qmp: str
    qemu: Process | None = None
    companion: Process | None = None
    version: str = ""
    capabilities: dict[str, bool] | None = None
    parameters: dict[str, int] | None = None


class PhaseStamp(Model):
    """When a phase began, by CLOCK_MONOTONIC."""

    name: Phase
    start_seconds: float


class MigrationState(Model):
    """`state.json`. Each field is written before the act that it announces."""

    version: Literal[1] = 1
    migration_id: str
    plan_name: str
    profile: str
    controller: Process | None = None
    phase: Phase = Phase.PREPARE
    phases: tuple[PhaseStamp, ...]
    #: whether the guest ran when it was told to `migrate`
    was_running: bool | None = None
    source: SideState
    destination: SideState
    #: no other unfinished migration may have these QEMUs (registry.py)
    claimed: bool = False
    #: the destination may have been told `stop` while `inmigrate`
    stop_sent: bool = False
    #: the handler may have put a userfaultfd into the destination (its handler.json says more)
    attach_sent: bool = False
    uffd_fd: int | None = None
    #: faults.trace is not written, or not any more
    untraced: bool = False
    #: the destination may have been told `migrate-incoming`: it may have loaded something
    incoming_sent: bool = False
    #: the source may have been told `migrate`
    migrate_sent: bool = False
    token: str
    ram_bytes: int = 0
    unshared_bytes: int = 0
    stopped_seconds: float | None = None
    resumed_seconds: float | None = None
    #: the page server began to push
    served_seconds: float | None = None
    #: the destination may have been told `cont`: its guest may have run
    cont_sent: bool = False
    #: the guest was shut down by itself, wherever it was
    guest_ended: bool = False

    def side(self, role: Literal["source", "destination"]) -> SideState:
        return self.source if role == "source" else self.destination


def run_directory() -> Path:
    """Where the state directories are; absolute, for our processes work in `/`."""
    return Path(os.environ.get("QPOSTCOPY_RUN_DIR", RUN_DIRECTORY)).absolute()


def write_durably(path: Path, text: str) -> None:
    """Replace a file whole: on return it is on disk under its name."""
    fresh = path.with_name(path.name + ".new")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class StateDirectory:
    """One migration's directory. `state` is what is on disk, as far as we wrote it."""

    def __init__(self, path: Path, state: MigrationState) -> None:
        self.path = path
        self.state = state

    @property
    def migration_id(self) -> str:
        return self.path.name

    @classmethod
    def create(
        cls,
        plan_name: str,
        *,
        plan_text: str,
        profile: str,
        source_qmp: Path,
        destination_qmp: Path,
    ) -> StateDirectory:
        """A new directory (0700) with a new ID, plan.yaml and state.json in it.

        :raise RunDirectoryError: it cannot be made there.
        """
        path = _make_directory(plan_name)
        state = MigrationState(
            migration_id=path.name,
            plan_name=plan_name,
            profile=profile,
            phases=(PhaseStamp(name=Phase.PREPARE, start_seconds=time.monotonic()),),
            source=SideState(qmp=str(source_qmp)),
            destination=SideState(qmp=str(destination_qmp)),
            token=os.urandom(32).hex(),
        )
        directory = cls(path, state)
        with directory.whole_or_gone():
            write_durably(path / "plan.yaml", plan_text)
            write_durably(directory._state_file, state.model_dump_json(indent=1))
        return directory

    @contextmanager
    def whole_or_gone(self) -> Iterator[None]:
        """Write what a new directory needs: if that fails, nothing of the directory stays.

        :raise RunDirectoryError: it cannot be written.
        """
        try:
            yield
        except BaseException as error:
            shutil.rmtree(self.path, ignore_errors=True)
            if isinstance(error, OSError):
                raise _unusable(error) from error
            raise

    @classmethod
    def open(cls, path: Path) -> StateDirectory:
        """Read a directory.

        :raise StateUnreadableError: there is no usable state.json.
        """
        try:
            state = MigrationState.model_validate_json((path / "state.json").read_text())
        except PermissionError as error:
            raise StateForbiddenError(
                f"{path}/state.json may not be read by you: {error.strerror}",
                remedy="ask as the user who started the migration, or as root",
            ) from error
        # ValueError: pydantic's, and bytes that are no text.
        except (OSError, ValueError, RecursionError) as error:
            raise StateUnreadableError(
                f"{path}/state.json cannot be read ({error.__class__.__name__}): where the VM is, "
                "is unknown to us",
                remedy="ask both QEMUs with query-status; never `cont` the source while the "
                "destination process lives",
            ) from error
        return cls(path, state)

    @classmethod
    def find(cls, name: str | None) -> StateDirectory:
        """By ID, or the latest of a plan's name; None: the latest of all.

        One that was refused touched nothing and knows nothing of the VM: a name means it
        only if there is no other.

        :raise UnknownMigrationError: there is none.
        """
        found = [path for path in reversed(_directories()) if name in _names(path)]
        for path in found:
            if path.name == name or not _was_refused(path):
                return cls.open(path)
        if found:
            return cls.open(found[0])
        wanted = "no migration" if name is None else f"no migration {name!r}"
        known = ", ".join(path.name for path in _directories()[-5:])
        raise UnknownMigrationError(
            f"{wanted} in {run_directory()}",
            remedy=f"known: {known}" if known else "`qpostcopy migrate PLAN` starts one",
        )

    @classmethod
    def all(cls) -> Iterator[StateDirectory]:
        """Every readable directory, oldest first."""
        for path in _directories():
            with suppress(StateUnreadableError):
                yield cls.open(path)

    def is_older_than(self, other: StateDirectory) -> bool:
        """Whether this one began first; of two in one second, by name."""
        return _stamp(self.path) < _stamp(other.path)

    @property
    def refused(self) -> bool:
        """Whether it ended before anything was touched."""
        return _was_refused(self.path)

    @staticmethod
    def known() -> list[str]:
        """The IDs of all directories, the latest first, readable or not."""
        return [path.name for path in reversed(_directories())]

    @property
    def _state_file(self) -> Path:
        return self.path / "state.json"

    def note(self, **changes: object) -> None:
        """Change fields that nothing depends on; they go to disk with the next update."""
        unknown = changes.keys() - MigrationState.model_fields.keys()
        assert not unknown, f"no such state: {unknown}"
        self.state = self.state.model_copy(update=changes)

    def update(self, **changes: object) -> None:
        """Change fields of the state; on return they are on disk."""
        self.note(**changes)
        write_durably(self._state_file, self.state.model_dump_json(indent=1))

    def update_side(self, role: Literal["source", "destination"], **changes: object) -> None:
        """Change fields of one side; on return they are on disk."""
        unknown = changes.keys() - SideState.model_fields.keys()
        assert not unknown, f"no such side state: {unknown}"
        self.update(**{role: self.state.side(role).model_copy(update=changes)})

    @property
    def committed(self) -> bool:
        """Whether the point of no return is on disk."""
        return (self.path / "committed").exists()

    def record_commit(self) -> None:
        """Write the point of no return. Once this was called the guest may run there."""
        stamp = {"migration_id": self.migration_id, "unix_seconds": time.time()}
        write_durably(self.path / "committed", json.dumps(stamp) + "\n")

    def erase_commit(self) -> None:
        """Take the point of no return back: for a destination that never ran and is dead."""
        (self.path / "committed").unlink()
        _sync_directory(self.path)

    def write_result(self, result: dict[str, object]) -> None:
        write_durably(self.path / "result.json", json.dumps(result, indent=1) + "\n")

    def read_result(self) -> dict[str, object] | None:
        return _read_result(self.path)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: a result that `resume` cannot improve.

        A rollback that failed is not the end while there is a source to bring back.
        """
        result = self.read_result()
        if result is None or result.get("status") == "interrupted":
            return False
        source = self.state.source.qemu
        could_go_back = not self.committed and source is not None and source.alive()
        return not (result.get("status") == "failed" and could_go_back)

    def controller_alive(self) -> bool:
        controller = self.state.controller
        return controller is not None and controller.alive()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the controller of this migration.

        :raise ControllerAliveError: someone else is.
        """
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ControllerAliveError(
                    f"{self.migration_id} already has a controller",
                    remedy=f"watch it: qpostcopy status {self.migration_id}",
                ) from error
            self.state = self.open(self.path).state
            yield
        finally:
            os.close(fd)


def _directories() -> list[Path]:
    """Oldest first, by the time in the ID."""
    try:
        found = [path for path in run_directory().iterdir() if _ID.match(path.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unusable(error) from error
    return sorted(found, key=_stamp)


def _names(path: Path) -> tuple[str | None, ...]:
    """What a migration may be called: nothing at all, its plan's name, its ID."""
    parts = _ID.match(path.name)
    return None, path.name, parts["name"] if parts else path.name


def _was_refused(path: Path) -> bool:
    result = _read_result(path)
    return result is not None and result.get("status") in ("refused", "error")


def _read_result(path: Path) -> dict[str, object] | None:
    try:
        result = json.loads((path / "result.json").read_text())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None


def _stamp(path: Path) -> tuple[str, str]:
    """What the directories are sorted by: time, then name."""
    return path.name.rpartition("-")[2], path.name


def _unusable(error: OSError) -> RunDirectoryError:
    """For people: which directory, why not, and what to do."""
    remedy = "be root, or set QPOSTCOPY_RUN_DIR to a directory of your own on a tmpfs"
    return RunDirectoryError(
        f"{run_directory()}: state directories cannot be kept there: {error.strerror}",
        remedy=remedy,
    )


def _make_directory(plan_name: str) -> Path:
    try:
        run_directory().mkdir(mode=0o700, parents=True, exist_ok=True)
        return _make_new(plan_name)
    except OSError as error:
        raise _unusable(error) from error


def _make_new(plan_name: str) -> Path:
    seconds = int(time.time())
    while True:  # two of one plan within a second: the next free second is its name
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds))
        path = run_directory() / f"{plan_name}-{stamp}"
        try:
            path.mkdir(mode=0o700)
            return path
        except FileExistsError:
            seconds += 1
