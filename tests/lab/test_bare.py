"""The guest without an operating system: its evidence is worth something, as the Linux guest's is.

It runs under TCG here, where it is quick; the guest is the same under KVM
(tests/vm/test_setups.py), but for the time it takes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from qpostcopy.core import PAGE_BYTES
from qpostcopy.lab.guest import find_bare_image
from qpostcopy.lab.vm import Boot
from tests.lab.booted import Booted, booted_guest

pytestmark = pytest.mark.vm

RAM_BYTES = 16 << 20
#: Above the guest's image and its table.
PAGES_FROM = 2 << 20


def data_page(booted: Booted) -> int:
    """The offset of one."""
    full = (at for at, page in booted.pages(PAGES_FROM) if all(memoryview(page).cast("I")))
    return next(full)


def zero_page(booted: Booted) -> int:
    """The offset of one that was touched."""
    return next(at for at, page in booted.pages(PAGES_FROM) if not any(page))


def speed(booted: Booted) -> float:
    """Operations a second, over one."""
    start_s = time.monotonic()
    booted.guest.wait_report_after(start_s + 1, 10)
    seen = [report for report in booted.guest.reports if report.host_s >= start_s]
    assert all(after.sequence == before.sequence + 1 for before, after in pairwise(seen))
    assert len(seen) >= 25
    return (seen[-1].operations - seen[0].operations) / (seen[-1].host_s - seen[0].host_s)


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    directory = tmp_path_factory.mktemp("vm")
    with booted_guest(Boot(find_bare_image()), RAM_BYTES, directory) as guest:
        yield guest


def test_it_reports_steadily_and_holds_its_rate(booted: Booted) -> None:
    assert booted.ready.workload == "bare"
    assert speed(booted) == pytest.approx(booted.ready.rate, rel=0.2)


def test_memory_is_data_and_zero_pages_and_what_was_never_touched(booted: Booted) -> None:
    ready = booted.ready
    total = RAM_BYTES / PAGE_BYTES
    assert ready.total_pages == pytest.approx(total, rel=0.02)  # the firmware keeps some
    assert ready.data_pages / total > 0.5
    assert ready.zero_pages / total > 0.15
    used = ready.data_pages + ready.zero_pages
    there = os.fstat(booted.ram_fd).st_blocks * 512 / PAGE_BYTES
    assert used < there < total * 0.95


def test_right_pages_are_right(booted: Booted) -> None:
    verified = booted.guest.verify(30)
    assert verified.pages == booted.ready.data_pages + booted.ready.zero_pages
    assert verified.corrupt == 0, booted.guest.corrupt_lines


@pytest.mark.parametrize("word", [0, 1, 511, 512, 513, 700, 1022, 1023])
def test_a_wrong_word_in_a_data_page_is_found(booted: Booted, word: int) -> None:
    before = booted.corrupt
    with booted.stopped():
        offset = data_page(booted) + 4 * word
        value = os.pread(booted.ram_fd, 4, offset)
        os.pwrite(booted.ram_fd, bytes(byte ^ 1 for byte in value), offset)
    assert booted.corrupt == before + 1
    assert booted.corrupt == before + 1, "a page is counted once"


def test_a_wrong_word_in_a_zero_page_is_found(booted: Booted) -> None:
    before = booted.corrupt
    os.pwrite(booted.ram_fd, b"\1", zero_page(booted) + 2000)
    assert booted.corrupt == before + 1


def test_stale_pages_are_found(booted: Booted) -> None:
    before = booted.corrupt
    old = dict(booted.pages(PAGES_FROM))
    booted.guest.wait_report_after(time.monotonic() + 0.5, 10)
    with booted.stopped():
        written = [at for at, page in old.items() if booted.read(at) != page]
        assert len(written) > 100
        for at in written[:10]:
            os.pwrite(booted.ram_fd, old[at], at)
    assert booted.corrupt == before + 10


def test_a_data_page_that_became_zeroes_is_found(booted: Booted) -> None:
    before = booted.corrupt
    with booted.stopped():
        os.pwrite(booted.ram_fd, bytes(PAGE_BYTES), data_page(booted))
    assert booted.corrupt == before + 1


def test_the_rate_can_be_set(booted: Booted) -> None:
    booted.guest.set_rate(0)
    assert speed(booted) > 2 * booted.ready.rate
    booted.guest.set_rate(booted.ready.rate)


def test_a_guest_that_was_held_up_counts_its_lateness(booted: Booted) -> None:
    late_us = booted.guest.reports[-1].late_us
    # The guest's clock goes on while its process is stopped, as when it waits for pages.
    booted.vm.signal(signal.SIGSTOP)
    time.sleep(0.3)  # what is measured is the time it is held up
    booted.vm.signal(signal.SIGCONT)
    booted.guest.wait_report_after(time.monotonic() + 0.1, 10)
    assert 250_000 < booted.guest.reports[-1].late_us - late_us < 600_000


def test_its_clock_is_ours(booted: Booted) -> None:
    first = booted.guest.wait_report_after(time.monotonic(), 10)
    last = booted.guest.wait_report_after(first.host_s + 1, 10)
    passed_us = (last.host_s - first.host_s) * 1e6
    assert last.guest_us - first.guest_us == pytest.approx(passed_us, rel=0.05)


def test_zzz_it_powers_off(booted: Booted) -> None:
    booted.guest.power_off()
    assert booted.vm.wait(20) == 0
    assert booted.vm.observer.wait_event("SHUTDOWN")["data"]["reason"] == "guest-shutdown"
