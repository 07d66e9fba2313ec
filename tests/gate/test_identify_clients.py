"""Which client a call comes from, by the key that it brings, and which calls are refused for it."""

from __future__ import annotations

import base64
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from relay.core.access import StoredKey
from relay.gate.keys import MAX_AGE_S, ClientKeys
from relay.registry.clients import BadRecord, checked_record, rights_of
from relay.registry.load import ConfigError
from relay.registry.schema import GatewayFile
from tests.conftest import StartRelay
from tests.relays import Relay, canary, configured, provider
from tests.upstream.raw import RawUpstream, ok

KEY, OTHER, FOREIGN = canary("client-key"), canary("other-client-key"), canary("own-credential")
UNKNOWN = "rk_" + canary("unknown")
REQUIRED = {"mode": "required"}
PLACES: list[tuple[dict[str, str], str]] = [
    ({"x-relay-key": KEY}, ""), ({"cf-aig-authorization": f"Bearer {KEY}"}, ""), ({"Authorization": f"Bearer {KEY}"}, ""),
    ({"Authorization": KEY}, ""), ({"Authorization": f"token {KEY}"}, ""), ({"Authorization": f"Key  {KEY}"}, ""),
    ({"Authorization": "Basic " + base64.b64encode(f"any:{KEY}".encode()).decode()}, ""),
    ({"Authorization": "Basic " + base64.b64encode(f"{KEY}:".encode()).decode()}, ""),
    ({"x-api-key": KEY}, ""), ({"api-key": KEY}, ""), ({"xi-api-key": KEY}, ""), ({"x-goog-api-key": KEY}, ""), ({"X-Own": KEY}, ""),
    ({}, f"?token={KEY}"), ({}, f"?a=1&tok%65n={KEY}&b=2"), ({}, f"?cf-aig-authorization={KEY}"),
]  # fmt: skip


async def _start(start: StartRelay, raw: RawUpstream, clients: dict[str, Any], access: dict[str, Any] = REQUIRED, **more: Any) -> Relay:
    raw.plays(ok(b'{"ok":1}', "Content-Type: application/json"))
    entry = {"base_url": raw.url, "auth": {"header": "X-Own", "value": "${OPENAI_API_KEY}"}, "query_credentials": ["token"]} | more
    return await start({"access": access, "clients": clients}, mine=entry, bearer=provider(raw.url, client_credentials="allow"))


async def _call(relay: Relay, name: str = "mine", query: str = "", **headers: str) -> tuple[int, str]:
    """Call; returns the status and the code of the relay's error."""
    url = relay.path(name, "chat/completions") + query
    status, answer, _ = await relay.call("POST", url, data=b'{"model":"m"}', headers={"Content-Type": "application/json"} | headers)
    return status, answer.get("x-relay-error", "")


@pytest.mark.parametrize(("headers", "query"), PLACES)
async def test_a_key_is_recognized_in_every_place_of_a_key_and_does_not_reach_the_provider(
    start: StartRelay, raw: RawUpstream, headers: dict[str, str], query: str
) -> None:
    relay = await _start(start, raw, {"web": {"key": KEY}})
    assert await _call(relay, "mine", query, **headers) == (200, "")
    [event] = await relay.events()
    assert event["client"] == "web"
    [arrived] = raw.arrived
    assert KEY.encode() not in arrived.head
    if "Basic" in headers.get("Authorization", ""):
        assert not arrived.header("Authorization")
    assert arrived.target == "/chat/completions" + ("?a=1&b=2" if "a=1" in query else "")


async def test_a_made_key_is_recognized_and_removed_in_a_query_parameter_of_any_name(start: StartRelay, raw: RawUpstream) -> None:
    made = "rk_" + canary("made")
    relay = await _start(start, raw, {"web": {"key": made}})
    assert await _call(relay, query=f"?x=1&anything={made.replace('_', '%5F')}&y=2") == (200, "")
    assert raw.arrived[-1].target == "/chat/completions?x=1&y=2"
    assert await _call(relay, query=f"?x=1&{made}&y") == (200, "")
    assert raw.arrived[-1].target == "/chat/completions?x=1&y"


