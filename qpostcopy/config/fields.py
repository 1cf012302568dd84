"""The types of single values in plans and profiles.

Each says in one phrase what it expects and refuses everything else, without
guessing: text for a number, a number for text, and whatever YAML 1.1 reads in
another way than a person would.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import (
    BeforeValidator,
    FieldSerializationInfo,
    PlainSerializer,
    ValidationInfo,
)

from qpostcopy.config import units
from qpostcopy.config.loader import Trap
from qpostcopy.config.model import from_file, refusal
from qpostcopy.config.problems import did_you_mean

#: A path that a unix socket can be bound to (unix(7): sun_path, with its NUL).
SOCKET_PATH_BYTES = 107
MAX_PID = 1 << 22
MAX_BYTES = 1 << 62

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}")
_SAFE_NAME_WORDS = "up to 48 letters, digits, dots, dashes and underscores, a letter or digit first"

_Parsed = TypeVar("_Parsed")


# --- words ----------------------------------------------------------------------------------


def text(value: object, expected: str) -> str:
    """`value`, if it is text.

    :raise PydanticCustomError: it is something else, or holds control characters.
    """
    if isinstance(value, str) and value and value.isprintable():
        return value
    unquoted = isinstance(value, Trap) or type(value) in (int, bool)
    raise refusal(
        value, expected, "put it in quotes, if this is what you mean" if unquoted else None
    )


def safe_name(value: object) -> str:
    """A name that can be part of a file name, of an ID and of a shell command."""
    name = text(value, _SAFE_NAME_WORDS)
    if not _SAFE_NAME.fullmatch(name):
        raise refusal(value, _SAFE_NAME_WORDS)
    return name


def choice(*words: str, hints: Mapping[str, str] | None = None) -> BeforeValidator:
    """One of `words`; `hints` maps what people write instead to the word they mean."""

    def check(value: object) -> object:
        if isinstance(value, str) and value in words:
            return value
        written = value.text if isinstance(value, Trap) else str(value)
        meant = (hints or {}).get(written.lower())
        remedy = f"write {meant}" if meant else did_you_mean(written, words)
        raise refusal(value, alternatives(words), remedy)

    return BeforeValidator(check)


def alternatives(words: tuple[str, ...]) -> str:
    """`a, b or c`"""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    written = (value.text if isinstance(value, Trap) else str(value)).lower()
    meant = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(written, written)
    raise refusal(value, "true or false", f"write {meant}" if meant in ("true", "false") else None)


# --- numbers --------------------------------------------------------------------------------


def whole(low: int, high: int, also: str | None = None) -> BeforeValidator:
    """A whole number from `low` to `high`, or the word `also`."""
    expected = f"{also} or " if also else ""
    expected += f"a whole number from {low} to {high}"

    def check(value: object) -> object:
        if also and value == also:
            return value
        if type(value) is int and low <= value <= high:
            return value
        remedy = "write plain decimal digits" if isinstance(value, Trap) else _unquote(value)
        raise refusal(value, expected, remedy)

    return BeforeValidator(check)


def _unquote(value: object) -> str | None:
    quoted = isinstance(value, str) and value.isascii() and value.isdigit()
    return "write the number without quotes" if quoted else None


def _version(value: object) -> object:
    if type(value) is int and value == 1:
        return value
    raise refusal(value, "1, the only version there is", _unquote(value))


def _quantity(
    value: object, parse: Callable[[str], _Parsed], expected: str, *, plain: bool = False
) -> _Parsed:
    """`value` parsed; `plain`: a number needs no unit."""
    written = str(value) if type(value) is int and not plain else value
    if not isinstance(written, str):
        base60 = isinstance(value, Trap) and ":" in value.text
        raise refusal(value, expected, "write it with a unit, such as 90s" if base60 else None)
    try:
        return parse(written)
    except units.UnitError as cause:
        raise refusal(value, expected, cause.remedy) from cause


def size(low: int, high: int, multiple: int = 1) -> BeforeValidator:
    """Bytes: `64KiB`, `1MiB` or a plain number; goes with `DUMP_SIZE`."""
    expected = f"a multiple of {units.format_bytes(multiple)}" if multiple > 1 else "a size"
    if high < MAX_BYTES:
        expected += f" from {units.format_bytes(low)} to {units.format_bytes(high)}"
    elif low:
        expected += f", at least {units.format_bytes(low)}"
    expected += ", such as 64KiB"

    def check(value: object) -> int:
        found = value if type(value) is int else _quantity(value, units.parse_bytes, expected)
        if not low <= found <= high or found % multiple:
            raise refusal(value, expected)
        return found

    return BeforeValidator(check)


def duration(low_seconds: float, high_seconds: float) -> BeforeValidator:
    """Seconds in whole milliseconds: `60s`, `1h`; goes with `DUMP_DURATION`."""
    low, high = units.format_duration(low_seconds), units.format_duration(high_seconds)
    expected = f"a duration from {low} to {high}, such as 60s or 1h"

    def check(value: object, info: ValidationInfo) -> float:
        if isinstance(value, int | float) and not from_file(info):
            found = round(value * 1000) / 1000
        else:
            found = _quantity(value, units.parse_duration, expected)
        if not low_seconds <= found <= high_seconds:
            raise refusal(value, expected)
        return found

    return BeforeValidator(check)


#: Slower than this, a migration of any real VM would not end.
LOWEST_RATE = 125_000
HIGHEST_RATE = 125_000_000_000


def _rate(value: object, info: ValidationInfo) -> int | None:
    expected = "unlimited, or a rate from 1Mbit/s to 1Tbit/s, such as 1Gbit/s or 100MiB/s"
    if from_file(info) or isinstance(value, str):
        found = _quantity(value, units.parse_rate, expected)
    elif value is None or type(value) is int:
        found = value
    else:
        raise refusal(value, expected)
    if found is not None and not LOWEST_RATE <= found <= HIGHEST_RATE:
        raise refusal(value, expected)
    return found


def _dump_size(value: int, info: FieldSerializationInfo) -> int | str:
    return units.format_bytes(value) if info.by_alias and value else value


def _dump_duration(value: float, info: FieldSerializationInfo) -> float | str:
    return units.format_duration(value) if info.by_alias else value


def _dump_rate(value: int | None, info: FieldSerializationInfo) -> int | str | None:
    return units.format_rate(value) if info.by_alias else value


#: As a file has them when dumped by alias, as numbers when dumped by name.
DUMP_SIZE = PlainSerializer(_dump_size)
DUMP_DURATION = PlainSerializer(_dump_duration)


# --- places ---------------------------------------------------------------------------------


def _socket_path(value: object) -> Path:
    expected = "the absolute path of a QMP unix socket"
    if isinstance(value, Path):
        value = str(value)
    path = text(value, expected)
    if not path.startswith("/"):
        raise refusal(value, expected)
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
        raise refusal(value, f"{expected}, of {SOCKET_PATH_BYTES} bytes at most")
    return Path(path)


def _host(value: object) -> object:
    if isinstance(value, str) and value.startswith("ssh://"):
        raise refusal(
            value, "local: other hosts are not in this version", "run both QEMUs on this host"
        )
    if value != "local":
        raise refusal(value, "local, the only host this version knows")
    return value


def _netns(value: object, info: ValidationInfo) -> str | None:
    """None: no other than the controller's."""
    if value == "none" or (value is None and not from_file(info)):
        return None
    expected = f"none, or the name of a network namespace: {_SAFE_NAME_WORDS}"
    if value is None:
        raise refusal(value, expected, "write none")
    name = text(value, expected)
    if not _SAFE_NAME.fullmatch(name):
        remedy = "write its name alone, as `ip netns list` has it" if "/" in name else None
        raise refusal(value, expected, remedy)
    return name


