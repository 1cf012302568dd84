"""A command in a terminal of its own: a pty, with keys, a size, and job control's signals."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence

CTRL_C = b"\x03"
SECONDS = 60.0
#: What ends a line, or begins the kept one anew.
_NEW_LINE = re.compile(r"\r\x1b\[K|\r\n")


class Terminal:
    """Starts the command; a context manager that ends it if need be.

    :ivar text: all that it has written so far.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], columns: int = 80
    ) -> None:
        self.text = ""
        self._seen = 0
        self._main, side = pty.openpty()
        self.resize(columns)
        self._process = subprocess.Popen(
            command,
            stdin=side,
            stdout=side,
            stderr=side,
            env={"TERM": "xterm"} | dict(environment),
            start_new_session=True,
            # Ctrl-C is sent to those whose controlling terminal it is.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(side)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self.hang_up()

    def press(self, keys: bytes) -> None:
        os.write(self._main, keys)

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self._main, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def read_until(self, text: str) -> None:
        """Read on, until that text has come after what was waited for before."""
        while (found := self.text.find(text, self._seen)) < 0:
            assert self._read(), f"it ended without {text!r}: {self.text}"
        self._seen = found + len(text)

    def hang_up(self) -> int:
        """Close the terminal, which sends SIGHUP; the exit code."""
        if self._main >= 0:
            os.close(self._main)
            self._main = -1
        return self._process.wait(SECONDS)

    def end(self) -> int:
        """Read to its end; its exit code."""
        while self._read():
            pass
        return self._process.wait(SECONDS)

    def lines(self, since: int = 0) -> list[str]:
        """What stood in a line at any time, the versions of the kept line too."""
        return _NEW_LINE.split(self.text[since:])

    def _read(self) -> bool:
        """Whether something came; False: it has ended."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            if select.select([self._main], [], [], 1.0)[0]:
                try:
                    self.text += os.read(self._main, 4096).decode()
                except OSError:  # EIO: nobody has it open any more
                    return False
                return True
        raise AssertionError(f"nothing within {SECONDS} s: {self.text}")
