"""The limits of the machine, as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from qpostcopy.bench.limits import Latency, Limits, Measured
from qpostcopy.progress import human_bytes

if TYPE_CHECKING:
    from rich.table import Table


LIMIT_COLUMNS = ("median", "low", "high", "samples")


def limits_table(limits: Limits) -> Table:
    """One row a figure: median, and the interval in which the true one lies."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, expand=False)
    table.add_column("at best", no_wrap=True)
    for name in LIMIT_COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for row in limit_rows(limits):
        table.add_row(*row)
    return table


def limit_rows(limits: Limits) -> Iterator[tuple[str, ...]]:
    """The name of each figure, then its columns, as text."""
    for name, measured, human in _rows(limits):
        values = (measured.median, measured.low, measured.high)
        yield (name, *map(human, values), str(measured.samples))


def _rows(limits: Limits) -> Iterator[tuple[str, Measured, Callable[[float], str]]]:
    yield "bare socket", limits.socket_bytes_per_second, _rate
    yield "socket to UFFDIO_COPY", limits.place_bytes_per_second, _rate
    yield from _percentiles("local fault, poll()", limits.fault_poll)
    yield from _percentiles("local fault, same core", limits.fault_same_core)
    yield from _percentiles("local fault, spinning", limits.fault_spin)
    yield from _percentiles("round trip, a byte", limits.byte_roundtrip)
    yield from _percentiles("round trip, a page", limits.page_roundtrip)


def _percentiles(
    name: str, latency: Latency
) -> Iterator[tuple[str, Measured, Callable[[float], str]]]:
    yield f"{name}  p50", latency.p50_us, _us
    yield f"{name}  p90", latency.p90_us, _us
    yield f"{name}  p99", latency.p99_us, _us


def _rate(bytes_per_second: float) -> str:
    return f"{human_bytes(bytes_per_second)}/s"


def _us(us: float) -> str:
    return f"{us:.1f} us"
