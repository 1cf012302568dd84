"""`scripts/bench limits`: the real program over real sockets and a real userfaultfd.

How long anything takes is not tested, but that what is timed was done: every byte
is placed where it belongs, and a program that does not do that fails.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from qpostcopy.bench import limits
from qpostcopy.bench.limits import (
    Latency,
    Limits,
    LimitsError,
    Measured,
    Place,
    build,
    measure_limits,
)
from qpostcopy.bench.limits_table import limits_table
from qpostcopy.core import PAGE_BYTES
from qpostcopy.lab.leftovers import processes_naming
from tests.core.test_c import SANITIZERS, WARNINGS

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "scripts" / "limits"
FRAME_BYTES = 1 << 20
#: More than a frame, and no multiple of one.
SIZE_BYTES = FRAME_BYTES + 3 * PAGE_BYTES
#: How a fault's handler waits.
WAITING = ("poll", "same-core", "spin")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def program(cache: Path) -> Path:
    return build(cache)


def run(program: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *words], capture_output=True, text=True, timeout=60, check=False
    )


def result(program: Path, *words: str) -> dict[str, float]:
    """The one object that it prints, and nothing else."""
    done = run(program, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    told: dict[str, float] = json.loads(done.stdout)
    return told


def complaint(program: Path, *words: str) -> str:
    """The one line of a run that fails, without the program's name."""
    done = run(program, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("limits: ") and done.stderr.count("\n") == 1
    return done.stderr.removeprefix("limits: ").strip()


@contextmanager
def served(program: Path, address: str = "127.0.0.1") -> Iterator[str]:
    """A server's port. It ends well, and says nothing, when its stdin is closed."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [program, "serve", address], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as server:
        try:
            assert server.stdout
            yield str(json.loads(server.stdout.readline())["port"])
            assert server.communicate(timeout=10) == ("", "")
            assert server.returncode == 0
        finally:
            server.kill()


# --- the program ------------------------------------------------------------------------------


@pytest.mark.parametrize("size_bytes", [PAGE_BYTES, FRAME_BYTES, SIZE_BYTES])
@pytest.mark.parametrize("figure", ["socket", "place"])
def test_a_transfer_moves_every_byte(program: Path, figure: str, size_bytes: int) -> None:
    with served(program) as port:
        told = result(program, figure, "127.0.0.1", port, str(size_bytes))
    assert told.keys() == {"bytes", "us"}
    assert told["bytes"] == size_bytes
    assert told["us"] > 0


def test_latencies_are_of_as_many_events_as_asked_for(program: Path) -> None:
    with served(program) as port:
        series = [
            *(result(program, "fault", waiting, "100") for waiting in WAITING),
            result(program, "roundtrip", "127.0.0.1", port, "100", "1"),
            result(program, "roundtrip", "127.0.0.1", port, "100", "4120"),
        ]
    for told in series:
        assert told.keys() == {"count", "p50_us", "p90_us", "p99_us"}
        assert told["count"] == 100
        assert 0 < told["p50_us"] <= told["p90_us"] <= told["p99_us"]


def test_one_event_is_enough(program: Path) -> None:
    told = result(program, "fault", "poll", "1")
    assert told["p50_us"] == told["p99_us"] > 0


def test_the_other_address_family(program: Path) -> None:
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6")
    with served(program, "::1") as port:
        assert result(program, "socket", "::1", port, "4096")["bytes"] == PAGE_BYTES


def test_a_server_goes_on_after_a_client_that_leaves(program: Path) -> None:
    with served(program) as port:
        with socket.create_connection(("127.0.0.1", int(port)), timeout=10) as client:
            client.send(b"not a request, but as long")
        with socket.create_connection(("127.0.0.1", int(port)), timeout=10) as client:
            client.send(b"short")
        assert result(program, "place", "127.0.0.1", port, str(SIZE_BYTES))["bytes"] == SIZE_BYTES


@pytest.mark.root
def test_faults_need_no_rights(program: Path) -> None:
    with program.open("rb") as file:  # nobody may look into a test's folder
        done = subprocess.run(
            [f"/proc/self/fd/{file.fileno()}", "fault", "poll", "10"],
            pass_fds=[file.fileno()], user=65534, group=65534, extra_groups=[],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "usage: limits serve ADDRESS"),
        (("socket", "127.0.0.1"), "usage: limits serve ADDRESS"),
        (("wrong", "127.0.0.1"), "usage: limits serve ADDRESS"),
        (("place", "127.0.0.1", "1", "4097"), "BYTES: expected 4096 to 1099511627776 in steps"),
        (("place", "127.0.0.1", "1", "-4096"), "got -4096"),
        (("socket", "127.0.0.1", "1", "4096k"), "got 4096k"),
        (("socket", "127.0.0.1", "1", "99999999999999999999"), "got 99999999999999999999"),
        (("fault", "poll", "0"), "COUNT: expected 1 to 1000000"),
        (("fault", "wait", "1"), "fault: none of poll, same-core, spin: wait"),
        (("roundtrip", "127.0.0.1", "1", "1", "1048577"), "ANSWER: expected 1 to 1048576"),
        (("socket", "localhost", "1", "4096"), "address localhost port 1: "),
        (("serve", "not-an-address"), "address not-an-address port 0: "),
        (("serve", "192.0.2.1"), "listen at 192.0.2.1: Cannot assign requested address"),
    ],
)
def test_wrong_words_are_told_in_one_line(
    program: Path, words: tuple[str, ...], expected: str
) -> None:
    assert expected in complaint(program, *words)


def test_nobody_listens(program: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
    for words in (("socket", "127.0.0.1", port, "4096"), ("place", "127.0.0.1", port, "4096")):
        assert complaint(program, *words) == f"connect to 127.0.0.1 port {port}: Connection refused"


# --- wrong peers, wrong programs --------------------------------------------------------------


def content(size_bytes: int) -> bytes:
    """What a sender is to send, as limits.h describes it."""
    first = [0x51A3B00000000000 + page for page in range(size_bytes // PAGE_BYTES)]
    middle = b"\xa5" * (PAGE_BYTES - 16)
    return b"".join(
        struct.pack("=Q", word) + middle + struct.pack("=Q", word ^ (1 << 64) - 1) for word in first
    )


@contextmanager
def sender(data: bytes) -> Iterator[str]:
    """The port of one that sends this whatever it is asked for, and hangs up."""

    def send() -> None:
        client, _ = listener.accept()
        with client:
            assert len(client.recv(24, socket.MSG_WAITALL)) == 24
            client.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=send)
        thread.start()
        yield str(listener.getsockname()[1])
        thread.join(10)
        assert not thread.is_alive()


def test_content_is_looked_at(program: Path) -> None:
    right = content(SIZE_BYTES)
    with sender(right) as port:
        assert result(program, "place", "127.0.0.1", port, str(SIZE_BYTES))["bytes"] == SIZE_BYTES
    at = 200 * PAGE_BYTES + 1000
    with sender(right[:at] + b"\0" + right[at + 1 :]) as port:
        told = complaint(program, "place", "127.0.0.1", port, str(SIZE_BYTES))
    assert told == "place: wrong content in page 200"


@pytest.mark.parametrize(
    ("right", "wrong", "page"),
    [
        # the first frame lands where the second belongs, and the second nowhere
        ("(uintptr_t)ram->at + offset", "(uintptr_t)ram->at + (offset + 1048576) % 2097152", 0),
        # the last page of each frame is left out
        (".len = bytes,", ".len = bytes - 4096,", 255),
    ],
)
def test_a_program_that_places_wrongly_fails(
    program: Path, tmp_path: Path, right: str, wrong: str, page: int
) -> None:
    sources = tmp_path / "sources"
    shutil.copytree(SOURCES, sources)
    text = (sources / "memory.c").read_text()
    assert text.count(right) == 1
    (sources / "memory.c").write_text(text.replace(right, wrong))
    broken = tmp_path / "broken"
    subprocess.run(["gcc", "-pthread", "-o", broken, *sources.glob("*.c")], check=True)
    with served(program) as port:
        told = complaint(broken, "place", "127.0.0.1", port, str(2 * FRAME_BYTES))
    assert told == f"place: wrong content in page {page}"


@pytest.mark.parametrize("figure", ["socket", "place"])
def test_a_sender_that_hangs_up(program: Path, figure: str) -> None:
    with sender(content(SIZE_BYTES)[:-1]) as port:
        told = complaint(program, figure, "127.0.0.1", port, str(SIZE_BYTES))
    assert told == "receive: the peer closed the connection"


@pytest.mark.slow
def test_a_sender_that_says_nothing_is_not_waited_for_for_ever(program: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = str(silent.getsockname()[1])
        told = complaint(program, "roundtrip", "127.0.0.1", port, "1", "1")
    assert told == "receive: Connection timed out"


def test_nothing_is_wrong_under_sanitizers(tmp_path: Path) -> None:
    checked = tmp_path / "limits"
    subprocess.run(
        ["gcc", *WARNINGS, *SANITIZERS["asan"], "-pthread", "-o", checked, *SOURCES.glob("*.c")],
        check=True,
    )
    with served(checked) as port:
        result(checked, "socket", "127.0.0.1", port, str(SIZE_BYTES))
        result(checked, "place", "127.0.0.1", port, str(SIZE_BYTES))
        result(checked, "roundtrip", "127.0.0.1", port, "50", "1")
        result(checked, "roundtrip", "127.0.0.1", port, "50", "4120")
    for waiting in WAITING:
        result(checked, "fault", waiting, "50")


def test_optimised_build_has_no_warnings(tmp_path: Path) -> None:
    for source in SOURCES.glob("*.c"):
        out = tmp_path / "out.o"
        subprocess.run(["gcc", *WARNINGS, "-O2", "-c", str(source), "-o", out], check=True)


# --- from Python ------------------------------------------------------------------------------


def test_all_figures(cache: Path) -> None:
    told = measure_limits(SIZE_BYTES, cache=cache, repeats=5, events=50)
    assert told.size_bytes == SIZE_BYTES
    transfers = [told.socket_bytes_per_second, told.place_bytes_per_second]
    faults = [told.fault_poll, told.fault_same_core, told.fault_spin]
    latencies = [*faults, told.byte_roundtrip, told.page_roundtrip]
    for measured in [*transfers, *(each.p50_us for each in latencies)]:
        assert measured.samples == 5
        assert 0 < measured.low <= measured.median <= measured.high
    for each in latencies:
        assert each.p50_us.median <= each.p90_us.median <= each.p99_us.median
    assert Limits.model_validate_json(told.model_dump_json()) == told
    assert processes_naming(build(cache)) == []


@pytest.fixture
def namespace() -> Iterator[Path]:
    name = f"qpclimits-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield Path("/run/netns", name)
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.mark.root
def test_each_end_is_in_its_namespace(cache: Path, namespace: Path) -> None:
    inside = Place(netns=namespace)
    told = measure_limits(SIZE_BYTES, inside, inside, cache=cache, repeats=1, events=10)
    assert told.place_bytes_per_second.samples == 1
    # The server is not where a client outside could reach it, nor the other way round.
    for source, destination in ((inside, Place()), (Place(), inside)):
        with pytest.raises(LimitsError, match=r"^[^\n]*connect to .*: Connection refused$"):
            measure_limits(SIZE_BYTES, source, destination, cache=cache, repeats=1, events=10)
    assert processes_naming(build(cache)) == []


def test_a_place_that_is_not_there(cache: Path, tmp_path: Path) -> None:
    nowhere = Place(netns=tmp_path / "none")
    with pytest.raises(LimitsError, match=r"^nsenter[^\n]*No such file or directory$"):
        measure_limits(SIZE_BYTES, nowhere, cache=cache)
    with pytest.raises(LimitsError, match=r"^[^\n]*listen at 192\.0\.2\.1: [^\n]*$"):
        measure_limits(SIZE_BYTES, Place("192.0.2.1"), cache=cache)


def test_it_is_built_once_and_again_when_the_sources_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "sources"
    shutil.copytree(SOURCES, sources)
    monkeypatch.setattr(limits, "_SOURCES", sources)
    first = build(tmp_path / "new" / "cache")
    made = first.stat().st_mtime_ns
    assert build(first.parent) == first
    assert first.stat().st_mtime_ns == made
    with (sources / "limits.h").open("a") as header:
        header.write("/* another */\n")
    assert build(first.parent) != first
    assert len(list(first.parent.iterdir())) == 2


def test_sources_that_do_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_SOURCES", tmp_path)
    with pytest.raises(LimitsError, match=r"^no sources in [^\n]*$"):
        build(tmp_path)
    (tmp_path / "limits.c").write_text("int main(void) { return x; }\n")
    with pytest.raises(LimitsError, match=r"^gcc [^\n]*error: [^\n]*$"):
        build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["limits.c"]


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LimitsError, match=r"^no gcc in PATH: [^\n]*$") as caught:
        build(tmp_path)
    assert caught.value.remedy and "gcc" in caught.value.remedy


def test_table() -> None:
    def measured(median: float) -> Measured:
        return Measured(median=median, low=median / 2, high=median * 2, samples=5)

    latency = Latency(p50_us=measured(10), p90_us=measured(20), p99_us=measured(300))
    rate = measured(3 << 30)
    console = Console(width=80, no_color=True)
    with console.capture() as capture:
        told = Limits(
            size_bytes=1 << 29, socket_bytes_per_second=rate, place_bytes_per_second=rate,
            fault_poll=latency, fault_same_core=latency, fault_spin=latency,
            byte_roundtrip=latency, page_roundtrip=latency,
        )  # fmt: skip
        console.print(limits_table(told))
    rows = [" ".join(line.split()) for line in capture.get().splitlines()]
    assert len(rows) == 1 + 2 + 5 * 3
    assert rows[1] == "bare socket 3.00 GiB/s 1.50 GiB/s 6.00 GiB/s 5"
    assert rows[5] == "local fault, poll() p99 300.0 us 150.0 us 600.0 us 5"
