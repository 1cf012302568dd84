"""The guest's evidence is worth something: wrong pages are found, right ones are not.

One guest is booted for the whole file; the tests put it right again after
themselves, as the workload does with a page that it found corrupt.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from qpostcopy.core import PAGE_BYTES
from qpostcopy.lab.guest import find_image
from qpostcopy.lab.vm import Boot
from tests.lab.booted import Booted, booted_guest, is_data

pytestmark = [pytest.mark.vm, pytest.mark.slow]

RAM_BYTES = 160 << 20


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    directory = tmp_path_factory.mktemp("vm")
    with booted_guest(Boot(*find_image()), RAM_BYTES, directory) as guest:
        yield guest


def test_memory_is_as_the_contract_says(booted: Booted) -> None:
    ready = booted.ready
    assert ready.workload == "service"
    assert 1 <= ready.rate <= 2000
    assert ready.zero_pages == pytest.approx(ready.total_pages / 5, rel=0.01)
    contents = [content for _, content in booted.pages()]
    assert sum(map(is_data, contents)) == ready.data_pages
    assert contents.count(bytes(PAGE_BYTES)) >= ready.zero_pages
    # Booting touches much that is free later: what was never touched is less than is free.
    assert len(contents) * PAGE_BYTES < RAM_BYTES * 0.97, "nothing was left untouched"


def test_reports_come_steadily_and_requests_on_time(booted: Booted) -> None:
    start_s = time.monotonic()
    booted.guest.wait_report_after(start_s + 1, 10)
    seen = [report for report in booted.guest.reports if report.host_s >= start_s]
    assert all(after.sequence == before.sequence + 1 for before, after in pairwise(seen))
    assert 25 <= len(seen) <= 60
    speed = (seen[-1].operations - seen[0].operations) / (seen[-1].host_s - seen[0].host_s)
    assert speed == pytest.approx(booted.ready.rate, rel=0.2)


def test_right_pages_are_right(booted: Booted) -> None:
    verified = booted.guest.verify(30)
    assert verified.pages == booted.ready.data_pages + booted.ready.zero_pages
    assert verified.corrupt == 0
    assert booted.guest.corrupt_lines == []


@pytest.mark.parametrize("word", [0, 1, 255, 256, 300, 510, 511])
def test_a_wrong_word_in_a_data_page_is_found(booted: Booted, word: int) -> None:
    before = booted.corrupt
    with booted.stopped():
        offset = next(offset for offset, page in booted.pages() if is_data(page))
        value = os.pread(booted.ram_fd, 8, offset + 8 * word)
        os.pwrite(booted.ram_fd, bytes(byte ^ 1 for byte in value), offset + 8 * word)
    assert booted.corrupt == before + 1
    assert booted.corrupt == before + 1, "a page is counted once"


def test_stale_pages_are_found(booted: Booted) -> None:
    before = booted.corrupt
    old = {offset: page for offset, page in booted.pages() if is_data(page)}
    booted.guest.wait_report_after(time.monotonic() + 0.5, 10)
    with booted.stopped():
        written = [
            offset
            for offset, page in old.items()
            if (now := os.pread(booted.ram_fd, PAGE_BYTES, offset)) != page and is_data(now)
        ]
        assert len(written) > 100
        for offset in written[:10]:
            os.pwrite(booted.ram_fd, old[offset], offset)
    assert booted.corrupt == before + 10


def test_a_data_page_that_became_zeroes_is_found(booted: Booted) -> None:
    before = booted.corrupt
    with booted.stopped():
        offset = next(offset for offset, page in booted.pages() if is_data(page))
        os.pwrite(booted.ram_fd, bytes(PAGE_BYTES), offset)
    assert booted.corrupt == before + 1


def test_the_rate_can_be_set(booted: Booted) -> None:
    booted.guest.set_rate(200)
    start_s = time.monotonic()
    booted.guest.wait_report_after(start_s + 1, 10)
    seen = [report for report in booted.guest.reports if report.host_s >= start_s + 0.2]
    speed = (seen[-1].operations - seen[0].operations) / (seen[-1].host_s - seen[0].host_s)
    booted.guest.set_rate(booted.ready.rate)
    assert speed == pytest.approx(200, rel=0.2)


def test_a_guest_that_was_held_up_counts_its_lateness(booted: Booted) -> None:
    late_us = booted.guest.reports[-1].late_us
    # The guest's clock goes on while its process is stopped, as when it waits for pages.
    booted.vm.signal(signal.SIGSTOP)
    time.sleep(0.3)  # what is measured is the time it is held up
    booted.vm.signal(signal.SIGCONT)
    booted.guest.wait_report_after(time.monotonic() + 0.1, 10)
    assert 250_000 < booted.guest.reports[-1].late_us - late_us < 600_000


def test_zzz_it_powers_off(booted: Booted) -> None:
    booted.guest.power_off()
    assert booted.vm.wait(20) == 0
