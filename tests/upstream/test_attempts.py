"""Which calls are retried, where and when, and which never are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from relay.core.errors import (
    BadRequest,
    ClientGone,
    UpstreamDisconnected,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from relay.core.exchange import Caller, Exchange, Request
from relay.core.retry_after import retry_after_s
from relay.core.retry_policy import (
    AttemptResult,
    RetryRules,
    fallback_cause,
    is_repeatable,
    key_cooldown_s,
    requested_rules,
    wait_s,
)
from relay.registry.load import ConfigError
from relay.upstream.attempts import AttemptOptions, Budget
from tests.conftest import StartRelay
from tests.relays import CLIENT_KEY, HANG_GUARD_S, Relay, canary, provider, write_config
from tests.upstream.raw import SILENCE, RawUpstream, gated_events, ok
from tests.upstream.vendors import echo, vendor

QUICK = {"max_attempts": 3, "delay_s": 0.001, "max_delay_s": 0.05}
NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


# Decisions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"retry-after": "0"}, 0),
        ({"retry-after": "1"}, 1),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "3600"}, 3600),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "abc"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "9" * 40}, None),
        ({"retry-after": format_datetime(NOW.replace(minute=1), usegmt=True)}, 60),
        ({"retry-after": format_datetime(NOW.replace(hour=11), usegmt=True)}, 0),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9),
        ({}, None),
    ],
)
def test_retry_after_is_read_in_every_form(headers: dict[str, str], expected: float | None) -> None:
    assert retry_after_s(headers.get, NOW.timestamp()) == expected


def test_waits_grow_and_are_capped_and_random() -> None:
    def waits(backoff: Any, random: float = 1.0) -> list[float | None]:
        rules = RetryRules(backoff=backoff, delay_s=1, max_delay_s=5)
        return [wait_s(rules, number, AttemptResult(503), lambda: random) for number in (1, 2, 3, 4)]

    assert waits("constant") == [1, 1, 1, 1]
    assert waits("linear") == [1, 2, 3, 4]
    assert waits("exponential") == [1, 2, 4, 5]
    assert waits("exponential", 0.5) == [0.5, 1, 2, 2.5]


def test_a_retry_after_above_the_cap_is_not_waited_for() -> None:
    rules = RetryRules(max_delay_s=5)
    assert wait_s(rules, 1, AttemptResult(429, None, 5), lambda: 0.0) == 5
    assert wait_s(rules, 1, AttemptResult(429, None, 6), lambda: 0.0) is None


@pytest.mark.parametrize(
    ("result", "method", "again"),
    [
        (AttemptResult(200), "GET", False), (AttemptResult(404), "GET", False), (AttemptResult(400), "POST", False), (AttemptResult(413), "POST", False),
        (AttemptResult(0, ClientGone()), "GET", False),
        (AttemptResult(503), "POST", True), (AttemptResult(429), "POST", True), (AttemptResult(529), "POST", True), (AttemptResult(401), "POST", True),
        (AttemptResult(500), "POST", False), (AttemptResult(502), "POST", False), (AttemptResult(504), "POST", False),
        (AttemptResult(500), "GET", True), (AttemptResult(502), "PUT", False), (AttemptResult(502), "DELETE", False),
        (AttemptResult(0, UpstreamUnreachable("p", "h:1", "refused")), "POST", True),
        (AttemptResult(0, UpstreamDisconnected("x")), "POST", False), (AttemptResult(0, UpstreamDisconnected("x")), "GET", True),
        (AttemptResult(0, UpstreamTimeout("x", 1)), "POST", False), (AttemptResult(0, UpstreamTimeout("x", 1)), "GET", True),
    ],
)  # fmt: skip
def test_only_calls_that_were_not_executed_or_are_idempotent_are_retried(result: AttemptResult, method: str, again: bool) -> None:
    rules = RetryRules()
    failed = fallback_cause(result, rules) is not None
    assert (failed and is_repeatable(result, rules, method)) is again


@pytest.mark.parametrize(
    ("result", "failures", "cooldown_s"),
    [
        (AttemptResult(401), 1, 300), (AttemptResult(403), 9, 300), (AttemptResult(429), 1, 20), (AttemptResult(429, None, 42), 1, 42), (AttemptResult(429, None, 99999), 1, 3600),
        (AttemptResult(500), 1, 1), (AttemptResult(503), 3, 4), (AttemptResult(500), 20, 60), (AttemptResult(0, UpstreamDisconnected("x")), 2, 2),
        (AttemptResult(200), 1, 0), (AttemptResult(400), 1, 0), (AttemptResult(422), 5, 0), (AttemptResult(0, ClientGone()), 1, 0),
    ],
)  # fmt: skip
def test_the_cooldown_of_a_key_follows_from_the_result(result: AttemptResult, failures: int, cooldown_s: float) -> None:
    assert key_cooldown_s(result, failures) == cooldown_s


def test_control_headers_change_the_retry_rules_within_limits() -> None:
    requested = requested_rules({"cf-aig-max-attempts": "5", "cf-aig-retry-delay": "1500", "cf-aig-backoff": "linear"}.get, RetryRules())
    assert requested == RetryRules(max_attempts=5, delay_s=1.5, backoff="linear")
    assert requested_rules({}.get, RetryRules()) is None
    for name, value in {"cf-aig-max-attempts": "6", "cf-aig-retry-delay": "-1", "cf-aig-backoff": "wild"}.items():
        with pytest.raises(BadRequest, match=name):
            requested_rules({name: value}.get, RetryRules())


def test_the_retry_budget_is_a_share_of_calls_and_a_minimum_per_second() -> None:
    now = 0.0
    budget = Budget(20, 10, lambda: now)
    spent = sum(budget.spend() for _ in range(100))
    assert spent == 10, "the minimum per second"
    for _ in range(1000):
        budget.earn()
    assert sum(budget.spend() for _ in range(100)) == 10, "savings are bounded"
    now = 1.0
    assert sum(budget.spend() for _ in range(100)) == 10


# Retries ------------------------------------------------------------------------------------------


def busy(status: str = "503 Busy", *headers: str) -> bytes:
    return ok(b'{"error": {"message": "busy"}}', *headers, status=status)


async def _attempts(relay: Relay) -> list[tuple[str, str, int, str]]:
    [event] = await relay.events()
    return [(each["provider"], each["key"], each["status"], each["error"]) for each in event.get("attempts", [])]


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_call_that_the_provider_did_not_execute_is_retried(start: StartRelay, raw: RawUpstream, method: str) -> None:
    raw.plays(busy())
    raw.plays(busy("429 Slow", "Retry-After: 0"))
    raw.plays(ok(b"fine"))
    relay = await start({"retries": QUICK}, openai=provider(raw.url))
    assert (await relay.call(method, relay.path("openai", "x"), data=b"{}" if method == "POST" else None))[2] == b"fine"
    assert [request.body for request in raw.arrived] == [b"{}" if method == "POST" else b""] * 3
    assert await _attempts(relay) == [("openai", "OPENAI_API_KEY", status, "") for status in (503, 429, 200)]


async def test_the_last_response_is_relayed_unchanged(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(busy("503 Busy", "Retry-After: 0"))
    relay = await start({"retries": QUICK}, openai=provider(raw.url))
    status, headers, body = await relay.call("POST", relay.path("openai", "x"), data=b"{}")
    assert (status, body, headers["Retry-After"]) == (503, b'{"error": {"message": "busy"}}', "0")
    assert len(raw.arrived) == 3 and headers["x-relay-error-source"] == "provider"


async def test_a_long_retry_after_is_not_waited_for(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(busy("429 Slow", "Retry-After: 60"))
    relay = await start({"retries": QUICK}, openai=provider(raw.url))
    assert (await relay.call("POST", relay.path("openai", "x"), data=b"{}"))[0] == 429
    assert len(raw.arrived) == 1


ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 12\r\n\r\n{\"ok\": true}"


@pytest.mark.parametrize("size", range(0, len(ANSWER), 5))
async def test_a_post_is_never_executed_twice_wherever_its_response_breaks_off(start: StartRelay, raw: RawUpstream, size: int) -> None:
    raw.plays(ANSWER[:size], "close") if size else raw.plays("close")
    relay = await start({"retries": QUICK}, openai=provider(raw.url))
    try:
        status, _, _ = await relay.call("POST", relay.path("openai", "x"), data=b"{}")
        assert status == 502
    except aiohttp.ClientError:
        pass  # the head was relayed already, so the client sees the truncation
    assert len(raw.arrived) == 1


async def test_a_get_without_a_response_is_retried(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays("close")
    raw.plays(ok(b"fine"))
    relay = await start({"retries": QUICK}, openai=provider(raw.url))
    assert (await relay.call("GET", relay.path("openai", "x")))[2] == b"fine"


async def test_a_streamed_upload_is_sent_once(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(busy())
    relay = await start({"retries": QUICK, "server": {"buffer_bytes": 10, "json_buffer_bytes": 10}}, openai=provider(raw.url))
    assert (await relay.call("POST", relay.path("openai", "x"), data=b"x" * 1000))[0] == 503
    assert len(raw.arrived) == 1


async def test_an_idempotency_key_makes_any_call_repeatable(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays("close")
    raw.plays(ok(b"fine"))
    relay = await start({"retries": QUICK}, openai=provider(raw.url, idempotency_header="Idempotency-Key"))
    _, headers, body = await relay.call("POST", relay.path("openai", "x"), data=b"{}")
    keys = [request.header("Idempotency-Key") for request in raw.arrived]
    assert body == b"fine" and keys == [[headers["cf-aig-log-id"]]] * 2


async def test_a_client_sets_the_number_of_attempts_and_an_invalid_one_is_refused(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(busy())
    relay = await start(openai=provider(raw.url))
    controls = {"cf-aig-max-attempts": "4", "cf-aig-retry-delay": "1", "cf-aig-backoff": "constant"}
    await relay.call("POST", relay.path("openai", "x"), data=b"{}", headers=controls)
    assert len(raw.arrived) == 4
    assert not any(request.header("cf-aig-max-attempts") for request in raw.arrived)
    status, headers, _ = await relay.call("POST", relay.path("openai", "x"), data=b"{}", headers={"cf-aig-max-attempts": "many"})
    assert (status, headers["x-relay-error"]) == (400, "bad_request") and len(raw.arrived) == 4


async def test_an_outage_is_not_amplified_and_its_end_is_noticed_at_once(start: StartRelay, aiohttp_server: Any) -> None:
    hits, down = 0, True

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal hits
        hits += 1
        return web.json_response({}, status=503 if down else 200)

    server = await aiohttp_server(vendor(("POST", "/x", answer)))
    relay = await start({"retries": QUICK}, openai=provider(str(server.make_url(""))))
    loop = asyncio.get_running_loop()
    began = loop.time()
    concurrency = asyncio.Semaphore(32)

    async def one() -> int:
        async with concurrency:
            return (await relay.call("POST", relay.path("openai", "x"), data=b"{}"))[0]

    assert set(await asyncio.gather(*(one() for _ in range(500)))) == {503}
    assert hits <= 500 * 1.2 + 10 * (loop.time() - began) + 20
    down = False
    assert set(await asyncio.gather(*(one() for _ in range(50)))) == {200}


# Targets ------------------------------------------------------------------------------------------


@pytest.fixture
async def other() -> AsyncIterator[RawUpstream]:
    """A second provider."""
    upstream = await RawUpstream.start()
    yield upstream
    await upstream.stop()


CHAT = b'{"messages": [{"role":"user","content":"hi \\u00e9"}],  "model": "big", "temperature": 0.10}'


async def test_a_fallback_gets_its_own_model_and_credential(start: StartRelay, raw: RawUpstream, other: RawUpstream) -> None:
    raw.plays(busy())
    other.plays(ok(b"from the other"))
    first = provider(raw.url, fallback=[{"provider": "other", "model": "small"}])
    relay = await start({"retries": QUICK | {"max_attempts": 1}}, openai=first, other=provider(other.url, "ANTHROPIC_API_KEY"))
    _, headers, body = await relay.call("POST", relay.path("openai", "chat/completions"), data=CHAT, headers={"Authorization": f"Bearer {CLIENT_KEY}"})
    assert body == b"from the other" and headers["cf-aig-step"] == "1"
    [arrived] = other.arrived
    assert arrived.header("Authorization") == [f"Bearer {canary('anthropic')}"]
    sent = json.loads(arrived.body)
    assert sent == json.loads(CHAT) | {"model": "small"} and b"0.10" in arrived.body and b"\\u00e9" in arrived.body
    [event] = await relay.events()
    assert [(each["provider"], each["status"]) for each in event["attempts"]] == [("openai", 503), ("other", 200)]


async def test_a_provider_that_cannot_be_reached_or_is_not_configured_is_skipped(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"fine"))
    chain = [{"provider": "unset"}, {"provider": "up"}]
    relay = await start(dead=provider("http://127.0.0.1:9", fallback=chain), unset=provider(raw.url, "NOT_SET_KEY"), up=provider(raw.url))
    _, headers, body = await relay.call("POST", relay.path("dead", "chat/completions"), data=CHAT)
    assert body == b"fine" and headers["cf-aig-step"] == "2"
    assert raw.arrived[0].body == CHAT, "a fallback without a model of its own changes no byte"


async def test_only_a_generating_call_falls_back(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"fine"))
    relay = await start(dead=provider("http://127.0.0.1:9", fallback=[{"provider": "up"}]), up=provider(raw.url))
    assert (await relay.call("GET", relay.path("dead", "models")))[0] == 502


async def test_a_call_goes_directly_to_the_provider_if_cloudflare_is_unreachable(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"direct"))
    entry = provider(raw.url, cloudflare={"slug": "openai"}, via={"rest": ["cloudflare", "direct"]})
    account = {"account_id": "acct", "base_url": "http://127.0.0.1:9/v1"}
    relay = await start({"cloudflare": account}, openai=entry)
    _, headers, body = await relay.call("POST", relay.path("openai", "chat/completions"), data=CHAT)
    assert body == b"direct" and headers["cf-aig-step"] == "1"
    [event] = await relay.events()
    assert [each["via"] for each in event["attempts"]] == ["cloudflare", "direct"]


async def test_a_client_limits_the_wait_for_the_first_byte(start: StartRelay, raw: RawUpstream, other: RawUpstream) -> None:
    raw.plays(SILENCE)
    other.plays(ok(b"quick"))
    document = {"providers": {"slow": provider(raw.url, fallback=[{"provider": "quick"}]), "lone": provider(raw.url), "quick": provider(other.url)}}
    relay = await start(document)
    controls = {"cf-aig-request-timeout": "100"}
    status, headers, _ = await relay.call("POST", relay.path("lone", "chat/completions"), data=CHAT, headers=controls)
    assert (status, headers["x-relay-error"]) == (504, "upstream_timeout")
    _, headers, body = await relay.call("POST", relay.path("slow", "chat/completions"), data=CHAT, headers=controls)
    assert body == b"quick" and headers["cf-aig-step"] == "1"


async def test_a_target_that_keeps_failing_is_in_cooldown_and_then_probed_once(start: StartRelay, raw: RawUpstream, other: RawUpstream) -> None:
    raw.plays(busy())
    other.plays(ok(b"other"))
    relay = await start(openai=provider(raw.url, fallback=[{"provider": "other"}]), other=provider(other.url))
    now = 1000.0
    relay.gateway.attempts.health._clock = lambda: now
    call: Callable[[], Awaitable[Any]] = lambda: relay.call("POST", relay.path("openai", "chat/completions"), data=CHAT)  # noqa: E731
    for _ in range(8):
        assert (await call())[2] == b"other"
    assert len(raw.arrived) == 5, "then it is in cooldown"
    now += 3600
    raw.scripts.clear()
    raw.plays(ok(b"recovered"))
    assert (await call())[2] == b"recovered"
    assert (await call())[2] == b"recovered"


async def test_targets_are_chosen_by_weight(start: StartRelay, raw: RawUpstream, other: RawUpstream) -> None:
    raw.plays(ok(b"first"))
    other.plays(ok(b"second"))
    entry = provider(raw.url, order="weight", weight=1, fallback=[{"provider": "other", "weight": 3}])
    relay = await start(openai=entry, other=provider(other.url))
    points = iter([0.1, 0.0, 0.9, 0.0, 0.3, 0.0])
    relay.gateway.attempts._random = lambda: next(points)
    answers = [(await relay.call("POST", relay.path("openai", "chat/completions"), data=CHAT))[2] for _ in range(3)]
    assert answers == [b"first", b"second", b"second"]


def test_a_fallback_to_an_unknown_provider_is_refused_with_its_place(tmp_path: Any) -> None:
    from relay.registry.load import load

    sources = write_config(tmp_path, {"providers": {"openai": provider("http://127.0.0.1:9", fallback=[{"provider": "opanai"}])}})
    with pytest.raises(ConfigError, match=r"gateway.yaml:\d+:\d+: providers.openai.fallback\[?\.?0.*there is no provider 'opanai'; did you mean 'openai'"):
        load(sources)


# Keys ---------------------------------------------------------------------------------------------

POOL = {"header": "Authorization", "value": ["Bearer ${OPENAI_API_KEY}", "Bearer ${FAL_KEY}", "Bearer ${GROQ_API_KEY}"]}
A, B, C = (f"Bearer {canary(name)}" for name in ("openai", "fal", "groq"))


class Keyed:
    """A provider that responds to each key as `answers` and `bodies` say."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, dict[str, str]]] = {}
        self.bodies: dict[str, Any] = {}
        self.used: list[str] = []
        self.gate: asyncio.Event | None = None

    async def answer(self, request: web.Request) -> web.StreamResponse:
        key = request.headers["Authorization"]
        self.used.append(key)
        if self.gate is not None:
            await self.gate.wait()
        status, headers = self.answers.get(key, (200, {}))
        return web.json_response(self.bodies.get(key, {}), status=status, headers=headers)


