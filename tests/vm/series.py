"""A guest that is moved from QEMU to QEMU, and looks at its memory.

The destination of one migration is the source of the next.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import yaml

from qpostcopy.lab.guest import Guest
from qpostcopy.lab.vm import Vm
from qpostcopy.state import StateDirectory
from tests.vm.devices import Host, rounds
from tests.vm.scene import (
    Ended,
    assert_clean,
    environment_of,
    finish,
    finish_after,
    kill,
    read_until_phase,
    resumes,
    status,
    wait_until,
)
from tests.vm.setups import PLAIN, Setup

KINDS = ("hole", "zero", "precopy", "push", "demand", "around")
PROFILES = ("sequential", "low-memory-first")
READY_SECONDS = 60.0
VERIFY_SECONDS = 60.0
REPORT_SECONDS = 20.0
MOST_PUSHED = 160 << 20
ROUND_SECONDS = 60.0


class Series:
    """One guest, and the QEMU that it is in."""

    def __init__(self, directory: Path, setup: Setup = PLAIN) -> None:
        self.directory = directory
        self.run_directory = directory / "run"
        self.host = Host(setup.devices, directory) if setup.devices else None
        self.setup = setup = setup.with_more(self.host.arguments if self.host else ())
        self.boot = setup.boot()
        spec = setup.source(setup.guest_sizes, boot=self.boot)
        self.here = Vm("vm0", spec, directory).start()
        self.made = [self.here]
        self.guest = Guest(self.here.serial)

    def __enter__(self) -> Self:
        try:
            self.guest.wait_ready(READY_SECONDS)
            self.wait_devices()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.guest.close()
        for vm in self.made:
            vm.kill()
        if self.host:
            self.host.close()

    def next_destination(self) -> Vm:
        spec = self.setup.destination(self.setup.guest_sizes, boot=self.boot)
        vm = Vm(f"vm{len(self.made)}", spec, self.directory).start()
        self.made.append(vm)
        return vm

    def start(
        self, there: Vm, *, profile: object, push: str, at: str = ""
    ) -> subprocess.Popen[str]:
        plan = {
            "version": 1,
            "name": "series",
            "source": {"qmp": str(self.here.qmp_path)},
            "destination": {"qmp": str(there.qmp_path)},
            "profile": profile,
            "limits": {"push": push},
        }
        path = self.directory / "plan.yaml"
        path.write_text(yaml.safe_dump(plan))
        return subprocess.Popen(
            [sys.executable, "-m", "qpostcopy", "migrate", str(path), "--json"],
            env=environment_of(self.run_directory, at),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def logs(self) -> str:
        latest = max(self.run_directory.iterdir())
        return "\n".join(path.read_text(errors="replace") for path in latest.glob("*.log"))

    # --- the three kinds ------------------------------------------------------------------

    def plain(self, chance: random.Random) -> None:
        there = self.next_destination()
        self.arrive(there, finish(self.start(there, profile=chance.choice(PROFILES),
                                             push="unlimited")))  # fmt: skip

    def handler_killed(self, chance: random.Random) -> None:
        """At a random moment of a postcopy that takes about a second."""
        there = self.next_destination()
        # Of a big guest most is never touched: it has no more to push than a small one.
        push = f"{min(sum(self.setup.guest_sizes), MOST_PUSHED) // 2 >> 20}MiB/s"
        viewer = self.start(there, profile=chance.choice(PROFILES), push=push)
        read = read_until_phase(viewer, "postcopy")
        time.sleep(chance.uniform(0, 0.6))
        latest = StateDirectory.open(max(self.run_directory.iterdir()))
        kill(latest.state.destination.companion)
        self.arrive(there, finish_after(viewer, read))

    def destination_killed(self, chance: random.Random) -> None:
        """Before the commit: the guest runs on where it is, and its memory is untouched."""
        there = self.next_destination()
        # No later than `confirm`: one that dies while the record is written may be sent its
        # `cont` before its death shows, and whether it ran is then unknown (`failed`, 11).
        step = chance.choice(["attach", "stop_source", "load_device_state", "confirm"])
        at = f"{step}:before SIGKILL destination"
        ended = finish(self.start(there, profile="sequential", push="unlimited", at=at))
        assert ended.ended == ("rolled-back", 4, "source"), self.logs()
        assert status(self.here) == "running"
        assert resumes(there) == 0
        self.wait_alive()

    def arrive(self, there: Vm, ended: Ended) -> None:
        assert ended.ended == ("completed", 0, "destination"), ended.err + self.logs()
        pages = ended.result["pages"]
        assert pages["total"] == sum(pages[kind] for kind in KINDS), pages
        assert status(there) == "running"
        assert_clean(there)
        assert self.here.wait(20) == 0  # the source has quit, by itself
        self.here = there
        self.guest.add(there.serial)
        self.wait_alive()

    def wait_alive(self) -> None:
        """It goes on to work, and has met no wrong page."""
        report = self.guest.wait_report_after(time.monotonic(), REPORT_SECONDS)
        assert report.corrupt == 0, self.guest.corrupt_lines
        self.wait_devices()

    def wait_devices(self) -> None:
        """Each does a whole round of its work from now on, and nothing that is wrong."""
        if self.host is None:
            return
        work, names, balloon = self.guest.work, self.host.devices.names, self.host.balloon
        moves = balloon.moves[-1]
        done = {name: work[name].operations if name in work else 0 for name in names}
        self.guest.wait_work({name: done[name] + rounds(name) for name in names}, ROUND_SECONDS)
        wait_until(lambda: balloon.moves[-1] > moves, "the balloon moves")
        assert self.guest.reports[-1].corrupt == 0, self.guest.corrupt_lines
        self.host.assert_right()

    def verify(self) -> None:
        verified = self.guest.verify(VERIFY_SECONDS)
        assert verified.pages > 0
        assert verified.corrupt == 0, self.guest.corrupt_lines
