"""Whom a guest's devices talk to: echoes for network and serial port, a hand at the balloon.

Each listens on a socket of its own, to which every QEMU of the guest connects.
Echoes check what they send back: a message is a sequence number and words tied
to it (scripts/guest/echoes.c).
"""

from __future__ import annotations

import selectors
import socket
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path

from qpostcopy.lab.observer import Observer, ObserverError, ObserverTimeoutError

MESSAGE_WORDS = 128
MESSAGE = struct.Struct(f"={MESSAGE_WORDS}Q")
_WORD_STEP = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1

_LENGTH = struct.Struct(">I")
_ETHERNET_BYTES, _IP_BYTES, _UDP_BYTES = 14, 20, 8
_HEADERS_BYTES = _ETHERNET_BYTES + _IP_BYTES + _UDP_BYTES
_WRONG_KEPT = 8

_MIB = 1 << 20
#: The balloon goes to and fro by so much, so often.
BALLOON_BYTES = 6 * _MIB
BALLOON_SECONDS = 0.1
_PATIENCE_SECONDS = 90.0


def first_word(sequence: int) -> int:
    """words_of_place(0, sequence) of scripts/guest/devices.c."""
    value = (sequence + 1) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def make_message(sequence: int) -> bytes:
    first = first_word(sequence)
    words = ((first + i * _WORD_STEP) & _MASK for i in range(MESSAGE_WORDS - 1))
    return MESSAGE.pack(sequence, *words)


class Listener:
    """A socket that QEMUs connect to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(path))
        self.socket.listen(4)

    def connected(self, connection: socket.socket) -> bool:
        """Whether what comes in is to be handed to `heard`."""
        return True

    def heard(self, connection: socket.socket, part: bytes) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.socket.close()
        self.path.unlink(missing_ok=True)


class Echo(Listener):
    """:ivar messages: how many came in right. :ivar wrong: of the others, the first few."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.messages = 0
        self.wrong: list[str] = []
        self._last = 0

    def check(self, message: bytes, *, in_order: bool) -> None:
        """:param in_order: none may be missing, else none may come again."""
        (sequence,) = struct.unpack_from("=Q", message)
        expected = sequence == self._last + 1 if in_order else sequence > self._last
        if expected and message == make_message(sequence):
            self.messages += 1
        elif len(self.wrong) < _WRONG_KEPT:
            self.wrong.append(f"after {self._last}: {sequence}, {message[8:40].hex()}")
        self._last = sequence


class SerialPort(Echo):
    """Bytes. The middle of a message may come from the next QEMU: all are one stream."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._buffer = b""

    def heard(self, connection: socket.socket, part: bytes) -> None:
        self._buffer += part
        while len(self._buffer) >= MESSAGE.size:
            message, self._buffer = self._buffer[: MESSAGE.size], self._buffer[MESSAGE.size :]
            self.check(message, in_order=True)
            connection.sendall(message)


class Network(Echo):
    """Frames, each after its length (-netdev stream). UDP goes back to where it came from."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._buffers: dict[socket.socket, bytes] = {}

    def heard(self, connection: socket.socket, part: bytes) -> None:
        buffer = self._buffers.get(connection, b"") + part
        while len(buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
            if len(buffer) < end:
                break
            frame, buffer = buffer[_LENGTH.size : end], buffer[end:]
            if len(frame) == _HEADERS_BYTES + MESSAGE.size:
                self.check(frame[_HEADERS_BYTES:], in_order=False)
                connection.sendall(_LENGTH.pack(len(frame)) + sent_back(frame))
        self._buffers[connection] = buffer


def sent_back(frame: bytes) -> bytes:
    """Both ends changed over, on each layer; that changes no checksum."""
    mac, source_mac, kind = frame[:6], frame[6:12], frame[12:14]
    ip, source, target = frame[14:26], frame[26:30], frame[30:34]
    port, target_port, rest = frame[34:36], frame[36:38], frame[38:]
    return source_mac + mac + kind + ip + target + source + target_port + port + rest


class Balloon(Listener):
    """Inflates and deflates a little, at every QEMU that runs its guest.

    :ivar moves: of each QEMU, oldest first: how often its balloon has changed its size.
    :ivar longest_ms: of each QEMU: the longest that its main loop took to answer.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.moves: list[int] = []
        self.longest_ms: list[float] = []
        self._end = threading.Event()
        self._threads: list[threading.Thread] = []

    def connected(self, connection: socket.socket) -> bool:
        index = len(self.moves)
        self.moves.append(0)
        self.longest_ms.append(0.0)
        thread = threading.Thread(target=self._move, args=(connection, index), name="balloon")
        self._threads.append(thread)
        thread.start()
        return False

    def close(self) -> None:
        super().close()
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _move(self, connection: socket.socket, index: int) -> None:
        with suppress(ObserverError, ObserverTimeoutError):  # QEMU has ended
            monitor = Observer(connection, _PATIENCE_SECONDS)
            full = last = monitor.execute("query-balloon")["actual"]
            targets = (full - BALLOON_BYTES, full)
            while not self._end.wait(BALLOON_SECONDS):
                asked = time.monotonic()
                actual = monitor.execute("query-balloon", limit_seconds=_PATIENCE_SECONDS)["actual"]
                waited_ms = (time.monotonic() - asked) * 1000
                self.longest_ms[index] = max(self.longest_ms[index], waited_ms)
                self.moves[index] += actual != last
                last = actual
                if monitor.status() == "running":
                    monitor.execute("balloon", {"value": targets[actual != full]})
        connection.close()


class Peers:
    """Serves them all in one thread, from here on until `close`."""

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = listeners
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        for listener in listeners:
            self._selector.register(listener.socket, selectors.EVENT_READ, listener)
        # Oldest first: what the source still had to say precedes the destination.
        self._connections: list[tuple[socket.socket, Listener]] = []
        self._thread = threading.Thread(target=self._serve, name="peers")
        self._thread.start()

    def close(self) -> None:
        self._wake.send(b"q")
        self._thread.join()
        for connection, _ in self._connections:
            connection.close()
        for listener in self._listeners:
            listener.close()
        self._selector.close()
        self._wake.close()
        self._woken.close()

    def _serve(self) -> None:
        while True:
            ready = {key.fileobj for key, _ in self._selector.select()}
            if self._woken in ready:
                return
            for connection, listener in list(self._connections):
                if connection in ready:
                    self._hear(connection, listener)
            for listener in self._listeners:
                if listener.socket in ready:
                    self._take(listener)

    def _take(self, listener: Listener) -> None:
        connection, _ = listener.socket.accept()
        if listener.connected(connection):
            self._connections.append((connection, listener))
            self._selector.register(connection, selectors.EVENT_READ)

    def _hear(self, connection: socket.socket, listener: Listener) -> None:
        try:
            part = connection.recv(65536)
            if part:
                listener.heard(connection, part)
        except (ConnectionResetError, BrokenPipeError):
            part = b""
        if not part:
            self._selector.unregister(connection)
            self._connections.remove((connection, listener))
            connection.close()