@pytest.fixture
async def keyed(start: StartRelay, aiohttp_server: Any) -> tuple[Relay, Keyed, Callable[[], Awaitable[int]], Callable[[float], None]]:
    upstream = Keyed()
    server = await aiohttp_server(vendor(("POST", "/x", upstream.answer)))
    relay = await start(openai={"base_url": str(server.make_url("")), "auth": POOL})
    now = 1000.0

    def advance(seconds: float) -> None:
        nonlocal now
        now += seconds

    relay.gateway.attempts.health._clock = lambda: now

    async def call() -> int:
        return (await relay.call("POST", relay.path("openai", "x"), data=b"{}"))[0]

    return relay, upstream, call, advance


async def test_keys_are_used_in_rotation(keyed: Any) -> None:
    _, upstream, call, _ = keyed
    assert [await call() for _ in range(6)] == [200] * 6
    assert upstream.used == [A, B, C, A, B, C]


async def test_a_limited_key_is_replaced_at_once_and_in_cooldown_for_its_retry_after(keyed: Any) -> None:
    _, upstream, call, advance = keyed
    upstream.answers[A] = (429, {"Retry-After": "30"})
    assert await call() == 200
    assert upstream.used[0] == A and len(upstream.used) == 2, "the same call uses the next key"
    assert [await call() for _ in range(6)] == [200] * 6
    assert upstream.used.count(A) == 1
    advance(31)
    upstream.answers.clear()
    assert [await call() for _ in range(6)] == [200] * 6
    assert upstream.used.count(A) >= 2, "the key has recovered"


