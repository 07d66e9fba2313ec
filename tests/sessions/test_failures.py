"""A bug in a running session ends it visibly: 1011 for both sides, a failed row and a log event."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import WSMsgType, web

from relay import periodic
from relay.core.meters.openai_realtime import Realtime
from relay.sessions.session import Ending, Leg
from tests.conftest import StartRelay
from tests.relays import Relay, provider
from tests.upstream.raw import SILENCE, RawUpstream
from tests.upstream.vendors import SEEN, Seen, echo, vendor

Patch = Callable[[pytest.MonkeyPatch, Relay], None]
TEXT = '{"type": "session.updated", "session": {"model": "é"}}'


class Bug(Exception):
    """An unexpected exception."""


def _raises(*_: Any, **__: Any) -> Any:
    raise Bug("unexpected")


def _raises_runtime_error(*_: Any, **__: Any) -> Any:
    raise RuntimeError("dictionary changed size during iteration")


def _cancels(*_: Any, **__: Any) -> Any:
    raise asyncio.CancelledError


@pytest.fixture
async def session(start: StartRelay, aiohttp_server: Any) -> tuple[Relay, list[Seen]]:
    """(relay, what the provider received); the provider is an echo."""
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    relay = await start(openai=provider(str(server.make_url("")), websocket={"default_path": "echo"}))
    return relay, server.app[SEEN]


async def _check_1011(relay: Relay, seen: list[Seen], socket: Any) -> dict[str, Any]:
    """Check that both sides get 1011, and return the row."""
    message = await socket.receive(20)
    assert (message.type, message.data, message.extra) == (WSMsgType.CLOSE, 1011, "the relay failed")
    await socket.close()
    await asyncio.wait_for(seen[-1].ended.wait(), 20)
    assert seen[-1].close_code == 1011
    [row] = await relay.events()
    assert (row["outcome"], row["error"], row["close_code"], row["closed_by"]) == ("failed", "internal_error", 1011, "relay")
    await relay.idle()
    return row


def _pump_breaks(patch: pytest.MonkeyPatch, relay: Relay) -> None:
    patch.setattr("relay.sessions.pump._is_utf8", _raises)


def _pump_breaks_like_a_lost_connection(patch: pytest.MonkeyPatch, relay: Relay) -> None:
    patch.setattr("relay.sessions.pump._is_utf8", _raises_runtime_error)


def _pump_is_cancelled(patch: pytest.MonkeyPatch, relay: Relay) -> None:
    patch.setattr("relay.sessions.pump._is_utf8", _cancels)


def _observer_and_its_guard_break(patch: pytest.MonkeyPatch, relay: Relay) -> None:
    patch.setattr(Realtime, "received", _raises)
    patch.setattr(relay.gateway.ledger, "meter_failed", _raises)


FAULTS: dict[str, tuple[Patch, str]] = {
    "a pump": (_pump_breaks, "Bug"),
    "a RuntimeError, with both connections open": (_pump_breaks_like_a_lost_connection, "RuntimeError"),
    "a cancelled pump": (_pump_is_cancelled, "RuntimeError"),
    "an observer": (_observer_and_its_guard_break, "Bug"),
}


@pytest.mark.parametrize("place", FAULTS)
async def test_an_unexpected_exception_while_messages_are_relayed_ends_the_session(session: tuple[Relay, list[Seen]], monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    (relay, seen), (patch, cause) = session, FAULTS[place]
    async with relay.client.ws_connect(relay.ws("openai"), autoclose=False) as socket:
        with monkeypatch.context() as broken:
            patch(broken, relay)
            await socket.send_str(TEXT)
            if place == "an observer":
                assert (await socket.receive(20)).type is WSMsgType.TEXT, "the observed message was relayed"
            row = await _check_1011(relay, seen, socket)
    assert row["cause"] == cause
    [bug] = await relay.events("exchange.failed")
    assert bug["id"] == row["id"] and f"{cause}: " in bug["traceback"]


async def test_a_meter_that_fails_does_not_end_its_session(session: tuple[Relay, list[Seen]], monkeypatch: pytest.MonkeyPatch) -> None:
    relay, _ = session
    monkeypatch.setattr(Realtime, "received", _raises)
    async with relay.client.ws_connect(relay.ws("openai")) as socket:
        for _ in range(2):
            await socket.send_str(TEXT)
            assert (await socket.receive(20)).data == TEXT
    assert (await relay.events())[0]["outcome"] == "relayed"


async def test_a_session_that_fails_before_it_runs_ends(session: tuple[Relay, list[Seen]], monkeypatch: pytest.MonkeyPatch) -> None:
    relay, seen = session
    monkeypatch.setattr("relay.websocket.observe_session", _raises)
    async with relay.client.ws_connect(relay.ws("openai"), autoclose=False) as socket:
        row = await _check_1011(relay, seen, socket)
    assert row["cause"] == "Bug"


async def test_a_failure_of_the_sweep_ends_only_the_session_that_caused_it(session: tuple[Relay, list[Seen]], monkeypatch: pytest.MonkeyPatch) -> None:
    relay, seen = session
    judge = periodic.overdue_ending
    async with relay.client.ws_connect(relay.ws("openai"), autoclose=False) as failing:
        [faulty] = relay.gateway.sessions
        async with relay.client.ws_connect(relay.ws("openai")) as healthy:
            monkeypatch.setattr(periodic, "overdue_ending", lambda each, *rest: _raises() if each is faulty else judge(each, *rest))
            assert (await failing.receive(20)).data == 1011
            await failing.close()
            await asyncio.wait_for(seen[0].ended.wait(), 20)
            [row] = await relay.events()
            assert (row["error"], row["cause"], seen[0].close_code) == ("internal_error", "Bug", 1011)
            await healthy.send_str("still here")
            assert (await healthy.receive(20)).data == "still here"


async def test_a_failure_of_the_sweep_ends_the_call_that_caused_it(start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    raw.plays(SILENCE)
    relay = await start(openai=provider(raw.url))
    monkeypatch.setattr(periodic, "overdue", _raises)
    status, headers, _ = await relay.call("GET", relay.path("openai", "x"))
    assert (status, headers["x-relay-error"]) == (500, "internal_error")
    [row], [bug] = await relay.events(), await relay.events("periodic.failed")
    assert (row["outcome"], bug["id"]) == ("failed", row["id"]) and "Bug: " in bug["traceback"]


async def test_a_failure_of_the_gauges_does_not_stop_the_sweep(session: tuple[Relay, list[Seen]], monkeypatch: pytest.MonkeyPatch) -> None:
    relay, _ = session
    monkeypatch.setattr(relay.gateway, "gauges", _raises)
    monkeypatch.setattr(periodic, "overdue_ending", lambda *_: Ending(4408, "judged", "relay"))
    async with relay.client.ws_connect(relay.ws("openai"), autoclose=False) as socket:
        assert (await socket.receive(20)).data == 4408


async def test_a_close_that_fails_is_logged_and_leaves_no_connection(start: StartRelay, aiohttp_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own, gone = Leg.close, asyncio.Event()

    async def close(leg: Leg, *rest: Any) -> None:
        if leg.side == "upstream":
            raise Bug("no close")
        await own(leg, *rest)

    async def echo_until_gone(request: web.Request) -> web.StreamResponse:
        try:
            return await echo(request)
        finally:
            gone.set()

    monkeypatch.setattr(Leg, "close", close)
    server = await aiohttp_server(vendor(("GET", "/echo", echo_until_gone)))
    relay = await start(openai=provider(str(server.make_url("")), websocket={"default_path": "echo"}))
    async with relay.client.ws_connect(relay.ws("openai")) as socket:
        await socket.close()
    await asyncio.wait_for(gone.wait(), 20)
    assert "Bug: " in (await relay.events("session.close_failed"))[0]["traceback"]
    assert (await relay.events())[0]["outcome"] == "relayed"
