"""`qpostcopy completion`: the script that makes a shell complete our command line."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

#: The script asks us, through this variable, what may come next (click's own protocol).
VARIABLE = "_QPOSTCOPY_COMPLETE"


@click.command(
    name="completion",
    epilog="\b\nqpostcopy completion bash > /etc/bash_completion.d/qpostcopy\n"
    "qpostcopy completion fish > ~/.config/fish/completions/qpostcopy.fish\n"
    'eval "$(qpostcopy completion zsh)"        # in ~/.zshrc, after compinit',
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    With it, TAB completes verbs, options, IDs, plans' names and shipped profiles.
    """
    kind = get_completion_class(shell)
    assert kind is not None, "click knows these shells"
    completion = kind(ctx.find_root().command, {}, "qpostcopy", VARIABLE)
    click.echo(completion.source())
