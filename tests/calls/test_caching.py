"""The cache and shared calls in a running relay: what is stored, for whom, and its replay."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from relay.core import caching
from relay.registry.load import ConfigError
from relay.storage import redis as shared
from tests.conftest import StartRelay
from tests.redis import RedisServer
from tests.relays import HANG_GUARD_S, Relay, configured, provider
from tests.upstream.raw import (
    CLOSE,
    LAST_CHUNK,
    SILENCE,
    SSE_HEAD,
    RawUpstream,
    chunk,
    gated_events,
    head,
    ok,
)
from tests.whole_run import canary

ANSWER = b'{"choices": [{"index": 0, "message": {"content": "42"}, "finish_reason": "stop"}]}'
FINISH = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"
END = chunk(FINISH) + chunk(DONE) + LAST_CHUNK
"""The end of a chat stream that may be cached."""
JSON = ok(ANSWER, "Content-Type: application/json", "x-request-id: theirs", "x-ratelimit-remaining-requests: 9", "x-stored: yes")
CACHE = {"cache": {"ttl_s": 3600}}


async def chat(relay: Relay, headers: dict[str, str] | None = None, **body: Any) -> tuple[int, Any, bytes]:
    return await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": "m"} | body, headers=headers)


async def statuses(relay: Relay, *calls: dict[str, Any]) -> list[str | None]:
    return [(await chat(relay, **call))[1].get("cf-aig-cache-status") for call in calls]


async def test_an_identical_call_is_served_from_the_cache(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(JSON)
    relay = await start(CACHE, openai=provider(raw.url))
    _, first, body = await chat(relay)
    status, again, same = await chat(relay, headers={"x-request-id": "mine"})
    assert (first["cf-aig-cache-status"], again["cf-aig-cache-status"], len(raw.arrived)) == ("MISS", "HIT", 1)
    assert (status, same, again["Content-Type"], again["x-stored"], again["Content-Length"]) == (200, body, "application/json", "yes", str(len(body)))
    assert int(again["age"]) >= 0 and again["cf-aig-log-id"] != first["cf-aig-log-id"]
    assert again["x-request-id"] == "mine" and "x-ratelimit-remaining-requests" not in again
    assert first["x-relay-cache-key"] == again["x-relay-cache-key"]
    missed, hit = await relay.events(count=2)
    assert (missed["cache"], missed["outcome"], hit["cache"], hit["outcome"]) == ("MISS", "relayed", "HIT", "cached")


async def test_a_stream_is_recorded_while_it_is_relayed_and_replayed_as_a_stream(start: StartRelay, raw: RawUpstream) -> None:
    gates, steps = gated_events(2)
    raw.plays(*steps[:-1], END)
    relay = await start(CACHE, openai=provider(raw.url))
    async with relay.client.post(relay.path("openai", "chat/completions"), json={"stream": True}) as answer:
        gates[0].set()
        assert await answer.content.readany() == b"data: 0\n\n", "the client gets each event at once"
        gates[1].set()
        assert await answer.content.read() == b"data: 1\n\n" + FINISH + DONE
    _, headers, body = await relay.call("POST", relay.path("openai", "chat/completions"), json={"stream": True})
    assert (headers["cf-aig-cache-status"], body) == ("HIT", b"data: 0\n\ndata: 1\n\n" + FINISH + DONE)
    assert headers["Transfer-Encoding"] == "chunked" and headers["x-accel-buffering"] == "no" and "Content-Length" not in headers


BINARY = bytes(range(256)) * 2000
CACHED = {
    "audio": ("audio/speech", ok(BINARY, "Content-Type: audio/mpeg"), BINARY),
    "an image": ("images/generations", ok(BINARY, "Content-Type: image/png"), BINARY),
    "JSON": ("chat/completions", ok(ANSWER, "Content-Type: application/json; charset=utf-8"), ANSWER),
    "text": ("audio/transcriptions", ok(b"hi", "Content-Type: text/plain"), b"hi"),
    "compressed JSON": ("chat/completions", ok(gzip.compress(ANSWER, mtime=0), "Content-Type: application/json", "Content-Encoding: gzip"), gzip.compress(ANSWER, mtime=0)),
    "a compressed stream": ("chat/completions", ok(gzip.compress(FINISH + DONE, mtime=0), "Content-Type: text/event-stream", "Content-Encoding: gzip"), gzip.compress(FINISH + DONE, mtime=0)),
    "messages": ("messages", SSE_HEAD + chunk(b'event: message_stop\ndata: {"type": "message_stop"}\n\n') + LAST_CHUNK, b'event: message_stop\ndata: {"type": "message_stop"}\n\n'),
    "JSON that ends with its connection": ("chat/completions", head("Content-Type: application/json") + ANSWER, ANSWER),
}  # fmt: skip


@pytest.mark.parametrize("name", CACHED)
async def test_complete_responses_of_each_media_type_are_cached(name: str, start: StartRelay, raw: RawUpstream) -> None:
    endpoint, answer, body = CACHED[name]
    raw.plays(answer, CLOSE)
    relay = await start(CACHE, openai=provider(raw.url))
    await relay.call("POST", relay.path("openai", endpoint), json={})
    _, headers, again = await relay.call("POST", relay.path("openai", endpoint), json={})
    assert (headers["cf-aig-cache-status"], again, len(raw.arrived)) == ("HIT", body, 1)


NOT_CACHED = {
    "an error": ok(b'{"error": {}}', "Content-Type: application/json", status="400 Bad Request"),
    "an error within a 200": ok(b'{"error": {"message": "no"}}', "Content-Type: application/json"),
    "not finished": ok(b'{"choices": [{"index": 0, "finish_reason": null}]}', "Content-Type: application/json"),
    "half a document": ok(ANSWER[:-2], "Content-Type: application/json"),
    "a page": ok(b"<html><body>We will be back soon</body></html>", "Content-Type: text/html"),
    "a page that is called JSON": ok(b"<html><body>We will be back soon</body></html>", "Content-Type: application/json"),
    "nothing": ok(b"", "Content-Type: application/json"),
    "nothing as a stream": SSE_HEAD + LAST_CHUNK,
    "a part": ok(ANSWER, "Content-Type: application/json", status="206 Partial Content"),
    "no-store": ok(ANSWER, "Content-Type: application/json", "Cache-Control: no-store"),
    "varying": ok(ANSWER, "Content-Type: application/json", "Vary: *"),
    "an unknown media type": ok(ANSWER, "Content-Type: application/octet-stream"),
    "too large": ok(ANSWER[:-1] + b" " * 2000 + b"}", "Content-Type: application/json"),
    "an error event": SSE_HEAD + chunk(b'data: {"id": 1, "error": {"code": 500}}\n\n') + END,
    "a named error event": SSE_HEAD + chunk(b"event: error\ndata: {}\n\n") + END,
    "a stream without a reason": SSE_HEAD + chunk(b'data: {"choices": [{"index": 0}]}\n\n') + chunk(DONE) + LAST_CHUNK,
    "a stream without its end": SSE_HEAD + chunk(b'data: {"choices": [{"index": 0}]}\n\n') + LAST_CHUNK,
    "a compressed stream without its end": ok(gzip.compress(b'data: {"choices": [{"index": 0}]}\n\n'), "Content-Type: text/event-stream", "Content-Encoding: gzip"),
    "half a compressed document": ok(gzip.compress(ANSWER)[:-4], "Content-Type: application/json", "Content-Encoding: gzip"),
    "in an unknown coding": ok(ANSWER, "Content-Type: application/json", "Content-Encoding: snappy"),
}  # fmt: skip


@pytest.mark.parametrize("answer", NOT_CACHED)
async def test_incomplete_and_failed_responses_are_not_cached(answer: str, start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(NOT_CACHED[answer])
    relay = await start({"cache": {"ttl_s": 3600, "max_answer_bytes": 1000}}, openai=provider(raw.url))
    assert await statuses(relay, {}, {}) == ["MISS", "MISS"] and len(raw.arrived) == 2


@pytest.mark.parametrize("answer", [head("Content-Type: audio/mpeg") + b"ID3", head("Content-Type: audio/mpeg", "Content-Length: 9") + b"ID3"])
async def test_audio_that_may_be_truncated_is_not_cached(answer: bytes, start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(answer, CLOSE)
    relay = await start(CACHE, openai=provider(raw.url))
    for _ in range(2):
        async with relay.client.post(relay.path("openai", "audio/speech"), json={}) as response:
            assert response.headers["cf-aig-cache-status"] == "MISS"
            with contextlib.suppress(aiohttp.ClientPayloadError):
                await response.read()
    assert len(raw.arrived) == 2


async def test_a_long_stream_is_checked_in_a_thread_and_then_cached(start: StartRelay, raw: RawUpstream) -> None:
    part = b'data: {"choices": [{"index": 0, "delta": {"content": "%s"}, "finish_reason": null}]}\n\n' % (b"x" * 1000)
    for end in (END, LAST_CHUNK):
        raw.plays(SSE_HEAD, chunk(part * 600), end)
    relay = await start(CACHE, openai=provider(raw.url))
    found = []
    for question in (1, 1, 2, 2):
        found += await statuses(relay, {"a": question})
        await relay.idle()
        await relay.gateway.background.done()
    assert found == ["MISS", "HIT", "MISS", "MISS"]


async def test_a_truncated_response_is_not_cached(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(SSE_HEAD, chunk(FINISH), chunk(DONE), CLOSE)
    raw.plays(SSE_HEAD, END)
    relay = await start(CACHE, openai=provider(raw.url))
    async with relay.client.post(relay.path("openai", "chat/completions"), json={}) as cut:
        with pytest.raises(Exception, match=r"not enough data|payload|closed"):
            await cut.read()
    _, headers, body = await relay.call("POST", relay.path("openai", "chat/completions"), json={})
    assert (headers["cf-aig-cache-status"], body) == ("MISS", FINISH + DONE)


async def test_a_response_whose_client_disconnected_is_not_cached(start: StartRelay, raw: RawUpstream) -> None:
    gates, steps = gated_events(2)
    raw.plays(*steps)
    relay = await start(CACHE, openai=provider(raw.url))
    async with relay.client.post(relay.path("openai", "chat/completions"), json={"model": "m"}) as leaving:
        gates[0].set()
        await leaving.content.readany()
    await relay.idle()
    gates[1].set()
    assert await statuses(relay, {}) == ["MISS"]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, [None, None]),
        ({"cf-aig-cache-ttl": "60"}, ["MISS", "HIT"]),
        ({"cf-cache-ttl": "60"}, ["MISS", "HIT"]),
        ({"cf-aig-cache-key": "mine"}, ["MISS", "HIT"]),
        ({"cf-aig-cache-ttl": "60", "cf-aig-skip-cache": "true"}, ["BYPASS", "BYPASS"]),
        ({"cf-cache-ttl": "60", "cf-skip-cache": "true"}, ["BYPASS", "BYPASS"]),
        ({"cf-aig-cache-ttl": "60", "cf-aig-skip-cache": "false"}, ["MISS", "HIT"]),
        ({"cf-aig-cache-ttl": "0"}, ["MISS", "MISS"]),
    ],
)
async def test_a_client_controls_the_cache_with_the_headers_of_cloudflare(headers: dict[str, str], expected: list[str | None], start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(JSON)
    relay = await start(openai=provider(raw.url))
    assert await statuses(relay, {"headers": headers}, {"headers": headers}) == expected
    assert not any(name.lower().startswith(("cf-aig-", "cf-cache", "cf-skip")) for each in raw.arrived for name, _ in each.headers)


@pytest.mark.parametrize("ttl", ["-1", "soon", "1.5", "99999999"])
async def test_an_invalid_ttl_is_refused(ttl: str, start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(openai=provider(raw.url))
    status, headers, _ = await chat(relay, headers={"cf-aig-cache-ttl": ttl})
    assert (status, headers["x-relay-error"]) == (400, "bad_request")


async def test_a_response_that_skipped_the_cache_replaces_the_cached_one(start: StartRelay, raw: RawUpstream) -> None:
    old, new = ANSWER.replace(b"42", b"old"), ANSWER.replace(b"42", b"new")
    raw.plays(ok(old, "Content-Type: application/json"))
    raw.plays(ok(new, "Content-Type: application/json"))
    relay = await start(CACHE, openai=provider(raw.url))
    await chat(relay)
    assert (await chat(relay, headers={"cf-aig-skip-cache": "true"}))[2] == new
    assert (await chat(relay))[2] == new and len(raw.arrived) == 2


async def test_a_custom_key_identifies_the_whole_request(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(JSON)
    relay = await start(CACHE, openai=provider(raw.url))
    custom = {"cf-aig-cache-key": "greeting"}
    assert await statuses(relay, {"headers": custom, "a": 1}, {"headers": custom, "a": 2}, {"a": 1}) == ["MISS", "HIT", "MISS"]


async def test_which_endpoints_are_cached_by_default_and_on_request(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(JSON)
    relay = await start(CACHE, openai=provider(raw.url))

    async def status(method: str, endpoint: str, **options: Any) -> str | None:
        return (await relay.call(method, relay.path("openai", endpoint), **options))[1].get("cf-aig-cache-status")

    assert [await status("POST", "files", data=b"x") for _ in range(2)] == [None, None]
    assert [await status("GET", "batches/b_1") for _ in range(2)] == [None, None]
    assert [await status("DELETE", "files/f_1", headers={"cf-aig-cache-ttl": "60"}) for _ in range(2)] == [None, None]
    assert [await status("GET", "models") for _ in range(2)] == ["MISS", "HIT"]
    assert [await status("GET", "voices", headers={"cf-aig-cache-ttl": "60"}) for _ in range(2)] == ["MISS", "HIT"]


async def test_a_response_of_a_fallback_is_not_cached_for_the_first_provider(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(JSON)
    entries = {"openai": provider("http://127.0.0.1:9", fallback=[{"provider": "other"}]), "other": provider(raw.url)}
    relay = await start(CACHE | {"providers": entries})
    assert await statuses(relay, {}, {}) == ["MISS", "MISS"]


@pytest.mark.parametrize("who", ["relay", "cloudflare", "off"])
async def test_calls_that_cloudflare_caches_are_not_cached_by_the_relay(who: str, start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(JSON)
    document = CACHE | {"cloudflare": {"account_id": "a", "base_url": raw.url, "delegate": {"cache": who}}}
    relay = await start(document, openai=provider("http://127.0.0.1:9", cloudflare={"slug": "openai"}))
    ttl = {"cf-aig-cache-ttl": "60"}
    expected = ["MISS", "HIT"] if who == "relay" else [None, None]
    assert await statuses(relay, {"headers": ttl}, {"headers": ttl}) == expected
    assert raw.arrived[0].header("cf-aig-cache-ttl") == (["60"] if who == "cloudflare" else [])


SCOPES = {
    "client": ("198.51.100.1", "198.51.100.2"),
    "path": ("chat/completions", "v2/chat/completions"),
    "query": ("", "?x=1"),
    "method": ("POST", "GET"),
    "body": (b'{"a": 1}', b'{"a": 2}'),
    "accept": ({}, {"Accept": "audio/wav"}),
    "version": ({}, {"anthropic-version": "2"}),
    "unknown header": ({}, {"x-any": "1"}),
    "coding": ({}, {"Accept-Encoding": "gzip"}),
    "custom key": ({"cf-aig-cache-key": "a"}, {"cf-aig-cache-key": "b"}),
    "own credential": ({"Authorization": "Bearer CANARY-client-a"}, {"Authorization": "Bearer CANARY-client-b"}),
    "no credential": ({"Authorization": "Bearer CANARY-client-a"}, {}),
    "provider": ("openai", "second"),
}  # fmt: skip


@pytest.mark.parametrize("scope", ["client", "shared"])
@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("differs", SCOPES)
async def test_a_cached_response_is_not_served_to_a_different_call(differs: str, custom: bool, scope: str, start: StartRelay, raw: RawUpstream) -> None:
    """Vary all that distinguishes two calls, in both scopes, with and without a custom key."""
    raw.plays(JSON)
    entry = provider(raw.url, client_credentials="allow")
    document = {"cache": {"ttl_s": 60, "scope": scope}, "server": {"trusted_proxies": ["127.0.0.1"]}}
    relay = await start(document, openai=entry, second=entry)

    async def call(side: int) -> str:
        request: dict[str, Any] = {"client": "198.51.100.1", "path": "chat/completions", "query": "", "method": "POST", "body": b"{}", "provider": "openai"}
        headers = {"X-Forwarded-For": request["client"], "cf-aig-cache-ttl": "60"} | ({"cf-aig-cache-key": "k"} if custom else {})
        value = SCOPES[differs][side]
        if isinstance(value, dict):
            headers |= value
        else:
            request[differs] = value
            headers["X-Forwarded-For"] = request["client"]
        url = relay.path(request["provider"], request["path"]) + request["query"]
        return str((await relay.call(request["method"], url, data=request["body"], headers=headers))[1]["cf-aig-cache-status"])

    same = differs == "client" and scope == "shared"
    # A custom key replaces the content of the request, never its client, provider or coding.
    same = same or (custom and differs in ("path", "query", "method", "body", "accept", "version", "unknown header"))
    assert [await call(0), await call(1), await call(0)] == ["MISS", "HIT" if same else "MISS", "HIT"]


async def test_headers_that_do_not_affect_the_response_do_not_affect_the_key(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(JSON)
    relay = await start(CACHE, openai=provider(raw.url))
    noise = [{"User-Agent": "a"}, {"User-Agent": "b", "x-stainless-retry-count": "1"}, {"traceparent": "00-1"}, {"Idempotency-Key": "2"}, {"Authorization": "Bearer CANARY-client-x"}]
    assert await statuses(relay, *[{"headers": each} for each in noise]) == ["MISS"] + ["HIT"] * 4


def test_no_part_of_a_cache_key_can_be_mistaken_for_another() -> None:
    texts = ["", "a", "ab", "', 'b", "\\"]
    keys = {
        caching.key_of((client, credential), (url,), [("accept", header)], body.encode()) for client, credential, url, header, body in itertools.product(texts, texts, texts, texts, texts)
    }
    assert len(keys) == len(texts) ** 5


async def test_a_purge_by_key_provider_or_age(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(JSON)
    relay = await start(CACHE, openai=provider(raw.url))
    key = (await chat(relay, a=1))[1]["x-relay-cache-key"]
    await chat(relay, a=2)

    async def purge(query: str) -> dict[str, Any]:
        status, _, body = await relay.call("DELETE", f"{relay.url}/api/v1/ai-gateway/cache{query}")
        assert status == 200
        return json.loads(body)  # type: ignore[no-any-return]

    assert await purge("?older_than_s=60") == {"purged": 0}
    assert await purge(f"?key={key}") == {"purged": 1}
    assert await statuses(relay, {"a": 1}, {"a": 2}) == ["MISS", "HIT"]
    assert await purge("?provider=fal") == {"purged": 0}
    assert await purge("?provider=openai") == {"purged": 2}
    assert await purge("") == {"purged": 0}


@pytest.mark.parametrize("query", ["?older_than_s=soon", "?older_than_s=-1", "?providers=openai"])
async def test_an_invalid_purge_removes_nothing(query: str, start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(JSON)
    relay = await start(CACHE, openai=provider(raw.url))
    await chat(relay)
    status, headers, _ = await relay.call("DELETE", f"{relay.url}/api/v1/ai-gateway/cache{query}")
    assert (status, headers["x-relay-error"]) == (400, "bad_request")
    assert await statuses(relay, {}) == ["HIT"]


async def test_two_relays_share_a_cache_in_redis_and_work_without_it(start: StartRelay, raw: RawUpstream, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "RETRY_AFTER_S", 0.05)
    raw.plays(JSON)
    document = {"cache": {"ttl_s": 3600, "store": "redis"}, "redis": {"url": redis_server.url}}
    one, other = [await start(document, openai=provider(raw.url)) for _ in range(2)]
    assert await statuses(one, {}) == ["MISS"]
    await one.idle()
    await one.gateway.background.done()
    _, headers, body = await chat(other)
    assert (headers["cf-aig-cache-status"], body) == ("HIT", ANSWER)
    await redis_server.stop()
    assert await statuses(other, {}, {}) == ["MISS", "MISS"]
    status, refused, _ = await other.call("DELETE", f"{other.url}/api/v1/ai-gateway/cache")
    assert (status, refused["x-relay-error"]) == (503, "store_unavailable")
    await redis_server.start()
    async with asyncio.timeout(HANG_GUARD_S):
        while await statuses(other, {}) != ["HIT"]:
            await asyncio.sleep(0.02)


# Shared calls

SHARED = {"cache": {"coalesce": True}}


async def _many(relay: Relay, count: int) -> list[asyncio.Task[tuple[int, Any, bytes]]]:
    """Start identical calls and wait until all have joined; the first one leads."""
    tasks: list[asyncio.Task[tuple[int, Any, bytes]]] = []
    async with asyncio.timeout(HANG_GUARD_S):
        for more in (1, count - 1):
            tasks += [asyncio.create_task(chat(relay, stream=True)) for _ in range(more)]
            # The shared call has an exchange of its own.
            while len(relay.gateway.running) < len(tasks) + 1:
                await asyncio.sleep(0.01)
    return tasks


async def test_a_hundred_identical_concurrent_streams_are_one_call(start: StartRelay, raw: RawUpstream) -> None:
    gates, steps = gated_events(20)
    raw.plays(*steps)
    relay = await start(SHARED, openai=provider(raw.url))
    tasks = await _many(relay, 100)
    for gate in gates:
        gate.set()
        await asyncio.sleep(0)
    answers = await asyncio.gather(*tasks)
    assert {body for _, _, body in answers} == {b"".join(b"data: %d\n\n" % number for number in range(20))}
    cache_statuses = [headers["cf-aig-cache-status"] for _, headers, _ in answers]
    assert (cache_statuses.count("MISS"), cache_statuses.count("HIT"), len(raw.arrived)) == (1, 99, 1)
    await relay.idle()
    assert len(relay.gateway.inflight) == 0


async def test_a_late_subscriber_gets_everything_so_far_and_then_follows_the_stream(start: StartRelay, raw: RawUpstream) -> None:
    gates, steps = gated_events(3)
    raw.plays(*steps)
    relay = await start(SHARED, openai=provider(raw.url))
    url, body = relay.path("openai", "chat/completions"), {"model": "m"}
    async with relay.client.post(url, json=body) as first:
        for gate in gates[:2]:
            gate.set()
        assert await first.content.readexactly(18) == b"data: 0\n\ndata: 1\n\n"
        async with relay.client.post(url, json=body) as late:
            assert await late.content.readexactly(18) == b"data: 0\n\ndata: 1\n\n"
            gates[2].set()
            assert await late.content.read() == await first.content.read() == b"data: 2\n\n"
    assert len(raw.arrived) == 1


async def test_a_leader_that_disconnects_does_not_end_the_other_calls(start: StartRelay, raw: RawUpstream) -> None:
    gates, steps = gated_events(2)
    raw.plays(*steps)
    relay = await start(SHARED, openai=provider(raw.url))
    tasks = await _many(relay, 10)
    gates[0].set()
    await asyncio.sleep(0.05)
    tasks[0].cancel()
    await asyncio.gather(tasks[0], return_exceptions=True)
    gates[1].set()
    answers = await asyncio.gather(*tasks[1:])
    assert {body for _, _, body in answers} == {b"data: 0\n\ndata: 1\n\n"} and len(raw.arrived) == 1
    lines = await relay.events(count=10)
    assert sorted(line["outcome"] for line in lines) == ["cached"] * 9 + ["client_gone"]


async def test_a_shared_call_is_cancelled_when_all_clients_have_disconnected(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(SILENCE)
    relay = await start(SHARED, openai=provider(raw.url))
    tasks = await _many(relay, 3)
    for task in tasks:
        task.cancel()
    async with asyncio.timeout(HANG_GUARD_S):
        await raw.closed.wait()
    await relay.idle()
    assert len(relay.gateway.inflight) == 0


async def test_a_waiting_call_does_not_inherit_a_failure(start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(gate, CLOSE)
    raw.plays(JSON)
    relay = await start(SHARED, openai=provider(raw.url))
    tasks = await _many(relay, 5)
    gate.set()
    answers = await asyncio.gather(*tasks)
    assert sorted(status for status, _, _ in answers) == [200] * 4 + [502]
    assert len(raw.arrived) == 5, "each of the others made its own call"


async def test_a_waiting_call_does_not_inherit_an_error_response(start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(gate, ok(b'{"error": {"message": "no"}}', "Content-Type: application/json", status="400 Bad Request"))
    raw.plays(JSON)
    relay = await start(SHARED, openai=provider(raw.url))
    tasks = await _many(relay, 5)
    gate.set()
    answers = await asyncio.gather(*tasks)
    assert sorted(status for status, _, _ in answers) == [200] * 4 + [400]
    refused = next(headers for status, headers, _ in answers if status == 400)
    assert refused["x-relay-error-source"] == "provider"


async def test_a_broken_stream_is_broken_for_every_client(start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(gate, SSE_HEAD, chunk(b"data: 0\n\n"), CLOSE)
    relay = await start(SHARED, openai=provider(raw.url))
    tasks = await _many(relay, 3)
    gate.set()
    assert all(isinstance(each, Exception) for each in await asyncio.gather(*tasks, return_exceptions=True))
    await relay.idle()
    lines = await relay.events(count=3)
    assert {line["error"] for line in lines} == {"upstream_disconnected"}


async def test_a_slow_client_loses_nothing_of_a_large_shared_response(start: StartRelay, raw: RawUpstream) -> None:
    body = bytes(range(256)) * 4096 * 16
    gate = asyncio.Event()
    raw.plays(gate, ok(body, "Content-Type: audio/mpeg"))
    relay = await start({"cache": {"coalesce": True, "max_answer_bytes": 100_000}}, openai=provider(raw.url))
    url = relay.path("openai", "chat/completions")
    slow = asyncio.create_task(relay.client.post(url, json={"model": "m", "stream": True}))
    fast = [asyncio.create_task(chat(relay, stream=True)) for _ in range(2)]
    async with asyncio.timeout(HANG_GUARD_S):
        while len(relay.gateway.running) < 4:
            await asyncio.sleep(0.01)
    gate.set()
    answer = await slow
    await asyncio.sleep(0.2)
    held = sum(len(piece) for flight in relay.gateway.inflight._flights.values() for piece in flight._chunks)
    assert held < 100_000 + (1 << 18), "the buffer is bounded while the slow client reads nothing"
    assert await answer.read() == body
    assert {each[2] == body for each in await asyncio.gather(*fast)} == {True} and len(raw.arrived) == 1


async def test_a_shared_response_is_cached(start: StartRelay, raw: RawUpstream) -> None:
    gates, steps = gated_events(1)
    raw.plays(*steps[:-1], END)
    relay = await start({"cache": {"coalesce": True, "ttl_s": 60}}, openai=provider(raw.url))
    tasks = await _many(relay, 3)
    gates[0].set()
    await asyncio.gather(*tasks)
    _, headers, body = await chat(relay, stream=True)
    assert (headers["cf-aig-cache-status"], body, len(raw.arrived)) == ("HIT", b"data: 0\n\n" + FINISH + DONE, 1)


async def test_only_the_call_to_the_provider_uses_tokens(start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(gate, ok(ANSWER[:-1] + b', "usage": {"prompt_tokens": 10, "completion_tokens": 5}}', "Content-Type: application/json"))
    relay = await start({"cache": {"coalesce": True, "ttl_s": 60}, "limits": [{"tokens": 10_000, "window_s": 86400, "name": "t"}]}, openai=provider(raw.url))
    tasks = await _many(relay, 5)
    gate.set()
    answers = await asyncio.gather(*tasks)
    assert sum("ratelimit" in headers for _, headers, _ in answers) == 1
    await relay.gateway.background.done()
    await chat(relay, stream=True)
    _, headers, _ = await chat(relay, headers={"cf-aig-skip-cache": "true"}, max_tokens=1)
    remaining = int(headers["ratelimit"].partition("r=")[2].partition(";")[0])
    assert 10_000 - 15 - 20 <= remaining < 10_000 - 15


# --- clients

CLIENT_KEYS = {name: canary(f"cache-{name}") for name in ("web", "web2", "ci")}
CLIENTS: dict[str, Any] = {"web": {"key": [CLIENT_KEYS["web"], CLIENT_KEYS["web2"]]}, "ci": {"key": CLIENT_KEYS["ci"]}}
NOBODY: dict[str, str] = {}


def as_client(name: str, **headers: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {CLIENT_KEYS[name]}"} | headers


async def test_the_keys_of_a_client_share_responses_and_clients_do_not(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(JSON)
    relay = await start(CACHE | {"clients": CLIENTS}, openai=provider(raw.url))
    callers = [as_client("web"), as_client("web2"), as_client("ci"), NOBODY, as_client("ci"), NOBODY]
    assert await statuses(relay, *[{"headers": caller} for caller in callers]) == ["MISS", "HIT", "MISS", "MISS", "HIT", "HIT"]
    assert len(raw.arrived) == 3


async def test_a_forwarded_address_never_shares_with_a_client(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(JSON)
    document = CACHE | {"clients": CLIENTS, "server": {"trusted_proxies": ["127.0.0.1"]}}
    relay = await start(document, openai=provider(raw.url))
    callers = [as_client("web"), {"X-Forwarded-For": "web"}, {"X-Forwarded-For": "198.51.100.7"}, as_client("web", **{"X-Forwarded-For": "198.51.100.7"})]
    assert await statuses(relay, *[{"headers": caller} for caller in callers]) == ["MISS", "MISS", "MISS", "HIT"]


@pytest.mark.parametrize("name", ["127.0.0.1", "198.51.100.7", "::1", "2001:db8::7"])
def test_a_client_cannot_have_an_address_as_its_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        configured(tmp_path, {"clients": {name: {"key": CLIENT_KEYS["web"]}}})


async def test_a_clients_own_cache_key_does_not_reach_the_entries_of_another(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(JSON)
    relay = await start({"clients": CLIENTS}, openai=provider(raw.url))
    own = {"cf-aig-cache-key": "k"}
    callers = [as_client("web", **own), as_client("web2", **own), as_client("ci", **own), own]
    assert await statuses(relay, *[{"headers": caller} for caller in callers]) == ["MISS", "HIT", "MISS", "MISS"]


async def test_only_calls_of_one_client_share_a_flight(start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(gate, JSON)
    relay = await start({"cache": {"coalesce": True}, "clients": CLIENTS}, openai=provider(raw.url))
    callers = [as_client("web"), as_client("web2"), as_client("ci"), NOBODY]
    calls = [asyncio.create_task(chat(relay, headers=caller)) for caller in callers]
    async with asyncio.timeout(HANG_GUARD_S):
        while len(relay.gateway.running) < 4 + 3:  # and the three shared calls
            await asyncio.sleep(0.005)
    gate.set()
    found = [headers["cf-aig-cache-status"] for _, headers, _ in await asyncio.gather(*calls)]
    assert sorted(found[:2]) == ["HIT", "MISS"] and found[2:] == ["MISS", "MISS"] and len(raw.arrived) == 3


RESTRICTED = {
    "provider": ({"providers": ["other"]}, "provider_not_allowed"), "endpoint": ({"endpoints": ["embeddings"]}, "endpoint_not_allowed"),
    "model": ({"models": ["gpt-*"]}, "model_not_allowed"),
}  # fmt: skip


@pytest.mark.parametrize("how", ["the content's key", "its own key", "a flight"])
@pytest.mark.parametrize("what", RESTRICTED)
async def test_a_shared_response_does_not_go_round_a_clients_rights(start: StartRelay, raw: RawUpstream, what: str, how: str) -> None:
    record, code = RESTRICTED[what]
    gate = asyncio.Event()
    raw.plays(gate, JSON)
    known = CLIENTS | {"ci": CLIENTS["ci"] | record}
    relay = await start({"cache": {"ttl_s": 60, "scope": "shared", "coalesce": True}, "clients": known}, openai=provider(raw.url), other=provider(raw.url))
    own = {"cf-aig-cache-key": "k"} if how == "its own key" else {}
    leading = asyncio.create_task(chat(relay, headers=as_client("web", **own)))
    if how == "a flight":
        async with asyncio.timeout(HANG_GUARD_S):
            while not raw.arrived:
                await asyncio.sleep(0.005)
    else:
        gate.set()
        await leading
    status, headers, body = await chat(relay, headers=as_client("ci", **own))
    assert (status, headers["x-relay-error"]) == (403, code) and ANSWER not in body
    gate.set()
    await leading
    assert (await chat(relay, headers=as_client("web2", **own)))[1]["cf-aig-cache-status"] == "HIT"


async def test_all_callers_of_the_anonymous_client_share_responses(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(JSON)
    document = CACHE | {"server": {"trusted_proxies": ["127.0.0.1"]}, "access": {"anonymous": "page"}, "clients": CLIENTS | {"page": {}}}
    relay = await start(document, openai=provider(raw.url))
    callers = [{"X-Forwarded-For": "198.51.100.7"}, {"X-Forwarded-For": "198.51.100.8"}, as_client("web")]
    assert await statuses(relay, *[{"headers": caller} for caller in callers]) == ["MISS", "HIT", "MISS"]
