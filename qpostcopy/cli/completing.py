"""What the shell offers after TAB: migrations, plans' names, page orders.

It must be quick and must never fail: what cannot be read is not offered. What
needs more than the standard library is imported only when it is asked for.
"""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from qpostcopy.errors import QpostcopyError


def migrations(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The names of plans that were migrated, then the IDs, the latest first."""
    from qpostcopy.state import StateDirectory

    try:
        ids = StateDirectory.known()
    except QpostcopyError:
        return []
    plans = dict.fromkeys(migration_id.rpartition("-")[0] for migration_id in ids)
    return [CompletionItem(name) for name in (*plans, *ids) if name.startswith(incomplete)]


def profiles(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The shipped page orders, and files."""
    from qpostcopy.config import shipped_profiles

    names = [name for name in shipped_profiles() if name.startswith(incomplete)]
    # The kind comes first: with it, bash forgets what was offered before.
    return [CompletionItem(incomplete, type="file"), *map(CompletionItem, names)]
