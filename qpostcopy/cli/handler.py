"""`qpostcopy handler`: a companion, started by the controller or by hand."""

from __future__ import annotations

from typing import Any

import click

from qpostcopy.cli.companion_options import companion_options, options_of
from qpostcopy.companion import run_companion


@click.command(name="handler")
@companion_options
def command(log_level: str, **options: Any) -> None:
    """Serve the page faults of a destination QEMU.

    The controller starts it. By hand it is driven with any QMP client on its
    control socket, and ended with `qpc-quit` or SIGTERM.
    """
    from qpostcopy.uffd.handler import Handler

    run_companion(Handler, options_of(**options), log_level)
