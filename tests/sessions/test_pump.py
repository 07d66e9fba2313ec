"""`admit`: the function that can refuse a message before it is forwarded."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import WSMsgType

from relay import websocket
from relay.sessions import pump
from relay.sessions.session import Admit, Ending
from tests.conftest import StartRelay
from tests.relays import Relay, provider
from tests.upstream.vendors import SEEN, echo, vendor


@pytest.fixture
async def echoing(start: StartRelay, aiohttp_server: Any) -> tuple[Relay, list[Any]]:
    """(relay, what the provider received); the provider is an echo."""
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    relay = await start(openai=provider(str(server.make_url("")), websocket={"default_path": "echo"}))
    return relay, server.app[SEEN]


def set_admit(monkeypatch: pytest.MonkeyPatch, admit: Admit) -> None:
    """Let `admit` decide on the messages of clients."""
    make = websocket._session

    def with_admit(*parts: Any) -> Any:
        session = make(*parts)
        session.downstream.admit = admit
        return session

    monkeypatch.setattr(websocket, "_session", with_admit)


async def test_a_refused_message_gets_an_event_and_the_session_continues(echoing: tuple[Relay, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    relay, seen = echoing
    set_admit(monkeypatch, lambda data: b'{"type":"error"}' if b"forbidden" in data else None)
    async with relay.client.ws_connect(relay.ws("openai")) as socket:
        for message in ("one", "forbidden", "two", "forbidden"):
            await socket.send_str(message)
        await socket.send_bytes(b"forbidden, too")
        await socket.send_bytes(b"three")
        received = [(await socket.receive(20)).data for _ in range(6)]
    assert sorted(map(str, received)) == sorted(["one", "two", "b'three'", *['{"type":"error"}'] * 3])
    [event] = await relay.events()
    assert seen[0].messages[:3] == ["one", "two", b"three"]
    assert (event["messages_up"], event["outcome"], event["close_code"]) == (6, "relayed", 1000)


async def test_a_refusal_can_end_the_session(echoing: tuple[Relay, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    relay, seen = echoing
    set_admit(monkeypatch, lambda data: Ending(1008, "this model is not allowed", "relay") if data == b"no" else None)
    async with relay.client.ws_connect(relay.ws("openai")) as socket:
        await socket.send_str("yes")
        assert (await socket.receive(20)).data == "yes"
        await socket.send_str("no")
        closed = await socket.receive(20)
        assert (closed.type, closed.data, closed.extra) == (WSMsgType.CLOSE, 1008, "this model is not allowed")
    [event] = await relay.events()
    assert (event["close_code"], event["closed_by"], event["messages_up"]) == (1008, "relay", 2)
    assert "no" not in seen[0].messages


async def test_a_message_whose_check_fails_is_not_forwarded(echoing: tuple[Relay, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    relay, seen = echoing

    def admit(data: bytes) -> None:
        raise ValueError("a bug")

    set_admit(monkeypatch, admit)
    async with relay.client.ws_connect(relay.ws("openai")) as socket:
        await socket.send_str("hello")
        assert (await socket.receive(20)).data == 1011
    assert (await relay.events())[0]["error"] == "internal_error"
    assert "hello" not in seen[0].messages


async def test_without_admit_a_message_takes_no_extra_call(echoing: tuple[Relay, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def admitted(*parts: Any) -> Any:
        raise AssertionError("no message is checked")

    relay, _ = echoing
    monkeypatch.setattr(pump, "_admitted", admitted)
    async with relay.client.ws_connect(relay.ws("openai")) as socket:
        await socket.send_str("hello")
        assert (await socket.receive(20)).data == "hello"
