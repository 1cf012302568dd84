"""core/inject.c against a victim that watches itself: nothing wrong, damaged, or held on to."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from qpostcopy.core import LaneTimeoutError, RefusedByCoreError, TargetGoneError, inject_syscall
from qpostcopy.process import Process
from tests.uffd.victims import (
    GONE,
    OK,
    REFUSED,
    STORM,
    SYS_PAUSE,
    TIMEOUT,
    filtered_command,
    inject,
    lesser_command,
    storm,
    victim,
)

pytestmark = pytest.mark.root

SYS_GETPID = 39
ASLEEP = ["nanosleep", "poll", "ppoll", "futex", "read"]
MODES = ["spin", *ASLEEP]


def until(condition: Callable[[], bool], limit_seconds: float = 5) -> None:
    """Poll /proc, which has no events."""
    end = time.monotonic() + limit_seconds
    while not condition():
        assert time.monotonic() < end, "did not come true"
        time.sleep(0.002)


# --- nothing wrong, nothing damaged -------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_call_runs_exactly_once(mode: str) -> None:
    with victim(mode) as target:
        report = inject(target.pid, 300, 2000, "once-each")
        assert (report.code, report.done, report.wrong) == (OK, 300, 0)
        # No signal was sent, so not one call of the victim's may have been cut short.
        assert target.end().startswith("ok ")


@pytest.mark.parametrize("restarting", [1, 0])
@pytest.mark.parametrize("mode", MODES)
def test_signal_storm(mode: str, restarting: int) -> None:
    """Twice 300 injections in each of twelve storms: none may be wrong, no signal may vanish."""
    with victim(mode, restarting) as target:
        with storm(target, 200, STORM) as end_storm:
            report = inject(target.pid, 300, 10_000, "once-each")
            sent = end_storm()
        assert (report.code, report.done, report.wrong) == (OK, 300, 0)
        word, _, signals, queued = target.end().split()
        assert word == "ok"
        assert int(signals) > 100
        assert int(queued) == sent


def test_storm_without_a_pause() -> None:
    with victim("spin") as target:
        with storm(target, 0, [signal.SIGUSR1, signal.SIGUSR2, signal.SIGRTMIN + 1]):
            report = inject(target.pid, 150, 20_000, "once-each")
        assert (report.code, report.done, report.wrong) == (OK, 150, 0)
        assert target.end().startswith("ok ")


@pytest.mark.parametrize("mode", ["spin", "nanosleep"])
def test_stop_and_continue_storm(mode: str) -> None:
    """Between SIGSTOP and SIGCONT it is refused; whatever is not refused is right."""
    with victim(mode) as target:
        with storm(target, 700, [signal.SIGSTOP, signal.SIGUSR1, signal.SIGCONT, signal.SIGUSR2]):
            report = inject(target.pid, 1500, 10_000, "once-each", goes_on=True)
        target.process.send_signal(signal.SIGCONT)
        assert report.code in (OK, REFUSED)  # that of the last one
        assert (report.done, report.wrong) == (1500, 0)
        assert 0 < report.refused < 1500
        assert target.end().startswith("ok ")


def test_the_result_is_the_kernels() -> None:
    with victim("spin") as target:
        assert inject(target.pid, 5, 1000, SYS_GETPID).result == target.pid
        bad_fd, no_such_call = 1 << 20, 100_000
        assert inject(target.pid, 1, 1000, 3, bad_fd).result == -9
        assert inject(target.pid, 1, 1000, no_such_call).result == -38
        # six arguments: mmap of one anonymous page at a fixed place, then munmap of it
        page = inject(target.pid, 1, 1000, 9, 0x10000000, 4096, 3, 0x22 | 0x100000, 2**64 - 1, 0)
        assert page.result == 0x10000000
        assert inject(target.pid, 1, 1000, 11, 0x10000000, 4096).result == 0
        assert target.end().startswith("ok ")


def test_a_filter_that_would_kill_is_never_asked() -> None:
    """One system call is forbidden on pain of death, but to the target itself only."""
    with victim("ppoll", under=filtered_command(SYS_GETPID)) as target:
        with storm(target, 300, STORM):
            report = inject(target.pid, 100, 5000, SYS_GETPID)
        assert (report.code, report.result, report.wrong) == (OK, target.pid, 0)
        assert target.end().startswith("ok ")


# --- refused, not touched -----------------------------------------------------------------


def test_a_stopped_process_is_refused_and_stays_stopped() -> None:
    with victim("spin") as target:
        target.stop()
        report = inject(target.pid, 1, 1000, SYS_GETPID)
        assert (report.code, report.operation) == (REFUSED, "target is stopped by a signal")
        assert target.state == "T"
        target.process.send_signal(signal.SIGCONT)
        assert inject(target.pid, 1, 1000, SYS_GETPID).result == target.pid
        assert target.end().startswith("ok ")


def test_another_tracer_is_named() -> None:
    seize = (
        "import ctypes, sys; libc = ctypes.CDLL(None)\n"
        "libc.ptrace(0x4206, int(sys.argv[1]), None, None)\n"
        "print('seized', flush=True); sys.stdin.read()"
    )
    with (
        victim("spin") as target,
        subprocess.Popen(
            [sys.executable, "-c", seize, str(target.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as tracer,
    ):
        assert tracer.stdout
        assert tracer.stdout.readline() == "seized\n"
        report = inject(target.pid, 1, 1000, SYS_GETPID)
        assert (report.code, report.address) == (REFUSED, tracer.pid)
        assert report.operation == "seize: traced by another process"
        tracer.communicate()
        assert inject(target.pid, 1, 1000, SYS_GETPID).code == OK
        assert target.end().startswith("ok ")


@pytest.mark.parametrize("how", ["no-admin", "filtered"])
def test_a_filter_that_we_may_not_suspend(how: Literal["no-admin", "filtered"]) -> None:
    """Its verdict is not tried out."""
    without = lesser_command(how)
    with victim("ppoll", under=filtered_command(SYS_GETPID)) as target:
        report = inject(target.pid, 1, 1000, SYS_GETPID, under=without)
        assert (report.code, report.errno) == (REFUSED, errno.EACCES)
        assert target.end().startswith("ok ")
    with victim("ppoll") as target:  # where there is none, none is in the way
        assert inject(target.pid, 1, 1000, SYS_GETPID, under=without).code == OK
        assert target.end().startswith("ok ")


def test_a_process_that_is_not_there() -> None:
    unused = int(Path("/proc/sys/kernel/pid_max").read_text()) + 1
    assert inject(unused, 1, 1000, SYS_GETPID).code == GONE


def test_a_zombie() -> None:
    with victim("exit", 0) as target:
        until(lambda: target.state == "Z")
        report = inject(target.pid, 1, 1000, SYS_GETPID)
        assert (report.code, report.operation) == (GONE, "seize: target is a zombie")
        assert target.process.wait() == 42


def test_a_32_bit_process(tmp_path: Path) -> None:
    code = bytes.fromhex("b81d000000cd80ebf7")  # again: mov eax, pause; int 0x80; jmp again
    base, start = 0x08048000, 52 + 32
    header = struct.pack(
        "<4s5B7x2H5I6H",
        *(b"\x7fELF", 1, 1, 1, 0, 0),
        *(2, 3, 1, base + start, 52, 0, 0),
        *(52, 32, 1, 0, 0, 0),
    )
    size = start + len(code)
    program = struct.pack("<8I", 1, 0, base, base, size, size, 5, 4096)
    binary = tmp_path / "pause32"
    binary.write_bytes(header + program + code)
    binary.chmod(0o755)
    try:
        process = subprocess.Popen([binary])
    except OSError as error:
        pytest.skip(f"this kernel runs no 32-bit programs: {error}")
    with process:
        try:
            report = inject(process.pid, 1, 1000, SYS_GETPID)
            assert report.code == REFUSED
            assert report.operation in (
                "target is not a 64-bit process",
                "no syscall instruction in its vdso",
            )
            assert process.poll() is None
        finally:
            process.kill()


# --- time, and the end --------------------------------------------------------------------


def test_a_call_that_sleeps_is_cut_short_at_the_deadline() -> None:
    with victim("spin") as target:
        report = inject(target.pid, 1, 400, SYS_PAUSE)
        assert (report.code, report.operation) == (TIMEOUT, "the call took too long")
        assert report.total_us < 400_000 + 200_000
        assert inject(target.pid, 1, 1000, SYS_GETPID).result == target.pid
        assert target.end().startswith("ok ")


def test_a_main_thread_that_no_signal_reaches() -> None:
    """Its other thread does it."""
    with victim("vfork") as target:
        until(lambda: target.state == "D")
        report = inject(target.pid, 3, 800, SYS_GETPID)
        assert (report.code, report.result, report.wrong) == (OK, target.pid, 0)
        assert target.state == "D"
        assert target.process.stdin
        target.process.stdin.close()  # lets the vfork child end
        assert target.end().startswith("ok ")


def test_a_process_that_no_signal_reaches() -> None:
    with victim("vfork-alone") as target:
        until(lambda: target.state == "D")
        report = inject(target.pid, 1, 300, SYS_GETPID)
        assert (report.code, report.operation) == (TIMEOUT, "wait: target does not stop")
        assert report.total_us < 300_000 + 200_000
        assert "TracerPid:\t0" in Path(f"/proc/{target.pid}/status").read_text()
        assert target.process.stdin
        target.process.stdin.close()
        assert target.end().startswith("ok ")


def test_a_main_thread_that_has_ended() -> None:
    with victim("leader-gone") as target:
        until(lambda: target.state == "Z")
        report = inject(target.pid, 20, 1000, "once-each")
        assert (report.code, report.done, report.wrong) == (OK, 20, 0)


@pytest.mark.parametrize("after_us", [20_000, 31_000, 47_000, 58_000, 73_000])
def test_a_victim_that_exits_meanwhile(after_us: int) -> None:
    with victim("exit", after_us * 1000) as target:
        report = inject(target.pid, 1_000_000, 2000, "once-each")
        assert (report.code, report.wrong) == (GONE, 0), report
        assert target.process.wait(5) == 42


def test_a_victim_that_is_killed_meanwhile() -> None:
    with victim("spin") as target:
        killer = threading.Timer(0.1, target.process.kill)
        killer.start()
        report = inject(target.pid, 1_000_000, 2000, "once-each")
        killer.join()
        assert (report.code, report.wrong) == (GONE, 0), report
        assert target.process.wait(5) == -signal.SIGKILL


# --- through the facade, in this very process ---------------------------------------------


def test_facade_raises_typed_errors() -> None:
    with victim("spin") as target:
        assert inject_syscall(target.pid, SYS_GETPID, (), 1000) == target.pid
        with pytest.raises(LaneTimeoutError):
            inject_syscall(target.pid, SYS_PAUSE, (), 100)
        target.stop()
        with pytest.raises(RefusedByCoreError):
            inject_syscall(target.pid, SYS_GETPID, (), 1000)
        target.process.send_signal(signal.SIGCONT)
        assert target.end().startswith("ok ")


def test_another_process_of_the_same_pid_is_not_touched() -> None:
    with victim("spin") as target:
        process = Process.of(target.pid)
        assert process
        ticks = process.start_ticks
        number, args = SYS_GETPID, ()
        assert inject_syscall(target.pid, number, args, 500, start_ticks=ticks) == target.pid
        with pytest.raises(TargetGoneError):
            inject_syscall(target.pid, number, args, 500, start_ticks=ticks + 1)
        assert target.end().startswith("ok ")


def test_no_child_is_reaped_but_by_its_owner() -> None:
    """The injector waits for its tracee; our children's ends, the victim's too, stay ours."""
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"]) as other:
        pidfd = os.pidfd_open(other.pid)
        select.select([pidfd], [], [], 10)
        os.close(pidfd)
        with victim("exit", 60_000_000) as target:
            with pytest.raises(TargetGoneError):
                while True:
                    inject_syscall(target.pid, SYS_GETPID, (), 1000)
            assert target.process.wait(5) == 42
        assert other.wait(5) == 7


def test_no_thread_stays_traced() -> None:
    """A tracer that is late lets go by ending its thread, in a process that lives on."""
    with victim("vfork-alone") as target:
        until(lambda: target.state == "D")
        with pytest.raises(LaneTimeoutError):
            inject_syscall(target.pid, SYS_GETPID, (), 100)
        assert "TracerPid:\t0" in Path(f"/proc/{target.pid}/status").read_text()
        assert target.process.stdin
        target.process.stdin.close()
        assert target.end().startswith("ok ")


def test_the_victim_sees_damage() -> None:
    """The spy is no decoration: it notices one general register that changes now and then."""
    # Outside of its loop the same register may be an address: then it dies without a word.
    assert any(damage_a_victim().startswith("damaged: general registers") for _ in range(10))


def damage_a_victim() -> str:
    """Its last words."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    pokeuser, cont, getregs, seize, interrupt, r12 = 6, 7, 12, 0x4206, 0x4207, 3
    registers = (ctypes.c_ulonglong * 27)()
    with victim("spin") as target:
        assert libc.ptrace(seize, target.pid, None, None) == 0
        for _ in range(200):
            assert libc.ptrace(interrupt, target.pid, None, None) == 0
            _, status = os.waitpid(target.pid, 0)
            if not os.WIFSTOPPED(status):
                target.process.returncode = os.waitstatus_to_exitcode(status)
                assert target.process.stdout
                return target.process.stdout.read()
            libc.ptrace(getregs, target.pid, None, registers)
            libc.ptrace(pokeuser, target.pid, r12 * 8, registers[r12] + 1)
            signal_number = 0 if status >> 16 else os.WSTOPSIG(status)
            libc.ptrace(cont, target.pid, None, signal_number)
            time.sleep(0.001)  # let it compute
    return "200 damaged registers, and it noticed nothing"
