"""Signals are kept until somebody takes them; a controller begins only if it is told to."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, cast

import pytest

from qpostcopy.cli import main, starter
from qpostcopy.cli.signals import InterruptedEarlyError, Signals, TerminatedEarlyError
from qpostcopy.cli.starter import ControllerProcess, ControllerStartError
from qpostcopy.cli.viewer import (
    ControllerLostError,
    DisplayLeftAfterCommitError,
    DisplayLeftError,
    Viewer,
    run_controller,
)
from qpostcopy.process import Process
from qpostcopy.qmp import schema
from qpostcopy.qmp.server import Endpoint
from qpostcopy.state import CONTROL_SOCKET, StateDirectory
from tests.qmp.support import private_directory
from tests.test_report import result

PLAN = "version: 1\nname: web1\nsource: {qmp: /nowhere/a}\ndestination: {qmp: /nowhere/b}\n"


def in_a_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        async def body() -> None:
            await test(*arguments, **named)

        asyncio.run(body())

    return run


@pytest.fixture(autouse=True)
def run_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with private_directory() as path:  # short enough for a socket
        monkeypatch.setenv("QPOSTCOPY_RUN_DIR", str(path / "run"))
        yield path


@pytest.fixture
def directory() -> StateDirectory:
    return StateDirectory.create(
        "web1",
        plan_text=PLAN,
        profile="sequential",
        source_qmp=Path("/nowhere/a"),
        destination_qmp=Path("/nowhere/b"),
    )


def child_of(process: ControllerProcess) -> subprocess.Popen[bytes]:
    return process._child


# --- keeping them -------------------------------------------------------------------------


def test_signals_wait_to_be_taken() -> None:
    signals = Signals.install()
    signals.cancel_if_any()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    assert select.select([signals.fd], [], [], 0)[0]
    assert signals.take() == ["SIGTERM", "SIGINT"]
    assert signals.take() == []
    with pytest.raises(TerminatedEarlyError, match="nothing was touched"):
        signals.cancel_if_any()


def test_a_signal_after_the_end_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "run", lambda: 4)
    with pytest.raises(SystemExit) as caught:
        main.entry()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    assert caught.value.code == 4


def test_a_signal_before_there_is_a_migration(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It came while the plan was read: no state directory, no controller."""
    plan = run_dir / "plan.yaml"
    plan.write_text(PLAN)
    from qpostcopy.config import load_plan

    def load(path: Path, profile: str | None) -> Any:
        signal.raise_signal(signal.SIGINT)
        return load_plan(path, profile=profile)

    monkeypatch.setattr("qpostcopy.config.load_plan", load)
    assert main.run(["migrate", str(plan), "--json"]) == 130
    told = json.loads(capsys.readouterr().out)
    assert (told["status"], told["rc"], told["vm_location"]) == ("cancelled", 130, "source")
    assert not (run_dir / "run").exists()


# --- a controller that is held back -------------------------------------------------------


def test_a_controller_that_is_not_told_to_go_touches_nothing(directory: StateDirectory) -> None:
    """Its starter died: the end of its standard input is no `go`."""
    directory.write_result({"status": "interrupted"})
    ready_read, ready_write = os.pipe()
    child = subprocess.Popen(
        [
            *[sys.executable, "-m", "qpostcopy.controller", str(directory.path)],
            *["--resume", "--ready-fd", str(ready_write)],
        ],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[ready_write],
    )
    os.close(ready_write)
    with os.fdopen(ready_read, "rb") as ready:
        assert ready.read() == b"ready\n"
    child.communicate(timeout=20)
    assert child.returncode != 0
    assert [stamp.name for stamp in StateDirectory.open(directory.path).state.phases] == ["prepare"]
    assert directory.read_result() == {"status": "interrupted"}
    assert not (directory.path / CONTROL_SOCKET).exists()
    assert not (directory.path / "page-server.log").exists()


def test_go_is_a_byte(directory: StateDirectory) -> None:
    """With it the migration is tried: here it is refused, for there is no QEMU."""
    process = ControllerProcess.start(directory, Signals(), resume=False)
    process.go()
    process.abandon()  # too late, and so it does nothing
    assert child_of(process).wait(30) == 3
    found = directory.read_result()
    assert found is not None
    assert found["status"] == "refused"


def test_an_abandoned_controller_is_gone(directory: StateDirectory) -> None:
    process = ControllerProcess.start(directory, Signals(), resume=False)
    process.abandon()
    assert child_of(process).returncode is not None
    assert directory.read_result() is None
    assert not (directory.path / "page-server.log").exists()


