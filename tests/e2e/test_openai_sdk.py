"""The official OpenAI SDK and curl, unmodified, directly and through Cloudflare."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from tests.conftest import Through
from tests.relays import CLIENT_KEY, CLOUDFLARE_TOKEN, KEYS
from tests.sdk.lazy import Lazy
from tests.tools import need
from tests.upstream.vendors import OPENAI_CHAT_USAGE, OPENAI_REALTIME_USAGE

openai = Lazy("openai")


@pytest.fixture(params=["", "/v1"], ids=["without-v1", "with-v1"])
async def client(request: pytest.FixtureRequest, through: Through) -> AsyncIterator[openai.AsyncOpenAI]:
    """The SDK, with and without the version in its base URL."""
    base = through.relay.path("openai").rstrip("/") + request.param
    async with openai.AsyncOpenAI(api_key=CLIENT_KEY, base_url=base, max_retries=0) as made:
        yield made


async def test_chat(client: openai.AsyncOpenAI, through: Through) -> None:
    answer = await client.chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": "hi"}])
    assert answer.choices[0].message.content == "Hello wörld"
    assert answer.usage is not None and answer.usage.total_tokens == OPENAI_CHAT_USAGE["total_tokens"]
    assert answer._request_id == ("req_upstream" if not through.front else None)
    _check_credentials(through)


def _check_credentials(through: Through) -> None:
    """Check that the provider and Cloudflare got the credentials of the relay, not the client's."""
    for seen in (*through.vendors.seen("openai"), *through.front):
        assert seen.header("Authorization") == f"Bearer {KEYS['OPENAI_API_KEY']}"
        assert CLIENT_KEY not in str(seen.headers)
    for seen in through.front:
        assert seen.header("cf-aig-authorization") == f"Bearer {CLOUDFLARE_TOKEN}"
        assert seen.target.startswith("/v1/acct/gw/openai")
    assert all("cf-aig-authorization" not in seen.names for seen in through.vendors.seen("openai"))


async def test_chat_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="gpt-5", stream=True, stream_options={"include_usage": True}, messages=[{"role": "user", "content": "hi"}])
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello wörld"
    assert chunks[-1].usage is not None and chunks[-1].usage.prompt_tokens == 19


async def test_responses_and_embeddings(client: openai.AsyncOpenAI) -> None:
    events = [event async for event in await client.responses.create(model="gpt-5", input="hi", stream=True)]
    assert events[-1].type == "response.completed"
    assert (await client.responses.create(model="gpt-5", input="hi")).output_text == "Hello wörld"
    assert (await client.embeddings.create(model="text-embedding-3-small", input="hi")).data[0].embedding == [0.25, -0.5]


async def test_upload(client: openai.AsyncOpenAI, through: Through) -> None:
    content = bytes(range(256)) * 20_000
    uploaded = await client.files.create(file=("big.bin", content), purpose="batch")
    assert uploaded.bytes > len(content)
    assert content in through.vendors.seen("openai")[-1].body


async def test_realtime(client: openai.AsyncOpenAI, through: Through) -> None:
    async with asyncio.timeout(20), client.realtime.connect(model="gpt-realtime") as connection:
        assert (await connection.recv()).type == "session.created"
        await connection.response.create()
        async for event in connection:
            if event.type == "response.done":
                assert event.response.usage is not None
                assert event.response.usage.total_tokens == OPENAI_REALTIME_USAGE["total_tokens"]
                break
    assert "model=gpt-realtime" in through.vendors.seen("openai")[-1].target
    _check_credentials(through)


async def test_responses_over_a_websocket(client: openai.AsyncOpenAI) -> None:
    async with asyncio.timeout(20), client.responses.connect() as connection:
        await connection.send({"type": "response.create", "model": "gpt-5", "input": "hi"})  # type: ignore[misc,arg-type]
        async for event in connection:
            if event.type == "response.completed":
                break


async def test_an_error_raises_the_exception_of_the_sdk(through: Through) -> None:
    base = through.relay.path("opnai").rstrip("/")
    async with openai.AsyncOpenAI(api_key=CLIENT_KEY, base_url=base) as client:
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.list()
    assert caught.value.code == "unknown_provider" and "Did you mean 'openai'?" in caught.value.message


@pytest.mark.programs
async def test_curl_streams(through: Through) -> None:
    need("curl")
    body = json.dumps({"model": "gpt-5", "stream": True, "messages": []})
    url = through.relay.path("openai", "chat/completions")
    process = await asyncio.create_subprocess_exec("curl", "-sN", url, "-H", "content-type: application/json", "-d", body, stdout=asyncio.subprocess.PIPE)
    out, _ = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 0 and out.endswith(b"data: [DONE]\n\n")


async def test_a_401_of_cloudflare_is_distinguished_from_one_of_the_provider(through: Through) -> None:
    if not through.front and "cloudflare" not in str(through.relay.gateway.registry.match_rest("openai", "x").target.via):
        return await _check_direct_401(through)
    broken = through.relay.gateway.registry.providers["openai"].rest.gateway_credential
    assert broken is not None
    object.__setattr__(broken, "value", "Bearer wrong")
    status, headers, body = await through.relay.call("POST", through.relay.path("openai", "chat/completions"), json={"model": "m"})
    assert (status, headers["x-relay-error-source"]) == (401, "cloudflare")
    assert json.loads(body)["error"][0]["code"] == 2009
    return None


async def _check_direct_401(through: Through) -> None:
    status, headers, _ = await through.relay.call("POST", through.relay.path("openai", "no/such/path"), json={})
    assert (status, headers["x-relay-error-source"]) == (404, "provider")


async def test_cloudflares_response_headers_are_renamed_and_its_request_headers_are_relayed(through: Through) -> None:
    _, headers, _ = await through.relay.call(
        "POST", through.relay.path("openai", "chat/completions"), json={"model": "m"}, headers={"cf-aig-collect-log": "true", "cf-aig-metadata": "{}"}
    )
    assert len(headers["cf-aig-log-id"]) == 36
    if through.front:
        assert headers["x-cloudflare-aig-log-id"] == "01cloudflare" and "cf-aig-cache-status" not in headers
        assert through.front[-1].header("cf-aig-collect-log") == "true"
    else:
        assert "cf-aig-collect-log" not in through.vendors.seen("openai")[-1].names
