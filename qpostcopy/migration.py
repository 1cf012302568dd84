"""What the steps of one migration share, and how trouble is told.

`Migration` owns no logic of a phase: prepare and switchover (switchover.py),
postcopy (postcopy.py) and recovery (recovery.py) act on it, the controller
drives them.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from qpostcopy.config import Plan
from qpostcopy.errors import RolledBackError
from qpostcopy.phases import PhaseMachine
from qpostcopy.qmp.events import Event
from qpostcopy.qmp.schema import Attached, HandlerStats, SideFacts
from qpostcopy.side import COMPANION_LOST, EventBook, Role, Seen, Side
from qpostcopy.state import MigrationState, StateDirectory

Result = TypeVar("Result")

#: A query of a QEMU whose main loop is not blocked takes a millisecond.
QUERY_SECONDS = 5.0
COMMAND_SECONDS = 5.0
#: Of a TroubleError: what was waited for did not come.
TIMEOUT_CODE = "switchover-timeout"


class TroubleError(RolledBackError):
    """Something failed before the commit: the migration must be rolled back.

    :param code: a fixed name for scripts.
    """

    def __init__(self, code: str, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.code = code


@dataclass
class Migration:
    """One migration in the making. `directory.state` is its memory."""

    directory: StateDirectory
    plan: Plan
    machine: PhaseMachine
    book: EventBook
    source: Side
    destination: Side
    say: Callable[[Literal["info", "warning"], str], None]
    facts: dict[Role, SideFacts] = field(default_factory=dict)
    stats: HandlerStats | None = None
    warnings: list[str] = field(default_factory=list)
    #: query-status of the destination once it has loaded
    loaded_status: str | None = None

    @property
    def state(self) -> MigrationState:
        return self.directory.state

    def side(self, role: Role) -> Side:
        return self.source if role == "source" else self.destination

    @property
    def downtime_ms(self) -> float | None:
        stopped, resumed = self.state.stopped_seconds, self.state.resumed_seconds
        return None if stopped is None or resumed is None else (resumed - stopped) * 1000

    def warn(self, message: str) -> None:
        """Something is not as it should be; the migration goes on."""
        self.warnings.append(message)
        self.say("warning", message)

    def note_trace(self, attached: Attached) -> None:
        """What a handler said of faults.trace as it began."""
        if attached.untraced:
            self.directory.update(untraced=True)
            self.warn(f"the faults of this migration are not recorded: {attached.untraced}")

    async def wait(
        self, what: str, matches: Callable[[Seen], bool], within_seconds: float, since: int = 0
    ) -> Seen:
        """An event, or TroubleError TIMEOUT_CODE that names what did not come."""
        try:
            async with asyncio.timeout(within_seconds):
                return await self.book.wait(matches, since)
        except TimeoutError as error:
            raise TroubleError(
                TIMEOUT_CODE, f"{what} did not come within {within_seconds:g} s"
            ) from error


Step = Callable[[Migration], Awaitable[None]]


def now_seconds() -> float:
    return time.monotonic()


async def together(*work: Awaitable[Result]) -> list[Result]:
    """Run at once, wait for all of them, then raise what the first of the failed raised.

    Unlike a bare gather, nothing still runs when this returns.
    """
    done = await asyncio.gather(*work, return_exceptions=True)
    results = []
    for outcome in done:
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)
    return results


_TROUBLE_EVENTS = {
    "QPC_QEMU_GONE": ("qemu-gone", "the {role} QEMU process has ended"),
    "QPC_FATAL": ("companion-fatal", "the {companion} cannot go on: {reason}"),
    "QPC_LANE_LOST": ("lane-lost", "the {companion} lost its lanes: {reason}"),
    "QPC_MONITOR_LOST": ("monitor-lost", "the {role} QEMU hung up its monitor: {reason}"),
    COMPANION_LOST: ("companion-lost", "the {companion} has ended or hung up: {reason}"),
}


def trouble(seen: Seen) -> TroubleError | None:
    """What an event that came before the commit means, if it means trouble."""
    reason = seen.event.data.get("reason", "")
    if seen.event.name in _TROUBLE_EVENTS:
        code, text = _TROUBLE_EVENTS[seen.event.name]
        message = text.format(
            role=seen.role,
            companion="page server" if seen.role == "source" else "handler",
            reason=reason,
        )
        return TroubleError(code, message, remedy="the logs are in the state directory")
    if seen.migration(seen.role, "failed"):
        return TroubleError(
            "migration-failed",
            f"the {seen.role} QEMU says that its migration failed",
            remedy="its own reason is on that QEMU's stderr",
        )
    return None


#: QMP ShutdownCause: those that the guest itself brought about.
_GUESTS_OWN_CAUSES = frozenset({"guest-shutdown", "guest-reset", "guest-panic"})


async def guest_ended(migration: Migration, role: Role) -> bool:
    """Whether that side's QEMU is gone because its guest shut itself down. Remembers it."""
    if migration.state.guest_ended:
        return True
    seen = migration.book.find(lambda seen: seen.is_(role, "SHUTDOWN"))
    if seen is None or not _is_guests_own(seen.event):
        return False
    process = migration.side(role).qemu
    # -no-shutdown keeps QEMU: then the guest is still there, in state `shutdown`.
    if process is not None and not await asyncio.to_thread(process.wait_gone, QUERY_SECONDS):
        return False
    migration.directory.update(guest_ended=True)
    return True


def _is_guests_own(shutdown: Event) -> bool:
    return shutdown.data.get("guest") is True or shutdown.data.get("reason") in _GUESTS_OWN_CAUSES


def who_ended(migration: Migration, role: Role) -> str:
    """QEMU's own last word on its end, in brackets, or nothing: it was killed."""
    seen = migration.book.find(lambda seen: seen.is_(role, "SHUTDOWN"))
    return f" ({seen.event.data.get('reason', 'shut down')})" if seen else ""


def error_code(error: BaseException) -> str:
    """A fixed name for scripts: its own, else its class's (MonitorHeldError: monitor-held)."""
    code = getattr(error, "code", None)
    if isinstance(code, str):
        return code
    name = str(getattr(error, "kind", "") or type(error).__name__)
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z0-9]*", name.removesuffix("Error"))
    return "-".join(words).lower() or "error"
