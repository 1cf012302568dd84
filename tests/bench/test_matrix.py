"""The order of runs, and when there are enough."""

from __future__ import annotations

from qpostcopy.bench.judge import subject_of
from qpostcopy.bench.matrix import Matrix, missing, next_round
from qpostcopy.bench.model import (
    Baseline,
    Book,
    Cell,
    Engine,
    Link,
    Machine,
    Outcome,
    Run,
    Session,
    Subject,
)

SUBJECT = Subject(
    code="c",
    guest="g",
    machine=Machine(cpu="x", cores=2, memory_bytes=1 << 30, kernel="6"),
    qemus={"10.0": "10.0.1"},
)
MATRIX = Matrix(
    engines=[Engine.QPOSTCOPY, Engine.PRECOPY, Engine.POSTCOPY],
    qemus=["10.0"],
    workloads=["kv", "churn"],
    links=[Link.LOOPBACK],
    memory_mib=256,
    runs=2,
)


def run_of(cell: Cell, *, speed: float = 100.0, outcome: Outcome = Outcome.GOOD) -> Run:
    baseline = Baseline(
        operations_per_second=speed,
        operations_per_cpu_second=speed,
        deviation=0.01,
        seconds=2.0,
    )
    return Run(session="s", round=0, at="", cell=cell, outcome=outcome, baseline=baseline)


def book_of(*runs: Run, subject: Subject = SUBJECT) -> Book:
    return Book(sessions=(Session(id="s", subject=subject),), runs=runs)


def test_an_empty_book_lacks_everything() -> None:
    assert missing(MATRIX, book_of(), SUBJECT) == dict.fromkeys(MATRIX.cells, 2)


def test_another_engine_comes_first_in_each_round() -> None:
    orders = [list(next_round(MATRIX, MATRIX.cells, number)) for number in range(3)]
    assert [order[0].engine for order in orders] == list(MATRIX.engines)
    assert all(sorted(map(str, order)) == sorted(map(str, MATRIX.cells)) for order in orders)
    # Side by side what is compared: the workloads are not mixed.
    assert [cell.workload for cell in orders[1]] == ["kv"] * 3 + ["churn"] * 3


def test_what_is_there_is_not_measured_again() -> None:
    full, half = MATRIX.cells[0], MATRIX.cells[1]
    lacking = missing(MATRIX, book_of(run_of(full), run_of(full), run_of(half)), SUBJECT)
    assert full not in lacking
    assert lacking[half] == 1


def test_a_bad_end_is_a_result_and_a_moved_baseline_is_none() -> None:
    cell = MATRIX.cells[0]
    bad = [run_of(cell, outcome=Outcome.GUEST_DIED)] * 2
    assert cell not in missing(MATRIX, book_of(*bad), SUBJECT)
    usual = run_of(cell.model_copy(update={"link": Link.GIGABIT}))
    runs = [run_of(cell), run_of(cell, speed=130.0), usual]
    assert missing(MATRIX, book_of(*runs), SUBJECT)[cell] == 1


def test_runs_of_other_code_do_not_count() -> None:
    other = SUBJECT.model_copy(update={"code": "d"})
    cell = MATRIX.cells[0]
    book = book_of(run_of(cell), run_of(cell), subject=other)
    assert missing(MATRIX, book, SUBJECT)[cell] == 2


def test_another_qemu_is_no_other_subject_but_another_version_is() -> None:
    cell = MATRIX.cells[0]
    runs = (run_of(cell), run_of(cell))
    more = SUBJECT.model_copy(update={"qemus": {"10.0": "10.0.1", "7.2": "7.2.9"}})
    assert cell not in missing(MATRIX, book_of(*runs, subject=more), SUBJECT)
    elsewhere = SUBJECT.model_copy(update={"qemus": {"7.2": "7.2.9"}})
    assert cell not in missing(MATRIX, book_of(*runs), elsewhere)
    newer = SUBJECT.model_copy(update={"qemus": {"10.0": "10.0.2"}})
    assert missing(MATRIX, book_of(*runs), newer)[cell] == 2


def test_the_subject_has_the_qemus_of_all_sessions_that_go_with_it() -> None:
    older, newer = ({"7.2": "7.2.9"}, {"10.0": "10.0.1"})
    sessions = [
        Session(id=name, subject=SUBJECT.model_copy(update={"qemus": qemus}))
        for name, qemus in (("other", {"10.0": "10.0.0"}), ("old", older), ("new", newer))
    ]
    subject = subject_of(Book(sessions=tuple(sessions)))
    assert subject is not None
    assert subject.qemus == older | newer
