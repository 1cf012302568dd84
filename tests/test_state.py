"""The state directory: durable, found by name, one controller, and processes that are proven."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from qpostcopy.phases import Phase
from qpostcopy.process import Process
from qpostcopy.registry import claim
from qpostcopy.side import Role
from qpostcopy.state import (
    ControllerAliveError,
    StateDirectory,
    StateUnreadableError,
    UnknownMigrationError,
    write_durably,
)


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QPOSTCOPY_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


def create(name: str = "web1") -> StateDirectory:
    return StateDirectory.create(
        name,
        plan_text="version: 1\n",
        profile="sequential",
        source_qmp=Path("/run/a.qmp"),
        destination_qmp=Path("/run/b.qmp"),
    )


def test_a_new_directory_is_private_and_complete() -> None:
    directory = create()
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory.path / "state.json").stat().st_mode) == 0o600
    assert (directory.path / "plan.yaml").read_text() == "version: 1\n"
    assert not directory.committed
    assert StateDirectory.open(directory.path).state == directory.state


def test_ids_of_one_second_differ_and_tokens_too() -> None:
    first, second = create(), create()
    assert first.migration_id != second.migration_id
    assert first.state.token != second.state.token


def test_update_is_on_disk_when_it_returns() -> None:
    directory = create()
    directory.update(uffd_fd=33, phase=Phase.SWITCHOVER)
    directory.update_side("destination", qemu=Process(pid=4, start_ticks=5))
    again = StateDirectory.open(directory.path)
    assert again.state.uffd_fd == 33
    assert again.state.phase is Phase.SWITCHOVER
    assert again.state.destination.qemu == Process(pid=4, start_ticks=5)
    assert again.state.source.qemu is None


def test_a_note_goes_to_disk_with_the_next_update() -> None:
    directory = create()
    directory.note(stopped_seconds=1.5)
    assert directory.state.stopped_seconds == 1.5
    assert StateDirectory.open(directory.path).state.stopped_seconds is None
    directory.update(uffd_fd=3)
    assert StateDirectory.open(directory.path).state.stopped_seconds == 1.5


def test_a_write_cut_short_leaves_the_old_state() -> None:
    directory = create()
    (directory.path / "state.json.new").write_text('{"vers')
    assert StateDirectory.open(directory.path).state == directory.state


def test_unknown_fields_are_our_bug() -> None:
    with pytest.raises(AssertionError, match="uffd"):
        create().update(uffd=1)


@pytest.mark.parametrize("content", [b"nonsense", b"", b"[]", b"\xff\0\xfe", b"[" * 100_000])
def test_the_commit_is_a_file_of_its_own(content: bytes) -> None:
    directory = create()
    directory.record_commit()
    (directory.path / "state.json").write_bytes(content)
    assert directory.committed
    with pytest.raises(StateUnreadableError, match="cannot be read"):
        StateDirectory.open(directory.path)


def test_find_by_id_by_plan_and_latest() -> None:
    old, new, other = create("web1"), create("web1"), create("db-2")
    assert StateDirectory.find(old.migration_id).path == old.path
    assert StateDirectory.find("web1").path == new.path
    assert StateDirectory.find("db-2").path == other.path
    assert StateDirectory.find(None).path in (new.path, other.path)


@pytest.mark.parametrize("name", ["web", "web1-", "20261123T101500", "nothing", "../web1"])
def test_find_never_guesses(name: str) -> None:
    directory = create("web1")
    with pytest.raises(UnknownMigrationError, match="no migration") as caught:
        StateDirectory.find(name)
    assert directory.migration_id in str(caught.value.remedy)


def test_one_controller_at_a_time() -> None:
    directory = create()
    other = StateDirectory.open(directory.path)
    with (
        directory.lock(),
        pytest.raises(ControllerAliveError, match="already has a controller"),
        other.lock(),
    ):
        pass
    with other.lock():
        pass


def test_the_lock_reads_what_the_last_controller_wrote() -> None:
    late = create()
    early = StateDirectory.open(late.path)
    early.update(uffd_fd=7)
    with late.lock():
        assert late.state.uffd_fd == 7


OURS = Process(pid=10, start_ticks=20)


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_second_migration_of_a_qemu_is_found(side: Role) -> None:
    first, second = create("one"), create("two")
    assert claim(first, {"source": OURS}) is None
    found = claim(second, {side: OURS})
    assert found is not None
    assert found.path == first.path
    assert claim(first, {"source": OURS}) is None, "what is refused is in nobody's way"


def test_of_two_that_begin_at_once_one_has_the_qemu() -> None:
    """By two monitors of one QEMU: nothing but its process tells that it is the same."""
    both = [create("one"), create("two")]
    for directory in both:
        directory.update_side("source", qemu=OURS)  # as its companion told it
    begin = threading.Barrier(len(both))

    def look(directory: StateDirectory) -> bool:
        begin.wait(10)
        return claim(directory, {"source": OURS}) is None

    with ThreadPoolExecutor() as pool:
        assert sorted(pool.map(look, both)) == [False, True]


def test_a_reused_pid_is_another_qemu() -> None:
    first, second = create("one"), create("two")
    assert claim(first, {"source": OURS}) is None
    assert claim(second, {"source": replace(OURS, start_ticks=21)}) is None


@pytest.mark.parametrize(
    ("status", "unfinished"), [("completed", False), ("failed", False), ("interrupted", True)]
)
def test_only_interrupted_results_can_be_improved(status: str, unfinished: bool) -> None:
    first, second = create("one"), create("two")
    assert claim(first, {"source": OURS}) is None
    first.write_result({"status": status})
    assert (claim(second, {"source": OURS}) is not None) is unfinished


def test_a_rollback_that_failed_is_not_the_end_while_the_source_lives() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        directory = create()
        directory.update_side("source", qemu=Process.of(child.pid))
        directory.write_result({"status": "failed"})
        assert not directory.finished
        directory.record_commit()
        assert directory.finished, "failed after the commit: nothing can be done"
        directory.erase_commit()
    finally:
        child.kill()
        child.wait()
    assert directory.finished


def test_write_durably_replaces_whole(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old and longer")
    write_durably(target, "new")
    assert target.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["file"]


def test_a_process_is_proven_alive_and_proven_gone() -> None:
    child = subprocess.Popen(["sleep", "60"])
    process = Process.of(child.pid)
    assert process is not None
    assert process.alive()
    assert not process.wait_gone(0)
    assert process.kill(5.0)
    assert not process.alive()  # a zombie still: gone all the same
    assert child.wait() == -signal.SIGKILL
    assert Process.of(child.pid) is None
    assert process.kill(0)


def test_a_signal_never_reaches_an_heir_of_the_pid() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        process = Process.of(child.pid)
        assert process is not None
        heir = replace(process, start_ticks=process.start_ticks - 1)
        assert not heir.alive()
        assert heir.kill(1.0)
        assert process.alive()
    finally:
        child.kill()
        child.wait()


def test_a_name_with_brackets_does_not_confuse_the_start_time(tmp_path: Path) -> None:
    odd = tmp_path / "a) S 1 (b"
    odd.symlink_to("/bin/sleep")
    child = subprocess.Popen([str(odd), "60"])
    try:
        mine, its = Process.of(os.getpid()), Process.of(child.pid)
        assert mine is not None
        assert its is not None
        assert its.start_ticks >= mine.start_ticks
    finally:
        child.kill()
        child.wait()
