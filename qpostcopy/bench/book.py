"""`bench.json`: read, and written anew after each run, so that an interrupted benchmark goes on.

Also: what exactly is being measured. Runs are put together only if the code, the
guest, the machine and the QEMUs are the same.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from qpostcopy.bench.model import VERSION, Book, Machine, Portrait, Run, Session, Subject
from qpostcopy.errors import UsageError

FILE = "bench.json"
_PACKAGE = Path(__file__).resolve().parents[1]
_SOURCES = ("*.py", "*.c", "*.h", "configs/**/*.yaml")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


class BookError(UsageError):
    """The file is there, and it is no benchmark of this version."""


class BookFile:
    """A book and its file.

    :param directory: made if need be.
    :raise BookError: what is there cannot be read, or the directory cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        _make(directory)
        self.directory = directory
        self.path = directory / FILE
        self.book = read_book(self.path) if self.path.exists() else Book()

    def add(
        self,
        *,
        session: Session | None = None,
        run: Run | None = None,
        portrait: Portrait | None = None,
    ) -> None:
        """Add to the book, and have it on disk before this returns."""
        book = self.book
        self.book = book.model_copy(
            update={
                "sessions": (*book.sessions, *([session] if session else [])),
                "runs": (*book.runs, *([run] if run else [])),
                "portraits": (*book.portraits, *([portrait] if portrait else [])),
            }
        )
        self._write()

    def update_session(self, session: Session) -> None:
        """The newest session, with more known of it."""
        before = self.book.sessions[:-1]
        self.book = self.book.model_copy(update={"sessions": (*before, session)})
        self._write()

    def _write(self) -> None:
        new = self.path.with_suffix(".new")
        with new.open("w") as file:
            file.write(self.book.model_dump_json())
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path)


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BookError(
            f"{directory}: {error.strerror}", remedy="give another directory with --output"
        ) from error


def read_book(path: Path) -> Book:
    """:raise BookError: it is not there, or no benchmark of this version."""
    try:
        return Book.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BookError(f"{path}: {error.strerror}", remedy="run scripts/bench first") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BookError(
            f"{path}: {place}: {first['msg']} (version {VERSION} is expected)",
            remedy="move the file away, or give another directory with --output",
        ) from error


def find_subject(image: Iterable[Path], qemus: Mapping[str, str]) -> Subject:
    """What is measured when it is measured now.

    :param image: the files that make the guest.
    :param qemus: full version by short name.
    """
    sources = (path for pattern in _SOURCES for path in _PACKAGE.rglob(pattern))
    return Subject(
        code=_hash_of(path for path in sources if path.name != "_core.c"),
        guest=_hash_of(image),
        machine=_machine(),
        qemus=dict(qemus),
    )


def _hash_of(paths: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    for path in sorted(paths):
        whole.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()[:12]


def _machine() -> Machine:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return Machine(
        cpu=next(models, platform.machine()),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        kernel=platform.release(),
        huge_pages="; ".join(_huge_pages()),
    )


def _huge_pages() -> Iterator[str]:
    for name in ("enabled", "defrag", "shmem_enabled"):
        with suppress(OSError):
            yield f"{name} {(_HUGE_PAGES / name).read_text().strip()}"
