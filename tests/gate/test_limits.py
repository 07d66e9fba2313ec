"""Limits through a running relay: which requests are refused, and that all counts are released."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from relay.core.paths import API
from relay.periodic import sweep
from relay.registry.load import ConfigError
from tests.conftest import StartRelay
from tests.relays import HANG_GUARD_S, Relay, configured, provider
from tests.upstream.raw import LAST_CHUNK, SILENCE, SSE_HEAD, RawUpstream, chunk, gated_events, ok
from tests.upstream.vendors import echo, vendor


async def _hold_calls(relay: Relay, name: str, count: int) -> list[asyncio.Task[Any]]:
    """Start `count` calls that run until their provider responds."""
    calls = [asyncio.create_task(relay.call("POST", relay.path(name, "x"), data=b"{}")) for _ in range(count)]
    async with asyncio.timeout(HANG_GUARD_S):
        while len(relay.gateway.running) < count:
            await asyncio.sleep(0.01)
    return calls


async def test_a_provider_that_hangs_takes_no_slots_of_other_providers(start: StartRelay, raw: RawUpstream, aiohttp_server: Any) -> None:
    gate = asyncio.Event()

    async def hang(request: web.Request) -> web.StreamResponse:
        await gate.wait()
        return web.json_response({})

    server = await aiohttp_server(vendor(("POST", "/x", hang)))
    raw.plays(ok(b"fine"))
    relay = await start({"limits": [{"calls_at_once": 5, "per": "provider"}]}, slow=provider(str(server.make_url(""))), well=provider(raw.url))
    calls = await _hold_calls(relay, "slow", 5)
    status, headers, body = await relay.call("POST", relay.path("slow", "x"), data=b"{}")
    assert (status, headers["x-relay-error"], headers["retry-after"]) == (503, "overloaded", "1")
    assert json.loads(body)["error"]["code"] == "overloaded" and "x-should-retry" not in headers
    assert (await relay.call("POST", relay.path("well", "x"), data=b"{}"))[2] == b"fine"
    gate.set()
    assert {status for status, _, _ in await asyncio.gather(*calls)} == {200}
    assert (await relay.call("POST", relay.path("slow", "x"), data=b"{}"))[0] == 200


async def test_a_client_with_too_many_concurrent_calls_gets_429(start: StartRelay, raw: RawUpstream) -> None:
    gates, steps = gated_events(1)
    raw.plays(*steps)
    relay = await start({"server": {"trusted_proxies": ["127.0.0.1"]}, "limits": [{"calls_at_once": 1, "per": "address"}]}, openai=provider(raw.url))
    async with relay.client.get(relay.path("openai", "x"), headers={"X-Forwarded-For": "198.51.100.7"}) as streaming:
        status, headers, _ = await relay.call("GET", relay.path("openai", "x"), headers={"X-Forwarded-For": "198.51.100.7"})
        assert (status, headers["x-relay-error"], headers["retry-after"]) == (429, "rate_limited", "1")
        other = asyncio.create_task(relay.call("GET", relay.path("openai", "x"), headers={"X-Forwarded-For": "198.51.100.8"}))
        gates[0].set()
        await streaming.read()
        assert (await other)[0] == 200


RELOAD = "/api/v1/ai-gateway/providers/reload"


@pytest.mark.parametrize("most", [1, 2])
async def test_a_running_call_stays_counted_across_a_reload(start: StartRelay, raw: RawUpstream, most: int) -> None:
    gates, steps = gated_events(1)
    raw.plays(*steps)
    raw.plays(ok(b"fine"))
    document = {"limits": [{"calls_at_once": 1, "per": "client"}]}
    relay = await start(document, openai=provider(raw.url))
    async with relay.client.get(relay.path("openai", "x")) as streaming:
        config = relay.folder / "gateway.yaml"
        config.write_text(config.read_text().replace("calls_at_once: 1", f"calls_at_once: {most}"))
        assert (await relay.call("POST", f"{relay.url}{RELOAD}"))[0] == 200
        assert (await relay.call("GET", relay.path("openai", "x")))[0] == (429 if most == 1 else 200)
        gates[0].set()
        await streaming.read()
    await relay.idle()
    assert (await relay.call("GET", relay.path("openai", "x")))[0] == 200
    await relay.idle()
    assert relay.gateway.limit_counts.running == {}


async def test_a_running_session_stays_counted_across_a_reload(start: StartRelay, aiohttp_server: Any) -> None:
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    relay = await start({"websocket": {"max_sessions_per_client": 1}}, openai=provider(str(server.make_url("")), websocket={"default_path": "echo"}))
    async with relay.client.ws_connect(relay.ws("openai")):
        assert (await relay.call("POST", f"{relay.url}{RELOAD}"))[0] == 200
        with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
            await relay.client.ws_connect(relay.ws("openai"))
        assert refusal.value.status == 429
    await relay.idle()
    async with relay.client.ws_connect(relay.ws("openai")) as socket:
        await socket.send_str("hello")
        assert (await socket.receive(HANG_GUARD_S)).data == "hello"


async def test_every_slot_is_released_however_a_call_ends(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays("close")
    relay = await start({"limits": [{"calls_at_once": 3}]}, openai=provider(raw.url), unset=provider(raw.url, "NOT_SET_KEY"))
    for _ in range(5):
        assert (await relay.call("POST", relay.path("openai", "x"), data=b"{}"))[0] == 502
        assert (await relay.call("POST", relay.path("unset", "x"), data=b"{}"))[0] == 503
    raw.scripts.clear()
    raw.plays(SILENCE)
    calls = await _hold_calls(relay, "openai", 3)
    for task in calls:
        task.cancel()
    await relay.idle()
    assert relay.gateway.limits._running == {}


async def test_a_call_that_runs_during_a_reload_is_released_in_both_counts(start: StartRelay, raw: RawUpstream) -> None:
    gates, steps = gated_events(1)
    raw.plays(*steps)
    relay = await start({"limits": [{"calls_at_once": 1}]}, openai=provider(raw.url))
    before = relay.gateway.limits
    async with relay.client.get(relay.path("openai", "x")) as streaming:
        relay.gateway.replace(relay.gateway.config)
        gates[0].set()
        await streaming.read()
    await relay.idle()
    assert before._running == {} and relay.gateway.limits._running == {}


@pytest.mark.parametrize(
    "rule",
    [
        {"calls_at_once": 1, "per": "address"},
        {"sessions_at_once": 1, "per": "client"},
        {"requests": 5},
        {"tokens": 5, "per": "provider"},
    ],
)
def test_several_workers_refuse_a_limit_that_each_would_count_for_itself(rule: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="counted in each process") as refused:
        configured(tmp_path, {"server": {"workers": 2}, "limits": [{"calls_at_once": 9}, rule]})
    (problem,) = refused.value.problems
    assert problem.where[:2] == ("limits", 1) and problem.line > 1


def test_several_workers_refuse_a_session_limit_that_each_would_count_for_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="counted in each process"):
        configured(tmp_path, {"server": {"workers": 2}, "websocket": {"max_sessions_per_client": 3}})


async def test_a_reload_refuses_a_limit_that_a_start_refuses(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start({"limits": [{"requests": 9}]}, openai=provider(raw.url))
    file = relay.folder / "gateway.yaml"
    file.write_text(file.read_text() + "server: {workers: 2}\n")
    status, headers, body = await relay.call("POST", f"{relay.url}{API}/providers/reload")
    assert (status, headers["x-relay-error"]) == (422, "config_invalid") and b"counted in each process" in body
    assert relay.gateway.settings.server.workers == 1


def test_several_workers_share_windows_through_redis(tmp_path: Path) -> None:
    configured(tmp_path, {"server": {"workers": 2}, "redis": {"url": "redis://127.0.0.1:1"}, "limits": [{"requests": 5}, {"calls_at_once": 9}]})


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ({}, "exactly one of"),
        ({"requests": 1, "tokens": 1}, "exactly one of"),
        ({"requests": 1, "per": "moon"}, "should be all, client"),
        ({"requests": 0}, "greater than or equal to 1"),
        ({"requests": 1, "providers": ["opnai"]}, "did you mean 'openai'"),
        ({"requests": 1, "window": 5}, "did you mean 'window_s'"),
    ],
)
def test_a_bad_rule_is_refused_with_its_line(rule: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem) as refused:
        configured(tmp_path, {"limits": [{"requests": 7}, rule], "providers": {"openai": provider("https://x.example")}})
    assert refused.value.problems[0].line > 1


async def test_requests_in_a_window_are_counted_and_reported(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}"))
    relay = await start({"limits": [{"requests": 2, "window_s": 600, "per": "client", "name": "mine"}]}, openai=provider(raw.url))
    states = [(await relay.call("POST", relay.path("openai", "x"), data=b"{}"))[1]["ratelimit"] for _ in range(2)]
    assert [state.rpartition(";")[0] for state in states] == ['"mine";r=1', '"mine";r=0']
    status, headers, body = await relay.call("POST", relay.path("openai", "x"), data=b"{}")
    assert (status, headers["x-relay-error"], headers["ratelimit-policy"]) == (429, "rate_limited", '"mine";q=2;w=600')
    assert headers["ratelimit"].startswith('"mine";r=0;t=') and 0 < int(headers["retry-after"]) <= 600
    assert "2 requests in 600 s" in json.loads(body)["error"]["message"] and len(raw.arrived) == 2


@pytest.mark.parametrize(
    ("name", "reads"),
    [("anthropic", lambda body: body["error"]["type"]), ("google", lambda body: body["error"]["status"]), ("openai", lambda body: body["error"]["type"]), ("elevenlabs", lambda body: body["detail"]["status"])],
)
async def test_a_refusal_has_the_shape_that_the_vendors_sdk_reads(name: str, reads: Any, start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}"))
    relay = await start({"limits": [{"requests": 1}]}, vendor=provider(raw.url, format=name))
    await relay.call("GET", relay.path("vendor", "x"))
    status, _, body = await relay.call("GET", relay.path("vendor", "x"))
    expected = {"anthropic": "rate_limit_error", "openai": "rate_limit_error", "google": "RESOURCE_EXHAUSTED", "elevenlabs": "rate_limited"}
    assert (status, reads(json.loads(body))) == (429, expected[name])


async def test_each_value_of_metadata_has_its_own_count(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}"))
    relay = await start({"limits": [{"requests": 1, "per": "metadata.team"}]}, openai=provider(raw.url))

    async def status(team: str) -> int:
        return (await relay.call("GET", relay.path("openai", "x"), headers={"cf-aig-metadata": json.dumps({"team": team})}))[0]

    assert [await status(team) for team in ("red", "blue", "red")] == [200, 200, 429]
    assert (await relay.call("GET", relay.path("openai", "x")))[0] == 200, "a missing value has its own count"


async def test_each_model_has_its_own_count_and_a_refused_call_uses_nothing(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}"))
    relay = await start({"limits": [{"requests": 3, "name": "all"}, {"requests": 1, "per": "model", "name": "each"}]}, openai=provider(raw.url))

    async def call(model: str) -> Any:
        return await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": model})

    assert [(await call(model))[0] for model in ("a", "a", "a", "b")] == [200, 429, 429, 200]
    status, headers, _ = await call("c")
    assert status == 200 and '"all";r=0' in headers["ratelimit"] and '"each";r=0' in headers["ratelimit"]
    assert (await call("d"))[0] == 429


@pytest.mark.parametrize(
    ("body", "content_type"),
    [(b'{"model": "a", "model": "b"}', "application/json"), (b"{broken", "application/json"), (b'\xef\xbb\xbf{"model": "a", "model": "b"}', "text/plain"), (b'{"model": "a", "n": NaN, "model_id": "b"}', "application/json"), (b'  {"model": "a", "model": "b"}', "application/octet-stream")],
)
async def test_a_body_without_a_plain_model_is_refused_if_a_rule_depends_on_the_model(body: bytes, content_type: str, start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}"))
    relay = await start({"limits": [{"requests": 5, "models": ["a"]}]}, openai=provider(raw.url))
    status, headers, _ = await relay.call("POST", relay.path("openai", "chat/completions"), data=body, headers={"Content-Type": content_type})
    assert (status, headers["x-relay-error"]) == (403, "model_unknown") and not raw.arrived
    assert (await relay.call("POST", relay.path("openai", "files"), data=b"\xff\xfb audio", headers={"Content-Type": "audio/mpeg"}))[0] == 200


async def test_a_body_too_large_to_be_read_is_refused_if_a_rule_depends_on_the_model(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}"))
    relay = await start({"server": {"buffer_bytes": 1000, "json_buffer_bytes": 1000}, "limits": [{"requests": 5, "per": "model"}]}, openai=provider(raw.url))
    status, headers, _ = await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": "a", "input": "x" * 2000})
    assert (status, headers["x-relay-error"]) == (403, "model_unknown")


ANSWERS = {
    "json": (ok(b'{"usage": {"prompt_tokens": 30, "completion_tokens": 12}}', "Content-Type: application/json"), 42),
    "gzip": (ok(gzip.compress(b'{"usage": {"prompt_tokens": 30, "completion_tokens": 12}}'), "Content-Encoding: gzip"), 42),
    "responses": (ok(b'{"usage": {"input_tokens": 30, "output_tokens": 12, "total_tokens": 42}}'), 42),
    "anthropic stream": (SSE_HEAD + chunk(b'data: {"message": {"usage": {"input_tokens": 30, "cache_read_input_tokens": 5, "output_tokens": 1}}}\n\n') + chunk(b'data: {"usage": {"output_tokens": 7}}\n\n') + LAST_CHUNK, 42),
    "gemini stream": (SSE_HEAD + chunk(b'data: {"usageMetadata": {"promptTokenCount": 30, "candidatesTokenCount": 2}}\n\n') + chunk(b'data: {"usageMetadata": {"promptTokenCount": 30, "candidatesTokenCount": 4, "thoughtsTokenCount": 8}}\n\n') + LAST_CHUNK, 42),
    "no usage": (ok(b'{"no": "usage"}'), 25 + 200),
    "refused by the provider": (ok(b'{"error": {}}', status="400 Bad Request"), 0),
    "unreachable": ("close", 25 + 200),
}  # fmt: skip


@pytest.mark.parametrize("technique", ["fixed", "sliding"])
@pytest.mark.parametrize("answer", ANSWERS)
async def test_tokens_are_reserved_first_and_corrected_to_the_usage(answer: str, technique: str, start: StartRelay, raw: RawUpstream) -> None:
    script, used = ANSWERS[answer]
    endpoint = {"anthropic": "messages", "gemini": "models/m:streamGenerateContent"}.get(answer.split()[0], "responses")
    raw.plays(script)
    relay = await start({"limits": [{"tokens": 1000, "window_s": 86400, "technique": technique, "name": "t"}]}, openai=provider(raw.url))
    limit = {"messages": '"max_tokens": 200', "responses": '"max_output_tokens": 200'}.get(endpoint, '"generationConfig": {"maxOutputTokens": 200}')
    body = f'{{{limit}, "input": "'.ljust(98, "x") + '"}'
    _, headers, _ = await relay.call("POST", relay.path("openai", endpoint), data=body)
    assert f'"t";r={1000 - 225}' in headers["ratelimit"]
    await relay.gateway.background.done()
    _, headers, _ = await relay.call("POST", relay.path("openai", endpoint), data=body)
    assert f'"t";r={1000 - used - 225}' in headers["ratelimit"]


async def test_a_call_that_may_exceed_the_limit_is_admitted_only_in_an_empty_window(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b'{"usage": {"prompt_tokens": 1, "completion_tokens": 1}}'))
    relay = await start({"limits": [{"tokens": 100}]}, openai=provider(raw.url))
    assert (await relay.call("POST", relay.path("openai", "x"), json={"max_tokens": 5000}))[0] == 200
    await relay.gateway.background.done()
    status, headers, _ = await relay.call("POST", relay.path("openai", "x"), json={"max_tokens": 5000})
    assert (status, headers["ratelimit"].partition(";t")[0]) == (429, '"tokens-60s";r=98')


FREE = {
    "a count of tokens": ("POST", "v1/messages/count_tokens"),
    "OpenAI's count": ("POST", "v1/responses/input_tokens"),
    "Gemini's count": ("POST", "v1beta/models/m:countTokens"),
    "a list of models": ("GET", "v1/models"),
    "an upload": ("POST", "v1/files"),
    "a read of a file": ("GET", "v1/files/f/content"),
    "a read of a response": ("GET", "v1/responses/r"),
    "a deletion": ("DELETE", "v1/responses/r"),
}


@pytest.mark.parametrize("name", FREE)
async def test_a_call_that_uses_no_tokens_reserves_none(name: str, start: StartRelay, raw: RawUpstream) -> None:
    method, endpoint = FREE[name]
    raw.plays(ok(b'{"input_tokens": 10000}', "Content-Type: application/json"))
    relay = await start({"limits": [{"tokens": 2000, "window_s": 86400}]}, openai=provider(raw.url))
    for _ in range(3):
        status, headers, _ = await relay.call(method, relay.path("openai", endpoint), data=b'{"a": "%s"}' % (b"x" * 20_000))
        assert status == 200 and "ratelimit" not in headers
    await relay.idle()
    status, headers, _ = await relay.call("POST", relay.path("openai", "chat/completions"), json={"max_tokens": 1900})
    assert status == 200 and int(headers["ratelimit"].partition("r=")[2].partition(";")[0]) > 0


def _user(named: Any) -> dict[str, Any]:
    """Return a request with the metadata in its header if `named` is text, else in its body."""
    return {"headers": {"cf-aig-metadata": named}, "json": {}} if isinstance(named, str) else {"json": named}


USERS = {
    "user": ({"user": "ann"}, {"user": "bob"}),
    "safety_identifier": ({"safety_identifier": "ann"}, {"safety_identifier": "bob", "user": "ann"}),
    "metadata.user_id": ({"metadata": {"user_id": "ann"}}, {"metadata": {"user_id": "bob"}}),
    "the header": ('{"user": "ann"}', '{"user": "bob"}'),
    "a number in the header": ('{"user": 1}', '{"user": 2}'),
    "a long name": ({"user": "a" * 5000}, {"user": "a" * 4999}),
    "a name that is a client's address": ({"user": "127.0.0.1"}, {}),
    "a name that looks like the key of a client": ({"user": "=127.0.0.1"}, {}),
}


@pytest.mark.parametrize("name", USERS)
@pytest.mark.parametrize("rule", [{"requests": 1}, {"tokens": 1}])
async def test_each_user_has_a_count_of_its_own(name: str, rule: dict[str, Any], start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}"))
    one, other = map(_user, USERS[name])
    relay = await start({"limits": [rule | {"window_s": 86400, "per": "user"}]}, openai=provider(raw.url))
    url = relay.path("openai", "chat/completions")
    found = [(await relay.call("POST", url, **who))[0] for who in (one, one, other, other)]
    assert found == [200, 429, 200, 429]


async def test_the_user_of_a_form_has_a_count_of_its_own(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}"))
    relay = await start({"limits": [{"requests": 1, "window_s": 86400, "per": "user"}]}, openai=provider(raw.url))

    async def status(user: str) -> int:
        form = aiohttp.FormData({"image": b"x" * 70_000, "user": user}, default_to_multipart=True)
        return (await relay.call("POST", relay.path("openai", "images/edits"), data=form))[0]

    assert [await status(user) for user in ("ann", "ann", "bob")] == [200, 429, 200]


async def test_the_user_of_the_header_overrides_the_user_of_the_body(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}"))
    relay = await start({"limits": [{"requests": 1, "window_s": 86400, "per": "user"}]}, openai=provider(raw.url))
    url, identity = relay.path("openai", "chat/completions"), {"cf-aig-metadata": '{"user": "ann"}'}
    found = [(await relay.call("POST", url, json={"user": user}, headers=headers))[0] for user, headers in (("bob", identity), ("eve", identity), ("bob", {}))]
    assert found == [200, 429, 200]


async def test_a_user_with_too_many_concurrent_calls_gets_429(start: StartRelay, raw: RawUpstream) -> None:
    gates, steps = gated_events(1)
    raw.plays(*steps)
    relay = await start({"limits": [{"calls_at_once": 1, "per": "user"}]}, openai=provider(raw.url))
    url = relay.path("openai", "chat/completions")
    async with relay.client.post(url, json={"user": "ann"}) as running:
        status, headers, _ = await relay.call("POST", url, json={"user": "ann"})
        assert (status, headers["x-relay-error"]) == (429, "rate_limited")
        gates[0].set()
        await running.read()
    await relay.idle()
    assert relay.gateway.limits._running == {}


async def test_a_session_counts_for_the_user_of_the_header_or_else_for_the_client(start: StartRelay, vendors: Any) -> None:
    relay = await start({"limits": [{"handshakes": 1, "window_s": 86400, "per": "user"}], "providers": vendors.entries()})
    for headers in ({"cf-aig-metadata": '{"user": "ann"}'}, {}):
        async with relay.client.ws_connect(relay.ws("openai"), headers=headers):
            pass
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await relay.client.ws_connect(relay.ws("openai"), headers=headers)
        assert refused.value.status == 429


@pytest.mark.parametrize("per", ["user", "metadata.team", "model"])
@pytest.mark.parametrize("size", [10, 3000])
async def test_calls_without_a_value_count_for_each_client(per: str, size: int, start: StartRelay, raw: RawUpstream) -> None:
    """In one common count, the clients would use up each other's limit."""
    raw.plays(ok(b"{}"))
    document = {"server": {"trusted_proxies": ["127.0.0.1"], "buffer_bytes": 2000 if per == "user" else 4000}, "limits": [{"requests": 1, "window_s": 86400, "per": per}]}
    relay = await start(document, openai=provider(raw.url))

    async def status(client: str) -> int:
        headers = {"X-Forwarded-For": client, "Content-Type": "audio/wav"}
        return (await relay.call("POST", relay.path("openai", "x"), data=bytes(size), headers=headers))[0]

    found = [await status(client) for client in ("198.51.100.1", "198.51.100.2", "198.51.100.1", "198.51.100.2")]
    assert found == [200, 200, 429, 429]


