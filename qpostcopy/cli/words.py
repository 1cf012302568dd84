"""What people read on stderr, and the standard streams that may be missing.

Guarantees: a line for a terminal is broken between words, so that it fits; off
a terminal a message stays one line, to be searched. Nobody who hangs up stderr
(a closed terminal, `2>&-`, a reader that ended) ends a verb by that.
"""

from __future__ import annotations

import io
import os
import sys
import textwrap
from typing import TextIO

import click

#: Where a terminal does not say.
_COLUMNS = 80


def is_terminal(stream: TextIO) -> bool:
    """Whether that is a terminal on which a line can be kept up to date."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def columns(stream: TextIO) -> int:
    """How wide that terminal is now: it may be resized at any time."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or _COLUMNS
    except (OSError, ValueError):
        return _COLUMNS


def wrapped(text: str, stream: TextIO) -> str:
    """The text as it is shown there. Words are not broken: a path can be copied."""
    if not stream.isatty():
        return text
    indent = " " * (len(text) - len(text.lstrip()) + 4)
    lines = textwrap.wrap(
        text,
        columns(stream),
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines)


def tell(text: str, *, prefix: str = "") -> None:
    """A message on stderr. :param prefix: goes before it, and takes no room."""
    try:
        click.echo(prefix + wrapped(text, sys.stderr), err=True)
    except OSError:
        mute(sys.stderr)


def mute(stream: TextIO) -> None:
    """What is written there from now on is lost, and is no error, at our exit neither."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def open_standard_streams() -> None:
    """Before anything is opened: nothing of ours must take the number of a closed stream."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    # To Python a closed stream is None.
    sys.stdout = sys.stdout or _null()
    sys.stderr = sys.stderr or _null()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # any path can be named


def _null() -> TextIO:
    return open(os.devnull, "w")  # noqa: PTH123 (kept until the process ends)
