"""Which runs count, and what they say together. Pure: from the raw runs of a book.

Thrown out is a run before which the guest was already faster or slower than is
usual in its session, by more than a fifth: something else was going on. A run
that ended badly counts, as what it is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from qpostcopy.bench.figures import Figure
from qpostcopy.bench.model import Book, Cell, Outcome, Run, Session, Subject
from qpostcopy.bench.statistics import Summary, summarize

MOVED_SHARE = 0.2
#: Below so many faults the 99th percentile is the worst fault, which is anecdote.
_P99_FAULTS = 200


@dataclass(frozen=True, slots=True)
class Judged:
    """The runs of one cell.

    :ivar good: whose figures are compared.
    :ivar bad: that ended otherwise, which is a result, too.
    :ivar moved: thrown out.
    """

    cell: Cell
    good: tuple[Run, ...]
    bad: tuple[Run, ...]
    moved: tuple[Run, ...]

    @property
    def counted(self) -> int:
        return len(self.good) + len(self.bad)

    @property
    def outcomes(self) -> Counter[Outcome]:
        return Counter(run.outcome for run in (*self.good, *self.bad))

    def summary(self, figure: Figure) -> Summary | None:
        """Of the good runs that have this figure; None if none has."""
        values = [value for run in self.good if (value := figure.of(run)) is not None]
        return summarize(values) if values else None

    def resolution(self, figure: Figure) -> float:
        """What this figure cannot tell from nothing, in these runs."""
        if figure.name != "work_lost_ms":
            return figure.resolution
        known = [run.work_lost_resolution_ms for run in self.good]
        return max([figure.resolution, *(value for value in known if value is not None)])

    def is_noise(self, figure: Figure) -> bool:
        """Whether the figure is to be called noise instead of printed."""
        summary = self.summary(figure)
        if summary is None:
            return False
        return self.is_anecdote(figure) or summary.is_noise(self.resolution(figure))

    def is_anecdote(self, figure: Figure) -> bool:
        """Whether there were too few faults to speak of their 99th percentile."""
        if figure.name != "fault_p99_us" or not self.good:
            return False
        return median(run.figures.faults or 0 for run in self.good) < _P99_FAULTS


def subject_of(book: Book) -> Subject | None:
    """What the newest session measured, with the QEMUs of all that go with it."""
    if not book.sessions:
        return None
    newest = book.sessions[-1].subject
    qemus: dict[str, str] = {}
    for session in sessions_of(book, newest):
        qemus |= session.subject.qemus
    return newest.model_copy(update={"qemus": qemus | newest.qemus})


def sessions_of(book: Book, subject: Subject) -> tuple[Session, ...]:
    """Those whose runs may be put together with this subject's."""
    return tuple(session for session in book.sessions if session.subject.is_like(subject))


def judge(book: Book, subject: Subject) -> dict[Cell, Judged]:
    """The runs of a subject by cell, in the order in which the cells first appear."""
    sessions = {session.id for session in sessions_of(book, subject)}
    runs = [run for run in book.runs if run.session in sessions]
    moved = _moved(runs)
    by_cell: dict[Cell, list[Run]] = defaultdict(list)
    for run in runs:
        by_cell[run.cell].append(run)
    return {cell: _judged(cell, of_cell, moved) for cell, of_cell in by_cell.items()}


def _judged(cell: Cell, runs: Sequence[Run], moved: set[int]) -> Judged:
    kept = [run for run in runs if id(run) not in moved]
    return Judged(
        cell,
        good=tuple(run for run in kept if run.outcome is Outcome.GOOD),
        bad=tuple(run for run in kept if run.outcome is not Outcome.GOOD),
        moved=tuple(run for run in runs if id(run) in moved),
    )


def _moved(runs: Iterable[Run]) -> set[int]:
    """The ids (in this process) of the runs whose baseline was not their group's."""
    groups: dict[tuple[object, ...], list[Run]] = defaultdict(list)
    for run in runs:
        if run.baseline is not None:
            cell = run.cell
            # By engine, too: guest RAM is not of the same kind for all of them.
            key = (run.session, cell.engine, cell.qemu, cell.workload, cell.memory_mib)
            groups[key].append(run)
    return {id(run) for group in groups.values() for run in group if _is_off(run, group)}


def _is_off(run: Run, group: Sequence[Run]) -> bool:
    """By the speed, and by the speed for the CPU time: a fixed rate moves only the latter."""
    assert run.baseline
    for name in ("operations_per_second", "operations_per_cpu_second"):
        usual = median(getattr(other.baseline, name) for other in group)
        if abs(getattr(run.baseline, name) - usual) > MOVED_SHARE * usual:
            return True
    return False