async def test_a_refused_key_has_a_long_cooldown_and_is_logged(keyed: Any) -> None:
    relay, upstream, call, advance = keyed
    upstream.answers[B] = (401, {})
    assert [await call() for _ in range(9)] == [200] * 9
    advance(200)
    assert [await call() for _ in range(6)] == [200] * 6
    assert upstream.used.count(B) == 1
    [alarm] = await relay.events("key.refused")
    assert (alarm["key"], alarm["status"], alarm["code"], alarm["level"]) == ("FAL_KEY", 401, "401", "warning")
    _, _, body = await relay.call("GET", f"{relay.url}/api/v1/ai-gateway/providers")
    [health] = json.loads(body)["providers"][0]["health"]
    assert [(each["key"], each["failures"]) for each in health["keys"]] == [("OPENAI_API_KEY", 0), ("FAL_KEY", 1), ("GROQ_API_KEY", 0)]


NO_KEY = {"error": {"code": 400, "details": [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}]}}


@pytest.mark.parametrize(("status", "body", "code"), [(400, NO_KEY, "API_KEY_INVALID"), (402, {}, "402"), (429, {"error": {"code": "insufficient_quota"}}, "insufficient_quota")])
async def test_a_dead_key_is_replaced_whatever_the_form_of_the_refusal(keyed: Any, status: int, body: Any, code: str) -> None:
    relay, upstream, call, advance = keyed
    upstream.answers[B], upstream.bodies[B] = (status, {}), body
    assert [await call() for _ in range(9)] == [200] * 9
    advance(200)
    assert [await call() for _ in range(6)] == [200] * 6
    assert upstream.used.count(B) == 1
    [alarm] = await relay.events("key.refused")
    assert (alarm["key"], alarm["status"], alarm["code"]) == ("FAL_KEY", status, code)


