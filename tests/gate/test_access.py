"""Who may call and manage while access is open, and which request headers are never forwarded.

The cases are malformed Host headers, proxies in front of the relay, pages without Origin, methods
that are not forwarded, and several credentials at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.addresses import host_name, is_loopback
from relay.core.errors import CrossSiteRequest, ManagementNotLocal, OriginNotAllowed, RelayError
from relay.core.headers import headers_for_cloudflare, headers_for_provider, is_of_network
from relay.gate.access import require_local
from tests.conftest import StartRelay
from tests.relays import canary, provider
from tests.test_security import send_raw
from tests.upstream.raw import RawUpstream, ok

CALL, MANAGE = "/api/v1/ai-gateway/providers/openai/x", "/api/v1/ai-gateway/providers"
SOCKET = ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="]


def _head(method: str, target: str, *lines: str, host: str = "localhost") -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode("latin-1")


# --- hosts

LOOPBACK = ["localhost", "LOCALHOST", "localhost.", "localhost:8787", "localhost:", "127.0.0.1", "127.9.9.9:80", "[::1]", "[::1]:8787", "[::ffff:127.0.0.1]", "[::FFFF:7f00:1]:1"]
NOT_LOOPBACK = [
    "[localhost]evil.com", "[localhost]", "[::1]evil.com", "[::1]evil.com:80", "[127.0.0.1]", "[::1%25lo]", "[::1%lo]", "::1", "localhost:evil",
    "localhost:80:80", "localhost:999999", "evil@localhost", "localhost@evil.com", "localhost/evil.com", "localhost..", "127.0.0.1.", "127.1",
    "0x7f.0.0.1", "0177.0.0.1", "2130706433", "017700000001", "0.0.0.0", "[::]", "[::ffff:8.8.8.8]", "127.0.0.1.evil.com", "localhost.evil.com",
    "evil-localhost", "", "\u0661\u0662\u0667.0.0.1", "loca\u017fhost", "[::1", "::1]", "localhost\t",
]  # fmt: skip


@pytest.mark.parametrize("host", LOOPBACK)
def test_a_loopback_host_is_recognised(host: str) -> None:
    assert is_loopback(host_name(host))


@pytest.mark.parametrize("host", NOT_LOOPBACK)
def test_a_malformed_or_foreign_host_is_not_loopback(host: str) -> None:
    assert not is_loopback(host_name(host))


@given(st.text(max_size=40))
def test_reading_a_host_never_raises_and_returns_a_plain_name(host: str) -> None:
    assert not set(host_name(host)) & set("@/[]% \t")


def test_a_mapped_loopback_address_is_loopback() -> None:
    assert is_loopback("::ffff:127.0.0.1") and not is_loopback("::ffff:10.0.0.1")


async def test_a_host_that_only_looks_like_loopback_may_neither_call_nor_manage(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok())
    relay = await start(openai=provider(raw.url))
    for host in ("[localhost]evil.com", "[::1]evil.com", "evil@localhost", "127.1", "localhost:evil"):
        for target, code in ((CALL, b"host_not_allowed"), (MANAGE, b"management_not_local")):
            answer = await send_raw(relay, _head("GET", target, "Connection: close", host=host))
            assert b" 403 " in answer and code in answer, (host, answer)
    assert raw.connections == 0


async def test_a_request_without_host_is_refused_without_a_name_lookup(start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP/1.0 requires none; aiohttp's request.host would then block the loop in the resolver."""
    raw.plays(ok())
    relay = await start(openai=provider(raw.url))
    monkeypatch.setattr("socket.getfqdn", lambda *_: pytest.fail("the resolver was asked"))
    for target in (CALL, MANAGE):
        assert b" 403 " in await send_raw(relay, f"GET {target} HTTP/1.0\r\n\r\n".encode()), target
    assert raw.connections == 0


# --- proxies in front

