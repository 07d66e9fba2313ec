"""Bodies and responses made to cost time: while the relay reads one, it serves other requests."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Awaitable
from typing import Any

import pytest

from tests.conftest import StartRelay
from tests.relays import Relay, provider
from tests.upstream.raw import LAST_CHUNK, SSE_HEAD, RawUpstream, chunk, ok

pytestmark = pytest.mark.serial  # the tests measure how long /healthz takes

BYTES = 25 * 1024 * 1024
LIMITS = [{"requests": 1000, "per": "model"}, {"tokens": 1 << 40}]
LONGEST_S = 1.0
"""Ten times the pause that is allowed; unbounded, each call takes 2 to 8 s."""


async def while_serving_healthz(relay: Relay, call: Awaitable[Any]) -> tuple[Any, float]:
    """Return the result of `call`, and the most CPU time of one /healthz request until then.

    It is the CPU time of all threads: the relay runs in this process, and others may be busy.
    """
    task = asyncio.ensure_future(call)
    longest_s = 0.0
    while not task.done():
        began_s = time.process_time()
        status, _, _ = await relay.call("GET", f"{relay.url}/healthz")
        longest_s = max(longest_s, time.process_time() - began_s)
        assert status == 200
    return await task, longest_s


@pytest.mark.parametrize(
    ("before", "unit", "after"),
    [(b'{"metadata":[', b"{},", b"{}]}"), (b'{"model":[', b"[],", b"[]]}")],
    ids=["objects in metadata", "lists as the model"],
)
async def test_a_body_of_millions_of_values_does_not_block_other_requests(before: bytes, unit: bytes, after: bytes, start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}"))
    relay = await start({"limits": LIMITS}, openai=provider(raw.url, inject_usage=True))
    body = before + unit * (BYTES // len(unit)) + after
    call = relay.call("POST", relay.path("openai", "chat/completions"), data=io.BytesIO(body), headers={"Content-Type": "application/json"})
    (status, headers, _), longest_s = await while_serving_healthz(relay, call)
    assert (status, headers["x-relay-error"]) == (403, "model_unknown") and not raw.arrived
    assert longest_s < LONGEST_S


async def test_a_body_of_millions_of_values_is_forwarded_unchanged_without_a_rule_by_model(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}"))
    relay = await start({"limits": LIMITS[1:]}, openai=provider(raw.url, inject_usage=True))
    body = b'{"stream":true,"metadata":[' + b"{}," * (BYTES // 3) + b"{}]}"
    call = relay.call("POST", relay.path("openai", "chat/completions"), data=io.BytesIO(body), headers={"Content-Type": "application/json"})
    (status, _, _), longest_s = await while_serving_healthz(relay, call)
    assert status == 200 and raw.arrived[0].body == body and longest_s < LONGEST_S


async def test_a_large_body_of_images_keeps_its_model_and_its_bound(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}"))
    relay = await start({"limits": LIMITS}, openai=provider(raw.url))
    body = b'{"messages":[{"content":"data:image/png;base64,' + b"iVBORw0KGgo" * (BYTES // 11) + b'"}],"model":"gpt-x","max_tokens":5}'
    call = relay.call("POST", relay.path("openai", "chat/completions"), data=io.BytesIO(body), headers={"Content-Type": "application/json"})
    (status, _, _), longest_s = await while_serving_healthz(relay, call)
    (line,) = await relay.events()
    assert status == 200 and line["model"] == "gpt-x" and longest_s < LONGEST_S


@pytest.mark.parametrize("inject_usage", [False, True], ids=["metered", "metered and changed"])
async def test_three_megabytes_of_usage_objects_do_not_block_other_requests(inject_usage: bool, start: StartRelay, raw: RawUpstream) -> None:
    usage = b'"usage":{}' * 300_000
    raw.plays(SSE_HEAD, chunk(b"data: {"), chunk(usage), chunk(b"}\n\ndata: [DONE]\n\n"), LAST_CHUNK)
    relay = await start(openai=provider(raw.url, inject_usage=inject_usage))
    call = relay.call("POST", relay.path("openai", "chat/completions"), json={"stream": True})
    (status, _, body), longest_s = await while_serving_healthz(relay, call)
    assert status == 200 and body == b"data: {" + usage + b"}\n\ndata: [DONE]\n\n"
    assert longest_s < LONGEST_S


async def test_an_event_over_the_limit_is_forwarded_before_it_ends_and_later_events_are_changed(start: StartRelay, raw: RawUpstream) -> None:
    large = b"data: " + b'{"choices":[],"usage":{}}' + b"x" * (1 << 21)
    gate = asyncio.Event()
    raw.plays(SSE_HEAD, chunk(large), gate, chunk(b'\n\ndata: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\ndata: [DONE]\n\n'), LAST_CHUNK)
    relay = await start(openai=provider(raw.url, inject_usage=True))
    async with relay.client.post(relay.path("openai", "chat/completions"), json={"stream": True}) as answer:
        assert await answer.content.readexactly(len(large)) == large
        gate.set()
        assert await answer.read() == b"\n\ndata: [DONE]\n\n"
    (line,) = await relay.events()
    assert line["usage"] == {"input_tokens": 7, "output_tokens": 3}
