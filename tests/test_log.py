"""The log: lines that cannot be written are counted and fail no call; terminals get pretty ones."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest
import structlog

from relay import log
from relay.client import AIGateway, RequestRefused
from relay.core.record import Record
from tests.conftest import StartRelay
from tests.relays import HANG_GUARD_S, KEYS, LogStream, provider, write_config
from tests.upstream.raw import RawUpstream, ok


async def test_a_full_disk_loses_log_lines_and_fails_no_call(start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_a_terminal_gets_pretty_lines_from_the_configured_level_on(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok())
    relay = await start(openai=provider(raw.url))
    terminal = _Terminal()
    log.setup("info", "auto", terminal)
    await relay.call("GET", relay.path("openai", "x"))
    await relay.idle()
    assert " openai/x  200  " in terminal.getvalue() and not terminal.getvalue().startswith("{")
    quiet = _Terminal()
    log.setup("warning", "pretty", quiet)
    await relay.call("GET", relay.path("openai", "x"))
    await relay.idle()
    assert quiet.getvalue() == ""


async def test_a_host_that_configured_structlog_gets_every_line_through_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tmp_path, {"providers": {}})
    captured = structlog.testing.LogCapture()
    monkeypatch.setattr(log, "_current", log._Log(structlog.get_logger("relay")))
    structlog.configure(processors=[captured])
    try:
        async with AIGateway.from_config(tmp_path / "gateway.yaml") as gateway:
            with pytest.raises(RequestRefused):
                await gateway.request(provider="nobody", endpoint="x", method="GET")
        log.warn("test.event", number=1)
    finally:
        structlog.reset_defaults()
    exchange, warning = captured.entries
    assert (exchange["event"], exchange["log_level"], exchange["error"]) == ("exchange", "info", "unknown_provider")
    assert "timestamp" not in exchange and "record" not in exchange
    assert warning == {"event": "test.event", "log_level": "warning", "number": 1}


def test_exchange_lines_and_events_go_through_the_same_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_current", log._current)
    stream = LogStream()
    log.setup("info", "json", stream)  # type: ignore[arg-type]
    logger = log._current.logger
    calls: list[str] = []

    class Counted:
        def info(self, name: str, **fields: Any) -> Any:
            calls.append(name)
            return logger.info(name, **fields)

    monkeypatch.setattr(log, "_current", log._current._replace(logger=Counted()))
    record = Record("id", "rest", "native", "GET", "openai", "models", 200, "relayed", 1.5, 0, 2, "127.0.0.1")
    line = log.exchange_ended(record, 1_700_000_000.25)
    log.event("test.event", number=1)
    assert calls == ["exchange", "test.event"] and line is not None
    assert [json.loads(each)["event"] for each in stream.lines] == calls
    assert stream.lines[0].encode() == line and json.loads(line)["timestamp"] == "2023-11-14T22:13:20.250000Z"
    assert json.loads(stream.lines[1]).keys() == {"event", "number", "level", "timestamp"}