@pytest.mark.parametrize("offered", [f"openai-insecure-api-key.{KEY}", f"cf-aig-authorization.{KEY}", f"bearer.{KEY}", f"xi-api-key.{KEY}"])
async def test_a_key_is_recognized_in_a_subprotocol(start: StartRelay, vendors: Any, offered: str) -> None:
    relay = await start({"access": REQUIRED, "clients": {"web": {"key": KEY}}, "providers": vendors.entries()})
    async with relay.client.ws_connect(relay.ws("openai"), protocols=("realtime", offered)) as socket:
        assert socket.protocol == "realtime"
    await relay.idle()
    [event] = await relay.events()
    assert event["client"] == "web" and KEY not in json.dumps(event)


async def test_the_first_known_key_in_the_documented_order_decides(start: StartRelay, raw: RawUpstream) -> None:
    relay = await _start(start, raw, {"web": {"key": KEY}, "other": {"key_sha256": sha256(OTHER.encode()).hexdigest().upper()}})
    cases = (
        ({"Authorization": KEY, "x-relay-key": OTHER}, "other"), ({"x-api-key": OTHER, "Authorization": KEY}, "web"),
        ({"x-relay-key": FOREIGN, "xi-api-key": OTHER}, "other"), ({"x-relay-key": UNKNOWN, "xi-api-key": OTHER}, "other"),
    )  # fmt: skip
    for number, (headers, expected) in enumerate(cases, 1):
        assert (await _call(relay, "mine", f"?token={KEY}", **headers))[0] == 200
        assert (await relay.events(count=number))[-1]["client"] == expected
        assert not any(secret.encode() in raw.arrived[-1].head for secret in (KEY, OTHER, FOREIGN, UNKNOWN))


async def test_one_of_several_keys_of_a_client_is_enough(start: StartRelay, raw: RawUpstream) -> None:
    relay = await _start(start, raw, {"web": {"key": [KEY, OTHER]}})
    assert [await _call(relay, **{"x-api-key": key}) for key in (KEY, OTHER)] == [(200, ""), (200, "")]


