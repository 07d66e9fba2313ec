"""Absolute URLs in responses, and the URLs that a client names: none bypasses the relay."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import pytest
from aiohttp import web

from relay.calls import send
from relay.calls.transforms import plan_transform
from relay.core.rewriting import ProviderOrigin, Rewriter, endpoint_of, field_pattern, whole_events
from relay.gate.identify import Proxies
from tests.conftest import StartRelay
from tests.relays import CLIENT_KEY, KEYS, Relay, provider
from tests.upstream.raw import CLOSE, LAST_CHUNK, SSE_HEAD, RawUpstream, chunk, head, ok
from tests.upstream.vendors import SEEN, noted, vendor

ORIGINS = (
    ProviderOrigin("https://queue.fal.run", "", "queue/"),
    ProviderOrigin("https://fal.run", "", ""),
    ProviderOrigin("https://api.openai.com", "/v1", ""),
)  # fmt: skip
QUEUE = {"status_url": 1, "response_url": 1, "cancel_url": 1}


def rewriter(root: str = "https://relay.test/api/v1/ai-gateway/providers/fal/") -> Rewriter:
    return Rewriter(ORIGINS, root, frozenset({"x-goog-upload-url"}), field_pattern(QUEUE))


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("https://queue.fal.run/fal-ai/flux/requests/1/status?logs=0", ("queue/fal-ai/flux/requests/1/status", "logs=0")),
        ("https://fal.run/fal-ai/flux", ("fal-ai/flux", "")),
        ("HTTPS://FAL.run/x", ("x", "")),
        ("wss://fal.run/app/realtime?a=1", ("app/realtime", "a=1")),
        ("https://api.openai.com/v1/files", ("files", "")),
        ("https://fal.run", ("", "")),
        ("https://api.openai.com/v2/files", None),
        ("https://api.openai.com/v11/files", None),
        ("http://fal.run/x", None),
        ("https://fal.run:8443/x", None),
        ("https://fal.run./x", None),
        ("https://fal.run@evil.test/x", None),
        ("https://user@fal.run/x", None),
        ("https://evil.test/fal.run/", None),
        ("https://evil.test#https://fal.run/", None),
        ("https://rest.fal.run.evil.test/x", None),
        ("//fal.run/x", None),
        ("fal.run/x", None),
        ("", None),
        ("https://", None),
    ],
)  # fmt: skip
def test_only_a_url_on_a_providers_own_host_is_an_endpoint(url: str, found: tuple[str, str] | None) -> None:
    assert endpoint_of(url, ORIGINS) == found


def test_only_the_listed_fields_change_and_no_other_byte() -> None:
    body = (
        b'{ "status_url":  "https:\\/\\/queue.fal.run\\/a\\/b" ,\n"response_url":"https://elsewhere.test/x", "cancel_url": null,'
        b' "status_urls": "https://queue.fal.run/no", "text": "\\"status_url\\": \\"https://queue.fal.run/no\\"", "n": 1.50 }'
    )
    expected = body.replace(
        b'"https:\\/\\/queue.fal.run\\/a\\/b"', b'"https://relay.test/api/v1/ai-gateway/providers/fal/queue/a/b"'
    )
    assert rewriter().body(body) == expected


def test_a_rewritten_socket_url_stays_a_socket_url() -> None:
    assert rewriter("http://127.0.0.1:1/p/").url("wss://fal.run/x?s=1") == "ws://127.0.0.1:1/p/x?s=1"
    assert rewriter().url("wss://fal.run/x").startswith("wss://relay.test/")


def test_sse_is_split_at_the_last_whole_event() -> None:
    assert whole_events(b"data: 1\n\ndata: 2") == 9
    assert whole_events(b"data: 1\r\n\r\ndata: 2\r\n\r\n") == 22
    assert whole_events(b"data: 1\n") == 0 and whole_events(b"") == 0


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "client"),
    [
        ("203.0.113.9", ["1.1.1.1"], "203.0.113.9"),
        ("127.0.0.1", [], "127.0.0.1"),
        ("127.0.0.1", ["198.51.100.7"], "198.51.100.7"),
        ("127.0.0.1", ["6.6.6.6, 198.51.100.7, 10.0.0.4"], "198.51.100.7"),
        ("127.0.0.1", ["6.6.6.6", "198.51.100.7"], "198.51.100.7"),
        ("127.0.0.1", ["not an address"], "127.0.0.1"),
        ("10.0.0.4", ["10.0.0.5"], "10.0.0.5"),
    ],
)
def test_the_client_is_the_last_hop_that_is_not_a_trusted_proxy(peer: str, forwarded_for: list[str], client: str) -> None:
    assert Proxies(["127.0.0.1", "10.0.0.0/8"]).client(peer, forwarded_for) == client


async def queue(request: web.Request) -> web.StreamResponse:
    """Respond to a submit as fal's queue does."""
    await noted(request)
    base = f"{request.url.origin()}{request.path}/requests/r1"
    answer = {"request_id": "r1", "status_url": f"{base}/status", "response_url": base, "cancel_url": f"{base}/cancel"}
    return web.json_response(answer, headers={"ETag": '"1"', "Digest": "sha-256=x"})


