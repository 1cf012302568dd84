"""A byte-for-byte case: RAM filled by the test is moved, and every byte compared.

QEMU is started with `-S` and stays paused, so nobody but us writes.
"""

from __future__ import annotations

import random
from pathlib import Path

import yaml

from tests.vm.scene import PAGE, Scene, assert_clean, status
from tests.vm.series import KINDS
from tests.vm.setups import PLAIN, Setup


def write_runs(scene: Scene, seed: int, hole_factor: int) -> None:
    """Data, zero pages and holes in runs of very different lengths, over all of RAM.

    :param hole_factor: how much longer holes are than what is written.
    """
    chance = random.Random(seed)
    for backend in scene.source.spec.backends:
        fd = scene.source.ram_fd(backend.name)
        at, pages = 0, backend.size_bytes // PAGE
        with open(fd, "wb", buffering=0, closefd=False) as ram:
            while at < pages:
                count = min(chance.choice([1, 1, 3, 63, 64, 65, 700]), pages - at)
                kind = chance.randrange(3)
                ram.seek(at * PAGE)
                if kind == 0:
                    ram.write(chance.randbytes(count * PAGE))
                elif kind == 1:
                    ram.write(bytes(count * PAGE))
                else:
                    count *= hole_factor
                at += count


def move_and_compare(
    directory: Path,
    sizes: tuple[int, ...],
    profile: object,
    seed: int,
    push_lanes: int = 1,
    setup: Setup = PLAIN,
) -> None:
    """One case, from the start of both QEMUs to their end."""
    with Scene(directory, setup=setup, sizes=sizes, running=False) as scene:
        more = {"profile": profile, "lanes": {"push": push_lanes}}
        scene.plan.write_text(scene.plan.read_text() + yaml.safe_dump(more))
        write_runs(scene, seed, setup.hole_factor)
        result = scene.run_controller_here()
        assert result["status"] == "completed", f"{result}\n{scene.logs()}"
        scene.assert_same_ram(start=0)
        assert status(scene.destination) == "prelaunch"
        pages = result["pages"]
        assert pages["total"] * PAGE == sum(sizes)
        assert pages["total"] == sum(pages[kind] for kind in KINDS)
        assert_clean(scene.destination)
        scene.assert_nothing_left()