PROXY_HEADERS = [
    "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Port", "X-Forwarded-Server", "X-Forwarded-Client-Cert", "X_Forwarded_For",
    "Forwarded", "Via", "X-Real-IP", "X-Client-IP", "Client-IP", "X-Cluster-Client-IP", "True-Client-IP", "WL-Proxy-Client-IP", "X-Original-Forwarded-For",
    "CF-Connecting-IP", "CF-Connecting-IPv6", "CF-IPCountry", "CF-Ray", "CF-Visitor", "CF-Worker", "CF-EW-Via", "Cf-Access-Jwt-Assertion", "CDN-Loop",
    "Fastly-Client-IP", "Fastly-FF", "X-Akamai-Edgescape", "Akamai-Origin-Hop", "CloudFront-Viewer-Address", "X-Amz-Cf-Id", "X-Amzn-Trace-Id",
    "X-Amzn-Oidc-Data", "Fly-Client-IP", "Fly-Forwarded-Proto", "Fly-Region", "X-Azure-ClientIP", "X-Azure-SocketIP", "X-Azure-FDID", "X-FD-HealthProbe",
    "X-ARR-SSL", "X-MS-CLIENT-PRINCIPAL-NAME", "X-AppEngine-User-IP", "X-Appengine-Country", "X-Cloud-Trace-Context", "X-Goog-Iap-Jwt-Assertion",
    "X-Goog-Authenticated-User-Email", "X-Envoy-External-Address", "X-Vercel-Forwarded-For", "X-Vercel-IP-Country", "X-NF-Client-Connection-IP",
    "DO-Connecting-IP", "Tailscale-User-Login", "X-Auth-Request-Email", "Ssl-Client-Subject-Dn",
]  # fmt: skip
CLIENT_HEADERS = [
    "x-goog-user-project", "x-goog-api-client", "x-goog-request-params", "x-goog-upload-command", "X-Amzn-Bedrock-Trace", "x-amz-date", "x-amz-content-sha256",
    "x-ms-client-request-id", "x-ms-useragent", "traceparent", "tracestate", "X-Request-Id", "fly-force-instance-id", "openai-beta", "anthropic-version",
    "x-stainless-timeout", "x-stainless-retry-count", "Helicone-Auth", "HTTP-Referer", "X-Title", "x-fal-queue-priority", "cartesia-version",
]  # fmt: skip


@pytest.mark.parametrize("name", PROXY_HEADERS)
def test_headers_of_a_network_in_front_are_not_forwarded(name: str) -> None:
    for spelling in (name, name.lower(), name.upper(), name.replace("-", "_")):
        assert is_of_network(spelling)
        assert headers_for_provider([(spelling, "203.0.113.9")], None) == headers_for_cloudflare([(spelling, "203.0.113.9")], None) == []


@pytest.mark.parametrize("name", CLIENT_HEADERS)
def test_headers_of_a_client_for_its_provider_are_forwarded(name: str) -> None:
    assert headers_for_provider([(name, "1")], None) == headers_for_cloudflare([(name, "1")], None) == [(name, "1")]


def test_control_headers_for_cloudflare_are_no_headers_of_its_network() -> None:
    for name in ("cf-aig-metadata", "cf-aig-cache-ttl", "cf-cache-ttl", "cf-skip-cache"):
        assert not is_of_network(name)
        assert headers_for_cloudflare([(name, "1")], None) == [(name, "1")] and headers_for_provider([(name, "1")], None) == []


@pytest.mark.parametrize("kind", ["rest", "websocket"])
async def test_no_header_of_a_network_in_front_reaches_the_provider(start: StartRelay, raw: RawUpstream, kind: str) -> None:
    raw.plays(ok(b"no", status="403 Forbidden"))
    relay = await start(openai=provider(raw.url, websocket={"default_path": "x"}))
    lines = [f"{name}: 203.0.113.9" for name in PROXY_HEADERS]
    await send_raw(relay, _head("GET", CALL, *lines, *(SOCKET if kind == "websocket" else ["Connection: close"]), "X-Mine: 1"))
    assert len(raw.arrived) == 1 and raw.arrived[0].header("X-Mine") == ["1"]
    assert b"203.0.113.9" not in raw.arrived[0].head
    assert not {name.lower() for name in PROXY_HEADERS} & {name.lower() for name, _ in raw.arrived[0].headers}