def _dump_netns(value: str | None, info: FieldSerializationInfo) -> str | None:
    return "none" if info.by_alias and value is None else value


def _listen_address(value: object) -> str:
    expected = "an IP address of this host, such as 127.0.0.1"
    address = text(value, expected)
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError as cause:
        remedy = "write 127.0.0.1" if address.lower() == "localhost" else None
        raise refusal(value, expected, remedy) from cause
    if parsed.is_unspecified or parsed.is_multicast:
        raise refusal(value, expected, "the page server connects to this address: name one")
    return address


def is_loopback(address: str) -> bool:
    """Does traffic to this address stay on the host?"""
    return ipaddress.ip_address(address).is_loopback


# --- the types ------------------------------------------------------------------------------

Flag = Annotated[bool, BeforeValidator(_flag)]
Host = Annotated[Literal["local"], BeforeValidator(_host)]
ListenAddress = Annotated[str, BeforeValidator(_listen_address)]
Name = Annotated[str, BeforeValidator(safe_name)]
Netns = Annotated[str | None, BeforeValidator(_netns), PlainSerializer(_dump_netns)]
Pid = Annotated[int | Literal["auto"], whole(2, MAX_PID, also="auto")]
Port = Annotated[int | Literal["auto"], whole(1, 65535, also="auto")]
Rate = Annotated[int | None, BeforeValidator(_rate), PlainSerializer(_dump_rate)]
SocketPath = Annotated[Path, BeforeValidator(_socket_path)]
Version = Annotated[Literal[1], BeforeValidator(_version)]
