"""What limits per client, address, team and user count, and the limits of a client of its own."""

from __future__ import annotations

import asyncio
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from relay.core.access import Client, StoredKey
from relay.core.exchange import Caller
from relay.registry.clients import BadRecord, checked_record, rights_of
from relay.registry.load import ConfigError
from tests.conftest import StartRelay
from tests.relays import HANG_GUARD_S, Relay, configured, provider
from tests.upstream.raw import RawUpstream, gated_events, ok
from tests.upstream.vendors import echo, vendor
from tests.whole_run import canary

KEYS = {name: canary(f"client-{name}") for name in ("web", "web2", "ci", "free")}
OWN_NAME = "client's requests-per-client-60s"


def bearer(name: str, **more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"} | more


def clients(**records: dict[str, Any]) -> dict[str, Any]:
    """`web` with two keys and `ci` with one, and what `records` adds to these."""
    keys = {"web": [KEYS["web"], KEYS["web2"]], "ci": KEYS["ci"]}
    return {name: {"key": key} | records.get(name, {}) for name, key in keys.items()}


async def statuses(relay: Relay, *callers: dict[str, str], path: str = "x", **options: Any) -> list[int]:
    return [(await relay.call("POST", relay.path("openai", path), headers=caller, **({"data": b"{}"} | options)))[0] for caller in callers]


@pytest.fixture
async def upstream(aiohttp_server: Any) -> str:
    """The URL of a provider that answers every call."""
    return str((await aiohttp_server(vendor(("*", "/{path:.*}", _answer)))).make_url(""))


async def _answer(_: web.Request) -> web.Response:
    return web.json_response({"usage": {"prompt_tokens": 3, "completion_tokens": 2}})


async def test_per_client_counts_the_keys_of_a_client_together_and_clients_apart(start: StartRelay, upstream: str) -> None:
    relay = await start({"clients": clients(), "limits": [{"requests": 2, "per": "client"}]}, openai=provider(upstream))
    assert await statuses(relay, bearer("web"), bearer("web2"), bearer("web"), bearer("ci"), {}) == [200, 200, 429, 200, 200]


async def test_per_client_counts_a_caller_without_a_key_by_its_forwarded_address(start: StartRelay, upstream: str) -> None:
    document = {"server": {"trusted_proxies": ["127.0.0.1"]}, "clients": clients(), "limits": [{"requests": 1, "per": "client"}]}
    relay = await start(document, openai=provider(upstream))
    first, second = {"X-Forwarded-For": "198.51.100.7"}, {"X-Forwarded-For": "198.51.100.8"}
    assert await statuses(relay, first, second, first) == [200, 200, 429]
    assert await statuses(relay, bearer("web", **first), bearer("web", **second)) == [200, 429], "a client is one, wherever it calls from"


async def test_per_address_counts_the_address_whatever_the_key(start: StartRelay, upstream: str) -> None:
    document = {"server": {"trusted_proxies": ["127.0.0.1"]}, "clients": clients(), "limits": [{"requests": 2, "per": "address"}]}
    relay = await start(document, openai=provider(upstream))
    first, second = {"X-Forwarded-For": "198.51.100.7"}, {"X-Forwarded-For": "198.51.100.8"}
    assert await statuses(relay, bearer("web", **first), bearer("ci", **first), first, bearer("web", **second)) == [200, 200, 429, 200]


TEAMS = clients(web={"metadata": {"team": "growth", "user": "ann"}}, ci={"metadata": {"team": "growth"}})


async def test_per_team_counts_the_fixed_team_whatever_the_call_says(start: StartRelay, upstream: str) -> None:
    relay = await start({"clients": TEAMS, "limits": [{"requests": 2, "per": "team"}]}, openai=provider(upstream))
    other = {"cf-aig-metadata": '{"team": "other"}'}
    assert await statuses(relay, bearer("web", **other), bearer("ci"), bearer("web", **other), bearer("ci")) == [200, 200, 429, 429]
    assert await statuses(relay, other, other, other) == [200, 200, 429], "without a key the call says which team it is"


async def test_per_user_counts_the_fixed_user_whatever_header_and_body_say(start: StartRelay, upstream: str) -> None:
    relay = await start({"clients": TEAMS, "limits": [{"requests": 2, "per": "user"}]}, openai=provider(upstream))
    callers = [bearer("web", **{"cf-aig-metadata": json.dumps({"user": f"u{n}"})}) for n in range(2)]
    assert await statuses(relay, *callers, json={"user": "bob"}, data=None) == [200, 200]
    assert await statuses(relay, bearer("web"), bearer("ci"), json={"user": "eve"}, data=None) == [429, 200]


async def test_a_client_with_limits_is_limited_where_no_other_limit_exists(start: StartRelay, upstream: str) -> None:
    relay = await start({"clients": clients(web={"limits": [{"requests": 1}]})}, openai=provider(upstream))
    url = relay.path("openai", "x")
    status, headers, _ = await relay.call("POST", url, data=b"{}", headers=bearer("web"))
    assert (status, headers["ratelimit"], headers["ratelimit-policy"]) == (200, f'"{OWN_NAME}";r=0;t=60', f'"{OWN_NAME}";q=1;w=60')
    status, headers, body = await relay.call("POST", url, data=b"{}", headers=bearer("web2"))
    assert (status, headers["x-relay-error"], json.loads(body)["error"]["code"]) == (429, "rate_limited", "rate_limited")
    assert 0 < int(headers["retry-after"]) <= 60
    status, headers, _ = await relay.call("POST", url, data=b"{}", headers=bearer("ci"))
    assert status == 200 and "ratelimit" not in headers
    assert relay.gateway.counters()["relay_limit_refusals_total", OWN_NAME] == 1


async def test_a_clients_limits_apply_besides_the_others(start: StartRelay, upstream: str) -> None:
    document = {"limits": [{"requests": 3, "name": "all"}], "clients": clients(web={"limits": [{"requests": 1, "name": "own"}]})}
    relay = await start(document, openai=provider(upstream))
    _, headers, _ = await relay.call("POST", relay.path("openai", "x"), data=b"{}", headers=bearer("web"))
    assert headers["ratelimit"] == '"all";r=2;t=60, "client\'s own";r=0;t=60'
    assert await statuses(relay, bearer("web"), bearer("ci"), bearer("ci"), bearer("ci")) == [429, 200, 200, 429], "a refused call counts nowhere"


async def test_clients_with_equal_records_have_counters_of_their_own(start: StartRelay, upstream: str) -> None:
    record = {"limits": [{"requests": 1}]}
    relay = await start({"clients": clients(web=record, ci=record)}, openai=provider(upstream))
    assert await statuses(relay, bearer("web"), bearer("ci"), bearer("web"), bearer("ci")) == [200, 200, 429, 429]


async def test_per_divides_the_calls_of_the_client(start: StartRelay, upstream: str) -> None:
    record = {"limits": [{"requests": 1, "per": "user"}]}
    relay = await start({"clients": clients(web=record, ci=record)}, openai=provider(upstream))
    assert await statuses(relay, bearer("web"), bearer("ci"), bearer("web"), json={"user": "ann"}, data=None) == [200, 200, 429]
    assert await statuses(relay, bearer("web"), json={"user": "bob"}, data=None) == [200]


async def test_a_clients_rule_about_a_model_needs_the_model(start: StartRelay, upstream: str) -> None:
    relay = await start({"clients": clients(web={"limits": [{"requests": 1, "models": ["m"]}]})}, openai=provider(upstream))
    sent = b'{"model": "m", "model": "n"}'
    assert await statuses(relay, bearer("web"), bearer("ci"), data=sent, path="chat/completions") == [403, 200]
    assert await statuses(relay, bearer("web"), bearer("web"), json={"model": "m"}, data=None) == [200, 429]


async def test_a_clients_tokens_are_reserved_and_settled(start: StartRelay, upstream: str) -> None:
    relay = await start({"clients": clients(web={"limits": [{"tokens": 100, "window_s": 3600}]})}, openai=provider(upstream))
    call = {"json": {"model": "m", "max_tokens": 60}, "data": None, "path": "chat/completions"}
    assert await statuses(relay, bearer("web"), bearer("web"), **call) == [200, 200]
    await relay.idle()
    _, headers, _ = await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": "m", "max_tokens": 1000}, headers=bearer("web"))
    assert headers["x-relay-error"] == "rate_limited", "each call used 5 tokens, so no window is empty"
    status, headers, _ = await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": "m", "max_tokens": 60}, headers=bearer("web"))
    assert status == 200 and headers["ratelimit"].startswith('"client\'s tokens-per-client-3600s"')


async def test_a_clients_concurrent_calls_are_released_when_they_end(start: StartRelay, raw: RawUpstream) -> None:
    gates, steps = gated_events(1)
    raw.plays(*steps)
    raw.plays(ok(b"fine"))
    raw.plays(ok(b"fine"))
    relay = await start({"clients": clients(web={"limits": [{"calls_at_once": 1}]})}, openai=provider(raw.url))
    url = relay.path("openai", "x")
    async with relay.client.get(url, headers=bearer("web")) as streaming:
        assert await statuses(relay, bearer("web"), bearer("ci")) == [429, 200]
        gates[0].set()
        await streaming.read()
    await relay.idle()
    assert await statuses(relay, bearer("web2")) == [200] and not relay.gateway.limit_counts.running


async def test_a_clients_sessions_are_limited(start: StartRelay, aiohttp_server: Any) -> None:
    server = await aiohttp_server(vendor(("GET", "/realtime", echo)))
    entry = provider(str(server.make_url("")), websocket={"default_path": "realtime"})
    relay = await start({"clients": clients(web={"limits": [{"sessions_at_once": 1}, {"handshakes": 2}]})}, openai=entry)
    async with relay.client.ws_connect(relay.ws("openai"), headers=bearer("web")):
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await relay.client.ws_connect(relay.ws("openai"), headers=bearer("web2"))
        assert refused.value.headers is not None
        assert (refused.value.status, refused.value.headers["x-relay-error"]) == (429, "too_many_sessions")
        async with relay.client.ws_connect(relay.ws("openai"), headers=bearer("ci")):
            pass
    await relay.idle()
    async with relay.client.ws_connect(relay.ws("openai"), headers=bearer("web")):
        pass
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await relay.client.ws_connect(relay.ws("openai"), headers=bearer("web"))
    assert refused.value.headers is not None and refused.value.headers["x-relay-error"] == "rate_limited"


async def test_the_limits_of_the_anonymous_client_hold_for_all_callers_without_a_key(start: StartRelay, upstream: str) -> None:
    known = clients() | {"page": {"limits": [{"requests": 1, "per": "address"}, {"requests": 2, "name": "all"}]}}
    document = {"server": {"trusted_proxies": ["127.0.0.1"]}, "access": {"anonymous": "page"}, "clients": known}
    relay = await start(document, openai=provider(upstream))
    callers = [{"X-Forwarded-For": f"198.51.100.{number}"} for number in (7, 7, 8, 9)]
    assert await statuses(relay, *callers, bearer("web")) == [200, 429, 200, 429, 200]


async def test_a_reload_keeps_a_clients_counts_and_applies_its_new_limits(start: StartRelay, upstream: str) -> None:
    relay = await start({"clients": clients(web={"limits": [{"requests": 2}]})}, openai=provider(upstream))
    assert await statuses(relay, bearer("web")) == [200]
    config = relay.folder / "gateway.yaml"
    config.write_text(config.read_text().replace("requests: 2", "requests: 3"))
    assert (await relay.call("POST", f"{relay.url}/api/v1/ai-gateway/providers/reload"))[0] == 200
    assert await statuses(relay, bearer("web"), bearer("web"), bearer("web")) == [200, 200, 429]


async def test_a_client_without_limits_has_the_limits_of_all(start: StartRelay, upstream: str) -> None:
    relay = await start({"clients": clients(web={"limits": [{"requests": 9}]}), "limits": [{"requests": 5}]}, openai=provider(upstream))
    known = relay.gateway.config.clients.by_name
    assert relay.gateway.limits_of(Caller("ci", record=known["ci"])) is relay.gateway.limits
    assert relay.gateway.limits_of(Caller("127.0.0.1")) is relay.gateway.limits
    own = relay.gateway.limits_of(Caller("web", record=known["web"]))
    assert own is not relay.gateway.limits and own is relay.gateway.limits_of(Caller("web", record=known["web"]))


PER_PROCESS = {"requests in memory": {"requests": 5}, "concurrent calls": {"calls_at_once": 5}, "sessions": {"sessions_at_once": 5}}


@pytest.mark.parametrize("what", PER_PROCESS)
def test_several_workers_refuse_a_clients_limits_that_they_would_multiply(tmp_path: Path, what: str) -> None:
    with pytest.raises(ConfigError, match="several workers would allow a multiple"):
        configured(tmp_path, {"server": {"workers": 2}, "clients": {"web": {"limits": [PER_PROCESS[what]]}}})


@pytest.mark.parametrize("what", PER_PROCESS)
def test_several_workers_refuse_such_limits_in_a_record_for_the_database(tmp_path: Path, what: str) -> None:
    text = json.dumps({"limits": [PER_PROCESS[what]]})
    alone, _ = configured(tmp_path, {})
    assert json.loads(checked_record(text, alone.settings, ())) == {"limits": [PER_PROCESS[what]]}
    several, _ = configured(tmp_path, {"server": {"workers": 2}})
    with pytest.raises(BadRecord, match="several workers would allow a multiple"):
        checked_record(text, several.settings, ())


async def test_the_limits_of_a_client_of_the_database_apply_and_change_at_once(start: StartRelay, upstream: str) -> None:
    relay = await start({}, openai=provider(upstream))
    keys = relay.gateway.keys
    keys.put_client("stored", '{"limits": [{"requests": 2}]}')
    keys.put_key(sha256(KEYS["free"].encode()).digest(), StoredKey("0123456789ab", "stored", None))
    assert await statuses(relay, bearer("free"), bearer("free"), bearer("free")) == [200, 200, 429]
    keys.put_client("stored", '{"limits": [{"requests": 3}]}')
    assert await statuses(relay, bearer("free"), bearer("free")) == [200, 429], "the calls of before still count"


async def test_a_stored_record_that_more_workers_multiply_is_logged_once(start: StartRelay, upstream: str) -> None:
    """The record was checked when it was stored; the relay was then started with more workers."""
    relay = await start({}, openai=provider(upstream))
    relay.gateway.settings = relay.gateway.settings.model_copy(update={"server": relay.gateway.settings.server.model_copy(update={"workers": 2})})
    caller = Caller("web", record=Client("web", rights_of('{"limits": [{"requests": 5}]}')))
    assert relay.gateway.limits_of(caller) is relay.gateway.limits_of(caller)
    [event] = await relay.events("limit.multiplied")
    assert event["rule"] == OWN_NAME and "several workers" in event["cause"]
    assert sum("limit.multiplied" in line for line in relay.logged.lines) == 1


async def test_the_number_of_counted_rule_names_is_bounded(start: StartRelay, upstream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.gate.limits._MAX_REFUSING_RULES", 1)
    records = {"web": {"limits": [{"requests": 1, "name": "a"}]}, "ci": {"limits": [{"requests": 1, "name": "b"}]}}
    relay = await start({"clients": clients(**records)}, openai=provider(upstream))
    assert await statuses(relay, *[bearer(name) for name in ("web", "web", "ci", "ci", "ci")]) == [200, 429, 200, 429, 429]
    assert relay.gateway.limit_counts.refusals == {"client's a": 1, "other": 2}


async def test_windows_in_redis_count_clients_apart_and_their_keys_together(start: StartRelay, upstream: str, redis_server: Any) -> None:
    record = {"limits": [{"requests": 1}]}
    document = {"redis": {"url": redis_server.url}, "clients": clients(web=record, ci=record)}
    first, second = await start(document, openai=provider(upstream)), await start(document, openai=provider(upstream))
    async with asyncio.timeout(HANG_GUARD_S):
        assert await statuses(first, bearer("web"), bearer("ci")) == [200, 200]
        assert await statuses(second, bearer("web2"), bearer("ci")) == [429, 429]