async def test_a_refused_key_is_logged_even_if_it_was_limited_before(keyed: Any) -> None:
    relay, upstream, call, advance = keyed
    upstream.answers[A] = (429, {"Retry-After": "30"})
    await call()
    advance(31)
    upstream.answers[A] = (401, {})
    assert [await call() for _ in range(3)] == [200] * 3
    assert (await relay.events("key.refused"))[0]["key"] == "OPENAI_API_KEY"


RETRY_AFTER: dict[str, tuple[dict[str, str], Any]] = {
    "Retry-After": ({"Retry-After": "1800"}, {}),
    "RetryInfo": ({}, {"error": {"details": [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "1800s"}]}}),
    "resets_in_seconds": ({}, {"error": {"type": "usage_limit_reached", "resets_in_seconds": 1800}}),
    "reset header": ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "30m0s"}, {}),
}  # fmt: skip


@pytest.mark.parametrize("form", RETRY_AFTER)
async def test_a_limited_key_is_in_cooldown_as_long_as_the_response_says_in_any_form(keyed: Any, form: str) -> None:
    _, upstream, call, advance = keyed
    headers, upstream.bodies[A] = RETRY_AFTER[form]
    upstream.answers[A] = (429, headers)
    assert [await call() for _ in range(6)] == [200] * 6
    advance(1790)
    assert [await call() for _ in range(6)] == [200] * 6
    assert upstream.used.count(A) == 1
    advance(20)
    assert [await call() for _ in range(3)] == [200] * 3
    assert upstream.used.count(A) == 2


