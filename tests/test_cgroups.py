"""Memory limits over a process, in a false /proc; a true one is in tests/vm/wrong.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from qpostcopy.cgroups import memory_limit

MIB = 1 << 20


class World:
    """A /proc, and a cgroup hierarchy that is mounted somewhere."""

    def __init__(self, path: Path, version: int, root: str = "/") -> None:
        self.proc, self.top, self.version = path / "proc", path / "cgroup", version
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "7").mkdir()
        rest = "cgroup2 cgroup2 rw" if version == 2 else "cgroup cgroup rw,memory"
        noise = "22 1 0:5 / /sys rw - sysfs sysfs rw"
        mount = f"30 22 0:26 {root} {self.top} rw,relatime - {rest}"
        (self.proc / "self/mountinfo").write_text(f"{noise}\n{mount}\n")

    def process_in(self, path: str) -> None:
        line = f"0::{path}" if self.version == 2 else f"3:cpu:/\n4:memory:{path}"
        (self.proc / "7/cgroup").write_text(f"{line}\n")

    def group(self, path: str, limit: str, usage: int, cache: int = 0) -> None:
        group = self.top / path
        group.mkdir(parents=True, exist_ok=True)
        names = ["memory.max", "memory.current"]
        if self.version == 1:
            names = ["memory.limit_in_bytes", "memory.usage_in_bytes"]
        total = "total_" if self.version == 1 else ""
        (group / names[0]).write_text(f"{limit}\n")
        (group / names[1]).write_text(f"{usage}\n")
        stat = f"anon 1\nshmem 2\n{total}inactive_file {cache}\n{total}active_file 0\n"
        (group / "memory.stat").write_text(stat)

    @property
    def found(self) -> tuple[str, int] | None:
        limit = memory_limit(7, self.proc)
        if limit is None:
            return None
        return str(Path(limit.path).parent.relative_to(self.top)), limit.available_bytes


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    return World(tmp_path, request.param)


NONE = {1: "9223372036854771712", 2: "max"}


def test_no_limit(world: World) -> None:
    world.process_in("/vms/web1")
    world.group("vms", NONE[world.version], 5 * MIB)
    world.group("vms/web1", NONE[world.version], 5 * MIB)
    assert world.found is None


def test_the_tightest_on_the_way_up_counts(world: World) -> None:
    world.process_in("/vms/web1")
    world.group("vms", str(100 * MIB), 90 * MIB)
    world.group("vms/web1", str(50 * MIB), 20 * MIB)
    world.group("vms/web2", str(MIB), MIB)
    assert world.found == ("vms", 10 * MIB)


def test_page_cache_makes_room(world: World) -> None:
    world.process_in("/vms")
    world.group("vms", str(100 * MIB), 90 * MIB, cache=30 * MIB)
    assert world.found == ("vms", 40 * MIB)


def test_above_its_limit_there_is_nothing_left(world: World) -> None:
    world.process_in("/vms")
    world.group("vms", str(10 * MIB), 20 * MIB)
    assert world.found == ("vms", 0)


@pytest.mark.parametrize("version", [1, 2])
def test_only_a_part_of_the_hierarchy_is_mounted(tmp_path: Path, version: int) -> None:
    """As in a container."""
    world = World(tmp_path, version, root="/vms")
    world.group("web1", str(50 * MIB), 20 * MIB)
    world.process_in("/vms/web1")
    assert world.found == ("web1", 30 * MIB)
    world.process_in("/elsewhere/web1")
    assert world.found is None


def test_a_process_that_has_ended(world: World) -> None:
    assert world.found is None
