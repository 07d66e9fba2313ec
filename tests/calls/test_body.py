"""Compressed and malformed request bodies, and the model of a fallback in place of the first."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import brotli
import pytest

from relay.calls import body as reading
from relay.core.meters.unpack import zstd
from tests.conftest import StartRelay
from tests.relays import Relay, packaged_provider, provider
from tests.upstream.raw import RawUpstream, gated_events, ok
from tests.upstream.vendors import SEEN, echo, vendor

BODY = b'{ "model": "big", "stream": false, "user": "u", "messages": [{"role": "user", "content": "hi \\ud83d"}]}'
PACKED = {"gzip": gzip.compress(BODY), "deflate": zlib.compress(BODY), "br": brotli.compress(BODY), "zstd": zstd.compress(BODY), "gzip, br": brotli.compress(gzip.compress(BODY))}
CHAT = "chat/completions"
BY_MODEL = {"limits": [{"requests": 1, "models": ["big"]}]}
BUSY = ok(b"busy", status="503 Busy")


@pytest.fixture
async def other() -> AsyncIterator[RawUpstream]:
    upstream = await RawUpstream.start()
    upstream.plays(ok(b"{}"))
    yield upstream
    await upstream.stop()


async def post(relay: Relay, body: bytes, coding: str = "", endpoint: str = CHAT, content_type: str = "application/json", name: str = "openai") -> tuple[int, Any]:
    headers = {"Content-Type": content_type} | ({"Content-Encoding": coding} if coding else {})
    status, answered, _ = await relay.call("POST", relay.path(name, endpoint), data=body, headers=headers)
    return status, answered.get("x-relay-error")


@pytest.mark.parametrize("coding", PACKED)
async def test_a_compressed_body_is_forwarded_unchanged_and_its_model_is_read(coding: str, start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}"))
    relay = await start(BY_MODEL, openai=provider(raw.url))
    assert [await post(relay, PACKED[coding], coding) for _ in range(2)] == [(200, None), (429, "rate_limited")]
    [arrived] = raw.arrived
    assert arrived.body == PACKED[coding] and arrived.header("Content-Encoding") == [coding]
    event = (await relay.events())[0]
    assert (event["model"], event["stream"]) == ("big", False)
    assert relay.gateway.held_bytes == 0


@pytest.mark.parametrize("coding", PACKED)
async def test_a_compressed_body_is_sent_uncompressed_if_its_model_is_replaced(coding: str, start: StartRelay, raw: RawUpstream, other: RawUpstream) -> None:
    raw.plays(BUSY)
    relay = await start(openai=provider(raw.url, fallback=[{"provider": "other", "model": "small"}]), other=provider(other.url))
    assert await post(relay, PACKED[coding], coding) == (200, None)
    assert raw.arrived[0].body == PACKED[coding] and raw.arrived[0].header("Content-Encoding") == [coding]
    [arrived] = other.arrived
    assert arrived.body == BODY.replace(b"big", b"small")
    assert arrived.header("Content-Encoding") == [] and arrived.header("Content-Length") == [str(len(arrived.body))]
    assert relay.gateway.held_bytes == 0


async def test_a_compressed_body_is_sent_uncompressed_if_usage_is_requested(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"data: [DONE]\n\n", "Content-Type: text/event-stream"))
    relay = await start(openai=provider(raw.url, inject_usage=True))
    body = b'{"model":"big","stream":true}'
    await post(relay, gzip.compress(body), "gzip")
    assert raw.arrived[0].body == body[:-1] + b',"stream_options":{"include_usage":true}}'
    assert raw.arrived[0].header("Content-Encoding") == []


@pytest.mark.parametrize(
    ("body", "coding"),
    [
        (PACKED["gzip"], "compress"), (PACKED["gzip"], "br"), (PACKED["gzip"][:-4], "gzip"), (b"garbage", "zstd"), (BODY, "gzip"), (b" " + BODY, "nonsense"),
        (gzip.compress(b'{"model":"a","model":"b"}'), "gzip"), (gzip.compress(BODY) + gzip.compress(BODY), "gzip"),
    ],
    ids=["unknown coding", "wrong coding", "truncated", "garbage", "JSON", "JSON in an unknown coding", "two models", "two members"],
)  # fmt: skip
async def test_a_body_that_cannot_be_decompressed_is_refused_only_by_a_limit_by_model(body: bytes, coding: str, start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}"))
    for content_type in ("application/json", "application/octet-stream"):
        relay = await start(BY_MODEL, openai=provider(raw.url))
        assert await post(relay, body, coding, content_type=content_type) == (403, "model_unknown") and not raw.arrived
    relay = await start(openai=provider(raw.url))
    assert await post(relay, body, coding) == (200, None) and raw.arrived[0].body == body


@pytest.mark.parametrize("bound", ["json_buffer_bytes", "buffer_total_bytes"])
async def test_a_decompression_bomb_is_unpacked_up_to_the_limit_without_blocking_the_loop(bound: str, start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    raw.plays(ok(b"{}"))
    relay = await start(BY_MODEL | {"server": {bound: 4 << 20}}, openai=provider(raw.url))
    bomb = gzip.compress(b'{"model":"big","x":"' + bytes(48 << 20) + b'"}', 1)
    turns = max_bytes = 0
    hold = type(relay.gateway).hold

    def watched(*arguments: Any) -> None:
        nonlocal max_bytes
        hold(*arguments)
        max_bytes = max(max_bytes, relay.gateway.held_bytes)

    monkeypatch.setattr(type(relay.gateway), "hold", watched)

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count_turns())
    assert await post(relay, bomb, "gzip") == (403, "model_unknown")
    counting.cancel()
    step = reading._STEP_BYTES
    assert 4 << 20 < max_bytes <= (4 << 20) + step + len(bomb)
    assert turns > (4 << 20) / step, "other tasks run between any two steps"
    assert relay.gateway.held_bytes == 0


async def test_a_compressed_body_is_unpacked_by_the_host_of_a_mounted_relay(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}"))
    relay = await start(openai=provider(raw.url))
    relay.gateway.mounted = True
    await post(relay, BODY, "gzip")
    assert raw.arrived[0].body == BODY and (await relay.events())[0]["model"] == "big"


MALFORMED = {
    "byte order mark": b'\xef\xbb\xbf{"model":"big"}',
    "NaN": b'{"t":NaN,"model":"big"}',
    "infinities": b'{"model":"big","t":[Infinity,-Infinity]}',
    "lone surrogate": b'{"model":"big","x":"\\ud83d"}',
    "second half alone": b'{"x":"\\uDC00","model":"big"}',
    "invalid UTF-8": b'{"model":"big","x":"caf\xe9"}',
    "control character": b'{"x":"a\x01b","model":"big"}',
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_the_model_in_malformed_json_is_known_to_limits_ledger_and_fallback(name: str, start: StartRelay, raw: RawUpstream, other: RawUpstream) -> None:
    raw.plays(BUSY)
    entry = provider(raw.url, fallback=[{"provider": "other", "model": "small"}])
    relay = await start(BY_MODEL, openai=entry, other=provider(other.url))
    assert [await post(relay, MALFORMED[name]) for _ in range(2)] == [(200, None), (429, "rate_limited")]
    assert (await relay.events())[0]["model"] == "big"
    assert (raw.arrived[0].body, other.arrived[0].body) == (MALFORMED[name], MALFORMED[name].replace(b"big", b"small"))


@pytest.mark.parametrize(
    "body",
    [
        b'\xef\xbb\xbf{"model":"a","model":"big"}', b'{"model":"a","t":NaN,"model":"big"}', b'{"model":"a","x":"\\ud83d","\\u006dodel":"big"}',
        b'{"model":"a","t":NaN,"model_id":"big"}', b'{"model":"\\ud83d"}', b'{"model":"big","t":1NaN}', b'{"model":"big","t":NaNNaN}',
        '{"model":"big"}'.encode("utf-16"), '{"model":"big"}'.encode("utf-16-be"), '\ufeff{"model":"big"}'.encode("utf-32-le"),
    ],
    ids=["byte order mark", "NaN", "escaped name", "model_id", "lone surrogate", "1NaN", "NaNNaN", "UTF-16", "UTF-16 without a mark", "UTF-32"],
)  # fmt: skip
@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=x", "text/plain"])
async def test_no_malformed_json_bypasses_a_limit_by_model(body: bytes, content_type: str, start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(BY_MODEL, openai=provider(raw.url))
    assert await post(relay, body, content_type=content_type) == (403, "model_unknown") and not raw.arrived


GEMINI = "v1beta/models/gemini-2.5-pro:streamGenerateContent?alt=sse"


def form(*fields: tuple[str, bytes]) -> bytes:
    return b"".join(b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (name.encode(), value) for name, value in fields) + b"--b--\r\n"


PLACES: dict[str, tuple[str, str, str, bytes, str, bytes]] = {
    "path": ("google-ai-studio", GEMINI, "application/json", b'{"contents": []}', "/v1beta/models/new:streamGenerateContent?alt=sse", b'{"contents": []}'),
    "path and body": ("google-ai-studio", "v1beta/models/e:embedContent", "application/json", b'{"model":"models/e","content":{}}', "/v1beta/models/new:embedContent", b'{"model":"models/new","content":{}}'),
    "deployment": ("azure-openai", "gpt-5/chat/completions?api-version=1", "application/json", b'{"messages":[]}', "/openai/deployments/new/chat/completions?api-version=1", b'{"messages":[]}'),
    "query": ("deepgram", "v1/listen?language=en&model=nova-3&x=%20", "audio/wav", b"RIFF", "/v1/listen?language=en&model=new&x=%20", b"RIFF"),
    "query that names none": ("deepgram", "v1/listen", "application/json", b'{"url":"x"}', "/v1/listen?model=new", b'{"url":"x"}'),
    "model_id": ("cartesia", "tts/bytes", "application/json", b'{"transcript":"hi", "model_id" : "sonic-3"}', "/tts/bytes", b'{"transcript":"hi", "model_id" : "new"}'),
    "body": ("openai", CHAT, "application/json", b'{"messages":[], "model" :"gpt-5"} ', "/v1/chat/completions", b'{"messages":[], "model" :"new"} '),
    "form": ("openai", "audio/transcriptions", "multipart/form-data; boundary=b", form(("file", b"\x00" * 70_000), ("model", b"whisper-1")), "/v1/audio/transcriptions", form(("file", b"\x00" * 70_000), ("model", b"new"))),
    "form of model_id": ("elevenlabs", "v1/speech-to-text", "multipart/form-data; boundary=b", form(("model_id", b"scribe_v1"), ("file", b"x")), "/v1/speech-to-text", form(("model_id", b"new"), ("file", b"x"))),
    "no place": ("elevenlabs", "v1/text-to-speech/voice", "application/json", b'{"text":"hi"}', "/v1/text-to-speech/voice", b'{"model_id":"new","text":"hi"}'),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
async def test_the_model_of_a_fallback_replaces_the_clients_model_in_its_place(place: str, start: StartRelay, raw: RawUpstream, other: RawUpstream) -> None:
    name, endpoint, content_type, body, target, expected = PLACES[place]
    raw.plays(BUSY)
    keyed = {"auth": {"header": "X-Key", "value": "the-key"}, "cloudflare": None}
    entry = packaged_provider(name, raw.url) | keyed | {"fallback": [{"provider": "second", "model": "new"}]}
    second = packaged_provider(name, other.url) | keyed
    for each in (entry, second):
        each["base_url"] = each["base_url"].replace("${AZURE_OPENAI_RESOURCE}", "r")
    relay = await start({"providers": {name: entry, "second": second}})
    assert await post(relay, body, endpoint=endpoint, content_type=content_type, name=name) == (200, None)
    [arrived] = other.arrived
    assert (arrived.target, arrived.body) == (target, expected)
    assert raw.arrived[0].body == body


@pytest.mark.parametrize(
    ("query", "defaults", "sent"),
    [
        ("?a=1&model=gpt-realtime", {}, "?a=1&model=new"), ("?model_id=eleven_v3&b=%20", {}, "?model_id=new&b=%20"),
        ("", {"model": "big"}, "?model=new"), ("?intent=transcription", {"model": "big"}, "?intent=transcription"), ("", {}, ""),
    ],
)  # fmt: skip
async def test_the_model_of_a_sockets_fallback_replaces_the_first_model_in_its_place(query: str, defaults: dict[str, str], sent: str, start: StartRelay, raw: RawUpstream, aiohttp_server: Any) -> None:
    raw.plays(BUSY)
    server = await aiohttp_server(vendor(("GET", "/live", echo)))
    socket = {"default_path": "live", "default_query": defaults}
    relay = await start(
        openai=provider(raw.url, websocket=socket, fallback=[{"provider": "other", "model": "new"}]),
        other=provider(str(server.make_url("")).rstrip("/"), websocket={"default_path": "live"}),
    )
    async with relay.client.ws_connect(relay.ws("openai") + query):
        pass
    assert server.app[SEEN][-1].target == "/live" + sent


@pytest.mark.parametrize(("name", "endpoint"), [("google-ai-studio", "v1beta/models/big:generateContent"), ("deepgram", "v1/listen?model=big")])
async def test_a_body_does_not_hide_the_model_of_the_path_or_query_from_a_limit(name: str, endpoint: str, start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}"))
    relay = await start(BY_MODEL | {"providers": {name: packaged_provider(name, raw.url)}})
    assert [await post(relay, b'{"model":"small"}', endpoint=endpoint, name=name) for _ in range(2)] == [(200, None), (429, "rate_limited")]


async def test_the_tokens_of_a_compressed_body_are_estimated_from_its_content(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}"))
    relay = await start({"limits": [{"tokens": 1000, "answer_tokens": 1}]}, openai=provider(raw.url))
    body = json.dumps({"model": "m", "max_tokens": 5, "input": "x" * 4000}).encode()
    assert [await post(relay, gzip.compress(body), "gzip") for _ in range(2)] == [(200, None), (429, "rate_limited")]


async def test_a_body_and_its_fields_are_freed_when_the_response_begins(start: StartRelay, raw: RawUpstream) -> None:
    gates, steps = gated_events(1)
    raw.plays(*steps)
    relay = await start({}, openai=provider(raw.url))
    of_other_tests = {id(each): each for each in gc.get_objects() if isinstance(each, reading.Body)}
    async with relay.client.post(relay.path("openai", CHAT), data=BODY, headers={"Content-Type": "application/json"}) as response:
        bodies = [each for each in gc.get_objects() if isinstance(each, reading.Body) and id(each) not in of_other_tests]
        assert [(each.whole, each.text, each.seen) for each in bodies] == [(b"", None, None)]
        gates[0].set()
        assert response.status == 200
