"""The commands and events that our own QMP endpoints add to QEMU's.

One description, used by both ends: the server validates what comes in, the
client what comes back. Three endpoints speak it, each on a unix socket of mode
0600: the page server (source), the handler (destination), the controller.
The companions pass every other command, and every event, through to and from
the QEMU whose monitor they hold.

Names begin with `qpc-` (commands) and `QPC_` (events); a reply is an object.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Count = int


class Model(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Empty(Model):
    """No arguments, or nothing to return."""


# --- facts about one side -----------------------------------------------------------------


class BlockFacts(Model):
    """One guest RAM block (a memory backend) of one QEMU."""

    name: str
    size_bytes: int
    first_gpa: int
    page_bytes: int
    share: bool
    backend: str = Field(description="qom type, e.g. memory-backend-file")
    mem_path: str | None
    device: int | None = Field(description="st_dev of the backing file; None: not found")
    inode: int | None
    filesystem: str | None = Field(description="tmpfs, hugetlbfs, ext4, ...")
    allocated_bytes: int = Field(0, description="of the file: pages that are there")
    mappings: tuple[MappingFacts, ...]


class MappingFacts(Model):
    """One VMA of a RAM block in QEMU's address space. All values in bytes."""

    hva: int
    length_bytes: int
    offset_bytes: int
    dontfork: bool
    huge_pages: bool = Field(description="THP may back it")
    uffd_registered: bool = Field(description="um, uw or ui in VmFlags")
    locked: bool = Field(False, description="lo in VmFlags: mlock")


class OtherMapper(Model):
    """A process other than QEMU that maps the RAM of a block."""

    pid: int
    command: str
    block: str


class MemoryLimit(Model):
    """The tightest memory limit of the cgroups that QEMU is in."""

    path: str = Field(description="of the file that holds the limit")
    available_bytes: int


class SideFacts(Model):
    """All that preflight needs to know about one side. Gathering it changes nothing."""

    role: Literal["source", "destination"]
    host: str
    pid: int
    pid_start_ticks: int = Field(description="field 22 of /proc/PID/stat: proves the pid is his")
    uid: int
    machine: str
    qemu_version: str
    run_status: str
    running: bool
    migration_status: str | None
    migration_blockers: tuple[str, ...]
    listening: bool = Field(False, description="migrate-incoming was sent already")
    capabilities: dict[str, bool]
    mem_lock: bool
    blocks: tuple[BlockFacts, ...]
    unshared_bytes: int = Field(description="RAM blocks that travel in QEMU's own stream")
    other_mappers: tuple[OtherMapper, ...]
    devices: tuple[str, ...] = Field(description="qom types of devices that matter, e.g. vfio-pci")
    userfaults: tuple[int, ...] = Field(description="fds of userfaultfds QEMU already holds")
    effective_rights: tuple[str, ...] = Field(description="of CAP_SYS_PTRACE, ... what we hold")
    userfaultfd: Literal["own", "lent", "none"] = Field(
        "own", description="how QEMU comes by one: by its own right, by our device, or not at all"
    )
    filter_refusal: str = Field("", description="why QEMU's seccomp filter is in our way")
    attach_refusal: str = Field("", description="why the kernel lets us not reach into QEMU")
    tracer: str = Field("", description="another process that traces QEMU: its pid and name")
    kernel_release: str
    kernel_missing: tuple[str, ...] = Field(description="features we need and do not find, named")
    memory_available_bytes: int
    tmpfs_available_bytes: int | None
    memory_limit: MemoryLimit | None = None
    shmem_huge_pages: str = Field("", description="the kernel's setting for THP on shmem")
    boot_id: str = Field("", description="of the kernel: equal on both sides means one machine")


# --- counters -----------------------------------------------------------------------------


class FaultStats(Model):
    """Page faults read from the userfaultfd, and how long each thread waited."""

    count: Count = 0
    local: Count = 0
    p50_us: float = 0
    p90_us: float = 0
    p99_us: float = 0
    max_us: float = 0
    histogram: tuple[tuple[float, int], ...] = ()


