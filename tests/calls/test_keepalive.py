"""Keepalives: between two events of a silent SSE stream, and nowhere else."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from relay.calls.response import RelayedResponse
from relay.core.record import Record
from relay.periodic import sweep, tick_s
from relay.registry.load import ConfigError
from tests.conftest import StartRelay
from tests.nginx import Nginx
from tests.relays import HANG_GUARD_S, Relay, configured, provider
from tests.sdk.lazy import Lazy
from tests.test_periodic import Clock
from tests.upstream.raw import (
    CLOSE,
    LAST_CHUNK,
    SILENCE,
    SSE_HEAD,
    Pause,
    RawUpstream,
    Step,
    chunk,
    head,
)

anthropic, groq, openai = map(Lazy, ("anthropic", "groq", "openai"))
genai, types = Lazy("google.genai"), Lazy("google.genai.types")

EVENT = b'data: {"n": 1}\n\n'
KEEPALIVE = b": keepalive\n\n"
AFTER_S = 10.0
USAGE = b'data: {"model": "m", "choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 5}}\n\n'
PRICES = {"pricing": [{"input_per_mtok": 1, "output_per_mtok": 2}]}


class Silence:
    """A relay whose clock the test sets."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.clock = relay.gateway.clock = Clock()
        self.records: list[Record] = []
        relay.gateway.ledger.counted.append(lambda finished, _sums: self.records.extend(finished))

    async def passes(self, silent_s: float = AFTER_S) -> None:
        """Let time pass without a byte, then run the sweep."""
        self.clock.now += silent_s
        await sweep(self.relay.gateway)


@pytest.fixture
def begin(start: StartRelay, raw: RawUpstream) -> Any:
    """Start a relay with keepalives, by a clock that stands still: `await begin(**entry)`."""

    async def make(document: dict[str, Any] | None = None, **entry: Any) -> Silence:
        return Silence(await start(document or {}, openai=provider(raw.url, **({"keepalive_s": AFTER_S} | PRICES | entry))))

    return make


