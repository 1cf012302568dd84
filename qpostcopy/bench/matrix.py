"""Which run comes next: the cells of the matrix, interleaved, until each has enough.

    for each round:  for each QEMU, workload, link:  every engine once, another one first

Whatever drifts (the machine, its neighbours) so hits all engines alike. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from qpostcopy.bench.judge import judge
from qpostcopy.bench.model import Book, Cell, Engine, Link, Subject


@dataclass(frozen=True, slots=True)
class Matrix:
    """What is to be measured.

    :ivar runs: that count, of each cell.
    :ivar labels: each engine once for each of them.
    """

    engines: Sequence[Engine]
    qemus: Sequence[str]
    workloads: Sequence[str]
    links: Sequence[Link]
    memory_mib: int
    runs: int
    labels: Sequence[str] = ("",)

    @property
    def groups(self) -> list[list[Cell]]:
        """Cells that are compared with each other, side by side."""
        return [
            [
                Cell(
                    engine=engine,
                    qemu=qemu,
                    workload=workload,
                    link=link,
                    memory_mib=self.memory_mib,
                    label=label,
                )
                for engine, label in product(self.engines, self.labels)
            ]
            for qemu, workload, link in product(self.qemus, self.workloads, self.links)
        ]

    @property
    def cells(self) -> list[Cell]:
        return [cell for group in self.groups for cell in group]

    @property
    def most_attempts(self) -> int:
        """At a cell in one session; what does not succeed by then is left as it is."""
        return 2 * self.runs + 2


def missing(matrix: Matrix, book: Book, subject: Subject) -> dict[Cell, int]:
    """How many runs that count each cell still lacks; without those that lack none."""
    judged = judge(book, subject)
    lacking = {
        cell: matrix.runs - (judged[cell].counted if cell in judged else 0) for cell in matrix.cells
    }
    return {cell: count for cell, count in lacking.items() if count > 0}


def next_round(matrix: Matrix, lacking: Iterable[Cell], number: int) -> Iterator[Cell]:
    """The cells of one round, in order.

    :param number: of the round: which engine comes first.
    """
    wanted = set(lacking)
    for group in matrix.groups:
        first = number % len(group)
        for cell in (*group[first:], *group[:first]):
            if cell in wanted:
                yield cell