def sleeping(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Controllers that never say `ready`."""
    children: list[subprocess.Popen[bytes]] = []

    def spawn(*_: object, **__: object) -> subprocess.Popen[bytes]:
        ready = os.dup(cast(int, _[1]))  # kept open, as the controller itself would
        children.append(
            subprocess.Popen(
                [sys.executable, "-c", "import signal; signal.sigwait([signal.SIGUSR1])"],
                stdin=subprocess.PIPE,
                pass_fds=[ready],
                bufsize=0,
            )
        )
        os.close(ready)
        return children[-1]

    monkeypatch.setattr(starter, "_spawn", spawn)
    return children


def test_a_controller_that_does_not_come_up_is_ended(
    directory: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = sleeping(monkeypatch)
    monkeypatch.setattr(starter, "START_SECONDS", 0.3)
    with pytest.raises(ControllerStartError, match=r"nothing was touched.*not ready within"):
        ControllerProcess.start(directory, Signals(), resume=False)
    assert children[0].returncode == -signal.SIGTERM


@pytest.mark.parametrize(("committed", "code"), [(False, 1), (True, 10)])
def test_a_controller_that_cannot_resume(
    directory: StateDirectory, monkeypatch: pytest.MonkeyPatch, committed: bool, code: int
) -> None:
    """A full disk, say: the guest of a committed migration waits, and `resume` is the way."""
    sleeping(monkeypatch)
    monkeypatch.setattr(starter, "START_SECONDS", 0.3)
    if committed:
        directory.record_commit()
    with pytest.raises(ControllerStartError, match="it changed nothing") as caught:
        ControllerProcess.start(directory, Signals(), resume=True)
    assert caught.value.exit_code == code
    assert f"qpostcopy resume {directory.migration_id}" in str(caught.value.remedy)


def test_a_second_signal_ends_a_start_that_hangs(
    directory: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = sleeping(monkeypatch)
    signals = Signals.install()
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    begun = time.monotonic()
    with pytest.raises(InterruptedEarlyError, match="nothing was touched"):
        ControllerProcess.start(directory, signals, resume=False)
    assert time.monotonic() - begun < 5
    assert children[0].returncode is not None


def test_a_signal_after_the_result_only_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import signal; signal.sigwait([signal.SIGUSR1])"
    signals = Signals.install()
    with subprocess.Popen([sys.executable, "-c", code]) as child:
        signal.raise_signal(signal.SIGINT)
        begun = time.monotonic()
        ControllerProcess(child, signals).wait_end()
        assert time.monotonic() - begun < 5
        child.kill()


# --- the viewer ---------------------------------------------------------------------------


class Said:
    """A display that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.shown: list[dict[str, object]] = []
        self.noted = asyncio.Event()

    def __enter__(self) -> Said:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, message: dict[str, object]) -> None:
        self.shown.append(message)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.noted.set()


class Controlled:
    """A controller's endpoint whose abort is played, and a process that waits for its go.

    :param answers: what `qpc-abort` does: an error to raise, or None.
    """

    def __init__(self, directory: StateDirectory, answers: Exception | None = None) -> None:
        self.directory = directory
        self.answers = answers
        self.log: list[str] = []
        self.gone_ahead = False
        self.went = asyncio.Event()
        self.endpoint = Endpoint(directory.path / CONTROL_SOCKET, schema.CONTROLLER, self)

    async def qpc_hello(self, _: schema.Empty) -> schema.Hello:
        raise NotImplementedError

    async def qpc_status(self, _: schema.Empty) -> schema.Status:
        return schema.Status(
            migration_id=self.directory.migration_id,
            phase="prepare",
            vm_location="source",
            abort_safe=True,
            message="",
            progress={},
        )

    async def qpc_abort(self, arguments: schema.Abort) -> schema.Empty:
        self.log.append(f"abort {arguments.signal}")
        if self.answers is not None:
            raise self.answers
        return schema.Empty()

    def go(self) -> None:
        self.gone_ahead = True
        self.log.append("go")
        self.went.set()

    def abandon(self) -> None:
        if not self.gone_ahead:
            self.log.append("abandoned")

    def end(self) -> None:
        message = {"v": 1, "type": "result", "ts": 1.0} | result().to_json()
        self.endpoint.emit(schema.ControllerMessage(message=message))


def watching(viewer: Viewer, played: Controlled) -> asyncio.Task[dict[str, object]]:
    return asyncio.create_task(viewer.watch(cast(ControllerProcess, played)))


async def until(said: Said, text: str) -> None:
    async with asyncio.timeout(10):
        while not any(text in note for note in said.notes):
            said.noted.clear()
            await said.noted.wait()


@in_a_loop
async def test_an_early_signal_is_sent_before_go(directory: StateDirectory) -> None:
    signals, said, played = Signals.install(), Said(), Controlled(directory)
    signal.raise_signal(signal.SIGTERM)
    signals.take()  # as the start of the controller does
    await played.endpoint.listen()
    try:
        task = watching(Viewer(directory, said, signals), played)
        await until(said, "cancelling; the VM stays at the source")
        await played.went.wait()
        played.end()
        assert (await task)["status"] == "completed"
    finally:
        await played.endpoint.close()
    assert played.log == ["abort SIGTERM", "go"]


