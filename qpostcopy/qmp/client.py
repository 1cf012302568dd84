"""Client of our own endpoints: companions (with QEMU behind them) and controller.

Arguments, replies and events of ours are typed by qmp/schema.py and validated;
QEMU's pass through untouched. An error of the far side comes back as the kind
of error that it was there (exit code, remedy): `except RefusedError` works
across processes, and so does `except OutcomeUnknownError`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Self, TypeVar

from pydantic import ValidationError

from qpostcopy.errors import (
    BeforeSwitchTimeoutError,
    ExitCode,
    InterruptedMigrationError,
    OutcomeUnknownError,
    QpostcopyError,
    RefusedError,
    RolledBackError,
    StateLostError,
    UsageError,
)
from qpostcopy.qmp import schema
from qpostcopy.qmp.connection import (
    CONNECT_SECONDS,
    EXECUTE_SECONDS,
    CommandError,
    Connection,
)
from qpostcopy.qmp.events import Event
from qpostcopy.qmp.sockets import CannotConnectError, ConnectFailure

__all__ = [
    "CommandError",
    "EndpointAbsentError",
    "EndpointClient",
    "EndpointConnectError",
    "EndpointReplyError",
    "OutcomeUnknownError",
    "RemoteError",
]

log = logging.getLogger(__name__)

Reply = TypeVar("Reply", bound=schema.Model)


class EndpointConnectError(QpostcopyError):
    """A process of ours does not answer on its control socket."""


class EndpointAbsentError(EndpointConnectError):
    """Nobody listens there: the process has ended, or was never started."""


class EndpointReplyError(QpostcopyError):
    """The far side answered with something that the schema does not know: versions differ."""


class RemoteError(QpostcopyError):
    """A command of ours failed at the far side.

    Raised as one of the leaves below, which are also the error that they stand for.

    :ivar kind: the name of the error class there.
    """

    def __init__(self, command: str, kind: str, desc: str, remedy: str | None) -> None:
        super().__init__(desc, remedy=remedy)
        self.command = command
        self.kind = kind


class RemoteUsageError(RemoteError, UsageError):
    """See UsageError."""


class RemoteRefusedError(RemoteError, RefusedError):
    """See RefusedError."""


class RemoteRolledBackError(RemoteError, RolledBackError):
    """See RolledBackError."""


class RemoteTimeoutError(RemoteError, BeforeSwitchTimeoutError):
    """See BeforeSwitchTimeoutError."""


class RemoteInterruptedError(RemoteError, InterruptedMigrationError):
    """See InterruptedMigrationError."""


class RemoteStateLostError(RemoteError, StateLostError):
    """See StateLostError."""


class RemoteOutcomeUnknownError(RemoteError, OutcomeUnknownError):
    """A command that the far side sent on (to QEMU) got no reply there."""


_LEAVES: dict[int, type[RemoteError]] = {
    leaf.exit_code: leaf
    for leaf in (
        RemoteUsageError,
        RemoteRefusedError,
        RemoteRolledBackError,
        RemoteTimeoutError,
        RemoteInterruptedError,
        RemoteStateLostError,
    )
}


class EndpointClient(Connection):
    """A connection to one of our endpoints."""

    WHAT = "control socket"

    @classmethod
    async def connect(cls, path: Path, timeout_seconds: float = CONNECT_SECONDS) -> Self:
        """Connect and negotiate.

        :raise EndpointConnectError: or its leaf EndpointAbsentError.
        """
        try:
            return await cls._open(path, timeout_seconds)
        except CannotConnectError as error:
            gone = error.failure in (ConnectFailure.ABSENT, ConnectFailure.REFUSED)
            leaf = EndpointAbsentError if gone else EndpointConnectError
            raise leaf(str(error)) from error

    async def call(
        self,
        command: str,
        arguments: schema.Model,
        reply: type[Reply],
        timeout_seconds: float = EXECUTE_SECONDS,
    ) -> Reply:
        """Run one of our commands; arguments and reply must be the schema's for it.

        :raise RemoteError: it failed there, in the leaf that tells how.
        :raise EndpointReplyError: the reply does not match the schema.
        :raise ConnectionLostError: it was not sent.
        :raise OutcomeUnknownError: it was sent and no reply came.
        """
        assert (type(arguments), reply) in schema.signatures(command), f"not in schema: {command}"
        # A far side of the version before refuses a key that it does not know, even at its default.
        content = arguments.model_dump(mode="json", exclude_defaults=True)
        raw = await self.execute(command, content, timeout_seconds)
        try:
            return reply.model_validate(raw)
        except ValidationError as error:
            raise EndpointReplyError(
                f"{command}: {self.name} replied off schema: {error}"
            ) from error

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        timeout_seconds: float = EXECUTE_SECONDS,
    ) -> object:
        """Run a command of QEMU through the endpoint.

        :raise CommandError: QEMU ran it and it failed.
        :raise RemoteError: the companion could not run it, in the leaf that tells how.
        :raise ConnectionLostError: it was not sent.
        :raise OutcomeUnknownError: it was sent and no reply came (here, or there).
        """
        try:
            return await super().execute(command, arguments, timeout_seconds)
        except CommandError as error:
            if not error.data:
                raise
            raise rebuild_error(command, error.desc, error.data) from error

    def _decode(self, name: str, data: Mapping[str, object]) -> Event | None:
        kind = schema.EVENTS.get(name)
        if kind is None:
            return Event(name, data)
        try:
            return Event(name, data, model=kind.model_validate(data))
        except ValidationError as error:
            log.error("%s: dropped an event that is off schema: %s: %s", self.name, name, error)
            return None


def rebuild_error(command: str, desc: str, data: Mapping[str, object]) -> RemoteError:
    """The typed error that the far side described (see error_data in qmp/server.py)."""
    remedy = data.get("remedy")
    exit_code = data.get("exit_code")
    leaf = _LEAVES.get(exit_code if isinstance(exit_code, int) else ExitCode.UNEXPECTED)
    if data.get("outcome_unknown") is True:
        leaf = RemoteOutcomeUnknownError
    return (leaf or RemoteError)(
        command, str(data.get("kind", "")), desc, remedy if isinstance(remedy, str) else None
    )