class Stream:
    """A response that a test reads in parts."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self.answer, self.body = answer, b""

    async def has(self, body: bytes) -> None:
        """Wait until exactly `body` has arrived since the beginning."""
        async with asyncio.timeout(HANG_GUARD_S):
            while len(self.body) < len(body):
                self.body += await self.answer.content.readany()
        assert self.body == body

    async def ends_with(self, body: bytes) -> None:
        """Read to the end: exactly `body` has arrived since the beginning."""
        async with asyncio.timeout(HANG_GUARD_S):
            self.body += await self.answer.content.read()
        assert self.body == body


@asynccontextmanager
async def stream(relay: Relay, path: str = "chat/completions", **options: Any) -> AsyncIterator[Stream]:
    options = {"json": {"model": "m", "stream": True}} | options
    async with relay.client.post(relay.path("openai", path), **options) as answer:
        yield Stream(answer)


async def waits(relay: Relay, for_: str = "upstream") -> None:
    """Wait until every call that runs waits for its provider."""
    async with asyncio.timeout(HANG_GUARD_S):
        while not relay.gateway.calls or {call.waiting.for_ for call in relay.gateway.calls} != {for_}:
            await asyncio.sleep(0.002)


async def test_a_silent_stream_gets_a_comment_between_two_events(begin: Any, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(EVENT), gate, chunk(EVENT), LAST_CHUNK)
    silence = await begin()
    async with stream(silence.relay) as got:
        await got.has(EVENT)
        await silence.passes(AFTER_S - 0.1)
        await silence.passes(0.2)
        await got.has(EVENT + KEEPALIVE)
        gate.set()
        await got.ends_with(EVENT + KEEPALIVE + EVENT)


async def test_a_keepalive_follows_each_further_silence(begin: Any, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(EVENT), gate, LAST_CHUNK)
    silence = await begin()
    async with stream(silence.relay) as got:
        await got.has(EVENT)
        for count in (1, 2, 3):
            await silence.passes(AFTER_S / 2)
            await silence.passes(AFTER_S / 2)
            await got.has(EVENT + KEEPALIVE * count)
        gate.set()
        await got.ends_with(EVENT + KEEPALIVE * 3)


async def test_a_stream_gets_one_before_its_first_byte_but_after_its_head(begin: Any, raw: RawUpstream) -> None:
    before, after = asyncio.Event(), asyncio.Event()
    raw.plays(before, SSE_HEAD, after, chunk(EVENT), LAST_CHUNK)
    silence = await begin()

    async def stays_silent_before_the_head() -> None:
        await waits(silence.relay, "first_byte")
        await silence.passes()
        before.set()

    silent = asyncio.create_task(stays_silent_before_the_head())
    async with stream(silence.relay) as got:
        await silent
        await waits(silence.relay)
        await silence.passes()
        await got.has(KEEPALIVE)
        after.set()
        await got.ends_with(KEEPALIVE + EVENT)


BOUNDARIES = (b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n", b"\r\n\n")


@pytest.mark.parametrize("boundary", BOUNDARIES)
async def test_a_keepalive_follows_a_whole_boundary_however_it_is_split(begin: Any, raw: RawUpstream, boundary: bytes) -> None:
    """The stream falls silent at two places within the boundary, and at its end."""
    silence = await begin()
    data = b"data: 1" + boundary
    cuts = range(len(data) - len(boundary), len(data))
    for first, second in [(a, b) for a in cuts for b in cuts if a <= b]:
        gates = [asyncio.Event() for _ in range(3)]
        pieces = [data[:first], data[first:second], data[second:]]
        raw.scripts.clear()
        steps: list[Step] = [SSE_HEAD]
        for piece, gate in zip(pieces, gates, strict=True):
            steps += [chunk(piece) if piece else b"", gate]
        raw.plays(*steps, chunk(EVENT), LAST_CHUNK)
        async with stream(silence.relay) as got:
            sent = b""
            for piece, gate in zip(pieces, gates, strict=True):
                sent += piece
                await got.has(sent)
                await waits(silence.relay)
                await silence.passes()
                gate.set()
            await got.ends_with(data + KEEPALIVE + EVENT)


async def test_no_keepalive_is_within_an_event(begin: Any, raw: RawUpstream) -> None:
    """The stream falls silent after each byte of the event."""
    silence = await begin()
    for at in range(1, len(EVENT)):
        gate = asyncio.Event()
        raw.scripts.clear()
        raw.plays(SSE_HEAD, chunk(EVENT), chunk(EVENT[:at]), gate, chunk(EVENT[at:]), LAST_CHUNK)
        async with stream(silence.relay) as got:
            await got.has(EVENT + EVENT[:at])
            await waits(silence.relay)
            await silence.passes()
            gate.set()
            await got.ends_with(EVENT * 2)


async def test_there_are_none_while_the_setting_is_off(begin: Any, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(EVENT), gate, LAST_CHUNK)
    silence = await begin(keepalive_s=None)
    async with stream(silence.relay) as got:
        await got.has(EVENT)
        assert not silence.relay.gateway.keepalives
        await silence.passes(299)
        gate.set()
        await got.ends_with(EVENT)


CHUNKED = "Transfer-Encoding: chunked"
OTHERS: dict[str, tuple[tuple[str, ...], bytes]] = {
    "json": (("Content-Type: application/json", CHUNKED), b'{"n":\n\n'),
    "audio": (("Content-Type: audio/mpeg", CHUNKED), b"abc\n\n"),
    "no type": ((CHUNKED,), EVENT),
    "gzip": (("Content-Type: text/event-stream", "Content-Encoding: gzip", CHUNKED), gzip.compress(EVENT)[:8] + b"\n\n"),
    "a length": (("Content-Type: text/event-stream", f"Content-Length: {len(EVENT) + 1}"), EVENT),
}


@pytest.mark.parametrize("other", OTHERS)
async def test_other_responses_get_none(begin: Any, raw: RawUpstream, other: str) -> None:
    headers, first = OTHERS[other]
    gate = asyncio.Event()
    ends = (b"x",) if other == "a length" else (chunk(b"x"), LAST_CHUNK)
    raw.plays(head(*headers), first if other == "a length" else chunk(first), gate, *ends)
    silence = await begin()
    async with stream(silence.relay) as got:
        await got.has(first)
        await waits(silence.relay)
        await silence.passes()
        gate.set()
        await got.ends_with(first + b"x")


async def test_the_idle_timeout_ends_the_stream_as_without_keepalives(begin: Any, raw: RawUpstream) -> None:
    bodies = []
    for keepalive_s in (None, 10):
        raw.scripts.clear()
        raw.plays(SSE_HEAD, chunk(EVENT), SILENCE)
        silence = await begin(keepalive_s=keepalive_s, idle_timeout_s=25)
        async with stream(silence.relay) as got:
            await got.has(EVENT)
            await silence.passes()
            await silence.passes()
            await silence.passes()  # here a keepalive is due too
            with pytest.raises(aiohttp.ClientPayloadError):
                while piece := await got.answer.content.readany():
                    got.body += piece
        [event] = await silence.relay.events()
        assert (event["outcome"], event["error"]) == ("failed", "upstream_timeout")
        error = json.loads(got.body.rpartition(b"data: ")[2])["error"]
        assert error["message"] == "The provider was silent for 25 s (in the middle of its response)."
        bodies.append(got.body)
        assert not silence.relay.gateway.keepalives
    without, kept = (body.rpartition(b"data: ")[0] for body in bodies)
    assert (without, kept) == (EVENT, EVENT + KEEPALIVE * 2)


def sweep_behind_each_write(monkeypatch: pytest.MonkeyPatch, silence: Silence) -> None:
    """Let a keepalive be due whenever a write has ended, before the call goes on."""
    write = RelayedResponse.write

    async def write_and_sweep(response: RelayedResponse, data: bytes) -> None:
        await write(response, data)
        await silence.passes()

    monkeypatch.setattr(RelayedResponse, "write", write_and_sweep)


async def test_nothing_follows_the_error_event(begin: Any, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    raw.plays(SSE_HEAD, chunk(EVENT), Pause(0.01), CLOSE)
    silence = await begin()
    sweep_behind_each_write(monkeypatch, silence)
    async with stream(silence.relay) as got:
        with pytest.raises(aiohttp.ClientPayloadError):
            while piece := await got.answer.content.readany():
                got.body += piece
    assert json.loads(got.body.rpartition(b"data: ")[2])["error"]["code"] == "upstream_disconnected"


async def test_no_keepalive_follows_a_write_that_may_end_within_an_event(begin: Any, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    part, rest = asyncio.Event(), asyncio.Event()
    raw.plays(SSE_HEAD, chunk(EVENT), part, chunk(EVENT[:5]), rest, chunk(EVENT[5:]), LAST_CHUNK)
    silence = await begin()
    sweep_behind_each_write(monkeypatch, silence)
    async with stream(silence.relay) as got:
        await got.has(EVENT)
        part.set()
        await got.has(EVENT + EVENT[:5])
        rest.set()
        await got.ends_with(EVENT * 2)


async def test_usage_cost_and_bytes_do_not_count_keepalives(begin: Any, raw: RawUpstream) -> None:
    silence = await begin()
    for is_silent in (False, True):
        gate = asyncio.Event()
        raw.scripts.clear()
        raw.plays(SSE_HEAD, chunk(EVENT), gate, chunk(USAGE), chunk(b"data: [DONE]\n\n"), LAST_CHUNK)
        async with stream(silence.relay) as got:
            await got.has(EVENT)
            if is_silent:
                await silence.passes()
                await got.has(EVENT + KEEPALIVE)
            gate.set()
            await got.ends_with(got.body + USAGE + b"data: [DONE]\n\n")
        await silence.relay.idle()
    without, kept = silence.records
    assert kept.cost_nano_usd == without.cost_nano_usd == 10 * 1000 + 5 * 2000
    assert kept.usage == without.usage is not None
    assert kept.bytes_down == without.bytes_down == len(EVENT + USAGE + b"data: [DONE]\n\n")


DONE = b'data: {"choices": [{"finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


async def test_a_recorded_response_is_replayed_without_keepalives(begin: Any, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(EVENT), gate, chunk(DONE), LAST_CHUNK)
    silence = await begin(cache={"ttl_s": 60})
    async with stream(silence.relay) as got:
        await got.has(EVENT)
        await silence.passes()
        await got.has(EVENT + KEEPALIVE)
        gate.set()
        await got.ends_with(EVENT + KEEPALIVE + DONE)
    await silence.relay.idle()
    async with stream(silence.relay) as got:
        assert got.answer.headers["cf-aig-cache-status"] == "HIT"
        await got.ends_with(EVENT + DONE)
    assert len(raw.arrived) == 1


async def test_each_client_of_a_shared_call_gets_its_own(begin: Any, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(EVENT), gate, chunk(DONE), LAST_CHUNK)
    silence = await begin({"cache": {"coalesce": True, "ttl_s": 60}})
    async with stream(silence.relay) as one:
        await one.has(EVENT)
        await silence.passes(AFTER_S / 2)
        async with stream(silence.relay) as other:
            await other.has(EVENT)
            await silence.passes(AFTER_S / 2)
            await one.has(EVENT + KEEPALIVE)
            await silence.passes(AFTER_S / 2)
            await other.has(EVENT + KEEPALIVE)
            gate.set()
            await one.ends_with(EVENT + KEEPALIVE + DONE)
            await other.ends_with(EVENT + KEEPALIVE + DONE)
    assert len(raw.arrived) == 1
    await silence.relay.idle()
    async with stream(silence.relay) as later:
        await later.ends_with(EVENT + DONE)


async def test_a_client_that_has_left_ends_its_call_as_before(begin: Any, raw: RawUpstream) -> None:
    raw.plays(SSE_HEAD, chunk(EVENT), SILENCE)
    silence = await begin()
    async with stream(silence.relay) as got:
        await got.has(EVENT)
        await silence.passes()
        await got.has(EVENT + KEEPALIVE)
    await asyncio.wait_for(raw.closed.wait(), HANG_GUARD_S)
    [event] = await silence.relay.events()
    assert event["outcome"] == "client_gone"
    assert not silence.relay.gateway.keepalives


async def test_a_client_that_takes_nothing_gets_none(begin: Any, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(EVENT), gate, LAST_CHUNK)
    silence = await begin()
    async with stream(silence.relay) as got:
        await got.has(EVENT)
        with monkeypatch.context() as patched:
            patched.setattr("relay.calls.response.RelayedResponse.transport", _Full())
            await silence.passes()
        gate.set()
        await got.ends_with(EVENT)


class _Full:
    """A connection whose client takes nothing."""

    def get_write_buffer_size(self) -> int:
        return 1


async def test_an_http_1_0_client_gets_them_unframed(begin: Any, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(EVENT), gate, LAST_CHUNK)
    silence = await begin()
    reader, writer = await asyncio.open_connection("127.0.0.1", silence.relay.port)
    writer.write(b"GET /api/v1/ai-gateway/providers/openai/x HTTP/1.0\r\nHost: localhost\r\n\r\n")
    async with asyncio.timeout(HANG_GUARD_S):
        await reader.readuntil(EVENT)
        await silence.passes()
        assert await reader.readexactly(len(KEEPALIVE)) == KEEPALIVE
        gate.set()
        assert await reader.read() == b""
    writer.close()


async def test_a_stream_with_ids_gets_comments_without_an_empty_line(begin: Any, raw: RawUpstream) -> None:
    """However an event with an id is split, since its SDK remembers the id."""
    silence = await begin()
    for first, rest in ((b"id: 7\n" + EVENT, EVENT), (b"id: 7\ndata: 1", b"\ndata: 2\n\n"), (EVENT, b"event: x\nid: 7\n" + EVENT), (b"data: 1\n", b"id: 7\n\n")):
        second, gate = asyncio.Event(), asyncio.Event()
        raw.scripts.clear()
        raw.plays(SSE_HEAD, chunk(first), second, chunk(rest), gate, LAST_CHUNK)
        async with stream(silence.relay) as got:
            await got.has(first)
            second.set()
            await got.has(first + rest)
            await silence.passes()
            gate.set()
            await got.ends_with(first + rest + b": keepalive\n")


async def test_googles_format_gets_empty_lines(begin: Any, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(b"data: {}\r\n\r\n"), gate, LAST_CHUNK)
    silence = await begin(format="google")
    async with stream(silence.relay, "v1beta/models/m:streamGenerateContent") as got:
        await got.has(b"data: {}\r\n\r\n")
        await silence.passes()
        await got.has(b"data: {}\r\n\r\n\n")
        gate.set()
        await got.ends_with(b"data: {}\r\n\r\n\n")


async def test_keepalives_come_at_most_half_a_second_late(begin: Any) -> None:
    assert tick_s((await begin(keepalive_s=1)).relay.gateway) <= 0.2
    assert tick_s((await begin(keepalive_s=300)).relay.gateway) <= 0.5


def test_a_provider_may_have_an_interval_of_its_own(tmp_path: Any) -> None:
    entries = {"openai": provider("http://localhost:1"), "other": provider("http://localhost:1", keepalive_s=3)}
    config, _ = configured(tmp_path, {"upstream": {"keepalive_s": 20}, "providers": entries})
    found = config.registry.providers
    assert (found["openai"].keepalive_s, found["other"].keepalive_s) == (20, 3)


async def test_a_reload_applies_the_setting_to_new_calls(begin: Any, raw: RawUpstream) -> None:
    gates = [asyncio.Event(), asyncio.Event()]
    silence = await begin(keepalive_s=None)
    for gate in gates:
        raw.plays(SSE_HEAD, chunk(EVENT), gate, LAST_CHUNK)
    async with stream(silence.relay) as before:
        await before.has(EVENT)
        config, _ = configured(silence.relay.folder, {"providers": {"openai": provider(raw.url, keepalive_s=AFTER_S)}})
        silence.relay.gateway.replace(config)
        async with stream(silence.relay) as after:
            await after.has(EVENT)
            await silence.passes()
            await after.has(EVENT + KEEPALIVE)
            for gate in gates:
                gate.set()
            await after.ends_with(EVENT + KEEPALIVE)
            await before.ends_with(EVENT)


@pytest.mark.parametrize("keepalive_s", [0, 0.5, 301, "often"])
def test_an_interval_out_of_bounds_is_refused(tmp_path: Any, keepalive_s: Any) -> None:
    with pytest.raises(ConfigError, match=r"upstream\.keepalive_s"):
        configured(tmp_path, {"upstream": {"keepalive_s": keepalive_s}, "providers": {}})


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Collect the keepalives that are written."""
    texts: list[bytes] = []
    write = RelayedResponse.write_if_empty

    def write_and_collect(response: RelayedResponse, data: bytes) -> None:
        texts.append(data)
        write(response, data)

    monkeypatch.setattr(RelayedResponse, "write_if_empty", write_and_collect)
    return texts