class HandlerStats(Model):
    """Counters of the userfault handler; pages are 4 KiB, each counted once."""

    total_pages: Count
    remaining_pages: Count
    hole_pages: Count
    zero_pages: Count
    precopy_pages: Count
    push_pages: Count
    demand_pages: Count
    around_pages: Count
    duplicate_pages: Count
    discarded_pages: Count = Field(description="faults on pages placed before, answered by zeroes")
    stray_pages: Count = Field(description="EEXIST on a page that our map called missing")
    push_bytes: Count
    demand_bytes: Count
    wire_bytes: Count = Field(description="read from all lanes, frame headers included")
    traced_faults: Count = Field(default=0, description="faults in the trace of this migration")
    untraced_faults: Count = Field(default=0, description="left out of it, by one of its bounds")
    faults: FaultStats


class SourceStats(Model):
    """Counters of the page server."""

    requests: Count
    demand_pages: Count
    around_pages: Count
    push_pages: Count
    hole_pages: Count
    zero_pages: Count
    wire_bytes: Count
    push_done: bool


# --- commands of both companions ----------------------------------------------------------


class Hello(Model):
    """`qpc-hello`: who is this."""

    role: Literal["page-server", "handler", "controller"]
    version: str
    migration_id: str
    pid: int
    qemu_pid: int | None
    monitor: Literal["held", "lost", "none"]


class Inspect(Model):
    """`qpc-inspect`"""


# --- handler ------------------------------------------------------------------------------


class FileIdentity(Model):
    device: int
    inode: int


class Attach(Model):
    """`qpc-attach`: obtain a userfaultfd, register all RAM, punch it empty, verify.

    `forbidden` are the files under the source's RAM; a destination block that
    is one of them is refused before anything is touched (design: trap 4).
    """

    forbidden: tuple[FileIdentity, ...]
    ahead_bytes: int
    behind_bytes: int


class Attached(Model):
    uffd_fd: int = Field(description="number of the userfaultfd inside QEMU")
    ranges: int
    registered_bytes: int
    untraced: str | None = Field(default=None, description="why no trace is written, if none is")


class Adopt(Model):
    """`qpc-adopt`: take over the userfaultfd that a dead handler left in QEMU."""

    uffd_fd: int
    ahead_bytes: int
    behind_bytes: int


class Listen(Model):
    """`qpc-listen`: end the present lanes, if any, and wait for new ones."""

    host: str
    port: int = Field(ge=0, le=65535)
    push_lanes: int = Field(ge=1, le=64)
    device_state: bool = Field(False, description="one more, for qpc-state-lend")
    token: str = Field(pattern=r"^[0-9a-f]{64}$")


class Listening(Model):
    port: int


class Serve(Model):
    """`qpc-serve` (handler): the lanes are up; serve faults from now on.

    Handler and page server greet each other over the demand lane inside their
    `qpc-serve`: send both commands at once, then await both replies. A reply
    means that faults are being served.
    """


class Committed(Model):
    """`qpc-committed`: the commit is on disk; the guest may run here from now on.

    From here on a page that appears without us is counted, no longer fatal, and
    `qpc-detach` is refused while pages are missing.
    """


class Detach(Model):
    """`qpc-detach`: unregister every range and close QEMU's copy of the userfaultfd.

    With nothing attached it only closes what a crashed handler left before the
    commit. Refused after the commit while pages are missing: they would be zeroes.
    """


class StateLend(Model):
    """`qpc-state-lend`: lend QEMU the lane for device state, as `qpostcopy-device-state`; once."""


class Kill(Model):
    """`qpc-kill`: SIGKILL QEMU through a pidfd and wait until it is gone."""


# --- page server --------------------------------------------------------------------------


class Connect(Model):
    """`qpc-connect`: end the present lanes, if any; connect new ones and say hello."""

    host: str
    port: int = Field(ge=1, le=65535)
    push_lanes: int = Field(ge=1, le=64)
    device_state: bool = Field(False, description="one more, for qpc-state-lend")
    token: str = Field(pattern=r"^[0-9a-f]{64}$")


class Prepare(Model):
    """`qpc-prepare` (page server): compile the push order for this RAM. Touches nothing.

    `profile` is the resolved profile, as `Profile.model_dump(mode="json")` gives it. Asked
    before anything is touched, so that a profile that does not fit this RAM costs nothing.
    """

    profile: dict[str, object]
    push_bytes_per_second: int | None = None