async def test_no_cooldown_is_longer_than_an_hour(keyed: Any) -> None:
    _, upstream, call, advance = keyed
    upstream.answers[A] = (429, {"Retry-After": "86400"})
    await call()
    advance(3601)
    assert [await call() for _ in range(3)] == [200] * 3
    assert upstream.used.count(A) == 2


async def test_a_call_that_would_wait_longer_than_the_cap_is_not_retried(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(json.dumps(RETRY_AFTER["RetryInfo"][1]).encode(), status="429 Slow"))
    relay = await start({"retries": QUICK}, openai=provider(raw.url))
    assert (await relay.call("POST", relay.path("openai", "x"), data=b"{}"))[0] == 429
    assert len(raw.arrived) == 1


async def test_a_retry_uses_no_key_in_cooldown_while_another_is_available(start: StartRelay, aiohttp_server: Any) -> None:
    """One key has a cooldown of half an hour, the other of 0 s: the other one is used again."""
    upstream = Keyed()
    server = await aiohttp_server(vendor(("POST", "/x", upstream.answer)))
    auth = POOL | {"value": POOL["value"][:2]}
    relay = await start({"retries": QUICK}, openai={"base_url": str(server.make_url("")), "auth": auth})
    upstream.answers = {A: (429, {"Retry-After": "1800"})}
    call: Callable[[], Awaitable[Any]] = lambda: relay.call("POST", relay.path("openai", "x"), data=b"{}")  # noqa: E731
    assert (await call())[0] == 200
    upstream.answers[B] = (429, {"Retry-After": "0"})
    assert (await call())[0] == 429
    assert upstream.used == [A, B, B, B, B]


