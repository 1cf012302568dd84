"""Prepare: look at both sides, refuse or not, and ready the waiting destination.

The source runs on as it was; nothing here can stop it. What is changed (the
destination's autostart, its RAM, capabilities and parameters of both QEMUs) is
in state.json before it is changed, so that recovery.py can put it back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TypedDict

from qpostcopy.config import Profile
from qpostcopy.errors import QpostcopyError, RefusedError
from qpostcopy.migration import (
    COMMAND_SECONDS,
    QUERY_SECONDS,
    Migration,
    Step,
    TroubleError,
    error_code,
    together,
)
from qpostcopy.preflight import (
    Finding,
    already_migrating,
    examine_side,
    is_error,
    judge,
    remark,
    unreachable,
)
from qpostcopy.process import Process
from qpostcopy.qmp import schema
from qpostcopy.registry import claim, migration_at
from qpostcopy.report import FindingReport
from qpostcopy.side import Role
from qpostcopy.state import StateDirectory

#: What each QEMU's capabilities must be; any other of `_OFF` is switched off.
_ON: dict[Role, frozenset[str]] = {
    "source": frozenset({"x-ignore-shared", "events", "pause-before-switchover"}),
    # late-block-activate: the destination takes the disk locks at `cont`, not when it loads.
    "destination": frozenset({"x-ignore-shared", "events", "late-block-activate"}),
}
_OFF = frozenset(
    {
        # return-path lets the destination's success decide at the source: that is ours to decide.
        "return-path",
        "postcopy-ram",
        "postcopy-preempt",
        "postcopy-blocktime",
        "multifd",
        "compress",
        "xbzrle",
        "rdma-pin-all",
        "auto-converge",
        "zero-blocks",
        "block",
        "x-colo",
        "release-ram",
        "background-snapshot",
        "zero-copy-send",
        "dirty-limit",
        "mapped-ram",
        "switchover-ack",
    }
)
#: Device state should flow at once: it is small, and the guest is stopped meanwhile.
_PARAMETERS = {"max-bandwidth": 1 << 40, "downtime-limit": 30_000}

ATTACH_SECONDS = 120.0
#: A trace of a million faults is some seconds' work.
SCHEDULE_SECONDS = 60.0


class PreflightRefusedError(RefusedError):
    """Preflight found reasons not to begin. All of them are in `findings`."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__(
            f"refused: {len(findings)} finding{'s' if len(findings) > 1 else ''}; "
            "nothing was touched",
            remedy=findings[0].remedy if findings else None,
        )
        self.findings = tuple(
            FindingReport(
                code=found.code, side=found.side, message=found.message, remedy=found.remedy
            )
            for found in findings
        )
        self.code = "refused"


async def refuse_busy_monitors(migration: Migration) -> None:
    """An unfinished migration of this VM holds its monitors: say that, not "held"."""
    sockets = migration.state.source.qmp, migration.state.destination.qmp
    _refuse_second(migration_at(*sockets, before=migration.directory))


def _refuse_second(other: StateDirectory | None) -> None:
    if other is not None:
        raise PreflightRefusedError([already_migrating(other.migration_id, other.state.phase)])


async def start_companions(migration: Migration) -> None:
    """Both at once; each takes its QEMU's monitor.

    :raise PreflightRefusedError: one cannot be had, or neither; with that comes all that speaks
        against the other side.
    """
    sides = migration.source, migration.destination
    done = await asyncio.gather(*(side.ensure() for side in sides), return_exceptions=True)
    refused: dict[Role, RefusedError] = {}
    for side, outcome in zip(sides, done, strict=True):
        if isinstance(outcome, RefusedError):
            refused[side.role] = outcome
        elif isinstance(outcome, BaseException):
            raise outcome
    if refused:
        raise PreflightRefusedError(await _all_that_is_seen(migration, refused))


async def _all_that_is_seen(
    migration: Migration, refused: Mapping[Role, RefusedError]
) -> list[Finding]:
    found = [unreachable(role, error_code(error), error) for role, error in refused.items()]
    for side in (migration.source, migration.destination):
        if side.role not in refused:
            facts = await side.call("qpc-inspect", schema.Inspect(), schema.SideFacts)
            found += [finding for finding in examine_side(facts) if is_error(finding)]
    return found


async def inspect(migration: Migration) -> None:
    """Learn the facts of both sides. Nothing is touched.

    :raise PreflightRefusedError: another migration has one of these QEMUs. If not, they are
        ours from here on.
    """
    source, destination = await together(
        *(
            side.call("qpc-inspect", schema.Inspect(), schema.SideFacts)
            for side in (migration.source, migration.destination)
        )
    )
    migration.facts = {"source": source, "destination": destination}
    directory = migration.directory
    qemus: dict[Role, Process] = {}
    for role, facts in migration.facts.items():
        qemus[role] = Process(pid=facts.pid, start_ticks=facts.pid_start_ticks)
        directory.update_side(role, version=facts.qemu_version)
    directory.update(
        ram_bytes=sum(block.size_bytes for block in source.blocks),
        unshared_bytes=source.unshared_bytes,
    )
    _refuse_second(claim(directory, qemus))


async def judge_both_sides(migration: Migration) -> None:
    """Refuse if anything speaks against it, with all that does; else tell what is odd."""
    both = migration.facts["source"], migration.facts["destination"]
    findings = judge(*both)
    if findings:
        raise PreflightRefusedError(findings)
    for found in remark(*both):
        migration.warn(f"{found.side}: {found.message} [{found.code}]; {found.remedy}")


