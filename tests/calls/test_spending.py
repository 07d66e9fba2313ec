"""Streams under budgets: a stream that passes what it has reserved takes more, or ends."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartRelay
from tests.gate.test_budgets import (
    CALL,
    PRICED,
    TOKEN_NANO,
    accounts,
    budget_sums,
    budgeted,
    ledger_nano,
)
from tests.relays import HANG_GUARD_S, Relay, provider
from tests.upstream.raw import LAST_CHUNK, SILENCE, SSE_HEAD, RawUpstream, chunk, head

STREAM = CALL | {"stream": True}
"""A call that may cost 0.01 US dollars: 10 tokens."""


@pytest.fixture(autouse=True)
def checked_often(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gate.spending.CHECK_S", "gate.spending.AT_EASE_S", "gate.spending._ASK_AGAIN_S", "periodic.MAX_TICK_S"):
        monkeypatch.setattr(f"relay.{name}", 0.01)
    monkeypatch.setattr("relay.calls.stream._FLUSH_S", HANG_GUARD_S)  # a busy machine may need longer than a second


def text(tokens: int) -> bytes:
    """The event of a chat completion with so many tokens."""
    return b"data: %s\n\n" % json.dumps({"model": "m", "choices": [{"delta": {"content": "four" * tokens}}]}).encode()


def usage(tokens: int) -> bytes:
    reported = {"model": "m", "choices": [], "usage": {"prompt_tokens": 0, "completion_tokens": tokens}}
    return b"data: %s\n\ndata: [DONE]\n\n" % json.dumps(reported).encode()


async def post(relay: Relay, endpoint: str = "chat/completions", body: Any = STREAM, **options: Any) -> tuple[int, bytes]:
    """Return the status and what was received of the body: an ended stream is cut."""
    read = b""
    async with relay.client.post(relay.path("p", endpoint), json=body, **options) as answer:
        try:
            async for piece in answer.content.iter_any():
                read += piece
        except Exception as error:
            assert "payload" in str(error).lower() or "TransferEncodingError" in repr(error), error
        return answer.status, read


async def until_reserved(relay: Relay, nano: int) -> None:
    async with asyncio.timeout(HANG_GUARD_S):
        while sum(account.reserved_nano for account in accounts(relay).values()) < nano:
            await asyncio.sleep(0.005)


async def until_ended(relay: Relay) -> None:
    """Wait until the relay ends a call, which sends on to the end of its event."""
    async with asyncio.timeout(HANG_GUARD_S):
        while not any(exchange.waiting.expired or exchange.outcome.error for exchange in relay.gateway.calls):
            await asyncio.sleep(0)


async def assert_ledger_equals_budget(relay: Relay) -> int:
    spent = await ledger_nano(relay)
    assert spent == (await budget_sums(relay))["spent_nano"]
    return spent


async def test_a_stream_that_passes_its_reservation_takes_more(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    goes_on = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(text(25)), goes_on, chunk(text(5)), chunk(usage(30)), LAST_CHUNK)
    relay = await start(budgeted(database_setting, {"usd": 1, "period": "day"}), p=provider(raw.url, **PRICED))
    answer = asyncio.create_task(post(relay))
    await until_reserved(relay, 25 * TOKEN_NANO)
    goes_on.set()
    status, body = await answer
    assert (status, body) == (200, text(25) + text(5) + usage(30))
    assert await assert_ledger_equals_budget(relay) == 30 * TOKEN_NANO
    assert [account.reserved_nano for account in accounts(relay).values()] == [0]


async def test_a_stream_without_money_ends_and_its_provider_is_left(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(SSE_HEAD, chunk(text(11)), SILENCE)
    relay = await start(budgeted(database_setting, {"usd": 0.01, "period": "day", "name": "small"}), p=provider(raw.url, **PRICED))
    status, body = await post(relay)
    events = body.split(b"\n\n")
    assert status == 200 and events[0] + b"\n\n" == text(11)
    error = json.loads(events[1].removeprefix(b"data: "))["error"]
    assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota") and "small" in error["message"]
    await asyncio.wait_for(raw.closed.wait(), HANG_GUARD_S)
    assert await assert_ledger_equals_budget(relay) == 11 * TOKEN_NANO
    assert (await budget_sums(relay))["over_nano"] == TOKEN_NANO
    (line,) = await relay.events()
    assert line["error"] == "budget_exhausted"


FORMATS = {
    "openai": ("chat/completions", text(11), b'data: {"error"'),
    "responses": ("responses", b'data: {"type":"response.created","response":{"id":"r","model":"m"}}\n\ndata: {"type":"response.output_text.delta","delta":"%s"}\n\n' % (b"four" * 11), b"event: error\ndata: "),
    "anthropic": ("messages", b'event: message_start\ndata: {"type":"message_start","message":{"model":"m","usage":{"input_tokens":0,"output_tokens":1}}}\n\nevent: content_block_delta\ndata: {"type":"content_block_delta","delta":{"type":"text_delta","text":"%s"}}\n\n' % (b"four" * 11), b"event: error\ndata: "),
    "google": ("models/m:streamGenerateContent?alt=sse", b'data: {"candidates":[{"content":{"parts":[{"text":"%s"}]}}],"usageMetadata":{"promptTokenCount":0,"candidatesTokenCount":11},"modelVersion":"m"}\r\n\r\n' % (b"four" * 11), b'data: {"error"'),
}  # fmt: skip


@pytest.mark.parametrize("format_", FORMATS)
async def test_a_stream_ends_between_two_events_with_the_error_event_of_its_format(format_: str, start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    """The money is gone within an event, whose rest comes later, with the beginning of another."""
    endpoint, start_of_stream, error = FORMATS[format_]
    rest = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(start_of_stream + b"data: {"), rest, chunk(b'}\n\ndata: {"a'), SILENCE)
    price = [{"input_per_mtok": 0, "output_per_mtok": 1000}]
    wire = "openai" if format_ == "responses" else format_
    relay = await start(budgeted(str(tmp_path / "relay.db"), {"usd": 0.01, "period": "day"}), p=provider(raw.url, format=wire, pricing=price))
    body = {"max_output_tokens": 10, "generationConfig": {"maxOutputTokens": 10}} | STREAM
    answer = asyncio.create_task(post(relay, endpoint, body))
    await until_ended(relay)
    rest.set()
    _, received = await answer
    whole = start_of_stream + b"data: {}\n\n"
    code = {"openai": b"insufficient_quota", "responses": b"insufficient_quota"}.get(format_, b"budget_exhausted")
    assert received.startswith(whole + error) and code in received and received.endswith(b"\n\n")
    assert await assert_ledger_equals_budget(relay) >= 11 * TOKEN_NANO


async def test_a_response_that_is_not_streamed_may_pass_its_bound(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    goes_on = asyncio.Event()
    body = b'{"model": "m", "choices": [{"message": {"content": "%s"}}], "usage": {"prompt_tokens": 0, "completion_tokens": 15}}' % (b"four" * 15)
    raw.plays(head("Content-Type: application/json", f"Content-Length: {len(body)}"), body[:100], goes_on, body[100:])
    relay = await start(budgeted(str(tmp_path / "relay.db"), {"usd": 0.01, "period": "day"}), p=provider(raw.url, **PRICED))
    answer = asyncio.create_task(post(relay, body=CALL))
    async with asyncio.timeout(HANG_GUARD_S):
        while not any(exchange.state == "committed" for exchange in relay.gateway.calls):
            await asyncio.sleep(0.005)
    assert not relay.gateway.spending._of
    goes_on.set()
    assert await answer == (200, body)
    assert await assert_ledger_equals_budget(relay) == 15 * TOKEN_NANO
    assert (await budget_sums(relay))["over_nano"] == 5 * TOKEN_NANO


async def test_a_stream_that_several_clients_share_ends_for_all_and_is_charged_once(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    goes_on, rest = asyncio.Event(), asyncio.Event()
    raw.plays(SSE_HEAD, chunk(text(5)), goes_on, chunk(text(6) + b"data: {"), rest, chunk(b"}\n\ndata: {"), SILENCE)
    cached = provider(raw.url, cache={"ttl_s": 60, "coalesce": True}, **PRICED)
    relay = await start(budgeted(str(tmp_path / "relay.db"), {"usd": 0.01, "period": "day"}), p=cached)
    answers = [asyncio.create_task(post(relay)) for _ in range(2)]
    async with asyncio.timeout(HANG_GUARD_S):
        while len(relay.gateway.calls) < 3:  # two clients and the call that they share
            await asyncio.sleep(0.005)
    goes_on.set()
    await until_ended(relay)
    rest.set()
    for _, body in await asyncio.gather(*answers):
        assert body.startswith(text(5) + text(6) + b'data: {}\n\ndata: {"error"') and body.count(b'"code":"insufficient_quota"') == 1
    assert len(raw.arrived) == 1
    assert await assert_ledger_equals_budget(relay) == 11 * TOKEN_NANO


async def test_a_stream_that_no_meter_can_read_is_ended_by_its_bytes(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    coded = head("Content-Type: text/event-stream", "Content-Encoding: x-unknown", "Transfer-Encoding: chunked")
    raw.plays(coded, chunk(b"\1" * 64 * 11), SILENCE)
    relay = await start(budgeted(str(tmp_path / "relay.db"), {"usd": 0.01, "period": "day"}), p=provider(raw.url, **PRICED))
    status, body = await post(relay)
    assert (status, body) == (200, b"\1" * 64 * 11), "no event can follow bytes that are compressed"
    (line,) = await relay.events()
    assert line["error"] == "budget_exhausted"
    await relay.idle()
    sums = await budget_sums(relay)
    assert (sums["unpriced_nano"], sums["over_nano"]) == (11 * TOKEN_NANO, TOKEN_NANO), "the cost is unknown: what it was ended for is charged"


async def test_a_response_of_which_a_part_has_no_price_is_charged_the_others_at_least(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    reported = {"prompt_tokens": 0, "completion_tokens": 15, "completion_tokens_details": {"audio_tokens": 1}}
    body = json.dumps({"model": "m", "choices": [], "usage": reported}).encode()
    raw.plays(head("Content-Type: application/json", f"Content-Length: {len(body)}"), body)
    relay = await start(budgeted(str(tmp_path / "relay.db"), {"usd": 1, "period": "day"}), p=provider(raw.url, **PRICED))
    assert await post(relay, body=CALL) == (200, body)
    await relay.idle()
    sums = await budget_sums(relay)
    assert (sums["spent_nano"], sums["unpriced_nano"], sums["over_nano"]) == (0, 15 * TOKEN_NANO, 5 * TOKEN_NANO)


async def test_a_budget_that_only_warns_ends_no_stream(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    goes_on = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(text(25)), goes_on, chunk(usage(25)), LAST_CHUNK)
    relay = await start(budgeted(str(tmp_path / "relay.db"), {"usd": 0.01, "period": "day", "mode": "warn"}), p=provider(raw.url, **PRICED))
    answer = asyncio.create_task(post(relay))
    await until_reserved(relay, 25 * TOKEN_NANO)
    goes_on.set()
    assert await answer == (200, text(25) + usage(25))
    assert await assert_ledger_equals_budget(relay) == 25 * TOKEN_NANO


async def test_a_stream_takes_more_under_all_of_its_budgets_or_under_none(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    raw.plays(SSE_HEAD, chunk(text(11)), SILENCE)
    rules = ({"usd": 1, "period": "day", "name": "large"}, {"usd": 0.01, "period": "day", "name": "small"})
    relay = await start(budgeted(str(tmp_path / "relay.db"), *rules), p=provider(raw.url, **PRICED))
    _, body = await post(relay)
    assert b"'small'" in body and b"'large'" not in body
    await relay.idle()
    assert {account.rule.name: (account.reserved_nano, account.charged.spent_nano) for account in accounts(relay).values()} == {
        "large": (0, 11 * TOKEN_NANO), "small": (0, 11 * TOKEN_NANO),
    }  # fmt: skip


def after_a_long_head(tokens: int) -> bytes:
    """A stream of Responses whose first event repeats 40 KB of instructions."""
    created = {"type": "response.created", "response": {"id": "r", "model": "m", "status": "in_progress", "instructions": "x" * 40_000}}
    delta = {"type": "response.output_text.delta", "delta": "four" * tokens}
    return b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in (created, delta))


async def test_a_stream_with_a_long_head_ends_when_the_money_is_gone(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    raw.plays(SSE_HEAD, chunk(after_a_long_head(11)), SILENCE)
    relay = await start(budgeted(str(tmp_path / "relay.db"), {"usd": 0.01, "period": "day"}), p=provider(raw.url, **PRICED))
    _, body = await post(relay, "responses", {"max_output_tokens": 10} | STREAM)
    assert body.startswith(after_a_long_head(11)) and b"insufficient_quota" in body
    assert await assert_ledger_equals_budget(relay) == 11 * TOKEN_NANO


async def test_a_client_that_leaves_a_stream_with_a_long_head_is_charged(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    raw.plays(SSE_HEAD, chunk(after_a_long_head(7)), SILENCE)
    relay = await start(budgeted(str(tmp_path / "relay.db"), {"usd": 1, "period": "day"}), p=provider(raw.url, **PRICED))
    async with relay.client.post(relay.path("p", "responses"), json={"max_output_tokens": 10} | STREAM) as answer:
        await answer.content.readexactly(len(after_a_long_head(7)))
    await relay.events()
    assert await assert_ledger_equals_budget(relay) == 7 * TOKEN_NANO