CHAT = b'data: {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [{"index": 0, "delta": {"content": "%d"}}]}\n\n'
CHATS = [CHAT % number for number in range(3)]
DONE_CHAT = b"data: [DONE]\n\n"


def silent_before_each(pieces: list[bytes]) -> tuple[list[asyncio.Event], list[Step]]:
    """An SSE response, each piece of which is sent once its gate is set."""
    gates = [asyncio.Event() for _ in pieces]
    return gates, [SSE_HEAD, *(step for pair in zip(gates, map(chunk, pieces), strict=True) for step in pair), LAST_CHUNK]


async def texts_of(items: Any, text: Any, silence: Silence, gates: list[asyncio.Event]) -> list[str]:
    """Return the texts that an SDK reads, while the stream is silent before each of its pieces."""

    async def plays() -> None:
        for gate in gates:
            await waits(silence.relay)
            await silence.passes()
            sent = silence.relay.gateway.clock()
            gate.set()
            while any(call.waiting.since_s < sent for call in silence.relay.gateway.calls):
                await asyncio.sleep(0.002)

    async with asyncio.timeout(HANG_GUARD_S):
        playing = asyncio.create_task(plays())
        found = [text(item) async for item in await items]
        await playing
    return [each for each in found if each]


@pytest.mark.programs
@pytest.mark.parametrize("with_ids", ["no ids", "ids"])
@pytest.mark.parametrize("sdk", ["openai", "groq"])
async def test_the_python_sdks_of_openai_and_groq_parse_a_stream_with_keepalives(begin: Any, raw: RawUpstream, written: list[bytes], sdk: str, with_ids: str) -> None:
    pieces = [(b"id: %d\n" % number if with_ids == "ids" else b"") + piece for number, piece in enumerate(CHATS)]
    gates, steps = silent_before_each([*pieces, DONE_CHAT])
    raw.plays(*steps)
    silence = await begin()
    make = openai.AsyncOpenAI if sdk == "openai" else groq.AsyncGroq
    prefix = "" if sdk == "openai" else "openai/v1/"
    base_url = silence.relay.path("openai").rstrip("/")
    async with make(api_key="the relay has it", base_url=base_url, max_retries=0) as client:
        items = client.chat.completions.create(model="m", stream=True, messages=[{"role": "user", "content": "hi"}])
        assert await texts_of(items, lambda item: item.choices[0].delta.content, silence, gates) == ["0", "1", "2"]
    assert raw.arrived[0].target == f"/{prefix}chat/completions"
    assert written == [KEEPALIVE] + [b": keepalive\n" if with_ids == "ids" else KEEPALIVE] * 3


