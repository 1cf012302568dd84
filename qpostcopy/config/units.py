"""Byte sizes, durations and rates as people write them, and back.

Pure functions. Whatever `format_*` writes, `parse_*` reads back as the same
value (tested as a property), so a resolved plan loads as the plan it came from.
A number without a unit is refused wherever a unit could be meant; only byte
sizes may be plain, since addresses are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

SIZE_UNITS: dict[str, int] = {
    "TiB": 1 << 40,
    "GiB": 1 << 30,
    "MiB": 1 << 20,
    "KiB": 1 << 10,
    "B": 1,
}
DURATION_UNITS_MS: dict[str, int] = {
    "d": 86_400_000,
    "h": 3_600_000,
    "m": 60_000,
    "s": 1000,
    "ms": 1,
}
#: bits a second, so that `bit/s` and `B/s` are both whole
RATE_UNITS_BITS: dict[str, int] = {
    "GiB/s": 8 << 30,
    "MiB/s": 8 << 20,
    "KiB/s": 8 << 10,
    "GB/s": 8 * 10**9,
    "MB/s": 8 * 10**6,
    "kB/s": 8 * 10**3,
    "B/s": 8,
    "Tbit/s": 10**12,
    "Gbit/s": 10**9,
    "Mbit/s": 10**6,
    "kbit/s": 10**3,
    "bit/s": 1,
}
UNLIMITED = "unlimited"

#: What people write instead of our units, in lower case.
_MEANT: dict[str, str] = {
    "k": "KiB",
    "kb": "KiB",
    "m": "MiB",
    "mb": "MiB",
    "g": "GiB",
    "gb": "GiB",
    "t": "TiB",
    "tb": "TiB",
    "msec": "ms",
    "sec": "s",
    "secs": "s",
    "second": "s",
    "seconds": "s",
    "min": "m",
    "mins": "m",
    "minute": "m",
    "minutes": "m",
    "hour": "h",
    "hours": "h",
    "day": "d",
    "days": "d",
    "kbps": "kbit/s",
    "mbps": "Mbit/s",
    "gbps": "Gbit/s",
    "tbps": "Tbit/s",
}

_QUANTITY = re.compile(
    r"(?P<whole>[0-9]{1,19})(?:\.(?P<part>[0-9]{1,9}))? ?(?P<unit>[A-Za-z/]{1,12})"
)


class UnitError(ValueError):
    """The text is no such quantity.

    :param remedy: what to write instead, or None if nothing can be guessed.
    """

    def __init__(self, remedy: str | None = None) -> None:
        super().__init__(remedy or "not a quantity")
        self.remedy = remedy


def parse_bytes(text: str) -> int:
    """`64KiB`, `1.5MiB`, `4096` or `0x1000` -> bytes.

    :raise UnitError: no such size, or not a whole number of bytes.
    """
    if re.fullmatch(r"[0-9]{1,19}", text):
        return int(text)
    if re.fullmatch(r"0x[0-9a-fA-F]{1,16}", text):
        return int(text, 16)
    size, rest = _quantity(text, SIZE_UNITS)
    if rest:
        raise UnitError("that is no whole number of bytes")
    return size


def format_bytes(size_bytes: int) -> str:
    """The shortest exact spelling: `64KiB`, `1MiB`; `0` has no unit."""
    return _format(size_bytes, SIZE_UNITS) if size_bytes else "0"


def parse_duration(text: str) -> float:
    """`60s`, `1h`, `500ms`, `1.5h` -> seconds, in whole milliseconds.

    :raise UnitError: no such duration, or finer than a millisecond.
    """
    milliseconds, rest = _quantity(text, DURATION_UNITS_MS)
    if rest:
        raise UnitError("the finest step is 1ms")
    return milliseconds / 1000


def format_duration(seconds: float) -> str:
    """Exact for whole milliseconds: `90s`, `1h`, `500ms`."""
    return _format(round(seconds * 1000), DURATION_UNITS_MS)


def parse_rate(text: str) -> int | None:
    """`1Gbit/s`, `100MiB/s` -> bytes a second, rounded down; `unlimited` -> None.

    :raise UnitError: no such rate.
    """
    if text == UNLIMITED:
        return None
    bits, _ = _quantity(text, RATE_UNITS_BITS)
    return bits // 8


def format_rate(bytes_per_second: int | None) -> str:
    """Exact: `unlimited`, `1Gbit/s`, `100MiB/s`."""
    return UNLIMITED if bytes_per_second is None else _format(bytes_per_second * 8, RATE_UNITS_BITS)


def _quantity(text: str, units: Mapping[str, int]) -> tuple[int, int]:
    """(amount in the base unit rounded down, what was lost by rounding)."""
    match = _QUANTITY.fullmatch(text)
    if not match:
        raise UnitError(_remedy_without_unit(text, units))
    unit = match["unit"]
    if unit not in units:
        raise UnitError(_remedy_for_unit(text, unit, units))
    part = match["part"] or ""
    amount, scale = int(match["whole"] + part) * units[unit], int("1" + "0" * len(part))
    return divmod(amount, scale)


def _remedy_without_unit(text: str, units: Mapping[str, int]) -> str | None:
    if re.fullmatch(r"[0-9]{1,18}(\.[0-9]{1,9})?", text):
        known = ("Gbit/s", "MiB/s") if units is RATE_UNITS_BITS else tuple(units)
        return "add a unit: " + " or ".join(known)
    if (
        re.fullmatch(r"0|none|max|infinite|infinity|no limit", text.lower())
        and units is RATE_UNITS_BITS
    ):
        return f"for no limit write {UNLIMITED}"
    return None


def _remedy_for_unit(text: str, unit: str, units: Mapping[str, int]) -> str:
    number = text[: -len(unit)].strip()
    by_case = {known.lower(): known for known in units}
    for guess in (unit.lower(), unit.lower() + "/s", _MEANT.get(unit.lower(), "")):
        meant = by_case.get(guess.lower())
        if meant:
            return f"write {number}{meant}"
    return "the units are " + ", ".join(units)


def _format(amount: int, units: Mapping[str, int]) -> str:
    """The spelling with the smallest number among the exact ones."""
    best = min((amount // size, index) for index, size in _exact(amount, units))
    return f"{best[0]}{list(units)[best[1]]}"


def _exact(amount: int, units: Mapping[str, int]) -> list[tuple[int, int]]:
    return [(index, size) for index, size in enumerate(units.values()) if amount % size == 0]