async def test_management_refuses_requests_that_a_proxy_forwarded(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(openai=provider(raw.url))
    assert b" 200 " in await send_raw(relay, _head("GET", MANAGE, "cf-aig-metadata: {}", "Connection: close"))
    for name in (*PROXY_HEADERS, "Proxy-Connection"):
        for method, target in (("GET", MANAGE), ("GET", "/api/v1/ai-gateway/usage"), ("DELETE", "/api/v1/ai-gateway/cache"), ("POST", f"{MANAGE}/reload")):
            answer = await send_raw(relay, _head(method, target, f"{name}: 127.0.0.1", "Connection: close"))
            assert b" 403 " in answer and b"management_not_local" in answer, (name, target)


# --- pages without Origin

SITES = {
    "cross-site": False, "same-site": False, "CROSS-SITE": False, "cross-origin": False, "": False, "same-origin, cross-site": False,
    "same-origin": True, "none": True, None: True,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["rest", "websocket", "ws"])
async def test_a_page_of_another_site_cannot_call_without_origin(start: StartRelay, raw: RawUpstream, kind: str) -> None:
    raw.plays(ok(b"no", status="403 Forbidden"))
    relay = await start(openai=provider(raw.url, websocket={"default_path": "x"}))
    target = "/api/v1/ai-gateway/ws/openai" if kind == "ws" else CALL
    for site, allowed in SITES.items():
        raw.arrived.clear()
        lines = [] if site is None else [f"Sec-Fetch-Site: {site}"]
        answer = await send_raw(relay, _head("GET", target, *lines, *(["Connection: close"] if kind == "rest" else SOCKET)))
        assert bool(raw.arrived) == allowed, site
        assert (b"x-relay-error: cross_site_request" in answer) == (not allowed), site


async def test_the_origin_decides_whatever_sec_fetch_site_says(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok())
    relay = await start({"cors": {"origins": ["https://app.example.com"]}}, openai=provider(raw.url))
    for site in ("cross-site", "same-site", "same-origin", "nonsense"):
        answer = await send_raw(relay, _head("POST", CALL, "Origin: https://app.example.com", f"Sec-Fetch-Site: {site}", "Content-Length: 0", "Connection: close"))
        assert b" 200 " in answer, site
        answer = await send_raw(relay, _head("POST", CALL, "Origin: https://evil.com", f"Sec-Fetch-Site: {site}", "Content-Length: 0", "Connection: close"))
        assert b"origin_not_allowed" in answer, site
    assert len(raw.arrived) == 4


async def test_management_and_metrics_refuse_a_page_of_another_site(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(openai=provider(raw.url))
    for target in (MANAGE, "/api/v1/ai-gateway/logs", "/api/v1/ai-gateway/logs/export", "/api/v1/ai-gateway/usage", "/metrics"):
        for site in ("cross-site", "same-site"):
            navigation = ["Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"]
            answer = await send_raw(relay, _head("GET", target, f"Sec-Fetch-Site: {site}", *navigation, "Connection: close"))
            assert b"x-relay-error: cross_site_request" in answer, target
        assert b"cross_site_request" not in await send_raw(relay, _head("GET", target, "Sec-Fetch-Site: none", "Connection: close"))


@pytest.mark.parametrize("target", ["/healthz", "/readyz", "/version"])
async def test_a_link_to_health_and_version_works(start: StartRelay, target: str) -> None:
    relay = await start()
    lines = ["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document", "Sec-Fetch-User: ?1"]
    assert b" 200 " in await send_raw(relay, _head("GET", target, *lines, "Connection: close"))


# --- methods


@pytest.mark.parametrize("target", [CALL, MANAGE, "/api/v1/ai-gateway/ws/openai", "/healthz", "/nowhere", "http://127.0.0.1:1/x"])
async def test_trace_gets_405(start: StartRelay, raw: RawUpstream, target: str) -> None:
    raw.plays(ok())
    relay = await start(openai=provider(raw.url))
    answer = await send_raw(relay, _head("TRACE", target, "X-Secret: 1", "Connection: close"))
    assert answer.startswith(b"HTTP/1.1 405 ") and b"x-relay-error: method_not_allowed" in answer
    assert b"\r\nallow: " in answer.lower() and b"X-Secret" not in answer
    assert raw.connections == 0


@pytest.mark.parametrize("target", ["127.0.0.1:22", CALL])
async def test_connect_gets_405_and_is_closed(start: StartRelay, raw: RawUpstream, target: str) -> None:
    raw.plays(ok())
    relay = await start(openai=provider(raw.url))
    answer = await send_raw(relay, _head("CONNECT", target) + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 405 ") and answer.count(b"HTTP/1.1 ") == 1
    assert raw.connections == 0


# --- several credentials

PLACES = ["Authorization: Bearer {}", "x-api-key: {}", "api-key: {}", "xi-api-key: {}", "x-goog-api-key: {}"]
_FIRST = """
from types import SimpleNamespace
from relay.core.credentials import client_credential
from relay.core.credential_headers import CREDENTIAL_HEADERS
given = {name: name for name in sorted(CREDENTIAL_HEADERS)}
provider = SimpleNamespace(query_credentials=frozenset({"key", "api_key", "token", "cf-aig-authorization"}), credential_headers=())
query, offered = "token=q1&key=q2&api_key=q3&cf-aig-authorization=gq", [("openai-insecure-api-key.", "s1"), ("xi-api-key.", "s2"), ("cf-aig-authorization.", "gs")]
found = []
while given:
    got = client_credential(given.get, query, provider, offered)
    found.append((got.provider, got.gateway))
    given.pop("cf-aig-authorization", None)
    given.pop(got.provider, None)
    if got.provider not in CREDENTIAL_HEADERS:
        break
for text in (query, "api_key=&key=q2", ""):
    got = client_credential(given.get, text, provider, offered)
    found.append((got.provider, got.gateway))
print(found)
"""


def test_the_order_of_credentials_does_not_depend_on_the_hash_seed() -> None:
    root = Path(__file__).parent.parent.parent
    seen = set()
    for seed in ("0", "1", "2", "3", "4", "5"):
        done = subprocess.run([sys.executable, "-c", _FIRST], env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=True, cwd=root)
        seen.add(done.stdout)
    (only,) = seen
    assert eval(only) == [
        ("authorization", "cf-aig-authorization"), ("x-api-key", "gq"), ("api-key", "gq"), ("xi-api-key", "gq"), ("x-goog-api-key", "gq"), ("q1", "gq"),
        ("q1", "gq"), ("q2", "gs"), ("s1", "gs"),
    ]  # fmt: skip


async def test_the_first_of_several_credentials_is_used(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok())
    relay = await start(mine=provider(raw.url, client_credentials="allow", query_credentials=["key"]))
    for first in range(len(PLACES)):
        lines = [place.format(canary(f"place{number}")) for number, place in enumerate(PLACES) if number >= first]
        await send_raw(relay, _head("GET", f"{MANAGE}/mine/x?key={canary('query')}", *reversed(lines), "Connection: close"))
        assert raw.arrived[-1].header("Authorization") == [f"Bearer {canary(f'place{first}')}"]
    await send_raw(relay, _head("GET", f"{MANAGE}/mine/x?key={canary('query')}", "Authorization: Bearer", f"x-relay-key: {canary('ours')}", "Connection: close"))
    assert raw.arrived[-1].header("Authorization") == [f"Bearer {canary('query')}"]
    assert not raw.arrived[-1].header("x-relay-key")


# --- credentials that are forwarded unchanged

OAUTH, KEY = f"Bearer {canary('oauth')}", canary("clients-key")
BY_HEADER = {"header": "x-api-key", "value": "${OPENAI_API_KEY}"}
BY_BEARER = {"header": "Authorization", "value": "Bearer ${OPENAI_API_KEY}"}
BY_QUERY = {"query": "key", "value": "${OPENAI_API_KEY}"}
BY_OTHER_HEADER = {"header": "X-Key", "value": "${OPENAI_API_KEY}"}
CREDENTIALS: dict[str, tuple[dict[str, str] | None, str, list[tuple[str, str]], dict[str, list[str]]]] = {
    "a subscription's token": (BY_HEADER, "", [("Authorization", OAUTH)], {"Authorization": [OAUTH]}),
    "the provider's own header": (BY_HEADER, "", [("x-api-key", KEY)], {"x-api-key": [KEY]}),
    "both": (BY_HEADER, "", [("x-api-key", KEY), ("Authorization", OAUTH)], {"Authorization": [OAUTH], "x-api-key": [KEY]}),
    "a scheme of its own": (BY_BEARER, "", [("Authorization", f"Token  {KEY}")], {"Authorization": [f"Token  {KEY}"]}),
    "a header that no SDK knows": (BY_OTHER_HEADER, "", [("x-key", KEY)], {"X-Key": [KEY]}),
    "where the key belongs in the query": (BY_QUERY, "", [("Authorization", OAUTH)], {"Authorization": [OAUTH]}),
    "where the registry has no key": (None, "", [("Authorization", OAUTH)], {"Authorization": [OAUTH]}),
    "another vendor's header": (BY_HEADER, "", [("x-goog-api-key", KEY)], {"x-api-key": [KEY]}),
    "another vendor's header, with a scheme": (BY_BEARER, "", [("api-key", KEY)], {"Authorization": [f"Bearer {KEY}"]}),
    "the query": (BY_HEADER, f"?key={KEY}", [], {"x-api-key": [KEY]}),
    "a header to the query": (BY_QUERY, "", [("x-api-key", KEY)], {}),
}  # fmt: skip


@pytest.mark.parametrize("transport", ["rest", "websocket"])
@pytest.mark.parametrize("what", CREDENTIALS)
async def test_a_clients_credential_is_forwarded_unchanged_or_moved_to_the_configured_place(start: StartRelay, raw: RawUpstream, what: str, transport: str) -> None:
    auth, query, headers, expected = CREDENTIALS[what]
    raw.plays(ok(b"no", status="403 Forbidden"))
    entry: dict[str, object] = {"base_url": raw.url, "client_credentials": "allow", "query_credentials": ["key"], "websocket": {"default_path": "x"}}
    relay = await start(mine=entry | ({"auth": auth} if auth else {}))
    lines = [f"{name}: {value}" for name, value in headers]
    if transport == "rest":
        await send_raw(relay, _head("GET", f"{MANAGE}/mine/x{query}", *lines, "Connection: close"))
    else:
        await send_raw(relay, _head("GET", f"/api/v1/ai-gateway/ws/mine/x{query}", *SOCKET, *lines))
    [arrived] = raw.arrived
    places = ("Authorization", "x-api-key", "api-key", "x-goog-api-key", "X-Key")
    assert {name: found for name in places if (found := arrived.header(name))} == expected
    assert arrived.target == (f"/x?key={KEY}" if what == "a header to the query" else "/x")


async def test_a_credential_that_is_forwarded_unchanged_is_not_sent_to_a_fallback(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok())
    first = {"base_url": "http://127.0.0.1:9", "auth": BY_HEADER, "client_credentials": "allow", "fallback": [{"provider": "other"}]}
    relay = await start(mine=first, other=provider(raw.url, "FAL_KEY"))
    await relay.call("POST", relay.path("mine", "chat/completions"), data=b"{}", headers={"Authorization": OAUTH, "x-api-key": KEY})
    assert raw.arrived[0].header("Authorization") == [f"Bearer {canary('fal')}"] and not raw.arrived[0].header("x-api-key")


KEY_LIKE = [
    "Cookie", "Cookie2", "Proxy-Authorization", "x-relay-key", "x-relay-anything", "cf-aig-authorization", "Ocp-Apim-Subscription-Key", "x-litellm-api-key",
    "x-portkey-api-key", "x-openai-api-key", "x-dashscope-apikey", "apikey", "x-rapidapi-key", "x-auth-token", "x-access-token", "x-amz-security-token",
    "x-functions-key", "private-token", "x-csrf-token", "x-authorization", "x-client-secret", "x-user-password", "Authentication", "X_Api_Key",
]  # fmt: skip
NOT_KEYS = ["Idempotency-Key", "x-max-tokens", "x-token-limit", "x-codex-turn-state", "x-claude-code-session-id", "chatgpt-account-id", "x-secretary", "prompt-cache-key"]


@pytest.mark.parametrize("credentials", ["deny", "allow"])
@pytest.mark.parametrize("transport", ["rest", "websocket"])
async def test_headers_that_look_like_keys_are_never_forwarded(start: StartRelay, raw: RawUpstream, transport: str, credentials: str) -> None:
    raw.plays(ok(b"no", status="403 Forbidden"))
    relay = await start(openai=provider(raw.url, client_credentials=credentials, websocket={"default_path": "x"}))
    lines = [f"{name}: {canary(f'like{number}')}" for number, name in enumerate(KEY_LIKE)] + [f"{name}: kept" for name in NOT_KEYS]
    if transport == "rest":
        await send_raw(relay, _head("GET", CALL, *lines, "Authorization: Bearer x", "Connection: close"))
    else:
        await send_raw(relay, _head("GET", "/api/v1/ai-gateway/ws/openai", *SOCKET, *lines, "Authorization: Bearer x"))
    [arrived] = raw.arrived
    assert b"-like" not in arrived.head
    assert [name for name in NOT_KEYS if arrived.header(name) != ["kept"]] == []


# --- relay headers of a provider

SPOOFED = ["X-Relay-Error: rate_limited", "x_relay_error: rate_limited", "x-relay-error-source: relay", "x-relay-cache-key: k", "X-Relay-New: 1"]


@pytest.mark.parametrize("status", ["200 OK", "400 Bad"])
async def test_relay_headers_of_a_provider_never_reach_the_client(start: StartRelay, raw: RawUpstream, status: str) -> None:
    raw.plays(ok(b"{}", *SPOOFED, "X-Vendor: a", status=status))
    document = {"cache": {"ttl_s": 60, "coalesce": True}}
    relay = await start(document, openai=provider(raw.url))
    for endpoint in ("x", "chat/completions", "chat/completions"):  # plain, shared and cached
        _, headers, _ = await relay.call("POST", relay.path("openai", endpoint), data=b"{}")
        named = {name: value for name, value in headers.items() if name.lower().replace("_", "-").startswith("x-relay-")}
        named.pop("x-relay-cache-key", None) if endpoint != "x" else None
        assert named == ({} if status == "200 OK" else {"x-relay-error-source": "provider"}) and headers["X-Vendor"] == "a"


async def test_relay_headers_of_a_refused_handshake_never_reach_the_client(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}", *SPOOFED, status="400 Bad"))
    relay = await start(openai=provider(raw.url, websocket={"default_path": "x"}))
    answer = (await send_raw(relay, _head("GET", "/api/v1/ai-gateway/ws/openai", *SOCKET))).lower()
    assert answer.count(b"relay-error: ") + answer.count(b"relay_error: ") == 1 and b"x-relay-error: handshake_refused" in answer
    assert answer.count(b"x-relay-error-source: ") == 1 and b"x-relay-new" not in answer and b"x-relay-cache-key" not in answer


# --- management

LOCAL = {"Host": "127.0.0.1:8787"}


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("headers", [LOCAL, {"Host": "localhost"}, {"Host": "[::1]:1", "Origin": "http://[::1]:1"}, LOCAL | {"Sec-Fetch-Site": "none"}])
def test_a_local_program_or_a_local_page_may_manage(peer: str, headers: dict[str, str]) -> None:
    require_local(peer, headers)


@pytest.mark.parametrize(
    ("peer", "headers", "error", "why"),
    [
        ("192.0.2.1", LOCAL, ManagementNotLocal, "another machine"),
        ("", LOCAL, ManagementNotLocal, "another machine"),
        (None, LOCAL, ManagementNotLocal, "another machine"),
        ("127.0.0.1", {}, ManagementNotLocal, "not a loopback name"),
        ("127.0.0.1", {"Host": "relay.example.com"}, ManagementNotLocal, "not a loopback name"),
        ("127.0.0.1", LOCAL | {"X-Forwarded-For": "127.0.0.1"}, ManagementNotLocal, "'X-Forwarded-For'"),
        ("127.0.0.1", LOCAL | {"Origin": "http://evil.example"}, OriginNotAllowed, "evil.example"),
        ("127.0.0.1", LOCAL | {"Sec-Fetch-Site": "cross-site"}, CrossSiteRequest, "cross-site"),
    ],
)  # fmt: skip
def test_management_is_refused_to_all_others(peer: str | None, headers: dict[str, str], error: type[RelayError], why: str) -> None:
    with pytest.raises(error) as raised:
        require_local(peer, headers)
    assert why in raised.value.message


def test_an_error_message_truncates_a_long_header_name() -> None:
    with pytest.raises(ManagementNotLocal) as raised:
        require_local("127.0.0.1", LOCAL | {f"X-Forwarded-{'x' * 1000}": "1"})
    assert len(raised.value.message) < 300
