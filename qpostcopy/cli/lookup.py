"""Which migration an operator means."""

from __future__ import annotations

from qpostcopy.cli.words import tell
from qpostcopy.state import StateDirectory


def find(name: str | None) -> StateDirectory:
    """By ID, or the latest of a plan's name, or of all. What a name hides is said.

    :raise UnknownMigrationError: there is none.
    """
    directory = StateDirectory.find(name)
    if name != directory.migration_id:
        for other in StateDirectory.all():
            if other.path == directory.path or other.state.plan_name != directory.state.plan_name:
                continue
            if not other.finished:
                _note(directory, f"{other.migration_id} has not ended either")
            elif other.refused and other.migration_id > directory.migration_id:
                _note(directory, f"{other.migration_id}, which came later, was refused")
    return directory


def _note(directory: StateDirectory, what: str) -> None:
    tell(f"note: this is about {directory.migration_id}; {what}")