async def compile_push_order(migration: Migration, profile: Profile | None = None) -> None:
    """The profile against this RAM, while a misfit costs nothing yet.

    :param profile: in place of the plan's.
    :raise UsageError: a step names a block or an offset that this VM does not have.
    """
    plan = migration.plan
    await migration.source.call(
        "qpc-prepare",
        schema.Prepare(
            profile=(profile or plan.profile).model_dump(mode="json"),
            push_bytes_per_second=plan.limits.push_bytes_per_second,
        ),
        schema.Prepared,
        SCHEDULE_SECONDS,
    )


async def hold_destination(migration: Migration) -> None:
    """`stop` while `inmigrate` clears autostart: it will load and stay paused."""
    migration.directory.update(stop_sent=True)
    await migration.destination.execute("stop", None, COMMAND_SECONDS)
    status = await migration.destination.query("query-status", QUERY_SECONDS)
    if status.get("status") != "inmigrate":
        raise TroubleError(
            "destination-not-waiting",
            f"the destination QEMU is {status.get('status')}, not inmigrate",
            remedy="start it with -incoming defer",
        )


async def attach(migration: Migration) -> None:
    """Userfaultfd into the destination, all RAM registered and punched empty."""
    directory, policy = migration.directory, migration.plan.profile.fault
    directory.update(attach_sent=True)
    forbidden = {
        schema.FileIdentity(device=block.device, inode=block.inode)
        for block in migration.facts["source"].blocks
        if block.device is not None and block.inode is not None
    }
    attached = await migration.destination.call(
        "qpc-attach",
        schema.Attach(
            forbidden=tuple(sorted(forbidden, key=lambda file: (file.device, file.inode))),
            ahead_bytes=policy.ahead_bytes,
            behind_bytes=policy.behind_bytes,
        ),
        schema.Attached,
        ATTACH_SECONDS,
    )
    directory.update(uffd_fd=attached.uffd_fd)
    migration.note_trace(attached)


async def set_capabilities(migration: Migration) -> None:
    """Both QEMUs; what they had is saved first, and restored at the end or on the way back."""
    for role in ("source", "destination"):
        before = {
            str(item["capability"]): bool(item["state"])
            for item in await _list_of(migration, role, "query-migrate-capabilities")
        }
        migration.directory.update_side(role, capabilities=before)
        if missing := _ON[role] - before.keys():
            raise TroubleError(
                "capability-missing",
                f"the {role} QEMU does not know the capability {', '.join(sorted(missing))}",
                remedy="QEMU 5.2 or later is needed",
            )
        wanted = {name: name in _ON[role] for name in before if name in _ON[role] | _OFF}
        changed = {name: state for name, state in wanted.items() if before[name] != state}
        await set_capability_states(migration, role, changed)


async def set_capability_states(migration: Migration, role: Role, states: dict[str, bool]) -> None:
    """QMP `migrate-set-capabilities`, which fails while a migration runs."""
    listed = [{"capability": name, "state": state} for name, state in states.items()]
    if listed:
        await migration.side(role).execute(
            "migrate-set-capabilities", {"capabilities": listed}, COMMAND_SECONDS
        )


async def set_parameters(migration: Migration) -> None:
    """The source only: it is the sender."""
    before = await migration.source.query("query-migrate-parameters", QUERY_SECONDS)
    saved = {name: value for name in _PARAMETERS if isinstance(value := before.get(name), int)}
    migration.directory.update_side("source", parameters=saved)
    await migration.source.execute("migrate-set-parameters", _PARAMETERS, COMMAND_SECONDS)


async def open_lanes(migration: Migration, *, device_state: bool = True) -> None:
    """A session of lanes: the handler listens, the page server connects.

    :param device_state: one of them is for QEMU's own stream; not after the switch, when that
        has done its work.
    """
    lanes = migration.plan.lanes
    port = 0 if lanes.port == "auto" else lanes.port
    both = _Both(
        host=lanes.listen,
        push_lanes=lanes.push,
        token=migration.state.token,
        device_state=device_state,
    )
    listen = schema.Listen(port=port, **both)
    listening = await migration.destination.call(
        "qpc-listen", listen, schema.Listening, COMMAND_SECONDS
    )
    connect = schema.Connect(port=listening.port, **both)
    await migration.source.call("qpc-connect", connect, schema.Empty, COMMAND_SECONDS)


class _Both(TypedDict):
    """What both ends are told of the lanes."""

    host: str
    push_lanes: int
    token: str
    device_state: bool


async def open_device_state(migration: Migration) -> None:
    """Each QEMU is lent its end of the lane for its own stream (stream.py says why)."""
    for side in (migration.source, migration.destination):
        await side.call("qpc-state-lend", schema.StateLend(), schema.Empty, COMMAND_SECONDS)


async def serve_faults(migration: Migration) -> None:
    """The handler goes to work: what faults before the switch waits for the page server."""
    await migration.destination.call("qpc-serve", schema.Serve(), schema.Empty, COMMAND_SECONDS)


async def _list_of(migration: Migration, role: Role, command: str) -> list[dict[str, object]]:
    reply = await migration.side(role).execute(command, None, QUERY_SECONDS)
    if not isinstance(reply, list):
        raise QpostcopyError(f"{command}: QEMU returned {reply!r}, not a list")
    return reply


PREPARE: tuple[Step, ...] = (
    refuse_busy_monitors,
    start_companions,
    inspect,
    judge_both_sides,
    compile_push_order,
    hold_destination,
    attach,
    set_capabilities,
    set_parameters,
    open_lanes,
    open_device_state,
    serve_faults,
)
