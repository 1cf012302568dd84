"""The stage of a run: what it gives the guest, and that nothing outlives it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from qpostcopy.bench import stage as stage_module
from qpostcopy.bench.link import LinkError
from qpostcopy.bench.stage import Conditions, calibrate, rate_key, stage
from qpostcopy.lab.guest import GuestError, find_image
from qpostcopy.lab.vm import VmError
from tests.bench.books import cell

IMAGE = Path("/no/vmlinuz"), Path("/no/initrd")


def conditions_of(qemu: str = "/bin/false", image: tuple[Path, Path] = IMAGE) -> Conditions:
    return Conditions("test", *image, {"10.0": qemu})


def present() -> set[Path]:
    """By names that carry our pid: others may be at work on this machine."""
    pid = os.getpid()
    namespaces = Path("/run/netns").glob(f"qpcbench-{pid}-*")
    return {*namespaces, *Path("/dev/shm").glob(f"qpostcopy-bench-{pid}-*")}


def test_only_service_has_a_rate() -> None:
    service, kv = cell(workload="service"), cell(workload="kv")
    rates = {rate_key(service): 1500}
    known = Conditions("test", *IMAGE, {}, rates)
    assert known.rate_words(service) == ("rate=1500",)
    assert known.rate_words(kv) == ()
    # Nothing is said while it is calibrated, and to a guest of another size.
    assert conditions_of().rate_words(service) == ()
    assert known.rate_words(cell(workload="service", memory_mib=1024)) == ()


def test_directories_of_the_dead_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "_TMPFS", tmp_path)
    ended = subprocess.Popen(["/bin/true"])
    ended.wait()
    dead = tmp_path / f"qpostcopy-bench-{ended.pid}-abc"
    kept = [
        tmp_path / f"qpostcopy-bench-{os.getpid()}-abc",
        tmp_path / f"qpostcopy-bench-x{ended.pid}-abc",
        tmp_path / f"qpostcopy-{ended.pid}-abc",
    ]
    for path in (dead, *kept):
        path.mkdir()
        (path / "ram").touch()
    stage_module._sweep()
    assert sorted(tmp_path.iterdir()) == sorted(kept)


@pytest.mark.root
@pytest.mark.parametrize("shared", [True, False])
def test_a_qemu_that_does_not_start_leaves_nothing(shared: bool) -> None:
    with pytest.raises(VmError), stage(cell(memory_mib=128), conditions_of(), shared=shared):
        pytest.fail("there is no guest")
    assert present() == set()


@pytest.mark.root
@pytest.mark.vm
def test_a_guest_that_does_not_boot_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real QEMU that has not booted anything by then."""
    monkeypatch.setattr(stage_module, "_BOOT_SECONDS", 0.2)
    conditions = conditions_of("qemu-system-x86_64", find_image())
    with pytest.raises(GuestError):
        calibrate(cell(workload="service", memory_mib=128), conditions)
    assert present() == set()


def test_whoever_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LinkError) as caught, stage(cell(), conditions_of(), shared=True):
        pytest.fail("there is no link")
    assert caught.value.remedy == "run scripts/bench as root"
    assert present() == set()
