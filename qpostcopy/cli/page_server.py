"""`qpostcopy page-server`: a companion, started by the controller or by hand."""

from __future__ import annotations

from typing import Any

import click

from qpostcopy.cli.companion_options import companion_options, options_of
from qpostcopy.companion import run_companion


@click.command(name="page-server")
@companion_options
def command(log_level: str, **options: Any) -> None:
    """Serve the RAM of a source QEMU to a handler.

    The controller starts it. By hand it is driven with any QMP client on its
    control socket, and ended with `qpc-quit` or SIGTERM.
    """
    from qpostcopy.source.server import PageServer

    run_companion(PageServer, options_of(**options), log_level)
