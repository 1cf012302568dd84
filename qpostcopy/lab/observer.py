"""A second, synchronous monitor of a QEMU: the laboratory's own pair of eyes.

The migration's companions hold the QMP socket that the plan names, and QEMU
serves one client a socket. The observer has a socket of its own, so tests and
the demo can look at a VM at any time of a migration. It blocks, always with a
time limit; it reconnects to nothing.
"""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from typing import Any

from qpostcopy.errors import OutcomeUnknownError, QpostcopyError

_LIMIT_SECONDS = 20.0


class ObserverError(QpostcopyError):
    """QEMU answered a command with an error, or hung up."""


class ObserverTimeoutError(OutcomeUnknownError):
    """QEMU did not answer in time: what was asked may or may not have happened."""


class Observer:
    """One QMP session.

    :param sock: connected, taken; the greeting may still be to come.
    :raise ObserverError: QEMU hung up instead of greeting.
    """

    def __init__(self, sock: socket.socket, limit_seconds: float = _LIMIT_SECONDS) -> None:
        self._sock = sock
        self._buffer = b""
        self._events: list[dict[str, Any]] = []
        greeting = self._read(time.monotonic() + limit_seconds)
        self.version: dict[str, Any] = greeting["QMP"]["version"]["qemu"]
        self.execute("qmp_capabilities", limit_seconds=limit_seconds)

    def execute(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        limit_seconds: float = _LIMIT_SECONDS,
    ) -> Any:
        """Run a command, return what it returns.

        :raise ObserverError: QEMU refused, or hung up.
        :raise ObserverTimeoutError: no reply in time.
        """
        deadline = time.monotonic() + limit_seconds
        request = {"execute": command, "arguments": arguments or {}}
        try:
            self._sock.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            self._drain(deadline)
            raise ObserverError(f"{command}: QEMU hung up") from error
        while True:
            message = self._read(deadline)
            if "error" in message:
                raise ObserverError(f"{command}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]
            self._events.append(message)

    def wait_event(self, name: str, *, limit_seconds: float = _LIMIT_SECONDS) -> dict[str, Any]:
        """The next event of that name that nobody has taken yet; others are kept."""
        deadline = time.monotonic() + limit_seconds
        while True:
            for index, event in enumerate(self._events):
                if event.get("event") == name:
                    return self._events.pop(index)
            self._events.append(self._read(deadline))

    def heard(self, name: str) -> int:
        """How many events of that name were read so far and not taken."""
        return sum(event.get("event") == name for event in self._events)

    def status(self) -> str:
        """`running`, `paused`, `inmigrate`, `postmigrate`, ..."""
        return str(self.execute("query-status")["status"])

    def close(self) -> None:
        self._sock.close()

    def _drain(self, deadline: float) -> None:
        """Keep what QEMU said before it hung up: it may be its last words that count."""
        with suppress(ObserverError):
            while True:
                self._events.append(self._read(deadline))

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._sock.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                part = self._sock.recv(65536)
            except TimeoutError as error:
                raise ObserverTimeoutError("QEMU's monitor did not answer in time") from error
            except OSError as error:
                raise ObserverError("QEMU hung up") from error
            if not part:
                raise ObserverError("QEMU hung up")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message