@pytest.fixture
async def fal(start: StartRelay, aiohttp_server: Any) -> tuple[Relay, Any]:
    queue_host = await aiohttp_server(vendor(("*", "/{path:.*}", queue)))
    return await start({"providers": fal_entry("http://127.0.0.1:9", str(queue_host.make_url("")).rstrip("/"))}), queue_host


def fal_entry(base: str, queue_url: str) -> dict[str, Any]:
    entry = provider(base, "FAL_KEY", format="fal", paths={"queue/": queue_url}, target_header="x-fal-target-url")
    return {"fal": entry | {"rewrite": {"fields": {"queue/": list(QUEUE)}}}}


async def test_the_urls_of_a_queue_response_point_to_the_relay(fal: tuple[Relay, Any]) -> None:
    relay, _ = fal
    status, headers, body = await relay.call("POST", relay.path("fal", "queue/fal-ai/flux"), json={"prompt": "x"})
    answer = json.loads(body)
    assert status == 200
    assert answer["status_url"] == relay.path("fal", "queue/fal-ai/flux/requests/r1/status")
    assert answer["response_url"] == relay.path("fal", "queue/fal-ai/flux/requests/r1")
    assert answer["cancel_url"] == relay.path("fal", "queue/fal-ai/flux/requests/r1/cancel")
    assert headers["Content-Length"] == str(len(body)) and "ETag" not in headers and "Digest" not in headers
    polled, _, _ = await relay.call("GET", answer["status_url"])
    assert polled == 200


async def test_a_stream_of_known_length_arrives_whole_although_its_urls_are_longer(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start({"providers": fal_entry("http://127.0.0.1:9", raw.url)})
    event = b'data: {"status_url":"%s/r1/status"}\n\n' % raw.url.encode()
    gate = asyncio.Event()
    raw.plays(head("Content-Type: text/event-stream", f"Content-Length: {2 * len(event)}", 'ETag: "1"'), event, gate, event)
    async with relay.client.get(relay.path("fal", "queue/x")) as streamed:
        assert "Content-Length" not in streamed.headers and "ETag" not in streamed.headers
        gate.set()
        rewritten = b'data: {"status_url":"%s/r1/status"}\n\n' % relay.path("fal", "queue").encode()
        assert await streamed.read() == 2 * rewritten


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "script",
    [
        [ok(b'{"status_url":"x"}', "Content-Type: application/json")],
        [SSE_HEAD, chunk(b"data: 1\n\n"), LAST_CHUNK],
        [ok(b"no", status="500 No")],
        [ok(b"fine")],
    ],
    ids=["JSON", "stream", "error", "plain"],
)
async def test_the_transform_of_a_response_is_planned_once(start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch, script: list[Any], shared: bool) -> None:
    planned: list[Any] = []

    def counted(upstream: Any, attempt: Any) -> Any:
        planned.append(attempt)
        return plan_transform(upstream, attempt)

    monkeypatch.setattr(send, "plan_transform", counted)
    relay = await start({"cache": {"coalesce": shared}, "providers": fal_entry(raw.url, raw.url)})
    raw.plays(*script)
    await relay.call("POST", relay.path("fal", "chat/completions"), data=b"{}")
    assert len(planned) == 1