@pytest.mark.programs
async def test_the_python_sdk_of_anthropic_parses_a_stream_with_keepalives(begin: Any, raw: RawUpstream, written: list[bytes]) -> None:
    message = {"id": "a", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 1}}
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": message},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}} for text in "01"),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_stop"},
    ]
    gates, steps = silent_before_each([f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events])
    raw.plays(*steps)
    silence = await begin(format="anthropic")
    base_url = silence.relay.path("openai").rstrip("/")
    async with anthropic.AsyncAnthropic(api_key="the relay has it", base_url=base_url, max_retries=0) as client:
        items = client.messages.create(model="m", max_tokens=9, stream=True, messages=[{"role": "user", "content": "hi"}])
        assert await texts_of(items, lambda item: getattr(getattr(item, "delta", None), "text", None), silence, gates) == ["0", "1"]
    assert written == [KEEPALIVE] * len(events)


@pytest.mark.programs
async def test_the_python_sdk_of_google_parses_a_stream_with_keepalives(begin: Any, raw: RawUpstream, written: list[bytes]) -> None:
    """It fails on a comment; tests/sdk/node has the same SDK for Node."""
    event = b'data: {"candidates": [{"content": {"role": "model", "parts": [{"text": "%d"}]}}]}\r\n\r\n'
    gates, steps = silent_before_each([event % number for number in range(3)])
    raw.plays(*steps)
    silence = await begin(format="google")
    options = types.HttpOptions(base_url=silence.relay.path("openai").rstrip("/"))
    client = genai.Client(api_key="the relay has it", http_options=options)
    items = client.aio.models.generate_content_stream(model="m", contents="hi")
    assert await texts_of(items, lambda item: item.text, silence, gates) == ["0", "1", "2"]
    assert written == [b"\n"] * 3
    await client.aio.aclose()


