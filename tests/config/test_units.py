"""Quantities: what is written is what is read, and nothing is guessed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpostcopy.config import units


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("0x1000", 4096),
        ("64KiB", 65536),
        ("64 KiB", 65536),
        ("1.5MiB", 1572864),
        ("2TiB", 2 << 40),
        ("7B", 7),
    ],
)
def test_bytes(text: str, size_bytes: int) -> None:
    assert units.parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("60s", 60), ("1.5h", 5400), ("2m", 120), ("1d", 86400), ("0.001s", 0.001)],
)
def test_durations(text: str, seconds: float) -> None:
    assert units.parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("unlimited", None),
        ("1Gbit/s", 125_000_000),
        ("100MiB/s", 100 << 20),
        ("1.5Mbit/s", 187_500),
        ("1MB/s", 1_000_000),
        ("9bit/s", 1),
    ],
)
def test_rates(text: str, rate: int | None) -> None:
    assert units.parse_rate(text) == rate


@pytest.mark.parametrize(
    ("parse", "text", "remedy"),
    [
        (units.parse_bytes, "64K", "write 64KiB"),
        (units.parse_bytes, "64kib", "write 64KiB"),
        (units.parse_bytes, "64 MB", "write 64MiB"),
        (units.parse_bytes, "1.3B", "that is no whole number of bytes"),
        (units.parse_bytes, "5apples", "the units are TiB, GiB, MiB, KiB, B"),
        (units.parse_bytes, "-1KiB", None),
        (units.parse_bytes, "", None),
        (units.parse_bytes, "\u0661KiB", None),  # a digit, but not of ours
        (units.parse_duration, "60", "add a unit: d or h or m or s or ms"),
        (units.parse_duration, "5 min", "write 5m"),
        (units.parse_duration, "60S", "write 60s"),
        (units.parse_duration, "0.1ms", "the finest step is 1ms"),
        (units.parse_rate, "1Gbps", "write 1Gbit/s"),
        (units.parse_rate, "1MiB", "write 1MiB/s"),
        (units.parse_rate, "100", "add a unit: Gbit/s or MiB/s"),
        (units.parse_rate, "infinite", "for no limit write unlimited"),
    ],
)
def test_refused(parse: object, text: str, remedy: str | None) -> None:
    assert callable(parse)
    with pytest.raises(units.UnitError) as caught:
        parse(text)
    assert caught.value.remedy == remedy


@given(st.integers(0, 1 << 62))
def test_bytes_round_trip(size_bytes: int) -> None:
    assert units.parse_bytes(units.format_bytes(size_bytes)) == size_bytes


@given(st.integers(0, 10**12))
def test_durations_round_trip(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert units.parse_duration(units.format_duration(seconds)) == seconds


@given(st.none() | st.integers(1, 10**15))
def test_rates_round_trip(rate: int | None) -> None:
    assert units.parse_rate(units.format_rate(rate)) == rate


@given(st.text(max_size=30))
def test_any_text_is_a_quantity_or_refused(text: str) -> None:
    for parse in (units.parse_bytes, units.parse_duration, units.parse_rate):
        try:
            value = parse(text)
        except units.UnitError:
            continue
        assert value is None or value >= 0


def test_shortest_spelling() -> None:
    assert units.format_bytes(1 << 20) == "1MiB"
    assert units.format_bytes(4097) == "4097B"
    assert units.format_duration(3600) == "1h"
    assert units.format_rate(125_000_000) == "1Gbit/s"
    assert units.format_rate(100 << 20) == "100MiB/s"
