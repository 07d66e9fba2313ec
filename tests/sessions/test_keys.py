"""Keys that a provider refuses after the 101, by an event or by the close of the session."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.conftest import StartRelay
from tests.relays import CLIENT_KEY, HANG_GUARD_S, Relay, canary
from tests.upstream.vendors import vendor

POOL = {"header": "Authorization", "value": ["Bearer ${OPENAI_API_KEY}", "Bearer ${FAL_KEY}"]}
BAD = f"Bearer {canary('openai')}"
INVALID = {"type": "error", "error": {"type": "invalid_request_error", "code": "invalid_api_key", "message": "x"}}
NO_QUOTA = {"type": "insufficient_quota", "code": "insufficient_quota"}
FAILED = {"type": "response.done", "response": {"id": "r", "status": "failed", "status_details": {"error": NO_QUOTA}, "instructions": "x" * 9000}}

Ends = dict[str, tuple[str, list[Any], tuple[int, str] | None]]
REFUSALS: Ends = {
    "OpenAI, an event": ("openai", [INVALID], None),
    "OpenAI, a close": ("openai", [], (3000, "invalid_request_error.invalid_api_key")),
    "OpenAI, after many messages": ("openai", [*[{"type": "x"}] * 9, {"type": "error", "error": NO_QUOTA}], (1000, "")),
    "OpenAI, a response that fails": ("openai", [*[{"type": "x"}] * 9, FAILED], None),
    "Google": ("google", [], (1007, "API key not valid. Please pass a valid API key.")),
    "ElevenLabs": ("elevenlabs", [{"message_type": "quota_exceeded", "error": "x"}], (1008, "")),
    "ElevenLabs, a close": ("elevenlabs", [], (1008, "This request exceeds your quota of 10. You have 3 credits remaining")),
    "Cartesia": ("cartesia", [{"type": "error", "status_code": 402, "error_code": None}], None),
    "AssemblyAI": ("assemblyai", [{"type": "Error", "error_code": 4001, "error": "Not Authorized"}], (4001, "Not Authorized")),
    "a code for applications": ("openai", [], (4401, "")),
    "a format without a meter": ("anthropic", [], (4403, "no")),
}
HARMLESS: Ends = {
    "a clean end": ("openai", [{"type": "x"}], (1000, "")),
    "an error of the client": ("openai", [{"type": "error", "error": {"code": "invalid_value", "message": "invalid_api_key"}}], (1008, "invalid model")),
    "Google, an error of the client": ("google", [], (1007, "Request contains an invalid argument.")),
    "a server error": ("openai", [], (1011, "internal error")),
}  # fmt: skip


async def _start(start: StartRelay, aiohttp_server: Any, ends: tuple[str, list[Any], tuple[int, str] | None], **entry: Any) -> tuple[Relay, list[str]]:
    """Start a relay whose first key ends a session as `ends` says; return the keys used too."""
    format_, messages, close = ends
    used: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        used.append(request.headers["Authorization"])
        if used[-1] != BAD and entry.get("client_credentials") != "allow":
            await socket.send_str("hello")
            await socket.receive()
            return socket
        for message in messages:
            await socket.send_json(message)
        if close is not None:
            await socket.close(code=close[0], message=close[1].encode())
        else:
            await socket.receive()
        return socket

    server = await aiohttp_server(vendor(("GET", "/realtime", answer)))
    entry = {"base_url": str(server.make_url("")), "auth": POOL, "format": format_, "websocket": {"default_path": "realtime"}} | entry
    return await start(openai=entry), used


async def _open(relay: Relay, messages: int, **options: Any) -> None:
    """Open a session, receive so many messages, and disconnect."""
    async with relay.client.ws_connect(relay.ws("openai"), **options) as socket:
        for _ in range(messages):
            assert (await socket.receive(HANG_GUARD_S)).type is aiohttp.WSMsgType.TEXT
    await relay.idle()


@pytest.mark.parametrize("how", REFUSALS)
async def test_a_key_that_is_refused_after_the_101_is_not_used_again(start: StartRelay, aiohttp_server: Any, how: str) -> None:
    relay, used = await _start(start, aiohttp_server, REFUSALS[how])
    await _open(relay, len(REFUSALS[how][1]))
    for _ in range(3):
        await _open(relay, 1)
    assert used[0] == BAD and BAD not in used[1:]
    [alarm] = await relay.events("key.refused")
    assert (alarm["key"], alarm["status"], alarm["rests_s"]) == ("OPENAI_API_KEY", 101, 300)


async def test_a_refused_key_counts_at_once_although_its_session_continues(start: StartRelay, aiohttp_server: Any) -> None:
    relay, used = await _start(start, aiohttp_server, REFUSALS["OpenAI, an event"])
    async with relay.client.ws_connect(relay.ws("openai")) as socket:
        assert json.loads((await socket.receive(HANG_GUARD_S)).data) == INVALID
        for _ in range(3):
            async with relay.client.ws_connect(relay.ws("openai")) as other:
                assert (await other.receive(HANG_GUARD_S)).data == "hello"
    assert used.count(BAD) == 1


@pytest.mark.parametrize("how", HARMLESS)
async def test_other_errors_of_the_client_or_the_provider_do_not_refuse_the_key(start: StartRelay, aiohttp_server: Any, how: str) -> None:
    relay, used = await _start(start, aiohttp_server, HARMLESS[how])
    await _open(relay, len(HARMLESS[how][1]))
    await _open(relay, 1)
    await _open(relay, len(HARMLESS[how][1]))
    assert used.count(BAD) == 2


async def test_a_clients_own_key_that_is_refused_in_a_session_has_no_health_state(start: StartRelay, aiohttp_server: Any) -> None:
    relay, used = await _start(start, aiohttp_server, REFUSALS["OpenAI, an event"], client_credentials="allow")
    await _open(relay, 1, headers={"Authorization": f"Bearer {CLIENT_KEY}"})
    assert used == [f"Bearer {CLIENT_KEY}"] and relay.gateway.attempts.health._keys == {}


async def test_an_open_session_ends_the_probe_of_its_key(start: StartRelay, aiohttp_server: Any) -> None:
    relay, used = await _start(start, aiohttp_server, REFUSALS["OpenAI, an event"])
    health, now = relay.gateway.attempts.health, 1000.0
    health._clock = lambda: now
    await _open(relay, 1)
    now += 301
    for _ in range(2):
        await _open(relay, 1)
    assert used.count(BAD) == 2 and not any(state.probing for state in health._keys.values())
    assert [state.failures for state in health._keys.values()] == [1, 0]
