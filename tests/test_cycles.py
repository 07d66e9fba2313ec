"""A call leaves nothing for the garbage collector: reference counts free it at once.

A cycle, such as a closure that holds its exchange and is held by it, keeps each call's objects until a collection, and made a
call a fifth dearer.
"""

from __future__ import annotations

import collections
import gc
from typing import Any

import pytest

from tests.conftest import StartRelay
from tests.relays import provider
from tests.upstream.raw import LAST_CHUNK, SSE_HEAD, RawUpstream, chunk, ok

JSON = ok(b'{"model": "m", "usage": {"prompt_tokens": 1, "completion_tokens": 2}}', "Content-Type: application/json")
STREAM = SSE_HEAD + chunk(b"data: 1\n\n") + chunk(b"data: 2\n\n") + LAST_CHUNK
CALLS = 50

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "limits": {"limits": [{"calls_at_once": 90}, {"calls_at_once": 9, "per": "client"}, {"requests": 9999, "per": "client"}, {"tokens": 10**9}]},
    "cache": {"cache": {"ttl_s": 60}},
    "shared": {"cache": {"coalesce": True}},
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("answer", [JSON, STREAM], ids=["whole", "stream"])
async def test_a_call_leaves_nothing_for_the_collector(setting: str, answer: bytes, start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(answer)
    relay = await start(SETTINGS[setting], openai=provider(raw.url, inject_usage=True))

    async def calls() -> None:
        for _ in range(CALLS):
            await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": "m", "stream": True})
        await relay.idle()
        await relay.gateway.later.done()

    await calls()
    gc.collect()
    gc.disable()
    try:
        await calls()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = collections.Counter(type(each).__name__ for each in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert [name for name, count in left.items() if count >= CALLS] == []
