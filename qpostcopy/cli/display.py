"""How the messages of a controller are shown: a kept line, plain lines, or JSON."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol, Self

import click

from qpostcopy.cli.stream import Message, Stream
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
        click.echo(text, err=True)


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


class TerminalDisplay:
    """One line that is kept up to date, logs above it. rich honours NO_COLOR."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._status = self._console.status("starting")

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._status.stop()

    def show(self, message: Message) -> None:
        text = describe(message)
        if message["type"] == "progress":
            self._status.update(text)
        elif text:
            self._console.print(text, markup=False)
            if message["type"] == "phase":
                self._status.update(str(message["phase"]))

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)


def make_display(stream: Stream) -> Display:
    """What suits our stdout and stderr."""
    if stream.on:
        return JsonDisplay(stream)
    return TerminalDisplay() if sys.stderr.isatty() else PlainDisplay()


def describe(message: Message) -> str:
    """A message in words; nothing for the result, which is not progress."""
    if message["type"] == "phase":
        return f"{message['phase']}: {message['message']}"
    if message["type"] == "log":
        return f"{message['level']}: {message['message']}"
    if message["type"] == "progress":
        fields = {key: message[key] for key in Progress.model_fields if key in message}
        return line(Progress.model_validate(fields))
    return ""