@in_a_loop
async def test_a_signal_with_nobody_to_ask_yet_is_not_swallowed(directory: StateDirectory) -> None:
    """The first is kept, the second leaves: the controller is never told to go."""
    signals, said = Signals.install(), Said()
    played = Controlled(directory)
    sock_path = directory.path / CONTROL_SOCKET
    with socket.socket(socket.AF_UNIX) as listener:  # it accepts, and never greets
        listener.bind(str(sock_path))
        listener.listen()
        task = watching(Viewer(directory, said, signals), played)
        await asyncio.sleep(0)
        signal.raise_signal(signal.SIGINT)
        await until(said, "as soon as the controller answers")
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(InterruptedEarlyError):
            async with asyncio.timeout(5):
                await task
    assert played.log == ["abandoned"]


@pytest.mark.parametrize(
    "answers", [None, RuntimeError("too late")], ids=["a hanging rollback", "a failed abort"]
)
@pytest.mark.parametrize("committed", [False, True])
@in_a_loop
async def test_a_second_signal_always_leaves(
    directory: StateDirectory, answers: Exception | None, committed: bool
) -> None:
    signals, said, played = Signals.install(), Said(), Controlled(directory, answers)
    if committed:
        directory.record_commit()
    await played.endpoint.listen()
    try:
        task = watching(Viewer(directory, said, signals), played)
        await played.went.wait()
        signal.raise_signal(signal.SIGINT)
        await until(said, "once more leaves this display")
        signal.raise_signal(signal.SIGTERM)
        leaving = DisplayLeftAfterCommitError if committed else DisplayLeftError
        with pytest.raises(leaving, match=f"qpostcopy status {directory.migration_id}"):
            async with asyncio.timeout(5):
                await task
    finally:
        await played.endpoint.close()
    assert played.log == ["go", "abort SIGINT"]


@in_a_loop
async def test_a_controller_that_does_not_answer_is_never_told_to_go(
    directory: StateDirectory,
) -> None:
    played = Controlled(directory)
    with pytest.raises(ControllerStartError, match="nothing was touched"):
        await Viewer(directory, Said(), Signals()).watch(cast(ControllerProcess, played))
    assert played.log == ["abandoned"]


@in_a_loop
async def test_somebody_else_brought_it_to_its_end(directory: StateDirectory) -> None:
    """Then the controller that we started only says `ready` and ends."""
    directory.write_result(result().to_json())
    told = await Viewer(directory, Said(), Signals()).watch(
        cast(ControllerProcess, Controlled(directory))
    )
    assert told["status"] == "completed"


@pytest.mark.parametrize("finished", [True, False])
def test_who_loses_the_lock_watches_the_winner(
    directory: StateDirectory, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    def start(*_: object, **__: object) -> ControllerProcess:
        if finished:
            directory.write_result(result().to_json())
        raise ControllerStartError("already has a controller")

    monkeypatch.setattr(ControllerProcess, "start", start)
    if finished:
        told = run_controller(directory, Said(), Signals(), resume=True)
        assert told["status"] == "completed"
    else:  # nobody has it: then it is what it says
        with pytest.raises(ControllerStartError):
            run_controller(directory, Said(), Signals(), resume=True)


@in_a_loop
async def test_without_a_result_it_is_lost(directory: StateDirectory) -> None:
    with pytest.raises(ControllerLostError):
        await Viewer(directory, Said(), Signals()).watch()


# --- the command --------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "rc"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("when", ["created", "starting"])
def test_a_signal_in_the_first_moments(
    run_dir: Path, number: signal.Signals, rc: int, when: str
) -> None:
    """`cancelled` and its code, never death by the signal while a controller goes on."""
    plan = run_dir / "plan.yaml"
    plan.write_text(PLAN)
    viewer = subprocess.Popen(
        [sys.executable, "-m", "qpostcopy", "migrate", str(plan), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    state = wait_for_state(run_dir / "run", started=when == "starting")
    viewer.send_signal(number)
    out, err = viewer.communicate(timeout=60)
    (told,) = [m for m in map(json.loads, out.splitlines()) if m["type"] == "result"]
    # There is no QEMU: it may find that out before it hears of the signal.
    assert (told["rc"], told["status"]) in ((rc, "cancelled"), (3, "refused")), out + err
    assert viewer.returncode == told["rc"]
    assert told["vm_location"] == "source"
    controller = StateDirectory.open(state).state.controller
    assert controller is None or controller.wait_gone(20)


def wait_for_state(run: Path, *, started: bool) -> Path:
    """The state directory, once it is there, or once its controller is recorded."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with suppress(Exception):
            (found,) = run.glob("*/state.json")
            controller = StateDirectory.open(found.parent).state.controller
            if not started or isinstance(controller, Process):
                return found.parent
        time.sleep(0.005)
    raise AssertionError("no migration began")
