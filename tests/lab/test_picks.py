"""What each workload touches is what its name promises: read from outside, off the pages.

A data page says how often it was written, so who is written how often, and
where, is known to the last write.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from statistics import fmean, pvariance

import pytest

from qpostcopy.lab.guest import find_image
from qpostcopy.lab.vm import Boot
from tests.lab.booted import Booted, booted_guest, generation, is_data
from tests.qmp.support import private_directory

pytestmark = [pytest.mark.vm, pytest.mark.slow]

RAM_BYTES = 160 << 20
EXPONENT = 0.99
PAGES_PER_REQUEST = 20


@pytest.fixture
def booted(request: pytest.FixtureRequest) -> Iterator[Booted]:
    boot = Boot(*find_image(), words=(f"workload={request.param}",))
    with private_directory() as directory, booted_guest(boot, RAM_BYTES, directory) as guest:
        assert guest.ready.workload == request.param
        assert guest.ready.rate == 0
        yield guest


def generations(booted: Booted) -> dict[int, int]:
    """Offset of each data page -> how often it was written."""
    return {offset: generation(page) for offset, page in booted.pages() if is_data(page)}


def work(booted: Booted, operations: int) -> None:
    """Let the guest do at least so many more."""
    report = booted.guest.wait_report_after(time.monotonic(), 10)
    goal = report.operations + operations
    while report.operations < goal:
        report = booted.guest.wait_report_after(report.host_s, 10)


def zipf_share(ranks: int, of_ranks: int) -> float:
    """What the hottest ranks get of all that these get."""
    weights = [rank**-EXPONENT for rank in range(1, of_ranks + 1)]
    return float(sum(weights[:ranks]) / sum(weights))


@pytest.mark.parametrize("booted", ["kv"], indirect=True)
def test_kv_follows_zipfs_law(booted: Booted) -> None:
    work(booted, 10_000)
    with booted.stopped():
        written = sorted(generations(booted).values(), reverse=True)
    total = sum(written)
    for ranks in (1, 10, len(written) // 100, len(written) // 10, len(written) // 2):
        expected = zipf_share(ranks, len(written))
        assert sum(written[:ranks]) / total == pytest.approx(expected, rel=0.06), ranks
    assert booted.corrupt == 0


@pytest.mark.parametrize("booted", ["churn"], indirect=True)
def test_churn_writes_anywhere_with_every_touch(booted: Booted) -> None:
    work(booted, 5_000)
    with booted.stopped():
        written = list(generations(booted).values())
        operations = booted.guest.reports[-1].operations
    assert len(written) == booted.ready.data_pages
    assert sum(written) >= operations * PAGES_PER_REQUEST
    # Drawn independently, each as likely as the other: Poisson.
    assert pvariance(written) / fmean(written) == pytest.approx(1, rel=0.1)
    assert booted.corrupt == 0


@pytest.mark.parametrize("booted", ["scan"], indirect=True)
def test_scan_goes_through_memory_in_address_order(booted: Booted) -> None:
    booted.guest.set_rate(50)
    with booted.stopped():
        before = generations(booted)
    booted.guest.wait_report_after(time.monotonic() + 0.5, 10)
    with booted.stopped():
        after = generations(booted)
    written = [index for index, at in enumerate(sorted(after)) if after[at] != before[at]]
    assert len(written) > 100
    # All in one band of RAM, half of whose pages were written; it may go round the end.
    around = [*written, written[0] + len(after)]
    band = len(after) - max(right - left for left, right in pairwise(around))
    assert len(written) / band == pytest.approx(0.5, abs=0.15)
    assert all(after[at] - before[at] in (0, 1) for at in after)
    assert booted.corrupt == 0
