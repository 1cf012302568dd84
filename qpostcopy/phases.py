"""The phases of a migration, the table of their transitions, and the one setter.

    prepare -> switchover -> postcopy -> complete
        \\          \\            \\
         \\          \\            +-> interrupted -> postcopy   (resume)
          \\          \\                    |
           +-----------+-> rolled-back      +-> failed
                       |        ^
                       |        | (resume)
                       +-> rollback-failed

`rollback-failed`: nothing was committed, but the source did not come back yet.
The point of no return is the edge switchover -> postcopy: `COMMIT` below. All
other code asks this table; none of it carries its own idea of what may follow.
`precopy` has its place in the table and is entered once the dirty scan exists.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import StrEnum

log = logging.getLogger(__name__)


class Phase(StrEnum):
    """Where a migration is."""

    PREPARE = "prepare"
    PRECOPY = "precopy"
    SWITCHOVER = "switchover"
    POSTCOPY = "postcopy"
    COMPLETE = "complete"
    ROLLED_BACK = "rolled-back"
    ROLLBACK_FAILED = "rollback-failed"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


#: Where a rollback ends. Complete: the guest ended by itself at the source.
_BACK = frozenset({Phase.ROLLED_BACK, Phase.ROLLBACK_FAILED, Phase.COMPLETE, Phase.FAILED})

TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.PREPARE: _BACK | {Phase.PRECOPY, Phase.SWITCHOVER},
    Phase.PRECOPY: _BACK | {Phase.SWITCHOVER},
    Phase.SWITCHOVER: _BACK | {Phase.POSTCOPY},
    Phase.ROLLBACK_FAILED: _BACK,
    Phase.POSTCOPY: frozenset({Phase.COMPLETE, Phase.INTERRUPTED, Phase.FAILED}),
    Phase.INTERRUPTED: frozenset({Phase.POSTCOPY, Phase.COMPLETE, Phase.FAILED}),
    Phase.COMPLETE: frozenset(),
    Phase.ROLLED_BACK: frozenset(),
    Phase.FAILED: frozenset(),
}

#: The point of no return. The edge is taken only after `committed` is on disk, and once
#: the guest is known to be the destination's.
COMMIT = (Phase.SWITCHOVER, Phase.POSTCOPY)

#: Phases in which nothing has been committed: abort and rollback are safe.
BEFORE_COMMIT = frozenset({Phase.PREPARE, Phase.PRECOPY, Phase.SWITCHOVER})

#: Phases that nothing follows.
TERMINAL = frozenset(phase for phase, after in TRANSITIONS.items() if not after)


class PhaseMachine:
    """Holds the phase; `set` is the only way to change it.

    :param notify: called with (old, new) after every change.
    """

    def __init__(
        self, phase: Phase = Phase.PREPARE, notify: Callable[[Phase, Phase], None] | None = None
    ) -> None:
        self._phase = phase
        self._notify = notify

    @property
    def phase(self) -> Phase:
        return self._phase

    def set(self, phase: Phase) -> None:
        """Move to `phase`. An edge that is not in the table is a bug of ours."""
        old = self._phase
        assert phase in TRANSITIONS[old], f"no transition {old} -> {phase}"
        self._phase = phase
        log.info("phase %s -> %s", old, phase)
        if self._notify:
            self._notify(old, phase)
