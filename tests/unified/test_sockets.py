"""Sockets on /v1: the provider is chosen before any message, and stays."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType, WSServerHandshakeError

from tests.conftest import StartRelay
from tests.relays import HANG_GUARD_S, Relay, packaged_provider
from tests.upstream.vendors import SEEN, Seen, echo, vendor

pytestmark = pytest.mark.usefixtures("no_lists")

MODELS = {"voice": "openai/gpt-realtime", "work": ["grok/grok-4", "openai/gpt-5.5"], "text": "anthropic/claude-opus-4-5"}


class Sockets:
    """A relay in front of echoing stand-ins, each below a path of its own."""

    def __init__(self, start: StartRelay, server: Any) -> None:
        self._start, self._server = start, server
        self.relay: Relay

    async def serve(self, *names: str, **document: Any) -> None:
        url = str(self._server.make_url("")).rstrip("/")
        entries = {name: packaged_provider(name, f"{url}/{name}") for name in names}
        self.relay = await self._start({"models": {}, "providers": entries} | document)

    @property
    def seen(self) -> list[Seen]:
        return self._server.app[SEEN]  # type: ignore[no-any-return]

    def connect(self, path: str, **options: Any) -> Any:
        return self.relay.client.ws_connect(f"{self.relay.url}/v1/{path}", **options)

    async def refusal(self, path: str) -> tuple[int, str]:
        with pytest.raises(WSServerHandshakeError) as refused:
            await self.connect(path)
        assert refused.value.headers is not None
        return refused.value.status, str(refused.value.headers["x-relay-error"])


@pytest.fixture
async def sockets(start: StartRelay, aiohttp_server: Any, monkeypatch: pytest.MonkeyPatch) -> Sockets:
    monkeypatch.setenv("XAI_API_KEY", "k-of-a-test")
    return Sockets(start, await aiohttp_server(vendor(("GET", "/{path:.*}", echo))))


async def echoed(socket: aiohttp.ClientWebSocketResponse[bool], message: Any) -> Any:
    """Send a message, and return what the stand-in received."""
    await socket.send_str(message if isinstance(message, str) else json.dumps(message))
    answer = await socket.receive(HANG_GUARD_S)
    assert answer.type is WSMsgType.TEXT, answer
    return json.loads(answer.data)


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("realtime?model=gpt-realtime", "/openai/v1/realtime?model=gpt-realtime"),
        ("realtime?model=voice", "/openai/v1/realtime?model=gpt-realtime"),
        ("realtime?model=grok/grok-voice&x=1", "/grok/v1/realtime?model=grok-voice&x=1"),
        ("responses?model=openai/gpt-5.5", "/openai/v1/responses?model=gpt-5.5"),
    ],
)
async def test_the_model_of_the_url_picks_the_provider(sockets: Sockets, path: str, target: str) -> None:
    await sockets.serve("openai", "grok", "anthropic", models=MODELS, unified={"order": ["openai", "grok"]})
    async with sockets.connect(path) as socket:
        assert await echoed(socket, {"type": "x"}) == {"type": "x"}
    [event] = await sockets.relay.events()
    assert [seen.target for seen in sockets.seen] == [target]
    assert (event["surface"], event["provider"]) == ("unified", target.split("/")[1])


async def test_the_only_provider_with_such_a_socket_answers_without_a_model(sockets: Sockets) -> None:
    await sockets.serve("openai", "anthropic")
    async with sockets.connect("responses") as socket:
        assert await echoed(socket, {"type": "response.create", "model": "gpt-5.5"})
    assert [seen.target for seen in sockets.seen] == ["/openai/v1/responses"]


async def test_the_configured_provider_answers_without_a_model(sockets: Sockets) -> None:
    await sockets.serve("openai", "grok", unified={"sockets": {"realtime": "grok"}})
    async with sockets.connect("realtime") as socket:
        assert await echoed(socket, {"type": "x"})
    assert sockets.seen[0].target.startswith("/grok/")


async def test_a_handshake_without_a_target_is_refused(sockets: Sockets) -> None:
    await sockets.serve("openai", "grok", "anthropic", models=MODELS)
    assert await sockets.refusal("realtime") == (400, "target_ambiguous")
    assert await sockets.refusal("realtime?model=none-of-these") == (404, "model_not_found")
    assert await sockets.refusal("realtime?model=text") == (426, "websocket_not_supported")
    assert await sockets.refusal("nothing") == (404, "unknown_route")
    assert not sockets.seen


KEY = "sk-local-sockets-of-unified-0123456789"


@pytest.mark.parametrize("path", ["realtime?model=grok/grok-voice", "realtime?model=work", "realtime"])
async def test_a_client_opens_no_session_at_a_provider_that_it_may_not_call(sockets: Sockets, path: str) -> None:
    clients = {"web": {"key": KEY, "providers": ["openai"]}}
    await sockets.serve("openai", "grok", "anthropic", models=MODELS, clients=clients, unified={"sockets": {"realtime": "grok"}})
    with pytest.raises(WSServerHandshakeError) as refused:
        await sockets.connect(path, headers={"x-relay-key": KEY})
    assert refused.value.headers is not None
    assert (refused.value.status, refused.value.headers["x-relay-error"]) == (403, "provider_not_allowed")
    assert not sockets.seen


async def test_a_limit_of_a_model_counts_the_sessions_that_an_alias_opens(sockets: Sockets) -> None:
    limits = [{"handshakes": 1, "models": ["gpt-realtime"]}]
    await sockets.serve("openai", "grok", "anthropic", models=MODELS, limits=limits)
    async with sockets.connect("realtime?model=voice") as socket:
        assert await echoed(socket, {"type": "x"})
    assert (await sockets.refusal("realtime?model=openai/gpt-realtime"))[0] == 429
    [event, _] = await sockets.relay.events(count=2)
    assert event["model"] == "gpt-realtime"


async def test_without_any_such_provider_codex_is_told_to_use_http(sockets: Sockets) -> None:
    await sockets.serve("anthropic")
    assert await sockets.refusal("responses") == (426, "websocket_not_supported")


RENAMED = [
    ('{"type":"response.create", "model" : "work","input":"work"}', '{"type":"response.create", "model" : "gpt-5.5","input":"work"}'),
    ('{"type":"response.create","model":"openai/gpt-5.5"}', '{"type":"response.create","model":"gpt-5.5"}'),
    ('{"type":"response.create","response":{"model":"work"}}', '{"type":"response.create","response":{"model":"gpt-5.5"}}'),
    ('{"type":"session.start","session":{"a":[1],"model":"voice"}}', '{"type":"session.start","session":{"a":[1],"model":"gpt-realtime"}}'),
    ('{"type":"response.create","model":"gpt-99"}', '{"type":"response.create","model":"gpt-99"}'),
    ('{"type":"x","text":"\\"model\\":\\"work\\""}', '{"type":"x","text":"\\"model\\":\\"work\\""}'),
]


@pytest.mark.parametrize(("sent", "received"), RENAMED)
async def test_an_alias_in_a_message_becomes_the_providers_name(sockets: Sockets, sent: str, received: str) -> None:
    await sockets.serve("openai", "grok", "anthropic", models=MODELS, unified={"sockets": {"responses": "openai"}})
    async with sockets.connect("responses") as socket:
        assert await echoed(socket, sent) == json.loads(received)
    async with asyncio.timeout(HANG_GUARD_S):
        await sockets.seen[0].ended.wait()
    assert sockets.seen[0].messages[0] == received


@pytest.mark.parametrize("model", ["text", "grok/grok-4"])
async def test_a_message_for_another_provider_ends_the_session_with_an_error_event(sockets: Sockets, model: str) -> None:
    await sockets.serve("openai", "grok", "anthropic", models=MODELS, unified={"sockets": {"responses": "openai"}})
    async with sockets.connect("responses") as socket:
        await socket.send_json({"type": "response.create", "model": model})
        event = (await socket.receive(HANG_GUARD_S)).json()
        closed = await socket.receive(HANG_GUARD_S)
    assert event["type"] == "error" and "model_not_in_session" in json.dumps(event)
    assert (closed.data, closed.extra) == (1008, f"model_not_in_session: {model}")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("realtime?model=voice", (426, "upgrade_required")), ("realtime?model=no-such", (404, "model_not_found")), ("realtime?model=text", (426, "websocket_not_supported")),
        ("realtime", (400, "target_ambiguous")), ("realtime?model=grok/grok-voice", (403, "provider_not_allowed")), ("live/sessions", (426, "upgrade_required")),
    ],
)  # fmt: skip
async def test_a_plain_get_says_why_a_handshake_is_refused(sockets: Sockets, path: str, expected: tuple[int, str]) -> None:
    """Browsers hide it from the page."""
    await sockets.serve("openai", "grok", "anthropic", models=MODELS, clients={"web": {"key": KEY, "providers": ["openai", "anthropic"]}})
    headers = {"Authorization": f"Bearer {KEY}"}
    status, found, _ = await sockets.relay.call("GET", f"{sockets.relay.url}/v1/{path}", headers=headers)
    assert (status, found["x-relay-error"]) == expected
    if expected[1] != "upgrade_required":
        with pytest.raises(WSServerHandshakeError) as refused:
            await sockets.connect(path, headers=headers)
        assert refused.value.headers is not None and refused.value.headers["x-relay-error"] == expected[1]
    assert not sockets.seen
