"""The observer against a monitor that is played over a socket pair."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from qpostcopy.lab.observer import Observer, ObserverError, ObserverTimeoutError

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}, "capabilities": []}}


class Monitor:
    """What the other end says is written ahead: the socket keeps it."""

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair()

    def say(self, *messages: object) -> None:
        self.far.sendall(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))


@pytest.fixture
def monitor() -> Iterator[Monitor]:
    made = Monitor()
    yield made
    made.near.close()
    made.far.close()


def test_it_reads_the_version_and_negotiates(monitor: Monitor) -> None:
    monitor.say(GREETING, {"return": {}})
    assert Observer(monitor.near).version["major"] == 7
    assert json.loads(monitor.far.recv(4096))["execute"] == "qmp_capabilities"


def test_events_between_are_kept_in_order(monitor: Monitor) -> None:
    monitor.say(GREETING, {"return": {}}, {"event": "STOP"}, {"event": "RESUME"})
    monitor.say({"return": {"status": "running"}}, {"event": "SHUTDOWN"})
    observer = Observer(monitor.near)
    assert observer.status() == "running"
    assert [observer.wait_event(name)["event"] for name in ("RESUME", "STOP", "SHUTDOWN")] == [
        "RESUME",
        "STOP",
        "SHUTDOWN",
    ]


def test_a_refusal_is_an_error_with_qemus_words(monitor: Monitor) -> None:
    monitor.say(GREETING, {"return": {}}, {"error": {"class": "X", "desc": "not now"}})
    with pytest.raises(ObserverError, match="cont: not now"):
        Observer(monitor.near).execute("cont")


def test_no_reply_is_an_unknown_outcome(monitor: Monitor) -> None:
    monitor.say(GREETING, {"return": {}})
    observer = Observer(monitor.near)
    with pytest.raises(ObserverTimeoutError):
        observer.execute("cont", limit_seconds=0.05)


def test_a_monitor_that_hangs_up_is_an_error(monitor: Monitor) -> None:
    monitor.say(GREETING, {"return": {}})
    observer = Observer(monitor.near)
    monitor.far.close()
    with pytest.raises(ObserverError, match="hung up"):
        observer.status()


def test_what_it_said_before_it_hung_up_is_kept(monitor: Monitor) -> None:
    """A request cannot be sent any more; the events that wait to be read still count."""
    monitor.say(GREETING, {"return": {}})
    observer = Observer(monitor.near)
    monitor.say({"event": "RESUME"}, {"event": "STOP"}, {"event": "RESUME"})
    monitor.far.close()
    with pytest.raises(ObserverError, match="hung up"):
        observer.status()
    assert (observer.heard("RESUME"), observer.heard("STOP")) == (2, 1)
    assert observer.wait_event("STOP")["event"] == "STOP"
    with pytest.raises(ObserverError, match="hung up"):
        observer.status()
    assert observer.heard("RESUME") == 2