async def test_a_response_that_is_rewritten_is_requested_uncompressed(fal: tuple[Relay, Any]) -> None:
    relay, upstream = fal
    await relay.call("POST", relay.path("fal", "queue/a"), json={}, headers={"Accept-Encoding": "gzip, br"})
    assert [seen.header("Accept-Encoding") for seen in upstream.app[SEEN]] == ["identity"]


async def test_a_compressed_response_is_relayed_unchanged(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start({"providers": fal_entry("http://127.0.0.1:9", raw.url)})
    packed = gzip.compress(json.dumps({"status_url": f"{raw.url}/x"}).encode())
    raw.plays(ok(packed, "Content-Type: application/json", "Content-Encoding: gzip"))
    assert (await relay.call("GET", relay.path("fal", "queue/a")))[2] == packed


async def test_a_partial_response_is_relayed_unchanged(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start({"providers": fal_entry("http://127.0.0.1:9", raw.url)})
    part = json.dumps({"status_url": f"{raw.url}/x"}).encode()
    raw.plays(ok(part, "Content-Type: application/json", status="206 Partial Content"))
    assert (await relay.call("GET", relay.path("fal", "queue/a")))[2] == part


async def test_events_are_rewritten_whole_however_they_are_split(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start({"providers": fal_entry("http://127.0.0.1:9", raw.url)})
    event = f'data: {{"status": "IN_QUEUE", "status_url": "{raw.url}/a/status"}}\n\n'.encode()
    raw.plays(SSE_HEAD, *(chunk(event[at : at + 7]) for at in range(0, len(event), 7)), chunk(b"data: tail"), LAST_CHUNK)
    _, _, body = await relay.call("GET", relay.path("fal", "queue/a/status/stream"))
    assert body == event.replace(raw.url.encode(), relay.path("fal", "queue").encode()) + b"data: tail"


async def test_a_buffered_event_is_forwarded_when_the_provider_disconnects(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start({"providers": fal_entry("http://127.0.0.1:9", raw.url)})
    raw.plays(SSE_HEAD, chunk(b"data: 1\n\n"), chunk(b"data: 2"), CLOSE)
    got = b""
    async with relay.client.get(relay.path("fal", "queue/a/status/stream")) as answer:
        with pytest.raises(Exception, match=r"not enough data|payload|closed"):
            while True:
                got += await answer.content.readany()
    assert got == b"data: 1\n\ndata: 2"


async def test_a_response_too_large_to_rewrite_is_relayed_unchanged(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start({"providers": fal_entry("http://127.0.0.1:9", raw.url)})
    body = json.dumps({"status_url": f"{raw.url}/x", "pad": "x" * (1024 * 1024 + 10)}).encode()
    raw.plays(head("Content-Type: application/json", "Transfer-Encoding: chunked"), chunk(body), LAST_CHUNK)
    assert (await relay.call("GET", relay.path("fal", "queue/a")))[2] == body


async def test_an_upload_url_in_a_header_points_to_the_relay(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(google=provider(raw.url, "GOOGLE_AI_API_KEY", rewrite={"headers": ["X-Goog-Upload-Url"]}))
    raw.plays(ok(b"{}", f"X-Goog-Upload-URL: {raw.url}/upload/v1beta/files?upload_id=7", "X-Other: https://generativelanguage.googleapis.com/"))
    _, headers, _ = await relay.call("POST", relay.path("google", "upload/v1beta/files"))
    assert headers["x-goog-upload-url"] == relay.path("google", "upload/v1beta/files?upload_id=7")
    assert headers["X-Other"] == "https://generativelanguage.googleapis.com/"


# fal's proxy convention ---------------------------------------------------------------------------


async def test_the_proxy_endpoint_calls_the_url_in_the_header(fal: tuple[Relay, Any]) -> None:
    relay, upstream = fal
    target_url = f"{upstream.make_url('/')}fal-ai/flux/requests/r1/status?logs=0"
    status, _, _ = await relay.call("GET", relay.path("fal", "proxy"), headers={"x-fal-target-url": target_url, "Authorization": f"Key {CLIENT_KEY}"})
    [seen] = upstream.app[SEEN]
    assert status == 200 and seen.target == "/fal-ai/flux/requests/r1/status?logs=0"
    assert seen.header("Authorization") == f"Bearer {KEYS['FAL_KEY']}"
    assert "x-fal-target-url" not in seen.names


@pytest.mark.parametrize(
    "target_url",
    [None, "", "https://evil.test/x", "http://169.254.169.254/latest", "//127.0.0.1:9/x", "gopher://127.0.0.1/x"],
)
async def test_the_proxy_endpoint_refuses_other_hosts(fal: tuple[Relay, Any], target_url: str | None) -> None:
    relay, _ = fal
    headers = {} if target_url is None else {"x-fal-target-url": target_url}
    status, response_headers, _ = await relay.call("POST", relay.path("fal", "proxy"), headers=headers, json={})
    assert (status, response_headers["x-relay-error"]) == (403, "target_not_allowed")


@pytest.mark.parametrize("tail", ["/a/../../x", "/a/%2e%2e/x", "/a\\b"])
async def test_the_proxy_endpoint_checks_the_path_like_any_other(fal: tuple[Relay, Any], tail: str) -> None:
    relay, upstream = fal
    target_url = str(upstream.make_url("")).rstrip("/") + tail
    status, response_headers, _ = await relay.call("POST", relay.path("fal", "proxy"), headers={"x-fal-target-url": target_url})
    assert (status, response_headers["x-relay-error"]) == (400, "bad_path")


async def test_proxy_is_an_ordinary_endpoint_of_other_providers(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(openai=provider(raw.url))
    raw.plays(ok(b"fine"))
    assert (await relay.call("GET", relay.path("openai", "proxy")))[0] == 200


# The public URL


async def _queue_url(relay: Relay, **headers: str) -> str:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    _, _, body = await relay.call("POST", relay.path("fal", "queue/a"), json={}, headers=names)
    return str(json.loads(body)["response_url"]).removesuffix("/api/v1/ai-gateway/providers/fal/queue/a/requests/r1")


async def test_the_public_url_of_the_configuration_is_used(start: StartRelay, aiohttp_server: Any) -> None:
    host = await aiohttp_server(vendor(("*", "/{path:.*}", queue)))
    entry = fal_entry("http://127.0.0.1:9", str(host.make_url("")).rstrip("/"))
    relay = await start({"server": {"public_url": "https://ai.example.com/"}, "providers": entry})
    assert await _queue_url(relay, X_Forwarded_Host="evil.test") == "https://ai.example.com"
    assert (await relay.call("POST", relay.path("fal", "queue/a"), headers={"Host": "ai.example.com"}))[0] == 200


async def test_forwarding_headers_are_trusted_only_from_trusted_proxies(start: StartRelay, aiohttp_server: Any) -> None:
    host = await aiohttp_server(vendor(("*", "/{path:.*}", queue)))
    entry = fal_entry("http://127.0.0.1:9", str(host.make_url("")).rstrip("/"))
    forwarded = {"X_Forwarded_Proto": "https", "X_Forwarded_Host": "ai.example.com", "X_Forwarded_For": "198.51.100.7"}
    distrusting = await start({"providers": entry})
    assert await _queue_url(distrusting, **forwarded) == distrusting.url
    await distrusting.events()  # wait for its line before the other relay takes over the log
    trusting = await start({"server": {"trusted_proxies": ["127.0.0.0/8"]}, "providers": entry})
    assert await _queue_url(trusting, **forwarded) == "https://ai.example.com"
    [event] = await trusting.events()
    assert event["client"] == "198.51.100.7"
