"""The table of transitions: what it must allow, and what it must never allow."""

from __future__ import annotations

import pytest

from qpostcopy.phases import BEFORE_COMMIT, COMMIT, TERMINAL, TRANSITIONS, Phase, PhaseMachine


def test_every_phase_has_its_row() -> None:
    assert set(TRANSITIONS) == set(Phase)


def test_nothing_leads_back_over_the_commit() -> None:
    """Once past the commit, no path reaches rolled-back or a phase before it."""
    reached, todo = set(), {COMMIT[1]}
    while todo:
        phase = todo.pop()
        reached.add(phase)
        todo |= TRANSITIONS[phase] - reached
    assert not reached & (BEFORE_COMMIT | {Phase.ROLLED_BACK})


def test_every_phase_before_the_commit_can_be_rolled_back() -> None:
    assert all(Phase.ROLLED_BACK in TRANSITIONS[phase] for phase in BEFORE_COMMIT)


def test_interrupted_is_not_the_end() -> None:
    assert Phase.INTERRUPTED not in TERMINAL
    assert Phase.INTERRUPTED not in TRANSITIONS[Phase.SWITCHOVER], "it may still go back"
    assert Phase.POSTCOPY in TRANSITIONS[Phase.INTERRUPTED]


def test_a_rollback_that_failed_can_be_tried_again() -> None:
    assert Phase.ROLLBACK_FAILED not in TERMINAL
    assert {Phase.ROLLED_BACK, Phase.ROLLBACK_FAILED} <= TRANSITIONS[Phase.ROLLBACK_FAILED]
    assert COMMIT[1] not in TRANSITIONS[Phase.ROLLBACK_FAILED], "it was never committed"


def test_set_tells_after_the_change() -> None:
    told: list[tuple[Phase, Phase, Phase]] = []
    machine = PhaseMachine(notify=lambda old, new: told.append((old, new, machine.phase)))
    machine.set(Phase.SWITCHOVER)
    assert told == [(Phase.PREPARE, Phase.SWITCHOVER, Phase.SWITCHOVER)]


@pytest.mark.parametrize("phase", sorted(Phase))
def test_an_edge_that_is_not_in_the_table_is_our_bug(phase: Phase) -> None:
    for after in set(Phase) - TRANSITIONS[phase]:
        machine = PhaseMachine(phase)
        with pytest.raises(AssertionError, match=f"{phase} -> {after}"):
            machine.set(after)
        assert machine.phase is phase
