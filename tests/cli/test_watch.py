"""`status --watch` of a controller that is played: when it ends, and what it never does."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qpostcopy.cli import main, watch
from qpostcopy.cli.display import JsonDisplay
from qpostcopy.cli.signals import Signals
from qpostcopy.cli.stream import Stream
from qpostcopy.errors import QpostcopyError
from qpostcopy.process import Process
from qpostcopy.progress import Progress
from qpostcopy.qmp import schema
from qpostcopy.qmp.client import RemoteError
from qpostcopy.state import StateDirectory
from tests.cli.test_signals import Controlled, in_a_loop
from tests.messages import documented, documented_stream
from tests.qmp.support import private_directory
from tests.test_report import result

PHASE = {"phase": "postcopy", "vm_location": "destination", "abort_safe": False, "message": ""}


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[StateDirectory]:
    with private_directory() as path:
        monkeypatch.setenv("QPOSTCOPY_RUN_DIR", str(path / "run"))
        made = StateDirectory.create(
            "web1",
            plan_text="version: 1\n",
            profile="sequential",
            source_qmp=Path("/run/a.qmp"),
            destination_qmp=Path("/run/b.qmp"),
        )
        made.update(controller=Process.of(os.getpid()))
        yield made


class Played(Controlled):
    """A controller that answers."""

    async def qpc_hello(self, _: schema.Empty) -> schema.Hello:
        return schema.Hello(
            role="controller",
            version="0",
            migration_id=self.directory.migration_id,
            pid=os.getpid(),
            qemu_pid=None,
            monitor="none",
        )

    async def qpc_status(self, _: schema.Empty) -> schema.Status:
        self.went.set()
        status = await super().qpc_status(_)
        return status.model_copy(update={"progress": Progress(phase="prepare").model_dump()})

    def say(self, kind: str, content: dict[str, Any]) -> None:
        head = {"v": 1, "type": kind, "ts": 1.0, "migration_id": self.directory.migration_id}
        self.endpoint.emit(schema.ControllerMessage(message=head | content))


def watching(directory: StateDirectory) -> tuple[Stream, asyncio.Task[Any]]:
    stream = Stream(on=True)
    stream.directory = directory
    watcher = watch._Watcher(stream, JsonDisplay(stream), Signals())
    return stream, asyncio.create_task(watcher.watch())


async def ends(task: asyncio.Task[Any]) -> Any:
    async with asyncio.timeout(10):
        return await task


def test_the_stream_is_status_then_what_the_controller_says(
    directory: StateDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    @in_a_loop
    async def body() -> None:
        played = Played(directory)
        await played.endpoint.listen()
        try:
            _, task = watching(directory)
            await played.went.wait()
            played.say("phase", PHASE)
            played.say("result", result().to_json())
            assert (await ends(task))["status"] == "completed"
        finally:
            await played.endpoint.close()
        assert played.log == [], "it must not ask for anything"

    body()
    told = documented_stream(capsys.readouterr().out)
    assert [message["type"] for message in told] == ["status", "phase", "result"]


def test_a_reader_that_leaves_ends_the_watch(directory: StateDirectory) -> None:
    @in_a_loop
    async def body() -> None:
        played = Played(directory)
        await played.endpoint.listen()
        try:
            stream, task = watching(directory)
            await played.went.wait()
            stream.lost = BrokenPipeError()
            played.say("phase", PHASE)
            assert await ends(task) is None
        finally:
            await played.endpoint.close()

    body()


def test_a_controller_that_falls_silent_is_told(
    directory: StateDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It greets and answers, then nothing: it is asked for a word, and what is known is told."""
    monkeypatch.setattr(watch, "QUIET_SECONDS", 0.2)
    monkeypatch.setattr(watch, "ASK_SECONDS", 0.2)
    monkeypatch.setattr("qpostcopy.cli.status.ASK_SECONDS", 0.2)
    monkeypatch.setattr(watch, "SUCCESSOR_SECONDS", 0.1)

    @in_a_loop
    async def body() -> None:
        played = Played(directory)
        stuck = asyncio.Event()

        async def hello(_: schema.Empty) -> schema.Hello:
            if played.went.is_set():
                await stuck.wait()
            return await Played.qpc_hello(played, _)

        monkeypatch.setattr(played, "qpc_hello", hello)
        await played.endpoint.listen()
        try:
            _, task = watching(directory)
            with pytest.raises(watch.NobodyAtWorkError, match="nobody has worked on"):
                await ends(task)
        finally:
            stuck.set()
            await played.endpoint.close()

    body()
    told = documented_stream(capsys.readouterr().out)
    assert [message["controller"] for message in told] == ["alive", "silent"]


def test_a_controller_that_refuses_is_told(
    directory: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It greets, so another one will not come: asking again and again would tell nobody."""

    @in_a_loop
    async def body() -> None:
        played = Played(directory)

        async def status(_: schema.Empty) -> schema.Status:
            raise QpostcopyError("not to you")

        monkeypatch.setattr(played, "qpc_status", status)
        await played.endpoint.listen()
        try:
            _, task = watching(directory)
            with pytest.raises(RemoteError, match="not to you"):
                await ends(task)
        finally:
            await played.endpoint.close()

    body()


@pytest.mark.parametrize(("number", "rc"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_watch_alone(
    directory: StateDirectory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    rc: int,
) -> None:
    whole = StateDirectory.find

    def find(name: str | None) -> StateDirectory:
        signal.raise_signal(number)
        return whole(name)

    monkeypatch.setattr(StateDirectory, "find", find)
    assert main.run(["status", "--watch", "--json"]) == rc
    said = capsys.readouterr()
    told = documented(said.out)
    assert (told["status"], told["rc"], told["vm_location"]) == ("error", rc, "source")
    assert told["error"]["code"] == "watch-left"
    assert "the migration is left as it is; the VM is at: source; abort is safe" in said.err
    assert json.loads((directory.path / "state.json").read_text())["phase"] == "prepare"
