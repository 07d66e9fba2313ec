"""Which failures reach a fallback, and how a call that may be billed twice is recorded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from relay.core.errors import UpstreamDisconnected, UpstreamTimeout
from relay.core.peek import generates, kind_of
from relay.core.retry_policy import (
    FALLBACK_CAUSES,
    AttemptResult,
    RetryRules,
    fallback_cause,
    may_be_executed,
)
from relay.registry.load import ConfigError, load
from tests.conftest import StartRelay
from tests.relays import HANG_GUARD_S, Relay, provider, write_config
from tests.upstream.raw import SILENCE, RawUpstream, Step, ok

CHAT = b'{"model": "big", "messages": []}'
STREAM = b'{"model": "big", "messages": [], "stream": true}'
FROM_OTHER = ok(b"from the other")


@pytest.fixture
async def other() -> AsyncIterator[RawUpstream]:
    """The fallback provider."""
    upstream = await RawUpstream.start()
    upstream.plays(FROM_OTHER)
    yield upstream
    await upstream.stop()


def failing(status: str) -> bytes:
    return ok(b'{"error": {"message": "no"}}', "Content-Type: application/json", status=status)


FAILURES: dict[str, tuple[str, tuple[Step, ...]]] = {
    "429": ("not_executed", (failing("429 Slow"),)),
    "498": ("not_executed", (failing("498 Capacity Exceeded"),)),
    "503": ("not_executed", (failing("503 Busy"),)),
    "521": ("not_executed", (failing("521 Down"),)),
    "522": ("not_executed", (failing("522 Timed Out"),)),
    "523": ("not_executed", (failing("523 Unreachable"),)),
    "529": ("not_executed", (failing("529 Overloaded"),)),
    "500": ("5xx", (failing("500 Broken"),)),
    "502": ("5xx", (failing("502 Bad Gateway"),)),
    "524": ("5xx", (failing("524 A Timeout Occurred"),)),
    "401": ("refused_key", (failing("401 No"),)),
    "403": ("refused_key", (failing("403 No"),)),
    "closed": ("disconnect", ("close",)),
    "truncated head": ("disconnect", (b"HTTP/1.1 200 O", "close")),
    "not HTTP": ("disconnect", (b"hello\r\n\r\n", "close")),
    "silent": ("timeout", (SILENCE,)),
}  # fmt: skip


async def _call(relay: Relay, endpoint: str = "chat/completions", body: bytes = CHAT, **options: Any) -> tuple[int, Any, bytes]:
    return await relay.call("POST", relay.path("openai", endpoint), data=body, **options)


@pytest.mark.parametrize("failure", FAILURES)
async def test_every_failure_reaches_the_fallback(start: StartRelay, raw: RawUpstream, other: RawUpstream, failure: str) -> None:
    _, steps = FAILURES[failure]
    raw.plays(*steps)
    patience = {"fallback_after_s": 0.05} if failure == "silent" else {}
    relay = await start(openai=provider(raw.url, fallback=[{"provider": "other"}], **patience), other=provider(other.url))
    status, headers, body = await _call(relay)
    assert (status, body, headers["cf-aig-step"]) == (200, b"from the other", "1")
    assert [len(raw.arrived), len(other.arrived)] == [1, 1]


async def test_a_provider_that_cannot_be_connected_to_reaches_the_fallback(start: StartRelay, other: RawUpstream) -> None:
    relay = await start(openai=provider("http://127.0.0.1:9", fallback=[{"provider": "other"}]), other=provider(other.url))
    assert (await _call(relay))[2] == b"from the other"


@pytest.mark.parametrize("failure", ["503", "500", "401", "closed", "silent"])
async def test_a_failure_that_fallback_on_leaves_out_reaches_the_client(start: StartRelay, raw: RawUpstream, other: RawUpstream, failure: str) -> None:
    cause, steps = FAILURES[failure]
    raw.plays(*steps)
    entry = provider(
        raw.url, fallback=[{"provider": "other"}], fallback_on=sorted(FALLBACK_CAUSES - {cause}), fallback_after_s=0.05, first_byte_timeout_s=0.1,
    )  # fmt: skip
    relay = await start(openai=entry, other=provider(other.url))
    status, headers, _ = await _call(relay)
    assert status == (int(failure) if failure.isdigit() else 502 if failure == "closed" else 504)
    assert headers["cf-aig-step"] == "0" if failure.isdigit() else headers["x-relay-error"].startswith("upstream_")
    assert other.arrived == []


@pytest.mark.parametrize("status", ["400 Bad Request", "404 Not Found", "413 Too Large", "422 Unprocessable"])
async def test_an_error_of_the_client_reaches_no_fallback(start: StartRelay, raw: RawUpstream, other: RawUpstream, status: str) -> None:
    raw.plays(failing(status))
    relay = await start(openai=provider(raw.url, fallback=[{"provider": "other"}]), other=provider(other.url))
    assert (await _call(relay))[0] == int(status[:3])
    assert other.arrived == []


@pytest.mark.parametrize("endpoint", ["responses/resp_1/cancel", "v2/transcript", "videos", "batches", "files", "queue/fal-ai/flux"])
async def test_jobs_uploads_and_batches_are_not_sent_twice(start: StartRelay, raw: RawUpstream, other: RawUpstream, endpoint: str) -> None:
    raw.plays(failing("500 Broken"))
    relay = await start(openai=provider(raw.url, fallback=[{"provider": "other"}]), other=provider(other.url))
    assert (await _call(relay, endpoint))[0] == 500
    assert other.arrived == []


JSON, FORM = "application/json", "multipart/form-data; boundary=b"
SUBMITTED = {
    "a response in the background": ("responses", JSON, b'{"model":"m","background":true}'),
    "a transcript for a callback": ("listen?callback=https%3A%2F%2Fexample.com", "audio/wav", b"RIFF"),
    "a transcript for a webhook": ("speech-to-text", FORM, b'--b\r\nContent-Disposition: form-data; name="webhook"\r\n\r\ntrue\r\n--b--\r\n'),
}


@pytest.mark.parametrize("job", SUBMITTED)
async def test_an_asynchronous_job_is_not_sent_twice(start: StartRelay, raw: RawUpstream, other: RawUpstream, job: str) -> None:
    endpoint, content_type, body = SUBMITTED[job]
    raw.plays(failing("500 Broken"))
    relay = await start(openai=provider(raw.url, fallback=[{"provider": "other"}]), other=provider(other.url))
    status, _, _ = await relay.call("POST", relay.path("openai", endpoint), data=body, headers={"Content-Type": content_type})
    assert status == 500 and other.arrived == []


async def test_a_body_that_streams_is_not_sent_twice(start: StartRelay, raw: RawUpstream, other: RawUpstream) -> None:
    raw.plays(failing("500 Broken"))
    document = {"server": {"buffer_bytes": 10, "json_buffer_bytes": 10}}
    relay = await start(document, openai=provider(raw.url, fallback=[{"provider": "other"}]), other=provider(other.url))
    assert (await _call(relay))[0] == 500
    assert other.arrived == []


async def test_a_target_does_not_get_a_call_again_that_it_may_have_executed(start: StartRelay, raw: RawUpstream, other: RawUpstream) -> None:
    raw.plays(failing("500 Broken"))
    retries = {"max_attempts": 3, "delay_s": 0.001}
    relay = await start({"retries": retries}, openai=provider(raw.url, fallback=[{"provider": "other"}]), other=provider(other.url))
    assert (await _call(relay))[2] == b"from the other"
    assert len(raw.arrived) == 1


async def test_the_direct_route_to_a_provider_gets_no_call_that_it_may_have_executed(start: StartRelay, raw: RawUpstream, other: RawUpstream) -> None:
    raw.plays(failing("500 Broken"))
    entry = provider(
        raw.url, cloudflare={"slug": "openai"}, via={"rest": ["cloudflare", "direct"]}, fallback=[{"provider": "other"}],
    )  # fmt: skip
    account = {"account_id": "acct", "base_url": f"{raw.url}/v1"}
    relay = await start({"cloudflare": account}, openai=entry, other=provider(other.url))
    _, headers, body = await _call(relay)
    assert (body, headers["cf-aig-step"]) == (b"from the other", "2")
    assert [request.target for request in raw.arrived] == ["/v1/acct/default/openai/chat/completions"], "through Cloudflare, and not directly"


async def test_an_attempt_that_may_be_billed_is_marked(start: StartRelay, raw: RawUpstream, other: RawUpstream, tmp_path: Path) -> None:
    other.scripts.clear()
    for status in ("500 Broken", "503 Busy"):
        raw.plays(failing(status))
        other.plays(FROM_OTHER)
    relay = await start({"database": str(tmp_path / "ledger.db")}, openai=provider(raw.url, fallback=[{"provider": "other"}]), other=provider(other.url))
    for _ in range(2):
        await _call(relay)
    executed, not_executed = await relay.events(count=2)
    assert [each.get("maybe_billed") for each in executed["attempts"]] == [True, None]
    assert [each.get("maybe_billed") for each in not_executed["attempts"]] == [None, None]
    await relay.idle()
    await relay.gateway.ledger.flushed()
    row = (await relay.call("GET", f"{relay.url}/api/v1/ai-gateway/logs/{executed['id']}"))[2]
    assert b'"maybe_billed":true' in row.replace(b" ", b"")


async def test_an_attempt_that_no_other_follows_is_not_marked(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(failing("500 Broken"))
    relay = await start(openai=provider(raw.url))
    await _call(relay)
    [event] = await relay.events()
    assert "maybe_billed" not in event["attempts"][0]


async def test_the_deadline_of_retries_does_not_prevent_a_fallback(start: StartRelay, raw: RawUpstream, other: RawUpstream) -> None:
    raw.plays(failing("503 Busy"))
    retries = {"max_attempts": 5, "delay_s": 0.001, "deadline_s": 0.000001}
    relay = await start({"retries": retries}, openai=provider(raw.url, fallback=[{"provider": "other"}]), other=provider(other.url))
    assert (await _call(relay))[2] == b"from the other"
    assert len(raw.arrived) == 1, "no retry begins after the deadline"


# The timeout of the first byte


async def _limit_s(relay: Relay, body: bytes, endpoint: str = "chat/completions") -> float | None:
    """Return the first-byte limit of a call while its provider is silent."""
    call = asyncio.create_task(_call(relay, endpoint, body))
    async with asyncio.timeout(HANG_GUARD_S):
        while not any(exchange.waiting.for_ == "first_byte" for exchange in relay.gateway.running):
            await asyncio.sleep(0.001)
    [exchange] = relay.gateway.running
    limit_s = exchange.waiting.first_byte_limit_s
    call.cancel()
    await relay.idle()
    return limit_s


@pytest.mark.parametrize(
    ("body", "endpoint", "limit_s"),
    [(STREAM, "chat/completions", 60), (CHAT, "chat/completions", None), (b"{}", "v1beta/models/gemini:streamGenerateContent", 60)],
)
async def test_a_streamed_call_waits_a_minute_if_another_target_follows(
    start: StartRelay, raw: RawUpstream, other: RawUpstream, body: bytes, endpoint: str, limit_s: float | None
) -> None:
    raw.plays(SILENCE)
    relay = await start(openai=provider(raw.url, fallback=[{"provider": "other"}]), other=provider(other.url))
    assert await _limit_s(relay, body, endpoint) == limit_s


@pytest.mark.parametrize("entry", [{}, {"fallback": [{"provider": "other"}], "fallback_on": ["5xx"]}])
async def test_a_call_without_a_fallback_on_timeout_has_the_timeout_of_its_provider(
    start: StartRelay, raw: RawUpstream, other: RawUpstream, entry: dict[str, Any]
) -> None:
    raw.plays(SILENCE)
    relay = await start(openai=provider(raw.url, **entry), other=provider(other.url))
    assert await _limit_s(relay, STREAM) is None


async def test_the_last_target_has_the_timeout_of_its_provider(start: StartRelay, raw: RawUpstream, other: RawUpstream) -> None:
    raw.plays(failing("500 Broken"))
    other.scripts[:] = [(SILENCE,)]
    relay = await start(openai=provider(raw.url, fallback=[{"provider": "other"}], fallback_after_s=5), other=provider(other.url))
    call = asyncio.create_task(_call(relay, body=STREAM))
    async with asyncio.timeout(HANG_GUARD_S):
        while not other.arrived:
            await asyncio.sleep(0.001)
    [exchange] = relay.gateway.running
    assert exchange.waiting.first_byte_limit_s is None
    call.cancel()


async def test_fallback_after_s_applies_to_whole_responses_and_never_exceeds_the_timeout_of_the_provider(
    start: StartRelay, raw: RawUpstream, other: RawUpstream
) -> None:
    raw.plays(SILENCE)
    entry = {"fallback": [{"provider": "other"}]}
    relay = await start(openai=provider(raw.url, fallback_after_s=7, **entry), other=provider(other.url))
    assert await _limit_s(relay, CHAT) == 7
    relay = await start(openai=provider(raw.url, fallback_after_s=7, first_byte_timeout_s=5, **entry), other=provider(other.url))
    assert await _limit_s(relay, CHAT) == 5


async def test_a_timeout_that_the_client_sets_reaches_the_fallback(start: StartRelay, raw: RawUpstream, other: RawUpstream) -> None:
    raw.plays(SILENCE)
    entry = provider(raw.url, fallback=[{"provider": "other"}], fallback_on=["5xx"])
    relay = await start(openai=entry, other=provider(other.url, idle_timeout_s=0.1))
    assert (await _call(relay, headers={"cf-aig-request-timeout": "30"}))[2] == b"from the other"


def test_the_default_timeout_of_the_first_byte_is_ten_minutes(tmp_path: Path) -> None:
    config = load(write_config(tmp_path, {"providers": {"openai": provider("http://127.0.0.1:9")}}))
    assert config.registry.providers["openai"].first_byte_timeout_s == 600


# Decisions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "executed"),
    [
        (AttemptResult(500), True), (AttemptResult(502), True), (AttemptResult(0, UpstreamTimeout("x", 1)), True), (AttemptResult(0, UpstreamDisconnected("x")), True),
        (AttemptResult(200, first_event_status=0), True), (AttemptResult(200, first_event_status=500), True),
        (AttemptResult(503), False), (AttemptResult(498), False), (AttemptResult(521), False), (AttemptResult(401), False), (AttemptResult(200, first_event_status=529), False),
    ],
)  # fmt: skip
def test_which_attempts_may_have_been_executed(result: AttemptResult, executed: bool) -> None:
    assert may_be_executed(result, RetryRules(), "POST") is executed
    assert may_be_executed(result, RetryRules(), "GET") is False


def test_a_configured_status_counts_as_not_executed() -> None:
    assert fallback_cause(AttemptResult(500), RetryRules(statuses=frozenset({500}))) == "not_executed"
    assert fallback_cause(AttemptResult(409), RetryRules(statuses=frozenset({409}))) == "not_executed"
    assert fallback_cause(AttemptResult(409), RetryRules()) is None


@pytest.mark.parametrize(
    "endpoint",
    [
        "chat/completions", "v1/messages", "v1/messages/count_tokens", "responses", "responses/compact", "completions", "embeddings", "moderations",
        "v1beta/models/gemini:generateContent", "v1/text-to-speech/voice/stream", "tts/bytes", "images/generations", "audio/transcriptions",
        "openai/deployments/mine/chat/completions",
    ],
)  # fmt: skip
def test_which_endpoints_generate(endpoint: str) -> None:
    assert generates("POST", endpoint) and not generates("GET", endpoint)


@pytest.mark.parametrize("endpoint", ["responses/resp_1", "responses/resp_1/cancel", "batches", "v1/messages/batches", "videos", "files", "models", "x", "queue/fal-ai/speech-to-text", "async/chat/completions"])
def test_which_endpoints_do_not_generate(endpoint: str) -> None:
    assert not generates("POST", endpoint)


def test_moderations_are_a_kind_of_their_own() -> None:
    assert kind_of("moderations") == "moderation"


# Configuration ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"fallback_on": ["5xx"]}, r"gateway.yaml:\d+:\d+: providers.openai.fallback_on.*needs `fallback`"),
        ({"fallback_after_s": 5}, r"gateway.yaml:\d+:\d+: providers.openai.fallback_after_s.*needs `fallback`"),
        ({"fallback": [{"provider": "openai", "model": "small"}], "fallback_on": ["4xx"]}, r"gateway.yaml:\d+:\d+: providers.openai.fallback_on.*'5xx'"),
        ({"fallback": [{"provider": "openai", "model": "small"}], "fallback_on": []}, r"gateway.yaml:\d+:\d+: providers.openai.fallback_on.*at least 1"),
    ],
)  # fmt: skip
def test_fallback_settings_without_effect_are_refused_with_their_place(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write_config(tmp_path, {"providers": {"openai": provider("http://127.0.0.1:9", **more)}}))
