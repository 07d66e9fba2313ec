"""The Python client: with a relay on a port, and with a relay in its own process."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.client import (
    AIGateway,
    ProviderError,
    RelayFailed,
    RelayUnreachable,
    RequestRefused,
    SessionClosed,
    UpstreamFailed,
    aiGateway,
)
from relay.core.sse import Event, EventParser
from relay.registry.load import ConfigError
from relay.websocket import draining
from tests.conftest import StartRelay, Vendors
from tests.relays import CLIENT_KEY, HANG_GUARD_S, Relay, provider, write_config
from tests.upstream.raw import SSE_HEAD, RawUpstream, chunk, gated_events, ok

CHAT = {"model": "gpt-5", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def relay(start: StartRelay, vendors: Vendors) -> Relay:
    return await start({"providers": vendors.entries()})


@pytest.fixture(params=["port", "in-process"])
async def gateway(request: pytest.FixtureRequest, relay: Relay, vendors: Vendors, tmp_path: Path) -> AsyncIterator[AIGateway]:
    """A client of a relay on a port, or of a relay in this process."""
    if request.param == "port":
        made = AIGateway(relay.url)
    else:
        folder = tmp_path / "inside"
        folder.mkdir()
        write_config(folder, {"providers": vendors.entries()})
        made = AIGateway.from_config(folder / "gateway.yaml")
    async with made:
        yield made


async def test_a_call_returns_status_headers_and_body(gateway: AIGateway, vendors: Vendors) -> None:
    answer = await gateway.request(
        provider="openai", endpoint="chat/completions", data=CHAT, headers={"OpenAI-Beta": "assistants=v1"}
    )
    assert answer.ok and answer.status == 200 and answer.headers["x-request-id"] == "req_upstream"
    assert answer.json()["choices"][0]["message"]["content"] == "Hello wörld"
    assert json.loads(answer.text()) == json.loads(answer.bytes()) == answer.json()
    [seen] = vendors.seen("openai")
    assert (seen.header("OpenAI-Beta"), seen.header("Content-Type")) == ("assistants=v1", "application/json")


async def test_a_call_without_data_is_a_get_with_the_query(gateway: AIGateway, vendors: Vendors) -> None:
    answer = await gateway.request(provider="openai", endpoint="models?limit=2", query={"after": "a b"})
    assert answer.json()["object"] == "list"
    [seen] = vendors.seen("openai")
    assert (seen.method, seen.target) == ("GET", "/v1/models?limit=2&after=a+b")


async def test_form_data_is_sent_as_a_form(gateway: AIGateway, vendors: Vendors) -> None:
    form = aiohttp.FormData({"purpose": "batch"})
    form.add_field("file", b"content", filename="f.txt")
    assert (await gateway.request(provider="openai", endpoint="files", data=form)).json()["id"] == "file-1"
    assert b'filename="f.txt"' in vendors.seen("openai")[0].body


async def test_a_stream_yields_events(gateway: AIGateway) -> None:
    events = [event async for event in gateway.stream(provider="openai", endpoint="chat/completions", data=CHAT | {"stream": True})]
    assert events[-1].data == "[DONE]"
    assert "".join(event.json()["choices"][0]["delta"]["content"] for event in events[:-1]) == "Hello wörld"


async def test_a_stream_of_bytes_yields_chunks(gateway: AIGateway) -> None:
    async with gateway.stream(provider="openai", endpoint="audio/speech", data={"model": "tts-1", "input": "hi"}) as speech:
        assert speech.status == 200 and speech.headers["Content-Type"] == "audio/mpeg"
        assert sum([len(piece) async for piece in speech]) == 16384


async def test_each_event_arrives_when_it_is_sent(start: StartRelay, raw: RawUpstream) -> None:
    gates, steps = gated_events(3)
    raw.plays(*steps)
    relay = await start(openai=provider(raw.url))
    async with AIGateway(relay.url) as gateway, asyncio.timeout(HANG_GUARD_S):
        gates[0].set()
        stream = aiter(gateway.stream(provider="openai", endpoint="x"))
        for number in range(3):
            assert (await anext(stream)).data == str(number)
            if number < 2:
                gates[number + 1].set()


async def test_a_session_sends_and_receives_json_text_and_bytes(gateway: AIGateway) -> None:
    async with asyncio.timeout(HANG_GUARD_S), gateway.connect(provider="openai") as session:
        assert (await session.receive())["session"]["model"] == "gpt-realtime-2.1"
        await session.send({"type": "response.create"})
        async for message in session:
            if message["type"] == "response.done":
                break
    async with asyncio.timeout(HANG_GUARD_S), gateway.connect(provider="openai", endpoint="realtime/echo") as session:
        await session.send(b"\x00\xff")
        assert await session.receive() == b"\x00\xff"
        await session.send("plain text")
        assert await session.receive() == "plain text"


async def test_a_session_can_be_awaited_and_closed_explicitly(gateway: AIGateway, vendors: Vendors) -> None:
    session = await gateway.connect(provider="openai", endpoint="realtime/echo", protocols=("one",))
    assert session.protocol is None or session.protocol == "one"
    await session.close(4001, "enough")
    seen = vendors.seen("openai")[-1]
    await asyncio.wait_for(seen.ended.wait(), HANG_GUARD_S)
    assert seen.close_code == 4001


# Failures -----------------------------------------------------------------------------------------


async def test_an_error_of_the_provider_is_a_response(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b'{"error": {"message": "no such model", "code": "model_not_found"}}', status="404 Not Found"))
    relay = await start(openai=provider(raw.url))
    async with AIGateway(relay.url) as gateway:
        answer = await gateway.request(provider="openai", endpoint="x", data={})
        assert not answer.ok and answer.status == 404
        with pytest.raises(ProviderError, match="no such model") as raised:
            answer.raise_for_status()
        assert (raised.value.status, raised.value.source) == (404, "provider")
        with pytest.raises(ProviderError, match="no such model"):
            await anext(aiter(gateway.stream(provider="openai", endpoint="x", data={})))


async def test_a_refusal_of_the_relay_raises_request_refused(gateway: AIGateway) -> None:
    with pytest.raises(RequestRefused, match="no provider named 'opanai'") as refused:
        await gateway.request(provider="opanai", endpoint="x")
    assert (refused.value.code, refused.value.status, refused.value.source) == ("unknown_provider", 404, "relay")
    assert len(refused.value.request_id) == 36
    with pytest.raises(RequestRefused) as refused:
        await gateway.connect(provider="nobody")
    assert refused.value.code == "unknown_provider"


async def test_a_missing_key_and_an_unreachable_provider_raise_different_errors(start: StartRelay) -> None:
    relay = await start(openai=provider("http://127.0.0.1:9"), other=provider("http://127.0.0.1:9", "NOT_SET_KEY"))
    async with AIGateway(relay.url) as gateway:
        with pytest.raises(RelayFailed, match="NOT_SET_KEY"):
            await gateway.request(provider="other", endpoint="x")
        with pytest.raises(UpstreamFailed) as failed:
            await gateway.request(provider="openai", endpoint="x")
        assert failed.value.code == "upstream_unreachable"


async def test_an_unreachable_relay_raises_relay_unreachable() -> None:
    async with AIGateway("http://127.0.0.1:9") as gateway:
        with pytest.raises(RelayUnreachable):
            await gateway.request(provider="openai", endpoint="x")
        with pytest.raises(RelayUnreachable):
            await gateway.connect(provider="openai")
        with pytest.raises(RelayUnreachable):
            await anext(aiter(gateway.stream(provider="openai", endpoint="x")))


async def test_a_truncated_stream_raises(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(SSE_HEAD, chunk(b"data: 1\n\ndata: ha"), "close")
    relay = await start(openai=provider(raw.url))
    async with AIGateway(relay.url) as gateway:
        stream = aiter(gateway.stream(provider="openai", endpoint="x"))
        assert (await anext(stream)).data == "1"
        with pytest.raises(RelayUnreachable):
            await anext(stream)


async def test_a_close_by_the_relay_is_raised_with_its_reason(relay: Relay) -> None:
    async with AIGateway(relay.url) as gateway, asyncio.timeout(HANG_GUARD_S):
        session = await gateway.connect(provider="openai", endpoint="realtime/echo")
        for running in relay.gateway.sessions:
            running.end(draining())
        with pytest.raises(SessionClosed, match="restarting") as closed:
            async for _ in session:
                pass
        assert (closed.value.code, closed.value.status) == ("restarting", 1012)


# Start and end ------------------------------------------------------------------------------------


async def test_a_backend_gets_a_ticket_for_a_page(start: StartRelay, vendors: Vendors, sqlite_setting: str) -> None:
    page = "https://app.example"
    clients = {"web": {"key": CLIENT_KEY, "providers": "openai", "origins": page}}
    relay = await start({"clients": clients, "database": sqlite_setting, "providers": vendors.entries()})
    async with AIGateway(relay.url, headers={"x-relay-key": CLIENT_KEY}) as gateway:
        ticket = await gateway.ticket(provider="openai", models=["gpt-realtime*"], origin=page, max_messages=10)
        assert ticket["openai_ticket"] == f"ek_{ticket['ticket']}"
        with pytest.raises(RequestRefused) as refused:
            await gateway.ticket(provider="elevenlabs")
    assert (refused.value.code, refused.value.status) == ("provider_not_allowed", 403)
    async with relay.client.ws_connect(ticket["websocket_url"], protocols=ticket["subprotocols"], headers={"Origin": page}) as socket:
        assert (await socket.receive_json())["type"] == "session.created"


async def test_the_default_client_uses_relay_url(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in (relay.url, f"{relay.url}/", f"{relay.url}/api/v1/ai-gateway"):
        monkeypatch.setenv("RELAY_URL", url)
        assert (await aiGateway.request(provider="openai", endpoint="models")).ok
    await aiGateway.close()


def test_a_client_can_be_used_again_in_another_event_loop(tmp_path: Path) -> None:
    write_config(tmp_path, {"demo": {"enabled": True}, "providers": {}})
    gateway = AIGateway.from_config(tmp_path / "gateway.yaml")

    async def once() -> str:
        answer = await gateway.request(provider="demo", endpoint="chat/completions", data=CHAT)
        await gateway.close()
        return str(answer.json()["object"])

    assert asyncio.run(once()) == "chat.completion"


async def test_in_process_the_demo_responds_and_no_task_is_left(tmp_path: Path) -> None:
    write_config(tmp_path, {"demo": {"enabled": True}, "providers": {}})
    async with AIGateway.from_config(tmp_path / "gateway.yaml") as gateway:
        events = [event async for event in gateway.stream(provider="demo", endpoint="chat/completions", data=CHAT | {"stream": True})]
        assert events[-1].data == "[DONE]"
    gc.collect()
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


def test_a_bad_configuration_is_refused_when_the_client_is_created(tmp_path: Path) -> None:
    write_config(tmp_path, {"servr": {}})
    with pytest.raises(ConfigError, match="server"):
        AIGateway.from_config(tmp_path / "gateway.yaml")


STREAM = "\ufeff: comment\r\ndata: one\ndata: two\n\nevent: named\rid: 7\rdata:x\r\revent: empty\n\ndata\n\n: only a comment\n\ndata: last".encode()
EVENTS = [Event("one\ntwo"), Event("x", "named", "7"), Event("", id="7")]


@given(st.lists(st.integers(0, len(STREAM)), max_size=6))
def test_events_do_not_depend_on_the_chunk_boundaries(cuts: list[int]) -> None:
    parser, at, found = EventParser(), 0, []
    for end in [*sorted(cuts), len(STREAM)]:
        found += parser.feed(STREAM[at:end])
        at = end
    assert found == EVENTS


@pytest.mark.parametrize("status", ["200 OK", "400 Bad"])
@pytest.mark.parametrize("between", [True, False])
async def test_an_error_header_of_the_provider_is_not_taken_for_the_relays(start: StartRelay, raw: RawUpstream, status: str, between: bool) -> None:
    """The relay strips the header; in a response that is not from a relay it is ignored."""
    raw.plays(ok(b"{}", "x-relay-error: rate_limited", status=status))
    relay = await start(openai=provider(raw.url))
    async with AIGateway(relay.url if between else raw.url) as gateway:
        answer = await gateway.request(provider="openai", endpoint="x")
        assert answer.status == int(status[:3])
        if not answer.ok:
            with pytest.raises(ProviderError) as failure:
                answer.raise_for_status()
            assert (failure.value.code, failure.value.source) == ("provider_error", "provider")
