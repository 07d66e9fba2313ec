"""CORS: what a browser may send, and what it may read. Also covers the private method of
aiohttp-cors that the relay calls.
"""

from __future__ import annotations

import re

import aiohttp_cors
import pytest

from relay.surfaces.cors import EXPOSED
from tests.conftest import StartRelay
from tests.processes import ROOT
from tests.relays import Relay, provider
from tests.upstream.raw import RawUpstream, ok

ORIGIN = "https://app.example.com"
CORS = {"cors": {"origins": [ORIGIN, "https://*.wild.example"]}}
ASKED = "authorization,content-type,x-stainless-lang,anthropic-version,cartesia-version"


async def _preflight(relay: Relay, origin: str, method: str = "POST"):  # type: ignore[no-untyped-def]
    headers = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": ASKED}
    return await relay.call("OPTIONS", relay.path("openai", "chat/completions"), headers=headers)


@pytest.mark.parametrize("origin", [ORIGIN, "https://a.wild.example", "https://a.b.wild.example"])
async def test_a_preflight_of_an_allowed_origin_is_answered_by_the_relay(start: StartRelay, raw: RawUpstream, origin: str) -> None:
    relay = await start(CORS, openai=provider(raw.url))
    for method in ("POST", "PATCH", "DELETE"):
        status, headers, _ = await _preflight(relay, origin, method)
        assert (status, headers["Access-Control-Allow-Origin"], headers["Access-Control-Allow-Methods"]) == (200, origin, method)
        assert set(headers["Access-Control-Allow-Headers"].lower().split(",")) == set(ASKED.split(","))
        assert headers["Access-Control-Max-Age"] == "600" and "Origin" in headers.getall("Vary")
        assert "Access-Control-Allow-Credentials" not in headers
    assert raw.connections == 0


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "https://wild.example", "http://app.example.com"])
async def test_a_preflight_of_another_origin_is_403(start: StartRelay, raw: RawUpstream, origin: str) -> None:
    relay = await start(CORS, openai=provider(raw.url))
    status, headers, _ = await _preflight(relay, origin)
    assert status == 403 and "Access-Control-Allow-Origin" not in headers
    none = await start(openai=provider(raw.url))
    assert (await _preflight(none, origin))[0] == 403


async def test_any_other_options_call_is_relayed(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"theirs", "Allow: GET"))
    relay = await start(CORS, openai=provider(raw.url))
    status, headers, body = await relay.call("OPTIONS", relay.path("openai", "x"), headers={"Origin": ORIGIN})
    assert (status, headers["Allow"], body) == (200, "GET", b"theirs")


async def test_a_page_may_read_the_response_and_its_headers(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"x", "Access-Control-Allow-Origin: *", "Vary: Accept"))
    relay = await start(CORS, openai=provider(raw.url))
    _, headers, _ = await relay.call("POST", relay.path("openai", "x"), headers={"Origin": ORIGIN})
    assert headers.getall("Access-Control-Allow-Origin") == [ORIGIN]
    exposed = set(headers["Access-Control-Expose-Headers"].split(","))
    assert {"x-request-id", "cf-aig-log-id", "retry-after", "ratelimit", "server-timing", "x-relay-error", "x-goog-upload-url"} <= exposed
    assert headers.getall("Vary") == ["Accept", "Origin"]
    _, headers, _ = await relay.call("POST", relay.path("openai", "x"))
    assert "Access-Control-Allow-Origin" not in headers and "Origin" in headers.getall("Vary")


async def test_a_page_may_read_errors_and_streams_too(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(CORS, empty=provider(raw.url, key="NOT_SET"), openai=provider(raw.url))
    status, headers, _ = await relay.call("POST", relay.path("empty", "x"), headers={"Origin": ORIGIN})
    assert (status, headers["Access-Control-Allow-Origin"]) == (503, ORIGIN)
    raw.plays(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n2\r\nok\r\n0\r\n\r\n")
    _, headers, _ = await relay.call("POST", relay.path("openai", "x"), headers={"Origin": ORIGIN})
    assert headers["Access-Control-Allow-Origin"] == ORIGIN


def test_the_pinned_version_is_installed() -> None:
    assert aiohttp_cors.__version__ == "0.8.1"


OWN_HEADERS = {
    "relay/calls/response.py": r'pairs\.append\(\("([a-z-]+)"',
    "relay/calls/caching.py": r'\("(age)", ',
    "relay/core/error_bodies.py": r'headers\["([a-z-]+)"\] =',
    "relay/core/limits.py": r'"(ratelimit[a-z-]*)"',
}
"""Where the relay sets a response header of its own, and how."""


def test_a_page_may_read_every_response_header_of_the_relay_and_the_documents_list_it() -> None:
    documented = (ROOT / "docs/api.md").read_text().partition("\n## Response headers\n")[2]
    for file, pattern in OWN_HEADERS.items():
        names = set(re.findall(pattern, (ROOT / file).read_text()))
        assert names, f"{file} sets none"
        assert names <= set(EXPOSED)
        assert [name for name in names if f"`{name}`" not in documented] == []
