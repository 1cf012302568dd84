"""The reader of the guest's reports, over socket pairs that play the serial ports."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qpostcopy.lab.guest import (
    Guest,
    GuestError,
    GuestImageError,
    Ready,
    Verified,
    Work,
    find_image,
)


class Port:
    """A serial port: `near` is the reader's end, `far` the guest's."""

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair()
        self.far.settimeout(5)

    def close(self) -> None:
        self.near.close()
        self.far.close()


@pytest.fixture
def ports() -> Iterator[tuple[Port, Port]]:
    pair = (Port(), Port())
    yield pair
    for port in pair:
        port.close()


def test_a_report_is_stamped_by_our_clock(ports: tuple[Port, Port]) -> None:
    before_s = time.monotonic()
    with Guest(ports[0].near) as guest:
        ports[0].far.sendall(b"@r 7 1000 20 30 4\n")
        report = guest.wait_report_after(before_s, 5)
    assert report[2:] == (1000, 7, 20, 30, 4)
    assert report.port == 0
    assert before_s < report.host_s < time.monotonic()


def test_ready_and_corrupt_lines_are_kept(ports: tuple[Port, Port]) -> None:
    with Guest(ports[0].near) as guest:
        ports[0].far.sendall(b"@c 17 generation\n@ready service 2000 11 12 30\n")
        assert guest.wait_ready(5) == Ready("service", 2000, 11, 12, 30)
        assert guest.corrupt_lines == ["17 generation"]


def test_devices_are_waited_for_each_by_itself(ports: tuple[Port, Port]) -> None:
    with Guest(ports[0].near) as guest:
        ports[0].far.sendall(b"@d /dev/vda 100 0\n@d network 8 1\n")
        guest.wait_work({"/dev/vda": 100, "network": 8}, 5)
        assert guest.work == {"/dev/vda": Work(100, 0), "network": Work(8, 1)}
        with pytest.raises(GuestError, match=r"wanted.*'network': 9.*operations=8"):
            guest.wait_work({"/dev/vda": 100, "network": 9}, 0.05)
        with pytest.raises(GuestError, match="screen"):
            guest.wait_work({"screen": 1}, 0.05)


def test_a_line_may_begin_on_one_port_and_end_on_the_next(ports: tuple[Port, Port]) -> None:
    with Guest(ports[0].near) as guest:
        ports[0].far.sendall(b"@r 1 1000 10 0 0\n@r 2 20")
        guest.wait_report_after(0, 5)
        guest.add(ports[1].near)
        ports[1].far.sendall(b"00 20 0 0\n")
        report = guest.wait_report_after(0, 5, port=1)
    assert (report.sequence, report.guest_us) == (2, 2000)


def test_the_older_port_is_heard_first(ports: tuple[Port, Port]) -> None:
    # Both have something to say before anybody listens.
    ports[0].far.sendall(b"@r 1 1000 10 0 0\n@r 2 20")
    ports[1].far.sendall(b"00 20 0 0\n")
    with Guest(ports[0].near, ports[1].near) as guest:
        guest.wait_report_after(0, 5, port=1)
        assert [report.sequence for report in guest.reports] == [1, 2]


@pytest.mark.parametrize(
    "line",
    [
        b"[ 1.0] Kernel panic",
        b"@r 1 2 3",
        b"@r 1 2 x 4 5",
        b"@v",
        b"@d",
        b"@ready service",
        b"\xff\xfe",
    ],
)
def test_what_is_not_the_workloads_is_kept_apart(ports: tuple[Port, Port], line: bytes) -> None:
    with Guest(ports[0].near) as guest:
        ports[0].far.sendall(line + b"\n@r 1 1000 10 0 0\n")
        guest.wait_report_after(0, 5)
        assert len(guest.reports) == 1
        assert guest.other_lines == [line.decode(errors="replace")]


def test_a_command_goes_to_the_port_that_spoke_last(ports: tuple[Port, Port]) -> None:
    with Guest(ports[0].near, ports[1].near) as guest:
        ports[0].far.sendall(b"@r 1 1000 10 0 0\n")
        guest.wait_report_after(0, 5, port=0)
        ports[1].far.sendall(b"@r 2 2000 20 0 0\n")
        guest.wait_report_after(0, 5, port=1)
        guest.power_off()
        assert ports[1].far.recv(64) == b"q\n"


def test_verify_waits_for_an_answer_of_its_own(ports: tuple[Port, Port]) -> None:
    def answer() -> None:
        assert ports[0].far.recv(64) == b"v\n"
        ports[0].far.sendall(b"@v 200 0\n")

    with Guest(ports[0].near) as guest:
        ports[0].far.sendall(b"@v 100 1\n@r 1 1000 10 0 0\n")
        guest.wait_report_after(0, 5)
        with ThreadPoolExecutor() as pool:
            answered = pool.submit(answer)
            assert guest.verify(5) == Verified(200, 0)
            answered.result()


def test_no_answer_is_an_error(ports: tuple[Port, Port]) -> None:
    with Guest(ports[0].near) as guest:
        ports[0].far.sendall(b"@rate 5\n@r 1 1000 10 0 0\n")
        guest.wait_report_after(0, 5)
        with pytest.raises(GuestError, match="did not set its rate within"):
            guest.set_rate(7, 0.05)


def test_a_silent_guest_cannot_be_commanded(ports: tuple[Port, Port]) -> None:
    with Guest(ports[0].near) as guest, pytest.raises(GuestError, match="not said anything"):
        guest.power_off()


def test_waiting_tells_what_the_kernel_said_last(ports: tuple[Port, Port]) -> None:
    with Guest(ports[0].near) as guest:
        ports[0].far.sendall(b"Kernel panic\n@r 1 1000 10 0 0\n")
        guest.wait_report_after(0, 5)
        with pytest.raises(GuestError, match=r"within 0\.05 s \(Kernel panic\)"):
            guest.wait_ready(0.05)


def test_a_port_that_closes_ends_nothing(ports: tuple[Port, Port]) -> None:
    with Guest(ports[0].near, ports[1].near) as guest:
        ports[0].far.close()
        ports[1].far.sendall(b"@r 1 1000 10 0 0\n")
        assert guest.wait_report_after(0, 5).port == 1


def test_a_missing_guest_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(GuestImageError) as caught:
        find_image(tmp_path / "vmlinuz", tmp_path / "initrd")
    assert str(tmp_path / "vmlinuz") in str(caught.value)
    assert caught.value.remedy and "scripts/setup" in caught.value.remedy
