"""The log: a line that cannot be written ends no call, and is counted; the terminal gets it pretty."""

from __future__ import annotations

import asyncio
import io

import pytest

from relay import log
from tests.conftest import StartRelay
from tests.relays import HANG_GUARD_S, KEYS, provider
from tests.upstream.raw import RawUpstream, ok


async def test_a_full_disk_costs_lines_and_no_call(start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    raw.plays(ok(b"fine"))
    relay = await start(openai=provider(raw.url))

    def full(_line: object) -> int:
        raise OSError(28, "No space left on device")

    before = log.losses.lines
    with monkeypatch.context() as patch:
        patch.setattr(relay.logged, "write", full)
        assert (await relay.call("GET", relay.path("openai", "x")))[2] == b"fine"
        async with asyncio.timeout(HANG_GUARD_S):
            while log.losses.lines == before:
                await asyncio.sleep(0.01)
        _, _, body = await relay.call("GET", f"{relay.url}/readyz")
    assert log.losses.lines > before and f'"log_lines_lost": {log.losses.lines}'.encode() in body
    assert (await relay.call("GET", relay.path("openai", "x")))[2] == b"fine"
    await relay.events()


async def test_a_traceback_shows_no_secret(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start({"redis": {"url": "redis://:CANARY-redis@127.0.0.1:1/0"}}, openai=provider(raw.url))
    for secret in (KEYS["OPENAI_API_KEY"], "CANARY-redis"):
        log.bug("test.bug", ValueError(f"url with {secret} in it"))
    events = await relay.events("test.bug", 2)
    assert all("[redacted] in it" in event["traceback"] for event in events)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


async def test_a_terminal_gets_it_pretty_and_a_level_holds(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok())
    relay = await start(openai=provider(raw.url))
    terminal = _Terminal()
    log.setup("info", "auto", terminal)
    await relay.call("GET", relay.path("openai", "x"))
    await relay.idle()
    assert "exchange" in terminal.getvalue() and not terminal.getvalue().startswith("{")
    quiet = _Terminal()
    log.setup("warning", "pretty", quiet)
    await relay.call("GET", relay.path("openai", "x"))
    await relay.idle()
    assert quiet.getvalue() == ""