@pytest.mark.parametrize(
    ("headers", "error"),
    [({}, "client_key_missing"), ({"Authorization": f"Bearer {FOREIGN}"}, "client_key_invalid"), ({"Authorization": f"Bearer {UNKNOWN}"}, "client_key_invalid"),
     ({"x-api-key": KEY[:-1]}, "client_key_invalid"), ({"x-api-key": KEY + "x"}, "client_key_invalid"), ({"Authorization": "Bearer"}, "client_key_missing")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["mine", "bearer"])
async def test_where_access_is_required_a_call_without_a_known_key_is_refused_before_its_body_is_read(
    start: StartRelay, raw: RawUpstream, headers: dict[str, str], error: str, name: str
) -> None:
    relay = await _start(start, raw, {"web": {"key": KEY}})

    async def body() -> Any:
        raise AssertionError("the body was asked for")
        yield b""

    url = relay.path(name, "chat/completions")
    status, answer, content = await relay.call("POST", url, data=body(), headers=headers | {"Expect": "100-continue"})
    assert (status, answer["x-relay-error"], answer["x-should-retry"]) == (401, error, "false")
    assert json.loads(content)["error"]["type"] == "authentication_error"
    assert not raw.arrived
    [event] = await relay.events()
    assert event["outcome"] == "refused" and event["error"] == error


async def test_while_access_is_open_only_a_key_of_the_relays_form_must_be_known(start: StartRelay, raw: RawUpstream) -> None:
    relay = await _start(start, raw, {"web": {"key": KEY}}, {"mode": "open"})
    assert await _call(relay) == (200, "")
    assert await _call(relay, Authorization=f"Bearer {FOREIGN}") == (200, "")
    assert FOREIGN.encode() not in raw.arrived[-1].head
    assert await _call(relay, Authorization=f"Bearer {UNKNOWN}") == (401, "client_key_invalid")
    assert await _call(relay, query=f"?x={UNKNOWN}") == (401, "client_key_invalid")
    assert await _call(relay, Authorization=f"Bearer {KEY}") == (200, "")
    assert [event["client"] for event in await relay.events(count=5)] == ["127.0.0.1"] * 4 + ["web"]


async def test_a_clients_own_credential_passes_only_beside_a_key_of_the_relay(start: StartRelay, raw: RawUpstream) -> None:
    relay = await _start(start, raw, {"web": {"key": KEY}, "other": {"key": OTHER}})
    assert await _call(relay, "bearer", Authorization=f"Bearer {FOREIGN}") == (401, "client_key_invalid")
    for place in ("x-relay-key", "cf-aig-authorization"):
        assert await _call(relay, "bearer", Authorization=f"Bearer {FOREIGN}", **{place: f"Bearer {KEY}"}) == (200, "")
        assert raw.arrived[-1].header("Authorization") == [f"Bearer {FOREIGN}"]
    for own in (KEY, OTHER, UNKNOWN):  # none of these is a credential of a provider
        assert await _call(relay, "bearer", f"?key={own}", Authorization=f"Bearer {own}", **{"x-relay-key": KEY}) == (200, "")
        assert own.encode() not in raw.arrived[-1].head
        assert raw.arrived[-1].header("Authorization") == [f"Bearer {canary('openai')}"]


async def test_calls_without_a_key_are_those_of_the_anonymous_client(start: StartRelay, raw: RawUpstream) -> None:
    page = "https://page.example"
    clients = {"public": {"providers": ["mine"], "origins": [page]}, "web": {"key": KEY}}
    relay = await _start(start, raw, clients, {"mode": "required", "anonymous": "public"})
    assert await _call(relay, Origin=page) == (200, "")
    assert (await relay.events())[-1]["client"] == "public"
    assert await _call(relay) == (403, "origin_required")
    assert await _call(relay, Origin="https://page.example.evil") == (403, "origin_not_allowed")
    assert await _call(relay, Origin=page, Authorization=f"Bearer {FOREIGN}") == (401, "client_key_invalid")
    assert await _call(relay, "bearer", Origin=page) == (403, "provider_not_allowed")
    assert await _call(relay, "bearer", Authorization=KEY) == (200, "")


async def test_while_access_is_open_the_anonymous_client_cannot_be_left_by_a_made_up_key(start: StartRelay, raw: RawUpstream) -> None:
    relay = await _start(start, raw, {"public": {"providers": ["mine"]}}, {"mode": "open", "anonymous": "public"})
    assert await _call(relay, "bearer", Authorization=f"Bearer {FOREIGN}") == (403, "provider_not_allowed")
    assert await _call(relay, Authorization=f"Bearer {FOREIGN}", Host="evil.example") == (403, "host_not_allowed")


@pytest.mark.parametrize(
    ("record", "headers", "error"),
    [({"providers": ["bearer"]}, {}, "provider_not_allowed"), ({"endpoints": "embeddings"}, {}, "endpoint_not_allowed"),
     ({"addresses": "10.0.0.0/8"}, {}, "address_not_allowed"), ({"addresses": ["10.0.0.0/8", "127.0.0.1"]}, {}, ""),
     ({"origins": "https://a.example"}, {"Origin": "https://b.example"}, "origin_not_allowed"), ({"origins": "https://a.example"}, {"Origin": "null"}, "origin_not_allowed"),
     ({"origins": "https://a.example"}, {"Origin": "https://a.example"}, ""), ({"origins": "https://a.example"}, {}, ""),
     ({}, {"Origin": "https://b.example"}, "origin_not_allowed"), ({"expires": "2020-01-01"}, {}, "client_key_expired"), ({"expires": "2999-01-01"}, {}, ""),
     ({"endpoints": ["chat"], "providers": ["mine"]}, {}, "")],
)  # fmt: skip
async def test_the_record_of_a_client_decides_what_it_may_call(start: StartRelay, raw: RawUpstream, record: dict[str, Any], headers: dict[str, str], error: str) -> None:
    relay = await _start(start, raw, {"web": {"key": KEY} | record})
    status = {"": 200, "client_key_expired": 401}.get(error, 403)
    assert await _call(relay, Authorization=KEY, **headers) == (status, error)
    assert len(raw.arrived) == (not error)


async def test_the_address_of_a_client_is_the_one_that_a_trusted_proxy_names(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok())
    document = {"access": REQUIRED, "server": {"trusted_proxies": ["127.0.0.1"]}, "clients": {"web": {"key": KEY, "addresses": "203.0.113.0/24"}}}
    relay = await start(document, mine=provider(raw.url))
    assert await _call(relay, Authorization=KEY, **{"X-Forwarded-For": "203.0.113.9"}) == (200, "")
    assert await _call(relay, Authorization=KEY, **{"X-Forwarded-For": "203.0.113.9, 198.51.100.1"}) == (403, "address_not_allowed")


async def test_a_preflight_allows_the_origins_of_all_clients_and_the_call_those_of_its_own(start: StartRelay, raw: RawUpstream) -> None:
    relay = await _start(start, raw, {"a": {"key": KEY, "origins": "https://a.example"}, "b": {"key": OTHER, "origins": "https://*.b.example"}})
    preflight = {"Access-Control-Request-Method": "POST"}
    for origin, status in (("https://a.example", 200), ("https://x.b.example", 200), ("https://c.example", 403)):
        got, answer, _ = await relay.call("OPTIONS", relay.path("mine", "chat/completions"), headers=preflight | {"Origin": origin})
        assert (got, answer.get("Access-Control-Allow-Origin")) == (status, origin if status == 200 else None)
    assert await _call(relay, Authorization=KEY, Origin="https://a.example") == (200, "")
    assert await _call(relay, Authorization=KEY, Origin="https://x.b.example") == (403, "origin_not_allowed")


async def test_a_socket_of_a_foreign_page_is_refused_before_the_provider_is_called(start: StartRelay, vendors: Any) -> None:
    clients = {"web": {"key": KEY, "origins": "https://a.example"}}
    relay = await start({"access": REQUIRED, "clients": clients, "providers": vendors.entries()})
    for protocols, headers, status in (((f"bearer.{KEY}",), {"Origin": "https://evil.example"}, 403), ((), {}, 401), ((f"bearer.{UNKNOWN}",), {}, 401)):
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await relay.client.ws_connect(relay.ws("openai"), protocols=("realtime", *protocols), headers=headers)
        assert refused.value.status == status
    assert not relay.gateway.upstream.sockets.connector._conns  # type: ignore[union-attr]
    assert {event["outcome"] for event in await relay.events(count=3)} == {"refused"}


async def test_a_fallback_leads_to_no_provider_that_the_client_may_not_call(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"no", status="503 Service Unavailable"))
    other = await RawUpstream.start()
    other.plays(ok(b"fallback"))
    fallback = [{"provider": "other"}]
    clients = {"one": {"key": KEY, "providers": ["mine"]}, "both": {"key": OTHER, "providers": ["mine", "other"]}}
    relay = await start({"access": REQUIRED, "clients": clients}, mine=provider(raw.url, fallback=fallback), other=provider(other.url))
    assert (await _call(relay, Authorization=KEY))[0] == 503
    assert not other.arrived
    assert (await _call(relay, Authorization=OTHER))[0] == 200
    await other.stop()


