"""The demo's scenario: a guest at work is moved between two QEMUs and gives evidence.

    boot -> baseline -> destination -> `qpostcopy migrate` -> settle -> verify -> checks

The migration is the command an operator would run, as a child process; what is
checked afterwards is looked up in the guest and in QEMU, not in what that
command says of itself. Nothing outlives the scenario unless it is asked to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import yaml

from qpostcopy.core import PAGE_BYTES
from qpostcopy.errors import QpostcopyError
from qpostcopy.lab.guest import Guest, GuestError, Ready, Verified
from qpostcopy.lab.leftovers import (
    processes_naming,
    registered_ranges,
    sockets_below,
    userfaultfds,
)
from qpostcopy.lab.measure import GuestCost, Measurement
from qpostcopy.lab.operator import Message, run_migrate
from qpostcopy.lab.vm import Backend, Boot, Vm, VmSpec
from qpostcopy.lab.warm import touch_and_free
from qpostcopy.report import Result

DOWNTIME_LIMIT_MS = 50.0
#: What the guest can be told to do (scripts/guest/workload.c).
WORKLOADS = ("service", "kv", "scan", "churn", "idle")
#: Sums to `total`, each page counted once by how it came to be placed.
PAGE_KINDS = ("hole", "zero", "precopy", "push", "demand", "around")

_BOOT_SECONDS = 60.0
_BASELINE_SECONDS = 1.5
_SETTLE_SECONDS = 1.0
_REPORT_SECONDS = 10.0
_QUIT_SECONDS = 10.0
_DESTINATION_PORT = 1


class ScenarioError(QpostcopyError):
    """The scenario could not be played; the guest was ours and is gone."""


class Check(NamedTuple):
    """One thing that is to hold after the migration.

    `decides`: without it the migration has failed. Time does not decide: on a
    busy machine everything takes longer, and the guest is right all the same.
    """

    what: str
    holds: bool
    detail: str
    decides: bool = True


@dataclass(frozen=True, slots=True)
class Setting:
    """What is played.

    :param profile: a shipped name, or the absolute path of a file.
    :param keep: the guest at the destination outlives the scenario.
    """

    memory_bytes: int
    kernel: Path
    initrd: Path
    profile: str = "sequential"
    workload: str = "service"
    qemu: str = "qemu-system-x86_64"
    precopy: str = "auto"
    keep: bool = False


class Scenario:
    """One run. Call the steps in the order in which they stand here.

    :param directory: for sockets, logs, plan and state; the caller's to remove.
    """

    def __init__(self, setting: Setting, directory: Path) -> None:
        self.setting = setting
        self.directory = directory
        self.run_directory = directory / "run"
        self.source = Vm("source", self._spec(incoming=False), directory)
        self.destination = Vm("destination", self._spec(incoming=True), directory)
        self.baseline = 0.0
        self.result: Message = {}
        self._guest: Guest | None = None
        self._started_s = 0.0
        self._settled_s = 0.0
        self._verified: Verified | None = None
        self._kept = False
        self._held = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()

    @property
    def outcome(self) -> Result:
        """The result object of a migration that came to its end, typed."""
        known = {key: self.result[key] for key in Result.model_fields if key in self.result}
        return Result.model_validate(known)

    @property
    def guest(self) -> Guest:
        assert self._guest, "not booted"
        return self._guest

    # --- the steps ---------------------------------------------------------------------------

    def boot(self) -> Ready:
        """Start the source and wait until its guest is at work."""
        self._held.callback(self.source.kill)
        self._held.callback(self._end_destination)
        self.source.start()
        # Closed before the VMs: it listens to their sockets.
        self._guest = self._held.enter_context(Guest(self.source.serial))
        return self.guest.wait_ready(_BOOT_SECONDS)

    def measure_baseline(self) -> float:
        """The guest's speed in quiet seconds, on memory that is warm; operations a second."""
        touch_and_free(self.setting.memory_bytes)
        from_s = time.monotonic()
        to_s = from_s + _BASELINE_SECONDS
        self.guest.wait_report_after(to_s, _BASELINE_SECONDS + _REPORT_SECONDS)
        self.baseline = Measurement(self.guest.reports).speed(from_s, to_s)
        if self.baseline <= 0:
            raise ScenarioError("the guest does no work")
        return self.baseline

    def start_destination(self) -> None:
        """Start the QEMU that waits for the guest."""
        self.destination.start()
        self.guest.add(self.destination.serial)

    def write_plan(self) -> Path:
        plan = {
            "version": 1,
            "name": "demo",
            "source": {"qmp": str(self.source.qmp_path), "pid": self.source.pid},
            "destination": {"qmp": str(self.destination.qmp_path), "pid": self.destination.pid},
            "profile": self.setting.profile,
            "precopy": {"mode": self.setting.precopy},
        }
        path = self.directory / "plan.yaml"
        path.write_text(yaml.safe_dump(plan, sort_keys=False))
        return path

    def migrate(self, plan: Path, show: Callable[[Message], None]) -> int:
        """Run `qpostcopy migrate`, hand on each of its messages; its exit code.

        :raise ScenarioError: it ended without a result.
        """

        def take(message: Message) -> None:
            self._take_message(message, show)

        status = run_migrate(plan, self.run_directory, take).status
        if not self.result:
            raise ScenarioError(f"`qpostcopy migrate` ended with {status} and without a result")
        return status

    def settle(self) -> None:
        """Let the guest run on for a while, so that its recovery can be measured."""
        report = self.guest.wait_report_after(
            time.monotonic() + _SETTLE_SECONDS, _SETTLE_SECONDS + _REPORT_SECONDS
        )
        self._settled_s = report.host_s

    def verify(self) -> Verified:
        """Have the guest check every byte of its memory."""
        limit_seconds = 10 + self.setting.memory_bytes / (50 << 20)
        self._verified = self.guest.verify(limit_seconds)
        return self._verified

    def cost(self, ready: Ready) -> GuestCost:
        """What the migration cost the guest."""
        reports = self.guest.reports
        measurement = Measurement(reports)
        resumed_s = next((r.host_s for r in reports if r.port == _DESTINATION_PORT), None)
        if resumed_s is None:
            raise GuestError("the guest never reported from the destination")
        late_ms = measurement.late_ms(self._started_s, self._settled_s)
        return GuestCost(
            workload=self.setting.workload,
            work_lost_ms=measurement.work_lost_ms(self._started_s, resumed_s, self.baseline),
            late_ms=late_ms if ready.rate else None,
            corrupt_pages=self._verified.corrupt if self._verified else reports[-1].corrupt,
            baseline_ops_per_second=self.baseline,
        )

    def checks(self, ready: Ready) -> list[Check]:
        """All that is to hold now."""
        verified = self._verified
        assert verified, "verify first"
        return [
            _check_content(verified, ready, self.guest.corrupt_lines),
            self._check_runs_on(),
            self._check_source_gone(),
            _check_page_counts(self.outcome),
            _check_downtime(self.outcome),
            self._check_nothing_left(),
        ]

    def keep(self) -> None:
        """The guest at the destination stays when the scenario ends."""
        self._kept = True

    # --- what the steps stand on -------------------------------------------------------------

    def _spec(self, *, incoming: bool) -> VmSpec:
        setting = self.setting
        return VmSpec(
            backends=(Backend("ram", setting.memory_bytes),),
            incoming=incoming,
            boot=Boot(setting.kernel, setting.initrd, (f"workload={setting.workload}",)),
            qemu=setting.qemu,
            outlives_us=incoming and setting.keep,
        )

    def _end_destination(self) -> None:
        if self._kept:
            self.destination.release()
        else:
            self.destination.kill()

    def _take_message(self, message: Message, show: Callable[[Message], None]) -> None:
        if not self._started_s:
            self._started_s = time.monotonic()
        if message["type"] == "result":
            stream_keys = ("v", "type", "ts")
            self.result = {key: message[key] for key in message if key not in stream_keys}
        show(message)

    # --- the checks --------------------------------------------------------------------------

    def _check_runs_on(self) -> Check:
        what = "the guest runs on at the destination"
        before = self.guest.reports[-1].operations
        report = self.guest.wait_report_after(time.monotonic(), _REPORT_SECONDS)
        status = self.destination.observer.status()
        Measurement(self.guest.reports)  # raises if the guest went back
        holds = report.port == _DESTINATION_PORT and status == "running"
        return Check(what, holds and report.operations >= before, f"QEMU says {status}")

    def _check_source_gone(self) -> Check:
        what = "the source QEMU has quit"
        try:
            return Check(what, self.source.wait(_QUIT_SECONDS) == 0, "as the plan says")
        except QpostcopyError as error:
            return Check(what, False, str(error))

    def _check_nothing_left(self) -> Check:
        pid = self.destination.pid
        left = [f"process {line}" for line in processes_naming(self.run_directory)]
        left += [f"socket {path}" for path in sockets_below(self.run_directory)]
        left += [f"range {name} registered in QEMU" for name in registered_ranges(pid)]
        left += [f"userfaultfd {fd} in QEMU" for fd in userfaultfds(pid)]
        detail = "; ".join(left) or "no process, no socket, no registered range, no userfaultfd"
        return Check("nothing of ours is left", not left, detail)


def _check_content(verified: Verified, ready: Ready, corrupt_lines: Sequence[str]) -> Check:
    told = "; ".join(["", *corrupt_lines])
    return Check(
        "every page is right",
        verified.corrupt == 0 and verified.pages == ready.data_pages + ready.zero_pages,
        f"{verified.corrupt} of {verified.pages} pages corrupt{told}",
    )


def _check_page_counts(result: Result) -> Check:
    counts = result.pages.model_dump()
    parts = {kind: counts[kind] for kind in PAGE_KINDS}
    counted, total = sum(parts.values()), result.pages.total
    told = " + ".join(f"{kind} {count}" for kind, count in parts.items() if count)
    return Check(
        "the page counts add up",
        total == counted == result.ram_bytes // PAGE_BYTES,
        f"{told} = {counted} of {total}",
    )


def _check_downtime(result: Result) -> Check:
    downtime_ms = result.downtime_ms
    return Check(
        f"downtime is under {DOWNTIME_LIMIT_MS:.0f} ms",
        downtime_ms is not None and downtime_ms < DOWNTIME_LIMIT_MS,
        "unknown" if downtime_ms is None else f"{downtime_ms:.1f} ms",
        decides=False,
    )
