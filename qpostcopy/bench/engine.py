"""What an engine is to the benchmark: something that moves a guest from one VM to the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qpostcopy.bench.link import Ends
from qpostcopy.bench.model import Usage
from qpostcopy.errors import QpostcopyError
from qpostcopy.lab.vm import Vm


class GaveUpError(QpostcopyError):
    """The migration did not come to an end in the time given, and was cancelled."""


class NotMovedError(QpostcopyError):
    """The migration failed."""


class UnsupportedError(QpostcopyError):
    """This QEMU has not got what the engine needs."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A running guest, the QEMU that waits for it, and the link between them.

    :ivar directory: for plan and state, the caller's to remove.
    :ivar environment: is added to that of our own processes.
    """

    source: Vm
    destination: Vm
    ends: Ends
    directory: Path
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Faults:
    """How page faults were served, as far as the engine can tell.

    :ivar histogram: (upper end in us, faults) of each bucket, ascending; empty if the engine
        knows no more than the mean.
    :ivar local: of `count`, those for which nothing had to be fetched.
    """

    count: int
    mean_us: float | None
    quantiles_us: Mapping[str, float] = field(default_factory=dict)
    histogram: tuple[tuple[float, int], ...] = ()
    local: int | None = None


@dataclass(frozen=True, slots=True)
class Moved:
    """A migration that came to its end.

    :ivar ended_s: when it was over for the operator, of `time.monotonic()`.
    :ivar placed_s: when the last page was at the destination, by the host's wall clock.
    :ivar faults: None if the engine leaves none.
    :ivar processes: of our own, by role.
    """

    ended_s: float
    placed_s: float
    faults: Faults | None = None
    processes: Mapping[str, Usage] = field(default_factory=dict)


class Mover(Protocol):
    """An engine. What it says itself of its time is not asked: that is taken from outside."""

    @property
    def shared_ram(self) -> bool:
        """Whether guest RAM is to be a shared file; else it is QEMU's default."""
        ...

    def prepare(self, pair: Pair) -> None:
        """What need not be timed: settings of the waiting QEMU that cost the guest nothing.

        :raise UnsupportedError: the engine is not in this QEMU.
        """
        ...

    def move(self, pair: Pair) -> Moved:
        """Move the guest; returns when the migration is over.

        :raise GaveUpError: it was cancelled; the guest runs at the source.
        :raise NotMovedError: it failed, or a VM ended.
        """
        ...
