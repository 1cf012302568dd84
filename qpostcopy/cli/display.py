"""How the messages of a controller are shown: a kept line, plain lines, or JSON.

The kept line never wraps, however narrow the terminal is or becomes. There is no
colour, so NO_COLOR asks for nothing; a terminal that cannot move its cursor
(TERM=dumb) gets plain lines.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol, Self

import click

from qpostcopy.cli.stream import Message, Stream
from qpostcopy.cli.words import columns, is_terminal, mute, tell
from qpostcopy.progress import Progress, line

#: Off a terminal: one line in this time.
PLAIN_LINE_SECONDS = 2.0


class Display(Protocol):
    """Shows the messages of a controller."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def show(self, message: Message) -> None: ...

    def note(self, text: str) -> None: ...


class _StreamDisplay:
    """A display that has nothing to set up or to tidy."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def note(self, text: str) -> None:
        tell(text)


class JsonDisplay(_StreamDisplay):
    """Every message verbatim, one object a line, on stdout."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def show(self, message: Message) -> None:
        self._stream.write(message)


class PlainDisplay(_StreamDisplay):
    """Lines on stderr, progress no more often than one an interval."""

    def __init__(self) -> None:
        self._last_seconds = 0.0

    def show(self, message: Message) -> None:
        if message["type"] == "progress":
            now = time.monotonic()
            if now - self._last_seconds < PLAIN_LINE_SECONDS:
                return
            self._last_seconds = now
        if text := describe(message):
            self.note(text)


#: To the first column, and erase to the end of the line.
_ERASE = "\r\x1b[K"


class TerminalDisplay:
    """One line that is kept up to date, what stays above it."""

    def __init__(self) -> None:
        self._kept: Progress | str = "starting"

    def __enter__(self) -> Self:
        self._draw()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._put(_ERASE)

    def show(self, message: Message) -> None:
        if message["type"] == "progress":
            self._kept = _progress_of(message)
            self._draw()
        elif text := describe(message):
            if "phase" in message:
                self._kept = str(message["phase"])
            self.note(text)

    def note(self, text: str) -> None:
        tell(text, prefix=_ERASE)
        self._draw()

    def _draw(self) -> None:
        room = columns(sys.stderr) - 1  # a terminal may wrap after its last column
        kept = self._kept if isinstance(self._kept, str) else line(self._kept, room)
        self._put(_ERASE + kept[:room])

    def _put(self, text: str) -> None:
        try:
            click.echo(text, err=True, nl=False)
        except OSError:
            mute(sys.stderr)


def make_display(stream: Stream) -> Display:
    """What suits our stdout and stderr."""
    return JsonDisplay(stream) if stream.on else make_people_display()


def make_people_display() -> PlainDisplay | TerminalDisplay:
    """What suits our stderr."""
    return TerminalDisplay() if is_terminal(sys.stderr) else PlainDisplay()


def describe(message: Message) -> str:
    """A message in words; nothing for the result, which is not progress."""
    if message["type"] in ("phase", "status"):
        return f"{message['phase']}: {message['message']}"
    if message["type"] == "log":
        return f"{message['level']}: {message['message']}"
    if message["type"] == "progress":
        return line(_progress_of(message))
    return ""


def _progress_of(message: Message) -> Progress:
    fields = {key: message[key] for key in Progress.model_fields if key in message}
    return Progress.model_validate(fields)
