"""401 and 403 of the relay in official SDKs: read as such an error, and never sent again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from tests.conftest import StartRelay
from tests.relays import Relay, canary, packaged_provider
from tests.sdk.lazy import Lazy
from tests.upstream.raw import RawUpstream

anthropic, openai, groq, cartesia, deepgram = map(Lazy, ("anthropic", "openai", "groq", "cartesia", "deepgram"))
elevenlabs_client, genai, types = Lazy("elevenlabs.client"), Lazy("google.genai"), Lazy("google.genai.types")

pytestmark = pytest.mark.programs

KEY = canary("refused-client")
UNKNOWN = "rk_" + "u" * 32
MESSAGES = [{"role": "user", "content": "hi"}]
PROVIDERS = ("openai", "anthropic", "google-ai-studio", "elevenlabs", "groq", "cartesia", "deepgram", "fal")


@pytest.fixture
async def relay(start: StartRelay, raw: RawUpstream) -> Relay:
    """A relay that requires a key, and a client that may call no provider of these tests."""
    providers = {name: packaged_provider(name, raw.url) for name in (*PROVIDERS, "assemblyai")}
    clients = {"web": {"key": KEY, "providers": ["assemblyai"]}}
    return await start({"access": {"mode": "required"}, "clients": clients, "providers": providers})


async def _openai(base: str, key: str) -> Any:
    async with openai.AsyncOpenAI(api_key=key, base_url=base) as client:
        await client.chat.completions.create(model="gpt-5", messages=MESSAGES)


async def _anthropic(base: str, key: str) -> Any:
    async with anthropic.AsyncAnthropic(api_key=key, base_url=base) as client:
        await client.messages.create(model="claude-x", max_tokens=10, messages=MESSAGES)


async def _groq(base: str, key: str) -> Any:
    async with groq.AsyncGroq(api_key=key, base_url=base.removesuffix("/openai/v1")) as client:
        await client.chat.completions.create(model="llama", messages=MESSAGES)


async def _google(base: str, key: str) -> Any:
    client = genai.Client(api_key=key, http_options=types.HttpOptions(base_url=base))
    try:
        await client.aio.models.generate_content(model="gemini-2.5-flash", contents="hi")
    finally:
        await client.aio.aclose()


async def _elevenlabs(base: str, key: str) -> Any:
    async with httpx.AsyncClient() as http:
        await elevenlabs_client.AsyncElevenLabs(api_key=key, base_url=base, httpx_client=http).models.list()


async def _cartesia(base: str, key: str) -> Any:
    async with cartesia.AsyncCartesia(api_key=key, base_url=base) as client:
        await client.voices.get("x")


async def _deepgram(base: str, key: str) -> Any:
    from deepgram.environment import DeepgramClientEnvironment

    places = DeepgramClientEnvironment(base=base, production=base, agent=base, agent_rest=base)
    async with httpx.AsyncClient() as http:
        client = deepgram.AsyncDeepgramClient(api_key=key, environment=places, httpx_client=http)
        try:
            await client.listen.v1.media.transcribe_file(request=b"", model="nova-3")
        except deepgram.core.api_error.ApiError as error:
            assert error.body["err_msg"] == error.body["message"] and error.body["err_code"]
            raise


async def _fal(base: str, key: str) -> Any:
    """The SDK makes URLs without a port, so here it only reads the response."""
    import fal_client.client as fal_client

    async with httpx.AsyncClient() as http:
        response = await http.post(f"{base}/fal-ai/flux/schnell", json={}, headers={"Authorization": f"Key {key}"})
    try:
        fal_client._raise_for_status(response)
    except fal_client.FalClientHTTPError as error:
        assert error.error_type == response.headers["x-relay-error"]
        raise


CALLS: dict[str, Callable[[str, str], Awaitable[Any]]] = {
    "openai": _openai, "anthropic": _anthropic, "groq": _groq, "google-ai-studio": _google, "elevenlabs": _elevenlabs, "cartesia": _cartesia,
    "deepgram": _deepgram, "fal": _fal,
}  # fmt: skip


def _status(error: Exception) -> int | None:
    """The status as an SDK shows it."""
    return getattr(error, "status_code", None) or getattr(error, "code", None)


def _calls(relay: Relay) -> int:
    """The requests that the relay got."""
    assert relay.runner.server is not None
    return relay.runner.server.requests_count


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("key", "status", "words"), [(UNKNOWN, 401, "not valid"), ("sk-own-key-of-the-user", 401, "not valid"), (KEY, 403, "may not call")])
async def test_a_refusal_is_read_by_the_sdk_and_not_sent_again(relay: Relay, raw: RawUpstream, name: str, key: str, status: int, words: str) -> None:
    with pytest.raises(Exception) as raised:
        await CALLS[name](relay.path(name).rstrip("/"), key)
    assert _status(raised.value) == status, raised.value
    assert words in str(raised.value)
    if name in ("openai", "anthropic", "groq", "cartesia"):
        kind = "AuthenticationError" if status == 401 else "PermissionDeniedError"
        assert type(raised.value).__name__ == kind
    assert _calls(relay) == 1 and raw.connections == 0


@pytest.mark.parametrize("name", sorted(set(CALLS) - {"elevenlabs", "deepgram"}))
async def test_too_many_wrong_keys_are_not_sent_again_either(relay: Relay, name: str) -> None:
    """The SDKs of ElevenLabs and Deepgram send any 429 again after `retry-after`."""
    for _ in range(10):
        await relay.call("GET", relay.path(name, "x"), headers={"x-relay-key": UNKNOWN})
    with pytest.raises(Exception) as raised:
        await CALLS[name](relay.path(name).rstrip("/"), UNKNOWN)
    assert _status(raised.value) == 429, raised.value
    assert _calls(relay) == 11
