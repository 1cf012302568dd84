"""One invocation of the benchmark: runs until the matrix is full, each on disk when it is over."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from qpostcopy.bench.book import BookFile, find_subject
from qpostcopy.bench.engine import UnsupportedError
from qpostcopy.bench.figures import FIGURES
from qpostcopy.bench.judge import sessions_of
from qpostcopy.bench.limits import Limits
from qpostcopy.bench.matrix import Matrix, missing, next_round
from qpostcopy.bench.model import Cell, Link, Outcome, Portrait, Run, Session
from qpostcopy.bench.portrait import PARTS, Painter
from qpostcopy.bench.qemus import Qemu
from qpostcopy.bench.run import play
from qpostcopy.bench.stage import SERVICE, Conditions, calibrate, rate_key
from qpostcopy.bench.usage import become_reaper
from qpostcopy.lab.guest import GuestError
from qpostcopy.lab.observer import ObserverError, ObserverTimeoutError
from qpostcopy.lab.vm import VmError
from qpostcopy.progress import human_seconds

Tell = Callable[[str], None]

#: There was no guest to move.
_NOT_STARTED = (GuestError, VmError, ObserverError, ObserverTimeoutError)

#: The figures in the line that is told of each run.
_TOLD = tuple(figure for figure in FIGURES if figure.name in ("total_ms", "downtime_ms"))


class BenchSession:
    """Fills a matrix with runs, and a book with what they saw.

    :param environments: added to that of our processes, by the label of the cell.
    :param tell: called with a line for people.
    """

    def __init__(
        self,
        file: BookFile,
        matrix: Matrix,
        image: tuple[Path, Path],
        qemus: Mapping[str, Qemu],
        tell: Tell,
        environments: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self._file = file
        self._matrix = matrix
        self._tell = tell
        self._environments = environments or {}
        self.subject = find_subject(image, {name: q.version for name, q in qemus.items()})
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        self._session = Session(id=now, subject=self.subject)
        self._conditions = Conditions(
            session=now,
            kernel=image[0],
            initrd=image[1],
            qemus={name: qemu.executable for name, qemu in qemus.items()},
            failures=file.directory / "failures",
        )
        self._attempts: Counter[Cell] = Counter()
        self._given_up: set[Cell] = set()

    def run(self, measure_limits: Callable[[Link], Limits] | None, *, portraits: bool) -> None:
        """Fill the matrix. What was measured before, of the same subject, is not measured again.

        :param measure_limits: None: not now.
        """
        become_reaper()
        # Even if nothing is missing: what is shown is what the newest session asked for.
        self._file.add(session=self._session)
        unpainted = self._unpainted() if portraits else []
        if measure_limits and self._lacking():
            self._measure_limits(measure_limits)
        self._calibrate()
        self._play_all()
        for cell in self._lacking_all():
            self._tell(f"{cell.title}: not enough runs, after {self._attempts[cell]} attempts")
        for cell in unpainted:
            self._paint(cell)

    def _measure_limits(self, measure: Callable[[Link], Limits]) -> None:
        for link in self._matrix.links:
            self._tell(f"limits of the machine, {link}")
            limits = {**self._session.limits, link: measure(link)}
            self._update(limits=limits)

    def _calibrate(self) -> None:
        """The rate of `service`, once; an earlier session's of the same subject holds on."""
        for earlier in sessions_of(self._file.book, self.subject):
            self._update(rates={**self._session.rates, **earlier.rates})
        for cell in self._matrix.cells:
            key = rate_key(cell)
            if cell.workload == SERVICE and key not in self._session.rates:
                rate = calibrate(cell, self._conditions)
                self._tell(f"{SERVICE} on QEMU {cell.qemu}: {rate} requests/s")
                self._update(rates={**self._session.rates, key: rate})
        self._conditions = replace(self._conditions, rates=self._session.rates)

    def _update(self, **found: object) -> None:
        self._session = self._session.model_copy(update=found)
        self._file.update_session(self._session)

    # --- runs --------------------------------------------------------------------------------

    def _lacking_all(self) -> dict[Cell, int]:
        return missing(self._matrix, self._file.book, self.subject)

    def _lacking(self) -> dict[Cell, int]:
        """Without those that were tried often enough."""
        lacking = self._lacking_all()
        return {cell: count for cell, count in lacking.items() if cell not in self._given_up}

    def _play_all(self) -> None:
        number, started_s, done = 0, time.monotonic(), 0
        while lacking := self._lacking():
            for cell in next_round(self._matrix, lacking, number):
                line = self._play(cell, number)
                done += 1
                left = sum(self._lacking().values())
                to_go = human_seconds((time.monotonic() - started_s) / done * left)
                self._tell(f"{line}; {left} to go, about {to_go}")
            number += 1

    def _play(self, cell: Cell, number: int) -> str:
        """One run, into the book; a line that tells of it."""
        self._attempts[cell] += 1
        if self._attempts[cell] >= self._matrix.most_attempts:
            self._given_up.add(cell)
        try:
            run = play(cell, self._conditions_of(cell), number)
        except UnsupportedError as error:
            self._given_up.add(cell)
            return f"{cell.title}: left out ({error})"
        except _NOT_STARTED as error:
            # No engine's doing: there was no guest to move yet.
            return f"{cell.title}: did not start ({error})"
        self._file.add(run=run)
        return _line(run)

    def _conditions_of(self, cell: Cell) -> Conditions:
        return replace(self._conditions, environment=self._environments.get(cell.label, {}))

    # --- portraits ---------------------------------------------------------------------------

    def _unpainted(self) -> list[Cell]:
        """Of the first workload."""
        sessions = {session.id for session in sessions_of(self._file.book, self.subject)}
        painted = {p.cell for p in self._file.book.portraits if p.session in sessions}
        first = self._matrix.workloads[0]
        return [
            cell for cell in self._matrix.cells if cell.workload == first and cell not in painted
        ]

    def _paint(self, cell: Cell) -> None:
        self._tell(f"portrait: {cell.title}")
        painter = Painter()
        try:
            run = play(cell, self._conditions_of(cell), 0, painter)
        except (UnsupportedError, *_NOT_STARTED) as error:
            self._tell(f"portrait: {cell.title}: did not start ({error})")
            return
        good = run.outcome is Outcome.GOOD
        portrait = Portrait(
            session=self._session.id,
            cell=cell,
            parts=PARTS,
            stopped_ms=run.stopped_ms,
            resumed_ms=run.resumed_ms,
            # Of one that did not come to its end there is no picture, and no second try.
            arrivals=tuple(painter.arrivals) if good else (),
        )
        self._file.add(portrait=portrait)


def _line(run: Run) -> str:
    if run.outcome is not Outcome.GOOD:
        return f"{run.cell.title}: {run.outcome} ({run.reason})"
    told = []
    for figure in _TOLD:
        value = figure.of(run)
        if value is not None:
            told.append(f"{figure.title} {figure.text(value)}")
    return f"{run.cell.title}: {', '.join(told)}"