async def test_a_rule_by_model_does_not_refuse_calls_to_other_providers(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}"))
    rule = {"requests": 9, "models": ["m"], "providers": ["openai"]}
    relay = await start({"limits": [rule]}, openai=provider(raw.url), other=provider(raw.url))
    unclear = b'{"model": "m", "model": "n"}'
    found = [(await relay.call("POST", relay.path(name, "chat/completions"), data=unclear))[0] for name in ("openai", "other")]
    assert found == [403, 200]


async def test_calls_through_cloudflare_are_not_counted_if_limits_are_delegated(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}"))
    account = {"account_id": "a", "base_url": raw.url}
    limits = [{"requests": 1}, {"calls_at_once": 50}]
    entry = provider(raw.url, cloudflare={"slug": "openai"})
    delegating = await start({"limits": limits, "cloudflare": account | {"delegate": ["limits"]}}, openai=entry, direct=provider(raw.url))
    assert [(await delegating.call("GET", delegating.path("openai", "x")))[0] for _ in range(3)] == [200] * 3
    assert [(await delegating.call("GET", delegating.path("direct", "x")))[0] for _ in range(2)] == [200, 429]
    counting = await start({"limits": limits, "cloudflare": account}, openai=entry)
    assert [(await counting.call("GET", counting.path("openai", "x")))[0] for _ in range(2)] == [200, 429]


