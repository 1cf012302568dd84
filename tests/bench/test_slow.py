"""The handler that is slow on purpose: each fault later by so much, and nothing else."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from qpostcopy.bench import slow
from qpostcopy.bench.slow import SlowLibraryError, build_slow_library, slow_environment
from tests.qmp.support import private_directory
from tests.vm.scene import finish
from tests.vm.series import Series
from tests.vm.setups import MIB, Setup, bare

ROOT = Path(__file__).parents[2]
WARNINGS = ["-std=gnu11", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SOURCE = ROOT / "scripts" / "slow" / "slow_faults.c"
#: tests/c/test_slow_faults.c knows it, too.
LONG_DELAY_US = 600_000
DELAY_US = 1000


@pytest.fixture
def library(tmp_path: Path) -> Path:
    return build_slow_library(tmp_path / "cache")


def test_it_is_built_once(tmp_path: Path) -> None:
    cache = tmp_path / "not" / "there"
    library = build_slow_library(cache)
    built_ns = library.stat().st_mtime_ns
    assert build_slow_library(cache) == library
    assert library.stat().st_mtime_ns == built_ns
    assert list(cache.iterdir()) == [library], "nothing unfinished is left"


def test_a_source_that_changed_is_built_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = build_slow_library(tmp_path)
    changed = tmp_path / "changed.c"
    changed.write_text(SOURCE.read_text() + "/* changed */\n")
    monkeypatch.setattr(slow, "_SOURCE", changed)
    assert build_slow_library(tmp_path) != before


def test_what_cannot_be_built_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.c"
    broken.write_text("int main(")
    monkeypatch.setattr(slow, "_SOURCE", broken)
    with pytest.raises(SlowLibraryError, match=r"broken\.c: .*error"):
        build_slow_library(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlowLibraryError, match="gcc is not installed"):
        build_slow_library(tmp_path)


@pytest.mark.parametrize("name", ["a b.so", "a:b.so"])
def test_a_path_that_the_loader_would_cut_is_refused(name: str) -> None:
    with pytest.raises(SlowLibraryError, match="LD_PRELOAD"):
        slow_environment(Path("/x") / name, DELAY_US)


def run(library: Path, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | slow_environment(library, DELAY_US) | more
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_it_is_loaded(library: Path) -> None:
    said = run(library, "cat", "/proc/self/maps")
    assert (said.returncode, said.stderr) == (0, "")
    assert str(library) in said.stdout


@pytest.mark.parametrize("delay", ["", "1ms", "-1", "60000001"])
def test_a_delay_that_is_none_ends_it_at_once(library: Path, delay: str) -> None:
    ended = run(library, "true", QPOSTCOPY_SLOW_FAULTS_US=delay)
    assert ended.returncode == 1
    assert "QPOSTCOPY_SLOW_FAULTS_US" in ended.stderr


@pytest.mark.root
def test_c(tmp_path: Path) -> None:
    binary = tmp_path / "test_slow_faults"
    test = ROOT / "tests" / "c" / "test_slow_faults.c"
    subprocess.run(
        ["gcc", *WARNINGS, *SANITIZERS, str(test), str(SOURCE), "-o", str(binary), "-pthread"],
        check=True,
    )
    done = subprocess.run(
        [str(binary)],
        env=os.environ | {"QPOSTCOPY_SLOW_FAULTS_US": str(LONG_DELAY_US)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok " in done.stdout


@pytest.fixture
def series() -> Iterator[Series]:
    setup = Setup("bare", boot=bare, guest_sizes=(16 * MIB,))
    with private_directory() as directory, Series(directory, setup) as made:
        yield made


def faults_of_a_move(series: Series, environment: Mapping[str, str]) -> dict[str, Any]:
    """Move it so slowly that the guest must ask for pages."""
    there = series.next_destination()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        viewer = series.start(there, profile="sequential", push="8MiB/s")
    ended = finish(viewer)
    series.arrive(there, ended)
    series.verify()
    faults: dict[str, Any] = ended.result["faults"]
    assert faults["count"] > 50, faults
    return faults


@pytest.mark.root
@pytest.mark.vm
def test_a_real_guest_waits_a_millisecond_longer_for_each_page(
    series: Series, library: Path
) -> None:
    plain = faults_of_a_move(series, {})
    slowed = faults_of_a_move(series, slow_environment(library, DELAY_US))
    assert slowed["p50_us"] >= DELAY_US
    # All but the few that were answered before their delay began (see on_fault in core/fault.c).
    prompt = sum(count for upper_us, count in slowed["histogram"] if upper_us <= DELAY_US)
    assert prompt <= slowed["count"] / 20, slowed["histogram"]
    assert plain["p50_us"] < slowed["p50_us"] / 2
