"""Every wrong set-up of wrong.py is refused, by name, before anything is touched.

Missing kernel features are the exception: tests/test_inspect.py takes them away.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qpostcopy.lab.leftovers import registered_ranges, userfaultfds
from qpostcopy.lab.vm import Vm
from qpostcopy.vmas import Vma, read_vmas
from tests.qmp.support import private_directory
from tests.vm.scene import Ended, Scene, capabilities, status
from tests.vm.spoil import RAM_BYTES, mapped_by_another
from tests.vm.wrong import ROWS, SECOND_MONITOR, Wrong

pytestmark = [pytest.mark.vm, pytest.mark.root]

TWO_MONITORS = Wrong("two-monitors", (), "", source={"more": SECOND_MONITOR})


@pytest.fixture
def directory() -> Iterator[Path]:
    with private_directory() as path:
        yield path


def ram_content(pid: int, vma: Vma) -> str:
    """Which pages the file has, and what is in them. Read as a file: no page appears by it."""
    digest, offset = hashlib.sha256(), 0
    fd = os.open(f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}", os.O_RDONLY)
    try:
        digest.update(str(os.fstat(fd).st_blocks).encode())
        while part := os.pread(fd, 1 << 20, offset):
            digest.update(part)
            offset += len(part)
    finally:
        os.close(fd)
    return digest.hexdigest()


def condition(vm: Vm) -> dict[str, object]:
    """Everything of a QEMU that a migration would change; RAM only where no guest runs."""
    files = [vma for vma in read_vmas(vm.pid) if vma.inode and vma.length_bytes >= RAM_BYTES]
    run_status = status(vm)
    return {
        "status": run_status,
        "capabilities": capabilities(vm),
        "parameters": vm.observer.execute("query-migrate-parameters"),
        "migration": vm.observer.execute("query-migrate").get("status"),
        "userfaultfds": userfaultfds(vm.pid),
        "ranges": registered_ranges(vm.pid),
        "ram": [ram_content(vm.pid, vma) for vma in files if run_status != "running"],
        "flags": [vma.flags for vma in files],
    }


def conditions(scene: Scene) -> list[dict[str, object]]:
    return [condition(vm) for vm in (scene.source, scene.destination)]


def run(scene: Scene, wrong: Wrong, *arguments: str) -> Ended:
    return scene.run(*arguments, "--json", through=wrong.through(scene.directory))


def assert_refused(ended: Ended, findings: list[dict[str, str]], wrong: Wrong) -> None:
    assert ended.ended == ("refused", 3, wrong.place), ended.out + ended.err
    found = sorted(f"{one['side']} {one['code']}" for one in findings)
    assert found == sorted(wrong.found), ended.err
    assert any(wrong.says in one["message"] for one in findings), ended.err
    assert all(one["remedy"] for one in findings)


#: Those that are played in the quick run, too.
QUICK = {"private-there", "same-file", "other-size", "mapped-there", "no-incoming", "held"}


def marks(row: Wrong) -> list[pytest.MarkDecorator]:
    return [] if row.name in QUICK and not row.migrate else [pytest.mark.slow]


@pytest.mark.parametrize(
    "wrong", [pytest.param(row, id=row.name, marks=marks(row)) for row in ROWS]
)
def test_refused(directory: Path, wrong: Wrong) -> None:
    with wrong.played(directory) as scene:
        before = conditions(scene)
        checked = run(scene, wrong, "check", str(scene.plan))
        assert_refused(checked, checked.result["findings"], wrong)
        if wrong.migrate:
            ended = run(scene, wrong, "migrate", str(scene.plan))
            assert_refused(ended, ended.result["error"]["findings"], wrong)
        assert conditions(scene) == before
        scene.assert_nothing_left()


def test_what_was_right_when_checked_is_looked_at_again(directory: Path) -> None:
    """Between `check` and `migrate` somebody maps the destination's RAM."""
    with Scene(directory, sizes=(RAM_BYTES,), running=False) as scene:
        assert scene.run("check", str(scene.plan), "--json").result["status"] == "ready"
        with mapped_by_another(scene.destination):
            before = conditions(scene)
            ended = scene.migrate()
            (found,) = ended.result["error"]["findings"]
            assert (ended.rc, found["code"]) == (3, "other-mapper")
            assert conditions(scene) == before
        scene.assert_nothing_left()


@pytest.mark.slow
def test_another_migration_of_this_vm(directory: Path) -> None:
    """Its controller is dead, its companions hold the monitors; it is named, not they."""
    with Scene(directory, sizes=(RAM_BYTES,), running=False) as scene:
        dead = scene.run_controller(at="set_parameters:after SIGKILL controller")
        before = conditions(scene)
        for verb in ("check", "migrate"):
            ended = scene.run(verb, str(scene.plan), "--json")
            result = ended.result
            (found,) = result["findings"] if verb == "check" else result["error"]["findings"]
            assert (ended.rc, found["code"]) == (3, "already-migrating")
            assert dead.migration_id in found["message"]
            assert f"qpostcopy resume {dead.migration_id}" in found["remedy"]
        assert conditions(scene) == before
        resumed = scene.run("resume", dead.migration_id, "--json")
        assert resumed.ended == ("rolled-back", 4, "source"), scene.logs()
        assert scene.run("check", str(scene.plan)).rc == 0


def test_another_migration_that_left_nobody(directory: Path) -> None:
    """All its processes are dead: its monitors are free, and it is found by its QEMUs, too."""
    with TWO_MONITORS.played(directory) as scene:
        at = ("page-server", "handler", "controller")
        dead = scene.run_controller(at=";".join(f"attach:before SIGKILL {one}" for one in at))
        text = scene.plan.read_text()
        elsewhere = text.replace("source.qmp", "second.qmp").replace("destination.qmp", "nowhere")
        for plan in (elsewhere, text):
            scene.plan.write_text(plan)
            (found,) = scene.run("check", str(scene.plan), "--json").result["findings"]
            assert found["code"] == "already-migrating"
            assert dead.migration_id in found["message"]
        resumed = scene.run("resume", dead.migration_id, "--json")
        assert resumed.ended == ("rolled-back", 4, "source"), scene.logs()
