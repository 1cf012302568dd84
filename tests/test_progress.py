"""Rates and the progress line."""

from __future__ import annotations

import pytest

from qpostcopy.progress import Meter, Progress, human_bytes, human_seconds, line
from qpostcopy.qmp.schema import FaultStats, HandlerStats

GIB = 1 << 30


def stats(total: int, remaining: int, faults: int = 0) -> HandlerStats:
    counters = dict.fromkeys(HandlerStats.model_fields, 0)
    del counters["faults"]
    counters |= {"total_pages": total, "remaining_pages": remaining}
    return HandlerStats(**counters, faults=FaultStats(count=faults, p50_us=400.0, p99_us=2100.0))


def test_the_contracts_line() -> None:
    progress = Progress(
        phase="postcopy",
        percent=71.25,
        placed_bytes=int(11.4 * GIB),
        total_bytes=16 * GIB,
        left_bytes=int(4.6 * GIB),
        bytes_per_second=1.12 * GIB,
        faults_per_second=812,
        fault_p50_us=400,
        fault_p99_us=2100,
        downtime_ms=12.3,
        eta_seconds=4.04,
    )
    assert line(progress) == (
        "postcopy 71% 11.4/16.0 GiB  left 4.60 GiB  1.12 GiB/s  faults 812/s p50 0.4 p99 2.1 ms"
        "  downtime 12 ms  ETA 4.0 s"
    )


def test_a_paused_guest_has_no_downtime_and_a_finished_one_no_eta() -> None:
    text = line(Progress(phase="postcopy", percent=100, placed_bytes=GIB, total_bytes=GIB))
    assert "downtime" not in text
    assert "ETA" not in text


def test_before_the_switch_there_is_only_the_phase() -> None:
    assert line(Progress(phase="prepare")) == "prepare"


def test_rates_come_from_two_measurements() -> None:
    meter = Meter()
    first = meter.measure("postcopy", stats(1000, 1000), 10.0, None)
    assert first.bytes_per_second == 0
    assert first.eta_seconds is None
    second = meter.measure("postcopy", stats(1000, 600, faults=50), 12.0, 7.0)
    assert second.bytes_per_second == pytest.approx(400 * 4096 / 2)
    assert second.faults_per_second == pytest.approx(25)
    assert second.eta_seconds == pytest.approx(3.0)
    assert second.percent == pytest.approx(40.0)
    assert second.downtime_ms == 7.0


def test_counters_that_go_back_or_a_clock_that_stands_give_no_nonsense() -> None:
    meter = Meter()
    meter.measure("postcopy", stats(1000, 500, faults=90), 10.0, None)
    assert meter.measure("postcopy", stats(1000, 400), 10.0, None).bytes_per_second == 0
    again = meter.measure("postcopy", stats(1000, 600, faults=3), 11.0, None)
    assert again.bytes_per_second == 0
    assert again.faults_per_second >= 0


def test_an_empty_vm_divides_nothing_by_zero() -> None:
    assert Meter().measure("postcopy", stats(0, 0), 1.0, None).percent == 0


def test_the_first_rate_counts_from_the_start_of_the_push() -> None:
    half = stats(1000, 500)
    measured = Meter().measure("postcopy", half, 12.0, None, served_seconds=10.0)
    assert measured.bytes_per_second == pytest.approx(500 * 4096 / 2)
    assert Meter().measure("postcopy", half, 12.0, None).bytes_per_second == 0


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (4095, "4.0 KiB"), (64 << 20, "64.0 MiB"), (16 * GIB, "16.0 GiB")],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12 ms"), (4.04, "4.0 s"), (59.4, "59 s"), (185, "3 min 5 s"), (119.9, "2 min 0 s")],
)
def test_human_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text