@pytest.mark.parametrize("mode", ["open", "required"])
async def test_a_ticket_makes_no_rest_call(start: StartRelay, raw: RawUpstream, mode: str) -> None:
    relay = await _start(start, raw, {"web": {"key": KEY}}, {"mode": mode})
    for headers in ({}, {"Origin": "https://evil.example"}, {"Origin": relay.url}):
        for ticket in ("rt_" + canary("ticket"), "ek_rt_" + canary("ticket")):
            status, _ = await _call(relay, Authorization=f"Bearer {ticket}", **headers)
            assert status in (401, 403)
    assert not raw.arrived


async def test_metadata_of_a_client_replaces_what_the_call_sends(start: StartRelay, raw: RawUpstream) -> None:
    relay = await _start(start, raw, {"web": {"key": KEY, "metadata": {"team": "growth", "user": "fixed"}}})
    await _call(relay, Authorization=KEY, **{"cf-aig-metadata": '{"team": "other", "stage": "test", "user": "me"}'})
    [event] = await relay.events()
    assert event["metadata"] == {"team": "growth", "stage": "test", "user": "fixed"} and event["user"] == "fixed"


# --- configuration


@pytest.mark.parametrize(
    ("document", "problem"),
    [({"clients": {"web": {"key": "short"}}}, "16 to 512"), ({"clients": {"web": {"key": "rt_0123456789abcdef"}}}, "16 to 512"),
     ({"clients": {"10.0.0.1": {"key": KEY}}}, "not an address"), ({"clients": {"a b": {"key": KEY}}}, "should be a name"),
     ({"clients": {"web": {"key": "${NOT_SET_ANYWHERE}"}}}, "NOT_SET_ANYWHERE is not set"), ({"clients": {"web": {"key": KEY, "providers": ["opnai"]}}}, "there is no such provider"),
     ({"clients": {"a": {"key": KEY}, "b": {"key": KEY}}}, "a key of the client 'a' is the same"), ({"clients": {"web": {"key": KEY, "expires": "soon"}}}, "should be a date or time"),
     ({"clients": {"web": {"key": KEY, "endpoints": "chta"}}}, "did you mean 'chat'"), ({"clients": {"web": {"key": KEY, "limits": [{}]}}}, "exactly one of"),
     ({"clients": {"web": {"key": KEY, "metadata": {"team": []}}}}, "text, numbers or booleans"), ({"access": {"anonymous": "wbe"}, "clients": {"web": {"key": KEY}}}, "did you mean 'web'"),
     ({"access": REQUIRED}, "no call is possible"), ({"clients": {"web": {"key_sha256": "abc"}}}, "64 hexadecimal digits")],
)  # fmt: skip
def test_a_wrong_client_is_refused_at_start(tmp_path: Path, document: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        configured(tmp_path, document)
    assert problem in str(refused.value) and "gateway.yaml:" in str(refused.value)
    assert KEY not in str(refused.value)


def test_the_key_of_a_client_is_in_no_repr(tmp_path: Path) -> None:
    config, _ = configured(tmp_path, {"clients": {"web": {"key": KEY}}})
    assert KEY not in repr(config) and KEY in config.secrets


def test_a_stored_record_means_the_same_as_one_of_the_file() -> None:
    text = checked_record('{"providers": "openai", "models": ["gpt-*"], "metadata": {"team": "a"}}', GatewayFile(), {"openai"})
    rights = rights_of(text)
    assert (rights.providers, rights.models, rights.metadata) == ({"openai"}, ("gpt-*",), {"team": "a"})
    assert rights_of(text) is rights


@pytest.mark.parametrize("record", ["", "[]", '{"provider": "x"}', '{"providers": "opnai"}', '{"endpoints": "chta"}', '{"models": [' + '"' + "x" * 201 + '"]}', '{"key": "k"}'])
def test_a_wrong_record_is_refused_before_it_is_stored(record: str) -> None:
    with pytest.raises(BadRecord):
        checked_record(record, GatewayFile(), {"openai"})


def test_stored_keys_are_refused_when_the_database_was_not_read_for_too_long() -> None:
    now = [100.0]
    keys = ClientKeys(lambda: now[0])
    keys.require_fresh()  # without a database nothing can be too old
    keys.has_store = True
    with pytest.raises(Exception, match="store_unavailable"):
        keys.require_fresh()
    keys.note_read(now[0])
    now[0] += MAX_AGE_S
    keys.require_fresh()
    now[0] += 0.001
    with pytest.raises(Exception, match="store_unavailable"):
        keys.require_fresh()


def test_a_stored_key_is_unknown_while_its_client_is() -> None:
    keys, digest = ClientKeys(lambda: 0.0), sha256(KEY.encode()).digest()
    keys.put_key(digest, StoredKey("0123456789ab", "web", None))
    assert keys.find(KEY) is None
    keys.put_client("web", "{}")
    found = keys.find(KEY)
    assert found is not None and found.client.name == "web" and keys.is_valid(found, 0.0)
    keys.remove_client("web")
    assert keys.find(KEY) is None and not keys.is_valid(found, 0.0)
