"""Sessions under budgets: slices, the end without money, and what is charged whatever happens."""

from __future__ import annotations

import asyncio
import itertools
import json
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import sqlalchemy as sa
from aiohttp import WSMsgType, web

from relay.storage.budgets import release_dead
from relay.storage.tables import budgets
from relay.websocket import draining
from tests.conftest import StartRelay
from tests.gate.test_budgets import TOKEN_NANO, accounts, budget_sums, budgeted, ledger_nano
from tests.relays import HANG_GUARD_S, Relay, packaged_provider
from tests.upstream.vendors import vendor
from tests.whole_run import canary

TOKENS = [{"input_per_mtok": 0, "output_per_mtok": 1000, "max_output_tokens": 100}]
"""Output costs 0.001 US dollars a token: 30 s of audio 0.75, a response at most 0.1."""
SECONDS = [{"audio_per_hour": 3600}]
CHARACTERS = [{"characters_per_million": 1000}]
USD = 1_000_000_000
PAGE = "https://page.example"
AUDIO_SLICE_NANO = 750 * TOKEN_NANO
Reply = Callable[[web.WebSocketResponse, Any], Awaitable[None]]


@pytest.fixture(autouse=True)
def checked_often(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gate.spending.CHECK_S", "gate.spending.AT_EASE_S", "gate.spending._ASK_AGAIN_S", "periodic.MAX_TICK_S"):
        monkeypatch.setattr(f"relay.{name}", 0.01)


@dataclass
class Upstream:
    """A stand-in provider that answers each message of a socket with `reply`."""

    url: str = ""
    reply: Reply | None = None
    refusal: int | None = None
    opened: int = 0
    received: list[Any] = field(default_factory=list)
    close_codes: list[int | None] = field(default_factory=list)

    async def socket(self, request: web.Request) -> web.StreamResponse:
        self.opened += 1
        if self.refusal is not None:
            return web.Response(status=self.refusal)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            self.received.append(message.data)
            if self.reply is not None:
                await self.reply(socket, message.data)
        self.close_codes.append(socket.close_code)
        return socket


@pytest.fixture
async def upstream(aiohttp_server: Any) -> Upstream:
    made = Upstream()
    made.url = str((await aiohttp_server(vendor(("*", "/{path:.*}", made.socket)))).make_url("")).rstrip("/")
    return made


def response(name: str, tokens: int | None, kind: str = "response.done") -> dict[str, Any]:
    usage = None if tokens is None else {"input_tokens": 0, "output_tokens": tokens, "total_tokens": tokens}
    return {"type": kind, "response": {"id": name, "model": "m", "status": "completed", "usage": usage}}


def realtime(tokens: int, done: str = "response.done") -> Reply:
    """Answer each `response.create` with so many tokens."""
    names = itertools.count()

    async def reply(socket: web.WebSocketResponse, data: Any) -> None:
        if "response.create" in data:
            name = f"r{next(names)}"
            await socket.send_json(response(name, None, "response.created"))
            await socket.send_json(response(name, tokens, done))

    return reply


def gemini(tokens: int) -> Reply:
    async def reply(socket: web.WebSocketResponse, data: Any) -> None:
        if b"clientContent" in data or b"realtimeInput" in data:
            await socket.send_bytes(json.dumps({"usageMetadata": {"promptTokenCount": 0, "responseTokenCount": tokens, "totalTokenCount": tokens}}).encode())
        else:
            await socket.send_bytes(b'{"setupComplete": {}}')

    return reply


def live(seconds: Iterator[int]) -> Reply:
    async def reply(socket: web.WebSocketResponse, data: Any) -> None:
        if "session.start" in data:
            await socket.send_json({"type": "session.started", "session": {"id": "live_1", "model": "gpt-live-1"}})
        else:
            await socket.send_json({"type": "session.usage.updated", "usage": {"seconds": next(seconds)}})

    return reply


async def echo(socket: web.WebSocketResponse, data: Any) -> None:
    await socket.send_json({"type": "ok"})


async def start_relay(start: StartRelay, upstream: Upstream, name: str, database: str, *rules: dict[str, Any], pricing: Any = TOKENS, **more: Any) -> Relay:
    entry = packaged_provider(name, upstream.url) | {"pricing": pricing}
    if name == "assemblyai":
        entry |= {"auth": {"header": "Authorization", "value": "${OPENAI_API_KEY}"}, "websocket": {"default_path": "v3/ws", "paths": ["v3/ws"]}}
    return await start(budgeted(database, *rules, **more), **{name: entry})


@asynccontextmanager
async def connected(relay: Relay, path: str, **options: Any) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    async with asyncio.timeout(HANG_GUARD_S), relay.client.ws_connect(relay.ws(*path.split("/", 1)), max_msg_size=0, **options) as socket:
        yield socket


async def send(socket: aiohttp.ClientWebSocketResponse, message: Any) -> None:
    await (socket.send_bytes(message) if isinstance(message, bytes) else socket.send_json(message))


async def checked(relay: Relay) -> None:
    """Wait until no session waits for the database: no provider spends a slice within that time."""
    async with asyncio.timeout(HANG_GUARD_S):
        while relay.gateway.spending._tasks:
            await asyncio.sleep(0)


async def talk(relay: Relay, socket: aiohttp.ClientWebSocketResponse, message: Any, answers: int = 1) -> list[Any]:
    """Send a message again and again, each after the answers to the one before, until the session
    ends. Returns the last text or binary message, and the code and reason of the close frame.
    """
    last: list[Any] = []
    while True:
        await checked(relay)
        with suppress(ConnectionError):  # the relay has closed the session, which is read below
            await send(socket, message)
        for _ in range(answers):
            received = await socket.receive()
            if received.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
                assert received.type is WSMsgType.CLOSE, received
                last.append((received.data, received.extra))
                return last
            last = [received.data]


async def assert_charged(relay: Relay) -> int:
    """The sum of the ledger is that of the budget, to the nano-dollar, and nothing is reserved."""
    spent = await ledger_nano(relay)
    sums = await budget_sums(relay)
    assert (sums["spent_nano"], sums["unpriced_nano"]) == (spent, 0)
    assert {(account.reserved_nano, account.running_nano) for account in accounts(relay).values()} == {(0, 0)}
    return spent


@dataclass(frozen=True)
class Case:
    """A session of a vendor that spends `round_nano` with each message, and a budget for it."""

    path: str
    message: Any
    reply: Callable[[], Reply]
    round_nano: int
    usd: float
    pricing: Any = field(default_factory=lambda: TOKENS)
    first: Any = None
    answers: int = 1
    event: tuple[str, ...] = ()
    """Where the vendor's error event has the code of the error, or its text."""
    slice_nano: int = AUDIO_SLICE_NANO
    refuses_before: bool = True
    """True if the message that would pass the budget does not reach the provider."""


CREATE = {"type": "response.create", "model": "m"}
CASES = {
    "openai realtime": Case("openai/realtime?model=m", CREATE, lambda: realtime(90), 90 * TOKEN_NANO, 2, answers=2, event=("error", "code")),
    "openai responses": Case("openai/responses", CREATE, lambda: realtime(90, "response.completed"), 90 * TOKEN_NANO, 2, answers=2, event=("error", "code")),
    "openai live": Case("openai/live/sessions", {"type": "session.update"}, lambda: live(iter(range(10, 1000, 10))), 10 * USD, 65, SECONDS, {"type": "session.start", "session": {"model": "gpt-live-1"}}, event=("error", "code"), slice_nano=30 * USD, refuses_before=False),
    "gemini live": Case("google-ai-studio/ws/google.ai.generativelanguage.v1beta.GenerativeService.BidiGenerateContent", b'{"clientContent": {"turns": [], "turnComplete": true}}', lambda: gemini(90), 90 * TOKEN_NANO, 2, first=b'{"setup": {"model": "models/m"}}'),
    "elevenlabs speech": Case("elevenlabs/v1/text-to-speech/v/stream-input?model_id=m", {"text": "a" * 90}, lambda: echo, 90 * TOKEN_NANO, 2, CHARACTERS, event=("error",), slice_nano=600 * TOKEN_NANO),
    "cartesia speech": Case("cartesia/tts/websocket", {"model_id": "m", "transcript": "a" * 90}, lambda: echo, 90 * TOKEN_NANO, 2, CHARACTERS, event=("error_code",), slice_nano=600 * TOKEN_NANO),
    "deepgram speech": Case("deepgram/v1/speak?model=m", {"type": "Speak", "text": "a" * 90}, lambda: echo, 90 * TOKEN_NANO, 2, CHARACTERS, event=("code",), slice_nano=600 * TOKEN_NANO),
    "deepgram transcription": Case("deepgram/v1/listen?model=m&encoding=linear16&sample_rate=16000", b"\0" * 32000, lambda: echo, USD, 65, SECONDS, event=("code",), slice_nano=30 * USD),
    "elevenlabs transcription": Case("elevenlabs/v1/speech-to-text/realtime?model_id=m&audio_format=pcm_16000", {"audio_base_64": "A" * 32000}, lambda: echo, USD * 3 // 4, 65, SECONDS, event=("error",), slice_nano=30 * USD),
    "cartesia transcription": Case("cartesia/stt/turns/websocket?model=m&encoding=pcm_s16le&sample_rate=16000", b"\0" * 32000, lambda: echo, USD, 65, SECONDS, event=("error_code",), slice_nano=30 * USD),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
async def test_a_session_ends_when_the_money_is_gone(name: str, start: StartRelay, upstream: Upstream, tmp_path: Path, sqlite_setting: str) -> None:
    case = CASES[name]
    upstream.reply = case.reply()
    relay = await start_relay(start, upstream, case.path.split("/")[0], sqlite_setting, {"usd": case.usd, "period": "day", "name": "mine"}, pricing=case.pricing)
    async with connected(relay, case.path) as socket:
        if case.first is not None:
            await send(socket, case.first)
            await socket.receive()
        last, (code, reason) = await talk(relay, socket, case.message, case.answers)
    limit_nano = int(case.usd * USD)
    assert code == 4402 and "budget_exhausted" in reason and "before 2" in reason
    if case.event:
        found = json.loads(last)
        for place in case.event:
            found = found[place]
        assert found in ("budget_exhausted", "insufficient_quota") or "'mine'" in found
    spent = await assert_charged(relay)
    assert limit_nano - case.slice_nano <= spent <= limit_nano + case.slice_nano
    if case.refuses_before:
        assert limit_nano - 4 * case.round_nano <= spent <= limit_nano
    (line,) = await relay.events()
    assert (line["error"], line["close_code"], line["closed_by"]) == ("budget_exhausted", 4402, "relay")
    assert upstream.close_codes == [4402]


async def test_a_session_that_the_provider_drives_passes_its_budget_by_at_most_one_slice(start: StartRelay, upstream: Upstream, database_setting: str) -> None:
    """Speech, which the provider answers by itself, without a `response.create`."""

    names = itertools.count()

    async def reply(socket: web.WebSocketResponse, data: Any) -> None:
        await socket.send_json(response(f"r{next(names)}", 100))

    upstream.reply = reply
    relay = await start_relay(start, upstream, "openai", database_setting, {"usd": 2, "period": "day"})
    async with connected(relay, "openai/realtime?model=m") as socket:
        _, (code, _) = await talk(relay, socket, {"type": "input_audio_buffer.append", "audio": "AAAA"})
        assert code == 4402
    assert 2 * USD - AUDIO_SLICE_NANO <= await assert_charged(relay) <= 2 * USD + AUDIO_SLICE_NANO
    # What was not reserved is listed, though the budget may have had a part of it.
    assert max(0, await ledger_nano(relay) - 2 * USD) <= (await budget_sums(relay))["over_nano"] <= AUDIO_SLICE_NANO


async def test_a_session_that_was_refused_more_ends_without_asking_again(start: StartRelay, upstream: Upstream, sqlite_setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider goes on while the database answers, so there is nothing to wait for."""
    monkeypatch.setattr("relay.gate.spending._ASK_AGAIN_S", 3600)
    names = itertools.count()

    async def reply(socket: web.WebSocketResponse, data: Any) -> None:
        await socket.send_json(response(f"r{next(names)}", 100))

    async def fail(*_arguments: Any) -> Any:
        raise AssertionError("a statement")

    upstream.reply = reply
    relay = await start_relay(start, upstream, "openai", sqlite_setting, {"usd": 2, "period": "day"})
    async with connected(relay, "openai/realtime?model=m") as socket:
        (followed,) = relay.gateway.spending._of.values()
        while followed.refusal is None:
            await send(socket, {"type": "input_audio_buffer.append", "audio": "AAAA"})
            await socket.receive()
            await checked(relay)
        assert relay.gateway.leases is not None
        monkeypatch.setattr(relay.gateway.leases.store, "lease", fail)
        _, (code, _) = await talk(relay, socket, {"type": "input_audio_buffer.append", "audio": "AAAA"})
        assert code == 4402
    await relay.idle()


async def test_a_session_that_got_money_after_a_refusal_asks_again(start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    """Its first refusal was final only for that moment."""
    names = itertools.count()

    async def reply(socket: web.WebSocketResponse, data: Any) -> None:
        await socket.send_json(response(f"r{next(names)}", json.loads(data)["tokens"]))

    upstream.reply = reply
    relay = await start_relay(start, upstream, "openai", sqlite_setting, {"usd": 100, "period": "day"})
    leases = relay.gateway.leases
    assert leases is not None
    async with connected(relay, "openai/realtime?model=m") as socket:
        (followed,) = relay.gateway.spending._of.values()
        (account,) = accounts(relay).values()
        rest_nano = 100 * USD - account.reserved_nano
        while account.free_nano < rest_nano:
            await leases.provide(account, rest_nano)
        account.reserve(rest_nano, time.time())  # as another call does
        while followed.refusal is None:
            await send(socket, {"tokens": 100})
            await socket.receive()
            await checked(relay)
        account.release(rest_nano)
        while followed.refusal is not None:
            await asyncio.sleep(0.001)
        await leases._give_back(account, 1)  # as another process asks for it
        await send(socket, {"tokens": 2000})
        assert json.loads((await socket.receive()).data)["type"] == "response.done"
        await checked(relay)
        await send(socket, {"tokens": 1})
        assert json.loads((await socket.receive()).data)["type"] == "response.done"
    assert await assert_charged(relay) > 2 * USD


async def test_a_session_of_which_only_the_time_is_known_ends_too(start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    upstream.reply = echo
    relay = await start_relay(start, upstream, "assemblyai", sqlite_setting, {"usd": 65, "period": "day"}, pricing=SECONDS)
    async with connected(relay, "assemblyai/v3/ws?sample_rate=16000") as socket:
        await send(socket, b"\0" * 320)
        await socket.receive()
        (session,) = relay.gateway.sessions
        meter: Any = session.exchange.usage.meter
        meter._began_s -= 20
        async with asyncio.timeout(HANG_GUARD_S):
            while session.exchange.budget is None or session.exchange.budget.reserved_nano < 50 * USD:
                await asyncio.sleep(0.005)
        meter._began_s -= 50
        async for message in socket:
            assert "budget" in json.loads(message.data)["error"]
        assert socket.close_code == 4402
    assert 70 * USD <= await assert_charged(relay) <= 75 * USD


async def test_a_slice_is_reserved_before_the_provider_is_connected(start: StartRelay, upstream: Upstream, database_setting: str) -> None:
    relay = await start_relay(start, upstream, "openai", database_setting, {"usd": 0.74, "period": "day", "name": "small"})
    for _ in range(2):
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            async with connected(relay, "openai/realtime?model=m"):
                pass
        headers = refused.value.headers
        assert headers is not None and (refused.value.status, headers["x-relay-error"], headers["x-should-retry"]) == (429, "budget_exhausted", "false")
    assert not upstream.opened
    assert await assert_charged(relay) == 0


async def test_a_response_with_a_larger_bound_makes_a_larger_slice(start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    """The context of a conversation is input of each response."""
    price = [{"input_per_mtok": 1000, "output_per_mtok": 0, "max_output_tokens": 100}]

    async def reply(socket: web.WebSocketResponse, data: Any) -> None:
        usage = {"input_tokens": 2000, "output_tokens": 0, "total_tokens": 2000}
        await socket.send_json({"type": "response.done", "response": {"id": "r", "status": "completed", "usage": usage}})

    upstream.reply = reply
    relay = await start_relay(start, upstream, "openai", sqlite_setting, {"usd": 100, "period": "day"}, pricing=price)
    async with connected(relay, "openai/realtime?model=m") as socket:
        (session,) = relay.gateway.sessions
        assert session.exchange.budget is not None and session.exchange.budget.reserved_nano == AUDIO_SLICE_NANO
        await send(socket, {"type": "input_audio_buffer.commit"})
        await socket.receive()
        async with asyncio.timeout(HANG_GUARD_S):
            # 2000 tokens are spent, and the next response has them as input again.
            while session.exchange.budget.reserved_nano < 4000 * TOKEN_NANO:
                await asyncio.sleep(0.005)
    assert await assert_charged(relay) == 2000 * TOKEN_NANO


@pytest.mark.parametrize("limit", [{}, {"max_output_tokens": 10}])
async def test_requests_that_are_sent_at_once_are_relayed_as_far_as_there_is_money(limit: dict[str, int], start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    """The provider has not answered any of them: only their bounds are known."""
    relay = await start_relay(start, upstream, "openai", sqlite_setting, {"usd": 1.05, "period": "day"})
    async with connected(relay, "openai/responses") as socket:
        for _ in range(200):
            await send(socket, CREATE | limit)
        async for _ in socket:
            pass
        assert socket.close_code == 4402
    await relay.idle()
    assert len(upstream.received) == (105 if limit else 10)


class Held:
    """A provider that begins each response at once, and ends them with `end_all`."""

    def __init__(self, done: str) -> None:
        self.done, self.begun = done, list[tuple[str, int, str]]()
        self.socket: web.WebSocketResponse | None = None
        self._names = itertools.count()

    async def reply(self, socket: web.WebSocketResponse, data: Any) -> None:
        self.socket, message = socket, json.loads(data)
        if message["type"] == "response.create":
            inner = message.get("response", message)
            self.begun.append((f"r{next(self._names)}", inner.get("max_output_tokens", 100), inner.get("model", "m")))
            await self._say(*self.begun[-1], "response.created")

    async def _say(self, name: str, tokens: int, model: str, kind: str) -> None:
        assert self.socket is not None
        event = response(name, tokens if kind == self.done else None, kind)
        event["response"]["model"] = model
        await self.socket.send_json(event)

    async def end_all(self) -> None:
        for each in self.begun:
            await self._say(*each, self.done)
        self.begun.clear()


async def order(socket: aiohttp.ClientWebSocketResponse, messages: list[Any]) -> int:
    """Send each message after the answer to the one before, until the session ends. Returns how
    many were answered.
    """
    for number, message in enumerate(messages):
        with suppress(ConnectionError):
            await send(socket, message)
        received = await socket.receive()
        if received.type is not WSMsgType.TEXT or "budget_exhausted" in received.data or "insufficient_quota" in received.data:
            return number
    return len(messages)


BOTH = [("openai/responses", "response.completed"), ("openai/realtime?model=m", "response.done")]


@pytest.mark.parametrize(("path", "done"), BOTH)
async def test_a_running_response_keeps_what_it_may_cost(path: str, done: str, start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    """Its maximum is higher than that of a next response."""
    held = Held(done)
    upstream.reply = held.reply
    limit = {"max_output_tokens": 700}
    message = {"type": "response.create", "response": limit | {"conversation": "none"}} if "realtime" in path else CREATE | limit
    relay = await start_relay(start, upstream, "openai", sqlite_setting, {"usd": 3, "period": "day"})
    async with connected(relay, path) as socket:
        assert await order(socket, [message] * 30) == 4
    await relay.idle()


async def test_more_responses_than_are_estimated_keep_what_they_may_cost(start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    held = Held("response.completed")
    upstream.reply = held.reply
    relay = await start_relay(start, upstream, "openai", sqlite_setting, {"usd": 8, "period": "day"})
    async with connected(relay, "openai/responses") as socket:
        assert await order(socket, [CREATE] * 120) == 80
    await relay.idle()


async def test_responses_that_have_ended_free_what_they_kept(start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    held = Held("response.completed")
    upstream.reply = held.reply
    relay = await start_relay(start, upstream, "openai", sqlite_setting, {"usd": 20, "period": "day"})
    async with connected(relay, "openai/responses") as socket:
        for _ in range(2):
            assert await order(socket, [CREATE] * 70) == 70
            await held.end_all()
            for _ in range(70):
                await socket.receive()
        (followed,) = relay.gateway.spending._of.values()
        assert followed.spender.ahead_nano() == AUDIO_SLICE_NANO
    assert await assert_charged(relay) == 14 * USD


@pytest.mark.parametrize("is_reversed", [False, True])
async def test_a_later_model_of_a_session_has_its_own_price(is_reversed: bool, start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    held = Held("response.completed")
    upstream.reply = held.reply
    pricing = [
        {"models": ["cheap"], "input_per_mtok": 0, "output_per_mtok": 10, "max_output_tokens": 100},
        {"models": ["dear"], "input_per_mtok": 0, "output_per_mtok": 1000, "max_output_tokens": 100},
    ]
    relay = await start_relay(start, upstream, "openai", sqlite_setting, {"usd": 1, "period": "day"}, pricing=pricing[::-1] if is_reversed else pricing)
    async with connected(relay, "openai/responses") as socket:
        assert await order(socket, [CREATE | {"model": "cheap"}]) == 1
        await held.end_all()
        await socket.receive()
        answered = 0
        while answered < 20 and await order(socket, [CREATE | {"model": "dear"}]):
            answered += 1
            await held.end_all()
            await socket.receive()
    assert answered == 9 and await assert_charged(relay) == USD * 901 // 1000


async def test_the_higher_maximum_counts_until_a_change_of_it_is_confirmed(start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    confirmations = asyncio.Semaphore(0)
    received: list[str] = []

    async def reply(socket: web.WebSocketResponse, data: Any) -> None:
        message = json.loads(data)
        received.append(message["type"])
        if message["type"] == "hello":
            await socket.send_json({"type": "session.created", "session": {"model": "m", "max_output_tokens": 1}})
        elif message["type"] == "session.update":
            await confirmations.acquire()

    upstream.reply = reply
    relay = await start_relay(start, upstream, "openai", sqlite_setting, {"usd": 2.05, "period": "day"})
    async with connected(relay, "openai/realtime?model=m") as socket:
        await send(socket, {"type": "hello"})
        await socket.receive()
        await send(socket, {"type": "session.update", "session": {"max_output_tokens": "inf"}})
        with suppress(ConnectionError):
            for _ in range(100):
                await send(socket, {"type": "response.create", "response": {"conversation": "none"}})
        async for _ in socket:
            pass
        confirmations.release()
    await relay.idle()
    assert received.count("response.create") == 20


async def test_a_confirmed_maximum_counts_alone(start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    async def reply(socket: web.WebSocketResponse, data: Any) -> None:
        message = json.loads(data)
        if message["type"] == "session.update":
            await socket.send_json({"type": "session.updated", "session": {"model": "m"} | message["session"]})
        else:
            await socket.send_json({"type": "x"})

    upstream.reply = reply
    relay = await start_relay(start, upstream, "openai", sqlite_setting, {"usd": 1, "period": "day"})
    updates = [{"type": "session.update", "session": {"max_output_tokens": limit}} for limit in ("inf", 10)]
    async with connected(relay, "openai/realtime?model=m") as socket:
        assert await order(socket, [*updates, *[{"type": "response.create"}] * 200]) == 2 + 100
    await relay.idle()


async def test_a_response_that_the_provider_refuses_frees_what_it_kept(start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    async def reply(socket: web.WebSocketResponse, data: Any) -> None:
        await socket.send_json({"type": "error", "error": {"type": "invalid_request_error", "code": "conversation_already_has_active_response"}})

    upstream.reply = reply
    relay = await start_relay(start, upstream, "openai", sqlite_setting, {"usd": 2, "period": "day"})
    async with connected(relay, "openai/realtime?model=m") as socket:
        assert await order(socket, [CREATE] * 50) == 50
    assert await assert_charged(relay) == 0


async def test_a_request_that_a_responses_socket_refuses_frees_what_it_kept(start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    async def reply(socket: web.WebSocketResponse, data: Any) -> None:
        await socket.send_json({"type": "error", "status": 400, "error": {"code": "previous_response_not_found", "param": "previous_response_id"}})

    upstream.reply = reply
    relay = await start_relay(start, upstream, "openai", sqlite_setting, {"usd": 2, "period": "day"})
    async with connected(relay, "openai/responses") as socket:
        assert await order(socket, [CREATE] * 50) == 50
    assert await assert_charged(relay) == 0


@pytest.mark.parametrize("path", [path for path, _ in BOTH])
async def test_an_error_that_another_message_brings_about_frees_nothing(path: str, start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    async def reply(socket: web.WebSocketResponse, data: Any) -> None:
        if "garbage" in data:
            await socket.send_json({"type": "error", "error": {"code": "invalid_value", "param": "type"}})

    upstream.reply = reply
    relay = await start_relay(start, upstream, "openai", sqlite_setting, {"usd": 2, "period": "day"})
    async with connected(relay, path) as socket:
        relayed = -1
        while relayed < 50 and (not relayed + 1 or await order(socket, [{"type": "garbage"}])):
            relayed += 1
            with suppress(ConnectionError):
                await send(socket, CREATE)
        assert relayed == 20
    await relay.idle()


@pytest.mark.parametrize(("turn_complete", "orders"), [(False, 50), (True, 20)])
async def test_a_history_for_gemini_orders_no_response(turn_complete: bool, orders: int, start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    async def reply(socket: web.WebSocketResponse, data: Any) -> None:
        await socket.send_str('{"setupComplete": {}}')

    upstream.reply = reply
    content = {"clientContent": {"turns": [{"role": "user", "parts": [{"text": "für"}]}], "turnComplete": turn_complete}}
    relay = await start_relay(start, upstream, "google-ai-studio", sqlite_setting, {"usd": 2, "period": "day"})
    async with connected(relay, CASES["gemini live"].path) as socket:
        assert await order(socket, [{"setup": {"model": "models/m"}}, *[content] * 50]) == 1 + orders
    await relay.idle()


@pytest.mark.parametrize("text", ["a" * 3000, "\\u0061" * 600 + "a" * 2000])
async def test_a_text_that_costs_more_than_is_left_is_not_relayed(text: str, start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    relay = await start_relay(start, upstream, "elevenlabs", sqlite_setting, {"usd": 2, "period": "day"}, pricing=CHARACTERS)
    async with connected(relay, "elevenlabs/v1/text-to-speech/v/stream-input?model_id=m") as socket:
        await socket.send_str(r'{"te\u0078t": "' + text + '"}')
        async for _ in socket:
            pass
        assert socket.close_code == 4402
    assert await assert_charged(relay) == 0 and not upstream.received


async def test_a_text_under_a_name_with_escapes_is_charged(start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    upstream.reply = echo
    relay = await start_relay(start, upstream, "elevenlabs", sqlite_setting, {"usd": 2, "period": "day"}, pricing=CHARACTERS)
    async with connected(relay, "elevenlabs/v1/text-to-speech/v/stream-input?model_id=m") as socket:
        await socket.send_str('{"te\\u0078t": "hello"}')
        await socket.receive()
    assert await assert_charged(relay) == 5 * TOKEN_NANO


@pytest.mark.parametrize("unpriced", ["allow", "refuse"])
async def test_a_gemini_session_whose_setup_is_written_with_an_escape_ends_too(unpriced: str, start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    upstream.reply = gemini(90)
    relay = await start_relay(start, upstream, "google-ai-studio", sqlite_setting, {"usd": 2, "period": "day"}, unpriced=unpriced)
    case = CASES["gemini live"]
    async with connected(relay, case.path) as socket:
        await send(socket, b'{"s\\u0065tup": {"model": "models/m"}}')
        await socket.receive()
        _, (code, _) = await talk(relay, socket, case.message)
    assert code == 4402
    assert 2 * USD - 4 * case.round_nano <= await assert_charged(relay) <= 2 * USD


async def test_a_long_first_message_makes_the_audio_behind_it_not_free(start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    upstream.reply = echo
    case = CASES["elevenlabs transcription"]
    relay = await start_relay(start, upstream, "elevenlabs", sqlite_setting, {"usd": case.usd, "period": "day"}, pricing=case.pricing)
    async with connected(relay, case.path) as socket:
        await send(socket, {"audio_base_64": "AAAA", "previous_text": "x" * 40_000})
        await socket.receive()
        _, (code, _) = await talk(relay, socket, case.message)
    assert code == 4402
    assert case.usd * USD - 4 * case.round_nano <= await assert_charged(relay) <= case.usd * USD + case.round_nano


async def test_audio_in_large_messages_ends_no_session_that_has_spent_nothing(start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    async def reply(socket: web.WebSocketResponse, data: Any) -> None:
        session = {"model": "m", "audio": {"input": {"format": {"type": "audio/pcm", "rate": 24000}}}}
        await socket.send_json({"type": "session.created", "session": session})

    upstream.reply = reply
    price = [{"input_per_mtok": 4, "input_audio_per_mtok": 32, "output_per_mtok": 16, "output_audio_per_mtok": 64, "max_output_tokens": 4096}]
    relay = await start_relay(start, upstream, "openai", sqlite_setting, {"usd": 1, "period": "day"}, pricing=price)
    async with connected(relay, "openai/realtime?model=m") as socket:
        for message in [{"type": "session.update"}, *[{"type": "input_audio_buffer.append", "audio": "A" * 300_000}] * 13, {"type": "response.create"}]:
            await send(socket, message)
            assert (await socket.receive()).type is WSMsgType.TEXT
    assert await assert_charged(relay) == 0


async def test_audio_that_is_sent_faster_than_it_lasts_passes_the_budget_by_nothing(start: StartRelay, upstream: Upstream, sqlite_setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five minutes of it between two checks."""
    monkeypatch.setattr("relay.gate.spending.CHECK_S", 3600)
    monkeypatch.setattr("relay.gate.spending.AT_EASE_S", 3600)
    entry = packaged_provider("deepgram", upstream.url) | {"pricing": SECONDS}
    relay = await start(budgeted(sqlite_setting, {"usd": 65, "period": "day"}) | {"websocket": {"close_timeout_s": 0.05}}, deepgram=entry)
    async with connected(relay, "deepgram/v1/listen?model=m&encoding=linear16&sample_rate=16000") as socket:
        with suppress(ConnectionError):
            for _ in range(300):
                await socket.send_bytes(b"\0" * 32000)
    (line,) = await relay.events()
    assert line["close_code"] == 4402
    assert 60 * USD <= await assert_charged(relay) <= 65 * USD


@pytest.mark.parametrize("unpriced", ["refuse", "allow", {"usd": 0.5}])
async def test_a_session_whose_first_message_names_a_model_without_a_price(unpriced: Any, start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    case = CASES["gemini live"]
    upstream.reply = gemini(90)
    relay = await start_relay(start, upstream, "google-ai-studio", sqlite_setting, {"usd": 2, "period": "day"}, pricing=[], unpriced=unpriced)
    code = None
    async with connected(relay, case.path) as socket:
        await send(socket, b'{"setup": {"model": "models/unheard-of"}}')
        await socket.receive()
        for _ in range(20):
            try:
                await send(socket, case.message)
            except ConnectionError:
                break
            if (received := await socket.receive()).type is WSMsgType.CLOSE:
                code = received.data
                break
    await relay.idle()
    sums = await budget_sums(relay)
    assert sums["spent_nano"] == 0 and code == (1008 if unpriced == "refuse" else None)
    # At least a nano-dollar was reserved, and is charged for a session of which no cost is known.
    assert sums["unpriced_nano"] == (USD // 2 if isinstance(unpriced, dict) else sums["unpriced_nano"]) and sums["unpriced_nano"] <= USD


async def test_a_model_without_a_price_in_the_url_refuses_the_handshake(start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    relay = await start_relay(start, upstream, "openai", sqlite_setting, {"usd": 2, "period": "day"}, pricing=[], unpriced="refuse")
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        async with connected(relay, "openai/realtime?model=unheard-of"):
            pass
    assert refused.value.status == 403 and not upstream.opened


async def test_a_session_of_which_nothing_is_known_spends_a_slice_every_30_seconds(start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    upstream.reply = echo
    relay = await start_relay(start, upstream, "fal", sqlite_setting, {"usd": 2, "period": "day"}, pricing=[{"per_unit": 0.5}])
    async with connected(relay, "fal/fal-ai/x/realtime") as socket:
        await send(socket, b"\x81\xa6prompt\xa1a")
        await socket.receive()
        (followed,) = relay.gateway.spending._of.values()
        spender: Any = followed.spender
        for slices in (1, 2, 3):
            spender._began_s -= 30
            assert spender.spent_nano() == slices * USD // 2
            assert followed.spender.exchange.budget is not None
            async with asyncio.timeout(HANG_GUARD_S):
                while followed.spender.exchange.budget.reserved_nano < (slices + 1) * USD // 2:
                    await asyncio.sleep(0.001)
        spender._began_s -= 30
        async for _ in socket:
            pass
        assert socket.close_code == 4402
    await relay.idle()
    sums = await budget_sums(relay)
    assert (sums["unpriced_nano"], sums["spent_nano"]) == (2 * USD, 0)


async def test_a_session_of_unknown_cost_is_charged_what_is_known_of_it_at_least(start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    """The audio of its usage has no price, the tokens have one."""

    async def reply(socket: web.WebSocketResponse, data: Any) -> None:
        event = response("r", 1500)
        event["response"]["usage"]["output_token_details"] = {"audio_tokens": 1}
        await socket.send_json(event)

    upstream.reply = reply
    relay = await start_relay(start, upstream, "openai", sqlite_setting, {"usd": 2, "period": "day"})
    async with connected(relay, "openai/realtime?model=m") as socket:
        await send(socket, {"type": "input_audio_buffer.commit"})
        await socket.receive()
    await relay.idle()
    sums = await budget_sums(relay)
    assert sums["spent_nano"] == 0 and 1500 * TOKEN_NANO <= sums["unpriced_nano"] <= 2 * USD


async def test_a_session_of_unknown_cost_is_charged_what_it_has_reserved_once(start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    upstream.reply = echo
    relay = await start_relay(start, upstream, "fal", sqlite_setting, {"usd": 2, "period": "day"}, pricing=[{"per_unit": 0.5}])
    async with connected(relay, "fal/fal-ai/x/realtime") as socket:
        await send(socket, b"\x81\xa6prompt\xa1a")
        await socket.receive()
    await relay.idle()
    sums = await budget_sums(relay)
    assert (sums["unpriced_nano"], sums["spent_nano"]) == (USD // 2, 0)


@pytest.mark.parametrize("refusal", [None, 403])
async def test_a_refused_handshake_and_an_unused_session_cost_nothing(refusal: int | None, start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    upstream.refusal = refusal
    relay = await start_relay(start, upstream, "openai", sqlite_setting, {"usd": 2, "period": "day"})
    with suppress(aiohttp.WSServerHandshakeError):
        async with connected(relay, "openai/realtime?model=m"):
            assert refusal is None
    assert await assert_charged(relay) == 0 and upstream.opened


@pytest.mark.parametrize("how", ["client", "client lost", "provider", "provider lost", "drain"])
async def test_a_session_is_charged_once_however_it_ends(how: str, start: StartRelay, upstream: Upstream, database_setting: str) -> None:
    answer = realtime(90)

    async def reply(socket: web.WebSocketResponse, data: Any) -> None:
        await answer(socket, data)
        if "end" in data and how == "provider":
            await socket.close(code=1000)
        elif "end" in data:
            assert socket._req is not None and socket._req.transport is not None
            socket._req.transport.abort()  # type: ignore[attr-defined]

    upstream.reply = reply
    relay = await start_relay(start, upstream, "openai", database_setting, {"usd": 2, "period": "day"})
    async with connected(relay, "openai/realtime?model=m") as socket:
        for _ in range(3):
            await send(socket, CREATE)
            await socket.receive()
            await socket.receive()
        if how.startswith("provider"):
            await send(socket, {"type": "end"})
            await socket.receive()
        elif how == "client lost":
            assert socket._response.connection is not None
            socket._response.connection.transport.abort()  # type: ignore[union-attr]
        elif how == "drain":
            relay.gateway.draining = True
            for session in list(relay.gateway.sessions):
                session.end(draining())
            await socket.receive()
    assert await assert_charged(relay) == 3 * 90 * TOKEN_NANO
    (account,) = accounts(relay).values()
    assert account.charged.spent_nano == account.written.spent_nano == 270 * TOKEN_NANO
    assert not relay.gateway.spending._of and not len(relay.gateway.spending._queue)


async def spent_after(change: Callable[[str], str], start: StartRelay, upstream: Upstream, database: str, period: str = "day") -> tuple[int, int | None]:
    """Change a rule of 2 dollars while a session runs, which then orders up to 50 responses.
    Returns what it was charged, and the code that ended it.
    """
    upstream.reply = realtime(90)
    relay = await start_relay(start, upstream, "openai", database, {"usd": 2, "period": period, "name": "mine"})
    async with connected(relay, "openai/realtime?model=m") as socket:
        file = relay.folder / "gateway.yaml"
        config = file.read_text()
        assert change(config) != config
        file.write_text(change(config))
        assert relay.gateway.reload is not None
        await relay.gateway.reload()
        for _ in range(50):
            with suppress(ConnectionError):
                await send(socket, CREATE)
            if (await socket.receive()).type is WSMsgType.CLOSE:
                break
            await socket.receive()
        code = socket.close_code
    return await assert_charged(relay), code


@pytest.mark.parametrize(("change", "ends"), [("usd: 0.2\n", True), ("usd: 100\n", False), ("usd: 2\n    clients: [other]\n", False)])
async def test_a_reload_that_changes_a_budget_holds_for_running_sessions(change: str, ends: bool, start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    spent, code = await spent_after(lambda config: config.replace("usd: 2\n", change), start, upstream, sqlite_setting)
    assert (code == 4402) == ends
    # What was leased before the reload may still be spent: two slices.
    assert spent <= 2 * AUDIO_SLICE_NANO if ends else spent > 2 * USD


@pytest.mark.parametrize(("before", "after", "holds"), [("day", "month", True), ("day", "total", True), ("month", "day", False)])
async def test_a_lower_limit_for_a_longer_period_holds_for_running_sessions(before: str, after: str, holds: bool, start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    def change(config: str) -> str:
        return config.replace("usd: 2\n", "usd: 0.2\n").replace(f"period: {before}\n", f"period: {after}\n")

    spent, code = await spent_after(change, start, upstream, sqlite_setting, before)
    assert code == 4402 and (spent <= 2 * AUDIO_SLICE_NANO) == holds


async def test_a_session_goes_on_while_its_lease_is_recalled(start: StartRelay, upstream: Upstream, database_setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes what the session has not reserved."""
    monkeypatch.setattr("relay.gate.leases._POLL_S", 0.01)
    monkeypatch.setattr("relay.core.budgets._LEASED_SHARE", 1)  # the first process leases everything
    upstream.reply = realtime(90)
    relays = [await start_relay(start, upstream, "openai", database_setting, {"usd": 2, "period": "day"}) for _ in range(2)]
    async with connected(relays[0], "openai/realtime?model=m") as first:
        (account,) = accounts(relays[0]).values()
        assert account.free_nano >= 2 * USD - 2 * AUDIO_SLICE_NANO > 0
        async with connected(relays[1], "openai/realtime?model=m") as second:
            for socket in (first, second):
                await send(socket, CREATE)
                await socket.receive()
                await socket.receive()
    await asyncio.gather(*(relay.idle() for relay in relays))
    assert await ledger_nano(relays[0]) == 180 * TOKEN_NANO == (await budget_sums(relays[1]))["spent_nano"]


async def test_a_session_over_a_ticket_spends_the_budget_of_its_client(start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    upstream.reply = realtime(90)
    keys = {name: "rk_" + canary(name) for name in ("web", "app")}
    clients = {name: {"key": key, "origins": PAGE, "budgets": [{"usd": 2, "period": "day"}]} for name, key in keys.items()}
    entry = packaged_provider("openai", upstream.url) | {"pricing": TOKENS}
    relay = await start({"database": sqlite_setting, "clients": clients, "access": {"mode": "required"}}, openai=entry)
    status, _, body = await relay.call("POST", f"{relay.url}/api/v1/ai-gateway/tickets", json={"provider": "openai"}, headers={"Authorization": f"Bearer {keys['web']}"})
    assert status in (200, 201), body
    ticket = json.loads(body)["ticket"]
    protocols = ["realtime", f"openai-insecure-api-key.{ticket}"]
    async with connected(relay, "openai/realtime?model=m", protocols=protocols, headers={"Origin": PAGE}) as socket:
        _, (code, _) = await talk(relay, socket, CREATE, 2)
        assert code == 4402
    assert {account.subject for account in accounts(relay).values()} == {"client=web"}
    assert 1.8 * USD <= await assert_charged(relay) <= 2 * USD
    # The other client has its own money.
    async with connected(relay, "openai/realtime?model=m", headers={"Authorization": f"Bearer {keys['app']}"}) as socket:
        await send(socket, CREATE)
        await socket.receive()
        await socket.receive()
    assert await assert_charged(relay) > 1.8 * USD


async def test_the_money_of_a_killed_process_with_open_sessions_is_neither_free_nor_blocked(start: StartRelay, upstream: Upstream, tmp_path: Path, sqlite_setting: str) -> None:
    """What its session had reserved counts as spent, until an administrator releases it."""
    upstream.reply = realtime(90)
    rule = {"usd": 2, "period": "total"}
    killed = await start_relay(start, upstream, "openai", sqlite_setting, rule)
    async with connected(killed, "openai/realtime?model=m") as socket:
        await send(socket, CREATE)
        for _ in range(2):
            await socket.receive()
        await checked(killed)
        # What the process has written at this moment is all that is left when it is killed.
        with closing(sqlite3.connect(sqlite_setting)) as there, closing(sqlite3.connect(tmp_path / "left.db")) as here:
            there.backup(here)
    relay = await start_relay(start, upstream, "openai", str(tmp_path / "left.db"), rule)
    assert relay.gateway.leases is not None
    later = time.time() + 61
    relay.gateway.leases.clock = lambda: later
    async with connected(relay, "openai/realtime?model=m") as socket:
        _, (code, _) = await talk(relay, socket, CREATE, 2)
        assert code == 4402
    database = relay.gateway.ledger.database
    assert database is not None
    spent, (budget,) = await assert_charged(relay), await database.rows(sa.select(budgets))
    await relay.gateway.leases.tidy()
    released = await database.change_durably(partial(release_dead, key=budget.key, period_start_s=0))
    assert released >= AUDIO_SLICE_NANO and 2 * USD - released - 2 * 90 * TOKEN_NANO <= spent <= 2 * USD - released
    async with connected(relay, "openai/realtime?model=m"):
        pass


async def test_what_a_running_session_has_spent_makes_the_refusal_of_another_call_final(start: StartRelay, upstream: Upstream, sqlite_setting: str) -> None:
    upstream.reply = realtime(90)
    relay = await start_relay(start, upstream, "openai", sqlite_setting, {"usd": 2, "period": "day"})
    body = {"model": "m", "messages": [], "max_tokens": 1300}

    async def refusal() -> tuple[int, str]:
        status, headers, _ = await relay.call("POST", relay.path("openai", "chat/completions"), json=body)
        return status, headers["x-relay-error"]

    async with connected(relay, "openai/realtime?model=m") as socket:
        assert await refusal() == (503, "budget_busy"), "the session may give back what it has reserved"
        for _ in range(8):
            await checked(relay)
            await send(socket, CREATE)
            await socket.receive()
            await socket.receive()
        assert await refusal() == (429, "budget_exhausted"), "0.72 of 2 dollars are spent"