async def test_handshakes_are_counted_separately(start: StartRelay, vendors: Any) -> None:
    relay = await start({"limits": [{"handshakes": 2, "per": "client"}, {"requests": 1}], "providers": vendors.entries()})
    for _ in range(2):
        async with relay.client.ws_connect(relay.ws("openai")):
            pass
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await relay.client.ws_connect(relay.ws("openai"))
    assert refused.value.status == 429 and refused.value.headers is not None
    assert refused.value.headers["x-relay-error"] == "rate_limited" and int(refused.value.headers["retry-after"]) > 1


async def test_sessions_at_once_are_counted_by_model(start: StartRelay, vendors: Any) -> None:
    relay = await start({"limits": [{"sessions_at_once": 1, "per": ["client", "model"]}], "providers": vendors.entries()})
    async with relay.client.ws_connect(relay.ws("openai")), relay.client.ws_connect(relay.ws("openai") + "?model=gpt-other"):
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await relay.client.ws_connect(relay.ws("openai") + "?model=gpt-realtime-2.1")
        assert refused.value.status == 429 and refused.value.headers is not None
        assert refused.value.headers["x-relay-error"] == "too_many_sessions"
    await relay.idle()
    async with relay.client.ws_connect(relay.ws("openai")):
        pass


@pytest.mark.parametrize(("setting", "message"), [("max_messages_per_s", '{"type": "x"}'), ("max_bytes_per_s", '{"type": "%s"}' % ("x" * 2000))])
async def test_a_client_that_sends_too_fast_ends_with_1008(setting: str, message: str, start: StartRelay, vendors: Any) -> None:
    relay = await start({"websocket": {setting: 300}, "providers": vendors.entries()})
    async with relay.client.ws_connect(relay.ws("openai")) as socket:
        flood = asyncio.create_task(_flood(socket, message))
        async with asyncio.timeout(HANG_GUARD_S):
            async for _ in socket:
                pass
        flood.cancel()
        await asyncio.gather(flood, return_exceptions=True)
        assert socket.close_code == 1008
    (line,) = await relay.events()
    assert (line["close_code"], line["closed_by"]) == (1008, "relay")


async def _flood(socket: Any, message: str) -> None:
    while not socket.closed:
        await socket.send_str(message)
        await asyncio.sleep(0.0005)


async def test_counts_of_made_up_names_are_dropped_when_their_window_is_over(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}"))
    relay = await start({"limits": [{"requests": 9, "window_s": 600, "per": per} for per in ("model", "user")]}, openai=provider(raw.url))
    for number in range(20):
        await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": f"made-up-{number}", "user": f"user-{number}"})
    counters = relay.gateway.windows.local._counters
    assert len(counters._windows) == 40
    clock = counters._clock
    counters._clock = lambda: clock() + 601
    await sweep(relay.gateway)
    assert len(counters._windows) == 0