@pytest.mark.serial
async def test_a_stream_outlives_the_read_timeout_of_nginx(begin: Any, raw: RawUpstream, nginx: Nginx) -> None:
    nginx.read_timeout = "1s"
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(EVENT), SILENCE)
    raw.plays(SSE_HEAD, chunk(EVENT), gate, chunk(EVENT), LAST_CHUNK)
    silence = await begin()
    silence.relay.url = await nginx.start(silence.relay.port)
    async with stream(silence.relay) as got:
        with pytest.raises(aiohttp.ClientPayloadError):
            await got.ends_with(b"")
    loop = asyncio.get_running_loop()
    async with stream(silence.relay) as got:
        sent, began_s = EVENT, loop.time()
        await got.has(sent)
        while loop.time() < began_s + 1.5:
            await silence.passes()
            sent += KEEPALIVE
            await got.has(sent)  # nginx forwards each at once
            await asyncio.sleep(0.1)
        gate.set()
        await got.ends_with(sent + EVENT)


@pytest.mark.soak
@pytest.mark.timeout(1500)
async def test_twenty_silent_minutes_pass_through_nginx_with_its_default_read_timeout(start: StartRelay, raw: RawUpstream, nginx: Nginx) -> None:
    nginx.read_timeout = "60s"
    silent_s, keepalive_s = 1200, 15
    raw.plays(SSE_HEAD, chunk(EVENT), Pause(silent_s), chunk(EVENT), LAST_CHUNK)
    relay = await start(openai=provider(raw.url, keepalive_s=keepalive_s, idle_timeout_s=silent_s + 60))
    relay.url = await nginx.start(relay.port)
    answer = await relay.call("GET", relay.path("openai", "x"), timeout=aiohttp.ClientTimeout(total=None))
    count = answer[2].count(KEEPALIVE)
    assert answer[2] == EVENT + KEEPALIVE * count + EVENT
    assert silent_s / (keepalive_s + 1) - 1 <= count <= silent_s / keepalive_s
    [event] = await relay.events()
    assert event["outcome"] == "relayed"