@pytest.mark.parametrize("status", [401, 429])
async def test_a_target_whose_only_key_is_in_cooldown_is_skipped(start: StartRelay, raw: RawUpstream, other: RawUpstream, status: int) -> None:
    raw.plays(busy(f"{status} No"))
    other.plays(ok(b"other"))
    relay = await start(openai=provider(raw.url, fallback=[{"provider": "other"}]), other=provider(other.url, "FAL_KEY"))
    now = 1000.0
    relay.gateway.attempts.health._clock = lambda: now
    call: Callable[[], Awaitable[Any]] = lambda: relay.call("POST", relay.path("openai", "chat/completions"), data=CHAT)  # noqa: E731
    assert [(await call())[2] for _ in range(3)] == [b"other"] * 3
    assert len(raw.arrived) == 1
    now += 301
    assert [(await call())[2] for _ in range(3)] == [b"other"] * 3
    assert len(raw.arrived) == 2, "one call probes it"


async def test_a_provider_may_forbid_retries(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(busy("503 Busy", "x-should-retry: false"))
    relay = await start({"retries": QUICK}, openai=provider(raw.url))
    status, headers, _ = await relay.call("POST", relay.path("openai", "x"), data=b"{}")
    assert (status, headers["x-should-retry"], len(raw.arrived)) == (503, "false", 1)


async def test_a_call_falls_back_if_the_provider_forbids_retries(start: StartRelay, raw: RawUpstream, other: RawUpstream) -> None:
    raw.plays(busy("503 Busy", "x-should-retry: false"))
    other.plays(ok(b"other"))
    entry = provider(raw.url, fallback=[{"provider": "other"}])
    relay = await start({"retries": QUICK}, openai=entry, other=provider(other.url))
    assert (await relay.call("POST", relay.path("openai", "chat/completions"), data=CHAT))[2] == b"other"
    assert len(raw.arrived) == 1


async def test_a_refused_key_is_replaced_if_the_provider_forbids_retries(keyed: Any) -> None:
    _, upstream, call, _ = keyed
    upstream.answers[A] = (401, {"x-should-retry": "false"})
    assert [await call() for _ in range(3)] == [200] * 3


async def test_after_its_cooldown_a_key_is_probed_by_one_call(keyed: Any) -> None:
    _, upstream, call, advance = keyed
    upstream.answers[A] = (429, {"Retry-After": "30"})
    await call()
    advance(31)
    upstream.gate = asyncio.Event()
    upstream.used.clear()
    calls = [asyncio.create_task(call()) for _ in range(9)]
    async with asyncio.timeout(HANG_GUARD_S):
        while len(upstream.used) < 9:
            await asyncio.sleep(0.01)
    assert upstream.used.count(A) == 1
    upstream.gate.set()
    assert await asyncio.gather(*calls) == [200] * 9


async def test_a_client_that_disconnects_during_a_probe_leaves_it_to_the_next_call(keyed: Any) -> None:
    relay, upstream, call, advance = keyed
    upstream.answers[A] = (429, {"Retry-After": "30"})
    await call()
    advance(31)
    upstream.answers.clear()
    upstream.gate = asyncio.Event()
    upstream.used.clear()
    leaving = [asyncio.create_task(call()) for _ in range(3)]
    async with asyncio.timeout(HANG_GUARD_S):
        while A not in upstream.used:
            await asyncio.sleep(0.01)
    for task in leaving:
        task.cancel()
    await relay.idle()
    upstream.gate.set()
    upstream.used.clear()
    assert [await call() for _ in range(6)] == [200] * 6
    assert upstream.used.count(A) >= 1


async def test_if_every_key_is_in_cooldown_one_is_used_anyway(keyed: Any) -> None:
    _, upstream, call, _ = keyed
    for key in (A, B, C):
        upstream.answers[key] = (429, {"Retry-After": "600"})
    assert await call() == 429
    used = len(upstream.used)
    assert await call() == 429
    assert len(upstream.used) > used, "a refusal by the provider is better than one by the relay"


@pytest.mark.parametrize("status", [400, 404, 413, 422])
async def test_an_error_of_the_client_puts_no_key_in_cooldown(keyed: Any, status: int) -> None:
    _, upstream, call, _ = keyed
    upstream.answers[A] = (status, {})
    assert [await call() for _ in range(6)] == [status, 200, 200] * 2


async def test_a_client_that_disconnects_puts_no_key_in_cooldown(keyed: Any) -> None:
    relay, upstream, call, _ = keyed
    upstream.gate = asyncio.Event()
    leaving = asyncio.create_task(call())
    async with asyncio.timeout(HANG_GUARD_S):
        while not upstream.used:
            await asyncio.sleep(0.01)
    leaving.cancel()
    await relay.idle()
    upstream.gate.set()
    assert [await call() for _ in range(3)] == [200] * 3
    assert all(state.failures == 0 for state in relay.gateway.attempts.health._keys.values())


async def test_the_least_busy_key_is_used_next(start: StartRelay, aiohttp_server: Any) -> None:
    upstream = Keyed()
    upstream.gate = asyncio.Event()
    server = await aiohttp_server(vendor(("POST", "/x", upstream.answer)))
    relay = await start(openai={"base_url": str(server.make_url("")), "auth": POOL | {"pool": "least_busy"}})
    calls = [asyncio.create_task(relay.call("POST", relay.path("openai", "x"), data=b"{}")) for _ in range(6)]
    async with asyncio.timeout(HANG_GUARD_S):
        while len(upstream.used) < 6:
            await asyncio.sleep(0.01)
    assert sorted(upstream.used) == sorted([A, B, C] * 2)
    upstream.gate.set()
    await asyncio.gather(*calls)


async def least_busy(start: StartRelay, raw: RawUpstream) -> tuple[Relay, asyncio.Event]:
    """Start a relay whose pool uses the least busy key.

    The first response streams until the event is set.
    """
    gates, steps = gated_events(2)
    raw.plays(*steps)
    raw.plays(ok(b"fine"))
    relay = await start(openai={"base_url": raw.url, "auth": POOL | {"pool": "least_busy"}})
    gates[0].set()
    return relay, gates[1]


async def test_a_key_is_busy_until_its_stream_has_ended(start: StartRelay, raw: RawUpstream) -> None:
    relay, end = await least_busy(start, raw)
    async with relay.client.post(relay.path("openai", "x"), data=b"{}") as streaming:
        await streaming.content.readany()
        used = raw.arrived[0].header("Authorization")
        for _ in range(6):
            await relay.call("POST", relay.path("openai", "x"), data=b"{}")
        assert used not in [request.header("Authorization") for request in raw.arrived[1:]]
        end.set()
        await streaming.read()
    await relay.idle()
    assert all(state.running == 0 for state in relay.gateway.attempts.health._keys.values())


async def test_a_clients_own_key_that_is_refused_is_not_replaced(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(busy("401 No"))
    relay = await start({"retries": QUICK}, openai={"base_url": raw.url, "auth": POOL, "client_credentials": "allow"})
    status, _, _ = await relay.call("POST", relay.path("openai", "x"), data=b"{}", headers={"Authorization": f"Bearer {CLIENT_KEY}"})
    assert status == 401
    assert [request.header("Authorization") for request in raw.arrived] == [[f"Bearer {CLIENT_KEY}"]]


async def test_clients_own_keys_have_no_health_state(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(busy("429 Slow"))
    raw.plays(ok(b"fine"))
    entry = {"base_url": raw.url, "auth": POOL | {"pool": "least_busy"}, "client_credentials": "allow"}
    relay = await start({"retries": QUICK}, openai=entry)
    for number in range(5):
        await relay.call("POST", relay.path("openai", "x"), data=b"{}", headers={"Authorization": f"Bearer {CLIENT_KEY}{number}"})
    assert relay.gateway.attempts.health._keys == {}


async def test_with_a_clients_token_for_cloudflare_the_keys_of_the_pool_are_used(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(busy("401 No"))
    raw.plays(ok(b"fine"))
    account = {"account_id": "acct", "base_url": f"{raw.url}/v1"}
    entry = {"base_url": "http://127.0.0.1:9", "auth": POOL, "cloudflare": {"slug": "openai"}, "client_credentials": "allow"}
    relay = await start({"cloudflare": account, "retries": QUICK}, openai=entry)
    for _ in range(4):
        await relay.call("POST", relay.path("openai", "x"), data=b"{}", headers={"cf-aig-authorization": f"Bearer {CLIENT_KEY}"})
    used = [request.header("Authorization")[0] for request in raw.arrived]
    assert len(used) == 5 and used.count(used[0]) == 1, "the refused one is in cooldown"
    states = relay.gateway.attempts.health._keys.values()
    assert sorted(state.failures for state in states)[-1] == 1 and not any(state.probing for state in states)


@pytest.mark.parametrize("fault", [RuntimeError("bug"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["attempt", "judge_head", "judge_body", "mapped"])
async def test_an_exception_in_an_attempt_ends_the_probe_of_its_key(keyed: Any, where: str, fault: BaseException) -> None:
    relay, upstream, call, advance = keyed
    attempts = relay.gateway.attempts
    for key in (A, B, C):
        upstream.answers[key] = (429, {"Retry-After": "30"})
    await call()
    advance(31)
    route = relay.gateway.registry.match_rest("openai", "x")

    @dataclass
    class Faulty:
        exchange: Exchange
        options: AttemptOptions
        examines_first_event: bool = False

        async def attempt(self, *_: Any) -> str:
            if where == "mapped":
                raise OSError
            return self.fail("attempt") or "answer"

        def judge_head(self, _: Any) -> Any:
            return self.fail("judge_head")

        async def judge_body(self, _: Any) -> Any:
            return self.fail("judge_body")

        def mapped(self, *_: Any) -> Any:
            return self.fail("mapped")

        def drop(self, _: Any) -> None: ...

        def fail(self, at: str) -> None:
            if at == where:
                raise fault

    exchange = Exchange("id", Request("rest", "POST", Caller("client"), 0.0))
    exchange.routing.route = route
    with pytest.raises(type(fault)):
        await attempts.open(Faulty(exchange, AttemptOptions("POST")))
    assert not any(state.probing for state in attempts.health._keys.values())


async def test_a_reload_does_not_change_how_busy_a_key_is(start: StartRelay, raw: RawUpstream) -> None:
    relay, end = await least_busy(start, raw)
    async with relay.client.post(relay.path("openai", "x"), data=b"{}") as streaming:
        await relay.call("POST", f"{relay.url}/api/v1/ai-gateway/providers/reload")
        for _ in range(6):
            await relay.call("POST", relay.path("openai", "x"), data=b"{}")
        used = [request.header("Authorization")[0] for request in raw.arrived]
        assert used[0] not in used[1:]
        end.set()
        await streaming.read()
    await relay.idle()
    assert all(state.running == 0 for state in relay.gateway.attempts.health._keys.values())


async def test_keys_are_chosen_by_weight(start: StartRelay, aiohttp_server: Any) -> None:
    upstream = Keyed()
    server = await aiohttp_server(vendor(("POST", "/x", upstream.answer)))
    relay = await start(openai={"base_url": str(server.make_url("")), "auth": POOL | {"pool": "weight", "weights": [1, 1, 2]}})
    points = iter([0.0, 0.3, 0.6, 0.99])
    relay.gateway.attempts.health._random = lambda: next(points)
    for _ in range(4):
        await relay.call("POST", relay.path("openai", "x"), data=b"{}")
    assert upstream.used == [A, B, C, C]


# Cloudflare and sockets


@pytest.mark.parametrize(("who", "attempts", "passed"), [("relay", 3, False), ("cloudflare", 1, True), ("off", 1, False)])
async def test_calls_that_cloudflare_retries_are_not_retried_by_the_relay(start: StartRelay, raw: RawUpstream, who: str, attempts: int, passed: bool) -> None:
    raw.plays(busy())
    account = {"account_id": "acct", "base_url": f"{raw.url}/v1"}
    entry = provider("http://127.0.0.1:9", cloudflare={"slug": "openai"})
    relay = await start({"cloudflare": account | {"delegate": {"retries": who}}, "retries": QUICK}, openai=entry)
    controls = {"cf-aig-max-attempts": "3", "cf-aig-retry-delay": "1", "cf-aig-collect-log": "true"}
    await relay.call("POST", relay.path("openai", "x"), data=b"{}", headers=controls)
    assert len(raw.arrived) == attempts
    assert bool(raw.arrived[0].header("cf-aig-max-attempts")) is passed
    assert raw.arrived[0].header("cf-aig-collect-log") == ["true"]


@pytest.mark.parametrize(("who", "passed"), [("relay", False), ("cloudflare", True), ("off", False)])
async def test_the_retry_headers_of_a_socket_go_to_cloudflare_only_if_it_retries(start: StartRelay, raw: RawUpstream, who: str, passed: bool) -> None:
    raw.plays(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
    account = {"account_id": "acct", "base_url": f"{raw.url}/v1"}
    entry = provider("http://127.0.0.1:9", cloudflare={"slug": "openai", "websocket": {"slug": "openai"}}, websocket={"default_path": "realtime"})
    relay = await start({"cloudflare": account | {"delegate": {"retries": who}}, "retries": QUICK}, openai=entry)
    with pytest.raises(aiohttp.WSServerHandshakeError):
        await relay.client.ws_connect(relay.ws("openai"), headers={"cf-aig-max-attempts": "2"})
    assert raw.arrived[0].header("cf-aig-max-attempts") == (["2"] if passed else [])


async def test_a_handshake_is_retried_and_falls_back(start: StartRelay, aiohttp_server: Any) -> None:
    refused = 0

    async def flaky(request: web.Request) -> web.StreamResponse:
        nonlocal refused
        refused += 1
        if refused == 1:
            raise web.HTTPServiceUnavailable
        return await echo(request)

    async def never(request: web.Request) -> web.StreamResponse:
        raise web.HTTPServiceUnavailable

    server = await aiohttp_server(vendor(("GET", "/flaky", flaky), ("GET", "/never", never), ("GET", "/echo", echo)))
    base = str(server.make_url("/")).rstrip("/")
    entries = {
        "flaky": provider(base, websocket={"default_path": "flaky"}),
        "never": provider(base, websocket={"default_path": "never", "default_query": {"model": "big"}}, fallback=[{"provider": "other", "model": "small"}]),
        "other": provider(base, "FAL_KEY", websocket={"default_path": "echo"}),
    }
    relay = await start({"retries": QUICK, "providers": entries})
    for name in ("flaky", "never"):
        async with relay.client.ws_connect(relay.ws(name)) as ws:
            await ws.send_str("hello")
            assert (await ws.receive(HANG_GUARD_S)).data == "hello"
    from tests.upstream.vendors import SEEN

    last = server.app[SEEN][-1]
    assert last.target == "/echo?model=small" and last.header("Authorization") == f"Bearer {canary('fal')}"


async def test_a_refused_handshake_keeps_its_status_after_the_last_attempt(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(busy("429 Slow", "Retry-After: 0"))
    relay = await start({"retries": QUICK}, openai=provider(raw.url, websocket={"default_path": "x"}))
    with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
        await relay.client.ws_connect(relay.ws("openai"))
    assert refusal.value.status == 429 and len(raw.arrived) == 3
