"""The client of our endpoints: typed replies, typed errors, events, losses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

import pytest

from qpostcopy import errors
from qpostcopy.errors import ExitCode, OutcomeUnknownError, QpostcopyError, RefusedError
from qpostcopy.qmp import schema
from qpostcopy.qmp.client import (
    EndpointAbsentError,
    EndpointClient,
    EndpointConnectError,
    EndpointReplyError,
    RemoteError,
    rebuild_error,
)
from qpostcopy.qmp.connection import CommandError, ConnectionLostError
from qpostcopy.qmp.events import Event, EventsOverflowError, EventTimeoutError, Fanout
from qpostcopy.qmp.server import Endpoint, error_data
from qpostcopy.qmp.sockets import bind_private
from tests.qmp.support import controller_endpoint, echo, private_directory, run

ALL_ERRORS = (
    QpostcopyError,
    errors.UsageError,
    errors.RefusedError,
    errors.RolledBackError,
    errors.BeforeSwitchTimeoutError,
    errors.InterruptedMigrationError,
    errors.StateLostError,
    errors.OutcomeUnknownError,
)


def test_calls_are_typed_and_qemu_passes_through() -> None:
    async def body() -> None:
        async with controller_endpoint(echo) as (endpoint, _):
            client = await EndpointClient.connect(endpoint.path)
            hello = await client.call("qpc-hello", schema.Empty(), schema.Hello)
            assert hello.migration_id == "m-1"
            reply = await client.execute("query-status", {"x": 1})
            assert reply == {"command": "query-status", "arguments": {"x": 1}}
            await client.close()
            await client.close()

    run(body)


def test_what_is_at_its_default_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """`resume` after an upgrade: a handler of the version before does not know the newest keys."""
    token = "11" * 32
    sent: list[Mapping[str, object] | None] = []

    async def keep(_: str, arguments: Mapping[str, object] | None, _seconds: float) -> object:
        sent.append(arguments)
        return {"port": 1}

    async def body() -> None:
        async with controller_endpoint() as (endpoint, _):
            client = await EndpointClient.connect(endpoint.path)
            monkeypatch.setattr(client, "execute", keep)
            for device_state in (False, True):
                listen = schema.Listen(
                    host="::1", port=0, push_lanes=1, token=token, device_state=device_state
                )
                await client.call("qpc-listen", listen, schema.Listening)
            await client.close()
        before = {"host": "::1", "port": 0, "push_lanes": 1, "token": token}
        assert sent == [before, before | {"device_state": True}]

    run(body)


def test_the_defaults_that_are_not_sent_stay_what_they_are() -> None:
    """The far side fills in its own: another one here would mean something else there."""
    requests = {
        arguments
        for table in (schema.HANDLER, schema.PAGE_SERVER, schema.CONTROLLER)
        for arguments, _ in table.values()
    }
    defaults = {
        (request.__name__, name): field.get_default()
        for request in requests
        for name, field in request.model_fields.items()
        if not field.is_required()
    }
    assert defaults == {
        ("Listen", "device_state"): False,
        ("Connect", "device_state"): False,
        ("ServePages", "push"): True,
        ("Prepare", "push_bytes_per_second"): None,
        ("Abort", "signal"): None,
    }


def test_an_error_of_ours_comes_back_as_what_it_was() -> None:
    async def body() -> None:
        async with controller_endpoint() as (endpoint, _):
            client = await EndpointClient.connect(endpoint.path)
            with pytest.raises(RefusedError, match="no status today") as caught:
                await client.call("qpc-status", schema.Empty(), schema.Status)
            assert isinstance(caught.value, RemoteError)
            assert caught.value.kind == "RefusedError"
            assert caught.value.remedy == "ask tomorrow"
            assert caught.value.exit_code is ExitCode.REFUSED
            await client.close()

    run(body)


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_every_base_survives_the_journey(kind: type[QpostcopyError]) -> None:
    rebuilt = rebuild_error("c", "words", error_data(kind("words", remedy="do")))
    assert isinstance(rebuilt, kind)
    assert (str(rebuilt), rebuilt.remedy, rebuilt.kind) == ("words", "do", kind.__name__)
    assert rebuilt.exit_code is kind.exit_code


def test_every_base_is_tested() -> None:
    bases = {kind for kind in vars(errors).values() if isinstance(kind, type)}
    assert {kind for kind in bases if issubclass(kind, QpostcopyError)} == set(ALL_ERRORS)


@pytest.mark.parametrize("data", [{}, {"exit_code": "3"}, {"exit_code": 99, "remedy": 5}])
def test_odd_error_data_still_makes_an_error(data: dict[str, object]) -> None:
    rebuilt = rebuild_error("c", "words", data)
    assert type(rebuilt) is RemoteError
    assert rebuilt.remedy is None


def test_an_error_of_qemu_is_a_command_error() -> None:
    async def fail(command: str, _: Mapping[str, object] | None) -> object:
        raise CommandError(command, "DeviceNotFound", "no x")

    async def body() -> None:
        async with controller_endpoint(fail) as (endpoint, _):
            client = await EndpointClient.connect(endpoint.path)
            with pytest.raises(CommandError) as caught:
                await client.execute("device_del")
            assert (caught.value.error_class, caught.value.desc) == ("DeviceNotFound", "no x")
            await client.close()

    run(body)


def test_unknown_at_the_companion_is_unknown_here() -> None:
    async def lose(command: str, _: Mapping[str, object] | None) -> object:
        raise OutcomeUnknownError(f"{command}: no reply from QEMU")

    async def body() -> None:
        async with controller_endpoint(lose) as (endpoint, _):
            client = await EndpointClient.connect(endpoint.path)
            with pytest.raises(OutcomeUnknownError, match="cont: no reply from QEMU"):
                await client.execute("cont")
            await client.close()

    run(body)


def test_no_reply_in_time_is_unknown_and_the_session_goes_on() -> None:
    async def body() -> None:
        async with controller_endpoint() as (endpoint, service):
            client = await EndpointClient.connect(endpoint.path)
            with pytest.raises(OutcomeUnknownError, match=r"qpc-abort: no reply .* 0\.05 s"):
                await client.call("qpc-abort", schema.Abort(), schema.Empty, 0.05)
            service.abort_may_end.set()  # the late reply comes, and confuses nobody
            await service.abort_done.wait()
            await client.call("qpc-hello", schema.Empty(), schema.Hello)
            await client.close()

    run(body)


def test_a_loss_is_unknown_for_what_was_sent_and_lost_for_what_was_not() -> None:
    async def body() -> None:
        with private_directory() as directory:
            path = directory / "s"
            greeting = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'

            async def dying(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(greeting)
                await reader.read(1000)
                writer.write(b'{"return": {}}\r\n')
                await reader.read(1000)
                writer.close()

            async with await asyncio.start_unix_server(dying, str(path)):
                client = await EndpointClient.connect(path)
                with client.subscribe() as events:
                    with pytest.raises(OutcomeUnknownError, match=r"cont: .* lost before"):
                        await client.execute("cont")
                    with pytest.raises(ConnectionLostError, match="hung up"):
                        await events.get()
                assert isinstance(await client.wait_lost(), ConnectionLostError)
                assert not client.connected
                with pytest.raises(ConnectionLostError, match="cont was not sent"):
                    await client.execute("cont")
                with client.subscribe() as late, pytest.raises(ConnectionLostError):
                    await late.get()
                await client.close()

    run(body)


def test_a_reply_off_schema_is_an_error() -> None:
    class Odd:
        async def qpc_hello(self, _: schema.Empty) -> schema.Empty:
            return schema.Empty()

    async def body() -> None:
        with private_directory() as directory:
            table = {"qpc-hello": (schema.Empty, schema.Empty)}
            endpoint = Endpoint(directory / "s", table, Odd())
            await endpoint.listen()
            client = await EndpointClient.connect(endpoint.path)
            with pytest.raises(EndpointReplyError, match="qpc-hello"):
                await client.call("qpc-hello", schema.Empty(), schema.Hello)
            await client.close()
            await endpoint.close()

    run(body)


def test_a_call_that_the_schema_does_not_have_is_our_bug() -> None:
    async def body() -> None:
        async with controller_endpoint() as (endpoint, _):
            client = await EndpointClient.connect(endpoint.path)
            with pytest.raises(AssertionError):
                await client.call("qpc-hello", schema.Empty(), schema.Empty)
            await client.close()

    run(body)


def test_events_reach_every_subscriber_in_order_ours_typed() -> None:
    async def body() -> None:
        async with controller_endpoint() as (endpoint, _):
            client = await EndpointClient.connect(endpoint.path)
            heard: list[str] = []
            client.on_event(lambda event: heard.append(event.name))
            with client.subscribe() as everything, client.subscribe("QPC_FATAL") as fatal:
                endpoint.broadcast("STOP", {})
                endpoint.broadcast("QPC_FATAL", {"unknown": 1})  # off schema: dropped
                endpoint.emit(schema.Fatal(reason="r"))
                assert (await everything.get()).name == "STOP"
                event = await everything.get()
                assert event.model == schema.Fatal(reason="r")
                assert (await fatal.get()).model == schema.Fatal(reason="r")
                assert heard == ["STOP", "QPC_FATAL"]
                with pytest.raises(EventTimeoutError, match="QPC_FATAL"):
                    await fatal.get(0.01)
                await client.close()
                assert [event async for event in everything] == []
                with pytest.raises(QpostcopyError, match="closed"):
                    await fatal.get()

    run(body)


def test_events_are_not_kept() -> None:
    """qemu.qmp's own listener would hold all of these for ever."""

    async def body() -> None:
        async with controller_endpoint() as (endpoint, _):
            client = await EndpointClient.connect(endpoint.path)
            with client.subscribe() as events:
                for _ in range(100):
                    endpoint.broadcast("STOP", {})
                for _ in range(100):
                    await events.get()
            assert client._client.events.empty()
            assert client._client.events.history == ()
            assert not client._fanout._subscriptions
            await client.close()

    run(body)


def test_a_subscriber_that_does_not_keep_up_is_told() -> None:
    async def body() -> None:
        fanout = Fanout()
        slow = fanout.subscribe(limit=2)
        for number in range(3):
            fanout.put(Event(str(number), {}))
        assert [(await slow.get()).name, (await slow.get()).name] == ["0", "1"]
        with pytest.raises(EventsOverflowError):
            await slow.get()

    run(body)


def test_nobody_there_and_nobody_answering() -> None:
    async def body() -> None:
        with private_directory() as directory:
            path = directory / "s"
            with pytest.raises(EndpointAbsentError):
                await EndpointClient.connect(path)

            with (
                contextlib.closing(bind_private(path)),
                pytest.raises(EndpointConnectError, match="does not answer"),
            ):
                await EndpointClient.connect(path, 0.05)
            with pytest.raises(EndpointAbsentError):
                await EndpointClient.connect(path)

    run(body)