class Prepared(Model):
    extents: int


class ServePages(Model):
    """`qpc-serve` (page server): the source is stopped; answer and push from now on."""

    push: bool = Field(True, description="false: only answer, until qpc-push or after the commit")


class Push(Model):
    """`qpc-push`: begin the push that `qpc-serve` was told to leave for later, unless it has.

    If it does not come, the push begins by itself some seconds after the commit was recorded:
    the guest must not stay without its pages because a controller died.
    """


# --- controller ---------------------------------------------------------------------------


class Abort(Model):
    """`qpc-abort`: cancel before the commit; refused after it.

    `signal` is what an operator's viewer got; it decides the result's exit code.
    """

    signal: Literal["SIGINT", "SIGTERM"] | None = None


class Status(Model):
    """`qpc-status` reply: the latest progress object, as `--json` prints it."""

    migration_id: str
    phase: str
    vm_location: Literal["source", "destination", "ended", "unknown"]
    abort_safe: bool
    message: str
    progress: dict[str, object]
    result: dict[str, object] | None = None


# --- events -------------------------------------------------------------------------------


class PlacedAll(Model):
    """`QPC_PLACED` (handler): every page is placed or known to be zero."""


class LaneLost(Model):
    """`QPC_LANE_LOST` (both): lanes ended before their work was done."""

    lane: str
    reason: str


class Fatal(Model):
    """`QPC_FATAL` (both): the companion cannot go on; it stays up to be asked."""

    reason: str


class QemuGone(Model):
    """`QPC_QEMU_GONE` (both): the QEMU process has ended."""


class MonitorLost(Model):
    """`QPC_MONITOR_LOST` (both): QEMU's monitor hung up while its process lives."""

    reason: str


class ControllerMessage(Model):
    """`QPC_MESSAGE` (controller): one object of the `--json` stream, verbatim."""

    message: dict[str, object]


#: command -> (arguments, reply), for each endpoint
BOTH: dict[str, tuple[type[Model], type[Model]]] = {
    "qpc-hello": (Empty, Hello),
    "qpc-inspect": (Inspect, SideFacts),
    "qpc-state-lend": (StateLend, Empty),
    "qpc-quit": (Empty, Empty),
}
HANDLER: dict[str, tuple[type[Model], type[Model]]] = BOTH | {
    "qpc-attach": (Attach, Attached),
    "qpc-adopt": (Adopt, Attached),
    "qpc-listen": (Listen, Listening),
    "qpc-serve": (Serve, Empty),
    "qpc-committed": (Committed, Empty),
    "qpc-stats": (Empty, HandlerStats),
    "qpc-detach": (Detach, Empty),
    "qpc-kill": (Kill, Empty),
}
PAGE_SERVER: dict[str, tuple[type[Model], type[Model]]] = BOTH | {
    "qpc-prepare": (Prepare, Prepared),
    "qpc-connect": (Connect, Empty),
    "qpc-serve": (ServePages, Empty),
    "qpc-push": (Push, Empty),
    "qpc-stats": (Empty, SourceStats),
}
CONTROLLER: dict[str, tuple[type[Model], type[Model]]] = {
    "qpc-hello": (Empty, Hello),
    "qpc-status": (Empty, Status),
    "qpc-abort": (Abort, Empty),
}
EVENTS: dict[str, type[Model]] = {
    "QPC_PLACED": PlacedAll,
    "QPC_LANE_LOST": LaneLost,
    "QPC_FATAL": Fatal,
    "QPC_QEMU_GONE": QemuGone,
    "QPC_MONITOR_LOST": MonitorLost,
    "QPC_MESSAGE": ControllerMessage,
}


def signatures(command: str) -> set[tuple[type[Model], type[Model]]]:
    """(arguments, reply) of a command of ours, for each endpoint that has it."""
    tables = (HANDLER, PAGE_SERVER, CONTROLLER)
    return {table[command] for table in tables if command in table}


def event_name(event: Model) -> str:
    """The name under which an event of ours travels."""
    return next(name for name, kind in EVENTS.items() if type(event) is kind)
