"""Cuts a stream of bytes into JSON texts, as a QMP server has to.

QMP is a stream of JSON objects; nothing obliges a client to end each with a
newline (qemu.qmp's does not). So the end of a text is the brace that closes it.
What does not begin like an object or an array is cut at the end of its line and
left to the JSON parser to refuse. Pure: no I/O, no JSON parsing, no recursion.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from qpostcopy.errors import QpostcopyError

_SPACE = re.compile(rb"[ \t\r\n]*")
_OUTSIDE_STRING = re.compile(rb'["{}\[\]]')
_INSIDE_STRING = re.compile(rb'["\\]')


class OversizeError(QpostcopyError):
    """A text is longer than we care to keep."""


class Framer:
    """Feed it what arrives, take complete texts out.

    :param limit_bytes: a text longer than this raises OversizeError.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._buffer = bytearray()
        self._begin()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield each text that `data` completes.

        :raise OversizeError: the unfinished text is too long; the stream is lost.
        """
        self._buffer += data
        while (text := self._take()) is not None:
            yield text
        if len(self._buffer) > self._limit_bytes:
            raise OversizeError(f"a message exceeds {self._limit_bytes} bytes")

    def _begin(self) -> None:
        self._scanned = 0
        self._depth = 0
        self._in_string = False

    def _take(self) -> bytes | None:
        """Cut the next text off the buffer, or None if it is not complete."""
        if self._scanned == 0:
            space = _SPACE.match(self._buffer)
            del self._buffer[: space.end() if space else 0]
        if not self._buffer:
            return None
        end = self._end_of_value() if self._buffer[0] in b"{[" else self._end_of_line()
        if end is None:
            return None
        text = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._begin()
        return text

    def _end_of_line(self) -> int | None:
        end = self._buffer.find(b"\n", self._scanned)
        self._scanned = len(self._buffer)
        return end if end >= 0 else None

    def _end_of_value(self) -> int | None:
        """Where the bracket is that closes the first one; scanning resumes, never restarts."""
        while found := self._next_mark():
            mark, after = found[0], found.end()
            if mark == b"\\":
                if after == len(self._buffer):
                    self._scanned = found.start()  # look again once the escaped byte is here
                    return None
                after += 1
            elif mark == b'"':
                self._in_string = not self._in_string
            else:
                self._depth += 1 if mark in b"{[" else -1
            self._scanned = after
            if self._depth == 0:
                return after
        self._scanned = len(self._buffer)
        return None

    def _next_mark(self) -> re.Match[bytes] | None:
        marks = _INSIDE_STRING if self._in_string else _OUTSIDE_STRING
        return marks.search(self._buffer, self._scanned)
