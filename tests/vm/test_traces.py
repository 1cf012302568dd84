"""A run leaves its trace, and the next one pushes in its order."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from qpostcopy.state import FAULT_TRACE, StateDirectory
from qpostcopy.trace import Trace, TracedBlock, encode, read_trace
from tests.qmp.support import private_directory
from tests.vm.scene import (
    MIB,
    PAGE,
    Scene,
    finish,
    finish_after,
    kill,
    read_until_phase,
    status,
    wait_until,
)
from tests.vm.series import Series

pytestmark = [pytest.mark.vm, pytest.mark.root]

SIZE = 32 * MIB


@pytest.fixture
def directory() -> Iterator[Path]:
    with private_directory() as path:
        yield path


def profile_of(trace: Path) -> dict[str, object]:
    return {"version": 1, "name": "again", "push": [{"trace": {"file": str(trace)}}]}


def pages_in(fd: int, size_bytes: int) -> frozenset[int]:
    """What the RAM file holds: asked, never read."""
    found: set[int] = set()
    at = 0
    while at < size_bytes:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # no data beyond here
            break
        at = os.lseek(fd, data, os.SEEK_HOLE)
        found |= set(range(data // PAGE, at // PAGE))
    return frozenset(found)


def arrivals(viewer: subprocess.Popen[str], fd: int, size_bytes: int) -> list[frozenset[int]]:
    """What was there, whenever two looks in a row agreed; each once, in order."""
    seen = [frozenset[int]()]
    while viewer.poll() is None:
        look = pages_in(fd, size_bytes)
        if look != seen[-1] and look == pages_in(fd, size_bytes):
            seen.append(look)
    return seen


def test_pages_are_pushed_in_the_order_of_a_trace(directory: Path) -> None:
    with Scene(directory, sizes=(SIZE,), running=False, push="4MiB/s") as scene:
        ram = scene.source.ram_fd("ram0")
        chance = random.Random(4)
        order = chance.sample(range(SIZE // PAGE), 500)
        for page in order:
            os.pwrite(ram, chance.randbytes(PAGE), page * PAGE)
        present = pages_in(ram, SIZE)  # the firmware's too
        order = [page for page in order if page in present]
        first, rest = order[:250], present - set(order[:250])
        trace = directory / "web.trace"
        faults = [page for page in first for _ in range(2)]  # twice means once
        trace.write_bytes(encode(Trace((TracedBlock("ram0", SIZE),), faults, range(len(faults)))))
        scene.plan.write_text(
            scene.plan.read_text() + yaml.safe_dump({"profile": profile_of(trace)})
        )

        viewer = scene.start_migrate()
        looks = arrivals(viewer, scene.destination.ram_fd("ram0"), SIZE)
        ended = finish(viewer)
        assert ended.ended == ("completed", 0, "destination"), scene.logs()
        scene.assert_same_ram(start=0)
        # The device state's pages are asked for when it is loaded.
        asked = set(read_trace(scene.state.path / FAULT_TRACE).locations)
        around = {page + ahead for page in asked for ahead in range(17)}
        during = [look - around for look in looks[1:]]
        expected = [page for page in first if page not in around]
        in_order = [look for look in during if 0 < len(look) <= len(expected)]
        assert len(in_order) > 5, "nothing was seen on its way"
        assert all(look == set(expected[: len(look)]) for look in in_order)
        assert all(look >= set(expected) for look in during if look & (rest - around))


def test_a_trace_of_another_vm_is_refused(directory: Path) -> None:
    """Exit code 2, with the place where it is named; nothing was touched."""
    with Scene(directory, sizes=(SIZE,)) as scene:
        trace = directory / "web.trace"
        trace.write_bytes(encode(Trace((TracedBlock("ram0", 2 * SIZE),), (1,), (0,))))
        plan = scene.plan.read_text()
        scene.plan.write_text(plan + yaml.safe_dump({"profile": profile_of(trace)}))
        line = scene.plan.read_text().splitlines().index("  - trace:") + 2
        for verb in ("check", "migrate"):
            ended = scene.run(verb, str(scene.plan), "--json")
            assert ended.rc == 2, ended.err
            error = ended.result["error"]
            assert f"{scene.plan}:{line}: profile.push[0].trace.file: " in error["message"]
            assert "with ram0 (64MiB); this VM has ram0 (32MiB)" in error["message"]
            assert "leaves a trace of it" in error["remedy"]
        scene.assert_back()
        trace.write_bytes(b"no trace")
        ended = scene.run("migrate", str(scene.plan), "--json")
        assert ended.rc == 2
        assert "is no fault trace of qpostcopy" in ended.result["error"]["message"]
        assert status(scene.source) == "running"


@pytest.mark.slow
def test_a_guest_leaves_its_trace_though_its_handler_is_killed(directory: Path) -> None:
    """And moves on in the order that it has left."""
    with Series(directory) as series:
        there = series.next_destination()
        viewer = series.start(there, profile="sequential", push="30MiB/s")
        read = read_until_phase(viewer, "postcopy")
        state = StateDirectory.open(max(series.run_directory.iterdir()))
        path = state.path / FAULT_TRACE
        wait_until(lambda: len(read_trace(path).locations) > 20, "faults")
        kill(state.state.destination.companion)
        before = read_trace(path)
        ended = finish_after(viewer, read)
        series.arrive(there, ended)
        trace = read_trace(path)
        told = ended.result["trace"]
        assert told == {"file": str(path), "faults": len(trace.locations), "left_out": 0}
        assert trace.locations[: len(before.locations)] == before.locations
        assert len(trace.locations) > len(before.locations)
        assert list(trace.times_us) == sorted(trace.times_us)
        assert trace.times_us[-1] < 60_000_000
        assert told["faults"] <= ended.result["faults"]["count"]

        kept = directory / "web.trace"
        shutil.copy(path, kept)
        there = series.next_destination()
        viewer = series.start(there, profile=profile_of(kept), push="40MiB/s")
        read = read_until_phase(viewer, "postcopy")
        kept.unlink()  # the next page server compiles the order from the migration's own copy
        kill(StateDirectory.open(max(series.run_directory.iterdir())).state.source.companion)
        series.arrive(there, finish_after(viewer, read))
        series.verify()
