"""Text from clients and providers is bounded and cleaned before it is logged, stored or shown."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from aiohttp import web

from relay import log
from relay.core.errors import (
    HostNotAllowed,
    OriginNotAllowed,
    RelayError,
    UnknownProvider,
    UnknownRoute,
)
from relay.core.text import MAX_CHARACTERS, MAX_PATH_CHARACTERS, clean
from relay.storage.tables import bodies, exchanges, group_rollups, rollups, tags
from tests.conftest import StartRelay
from tests.ledger.test_ledger import rows
from tests.relays import KEYS, Relay, provider
from tests.test_cycles import Peer
from tests.upstream.raw import RawUpstream, ok

LONG = "m" * 50_000
UNCLEAN = "a\0b\x1b[31mc\u202ed"
LINE_BYTES = 16 * 1024
"""The upper bound of a log line."""


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in _texts(part)]
    if isinstance(value, list):
        return [text for each in value for text in _texts(each)]
    return [value] if isinstance(value, str) else []


async def _stored(relay: Relay) -> list[str]:
    """All text in the database."""
    await relay.idle()
    database = relay.gateway.ledger.database
    assert database is not None
    found = []
    for table in (exchanges, tags, rollups, group_rollups, bodies):
        for row in await database.rows(sa.select(table)):
            found += [part for part in row if isinstance(part, str)]
    return found


async def _check_bounds(relay: Relay) -> None:
    record = max(map(len, await _stored(relay)))
    assert record <= LINE_BYTES
    for line in relay.logged.lines:
        assert len(line) <= LINE_BYTES
        for text in _texts(json.loads(line)):
            assert text == clean(text, MAX_PATH_CHARACTERS) or "Traceback" in text
    _, _, metrics = await relay.call("GET", f"{relay.url}/metrics")
    assert max(map(len, metrics.splitlines())) <= 2 * MAX_CHARACTERS
    assert relay.gateway.ledger.lost.rows == 0


async def test_long_names_of_a_call_are_bounded_in_log_database_and_metrics(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    answered = {"model": f"{UNCLEAN}{'a' * 150}", "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    raw.plays(ok(json.dumps(answered).encode(), "Content-Type: application/json"))
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    names = {f"{n}{'n' * 900}": "v" * 900 for n in range(5)}
    headers = {"X-Request-Id": "r" * 3000, "cf-aig-event-id": "e" * 3000, "cf-aig-metadata": json.dumps(names)}
    call = {"model": LONG, "user": UNCLEAN + LONG}
    assert (await relay.call("POST", relay.path("openai", "p" * 3000), json=call, headers=headers))[0] == 200
    (row,) = await rows(relay)
    assert row["model"] == clean(LONG) and row["user"] == clean(UNCLEAN + LONG) and len(row["endpoint"]) == MAX_PATH_CHARACTERS
    assert row["request_id"] == clean("r" * 3000) and row["event_id"] == clean("e" * 3000)
    assert row["metadata"] == {clean(name): clean(value) for name, value in names.items()}
    await _check_bounds(relay)


async def test_the_name_of_an_unknown_provider_is_bounded(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    status, _, body = await relay.call("PROPFIND", relay.path("n" * 3000, "x"))
    assert (status, json.loads(body)["error"]["code"]) == (404, "unknown_provider") and len(body) < 400
    (row,) = await rows(relay)
    assert row["provider"] == clean("n" * 3000)
    await _check_bounds(relay)


@pytest.mark.parametrize("error", [UnknownRoute(LONG), UnknownProvider(LONG), HostNotAllowed(LONG), OriginNotAllowed(LONG)], ids=lambda e: e.code)
def test_an_error_message_quotes_only_the_beginning_of_a_long_text(error: RelayError) -> None:
    assert len(error.message) < 300


async def test_log_events_and_tracebacks_are_bounded(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(openai=provider(raw.url))
    log.event("test.event", method=UNCLEAN + LONG)
    log.bug("test.bug", ValueError(f"first {LONG} last"))
    (event,), (bug,) = await relay.events("test.event"), await relay.events("test.bug")
    assert event["method"] == clean(UNCLEAN + LONG) and len(bug["traceback"]) < 17_000
    assert bug["traceback"].startswith("ValueError: first m") and bug["traceback"].endswith("m last\n")


@pytest.mark.parametrize("header", ["Origin", "Host"])
async def test_a_header_that_is_not_utf8_is_quoted_and_causes_no_failure(start: StartRelay, raw: RawUpstream, database_setting: str, header: str) -> None:
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    peer = Peer(relay.port)
    host = "Host: localhost\r\n" if header != "Host" else ""
    peer.send(f"GET /api/v1/ai-gateway/providers/openai/x HTTP/1.1\r\n{host}{header}: http://".encode() + b"\xff\xfe" * 500 + b"\r\n\r\n")
    answered = await asyncio.to_thread(peer.answer)
    peer.sock.close()
    assert answered.startswith(b"HTTP/1.1 403") and len(answered) < 1000
    assert len(await rows(relay)) == 1
    await _check_bounds(relay)


async def test_bytes_that_are_not_utf8_in_names_lose_no_row(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(b"{}", "Content-Type: application/json"))
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    peer = Peer(relay.port)
    names = b"X-Request-Id: \xff\xfe\r\ncf-aig-event-id: \xff\r\ncf-aig-metadata: {\"a\": \"\xff\"}\r\n"
    peer.send(b"GET /api/v1/ai-gateway/providers/openai/x HTTP/1.1\r\nHost: localhost\r\n" + names + b"\r\n")
    await asyncio.to_thread(peer.answer)
    peer.sock.close()
    (row,) = await rows(relay)
    assert row["request_id"] == "\ufffd\ufffd" and row["event_id"] == "\ufffd"
    await _check_bounds(relay)


async def test_long_names_of_a_session_are_bounded(start: StartRelay, aiohttp_server: Any, database_setting: str) -> None:
    async def realtime(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        transcription = {"input_audio_transcription": {"model": UNCLEAN + "t" * 30_000}}
        await socket.send_json({"type": "session.updated", "session": {"model": UNCLEAN + "s" * 200, **transcription}})
        for number in range(200):
            await socket.send_json({"type": "session.updated", "session": {"input_audio_transcription": {"model": f"t{number}"}}})
            await socket.send_json({"type": "conversation.item.input_audio_transcription.completed", "usage": {"type": "tokens", "input_tokens": 1, "output_tokens": 1, "total_tokens": 2}})
        await socket.send_str("last")
        await socket.receive()
        return socket

    app = web.Application()
    app.router.add_get("/realtime", realtime)
    server = await aiohttp_server(app)
    entry = provider(str(server.make_url("")).rstrip("/"), websocket={"default_path": "realtime"})
    relay = await start({"database": database_setting}, openai=entry)
    async with relay.client.ws_connect(f"{relay.ws('openai')}?model={'q' * 3000}") as socket:
        while (await socket.receive()).data != "last":
            pass
        (session,) = relay.gateway.sessions
        assert len(session.exchange.usage.meter.parts) <= 60  # type: ignore[union-attr]
    (row,) = await rows(relay)
    assert row["model"] == clean("q" * 3000) and row["model_answered"] == clean(UNCLEAN + "s" * 200)
    await _check_bounds(relay)


async def test_two_long_names_have_separate_limits_and_sums(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(b"{}", "Content-Type: application/json"))
    limit = {"requests": 1, "per": ["model", "metadata.team"], "window_s": 9999}
    relay = await start({"database": database_setting, "limits": [limit]}, openai=provider(raw.url))

    async def call(model: str, team: str) -> int:
        headers = {"cf-aig-metadata": json.dumps({"team": team})}
        return (await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": model}, headers=headers))[0]

    assert [await call(LONG + "1", "t"), await call(LONG + "2", "t"), await call(LONG + "1", "t")] == [200, 200, 429]
    assert [await call("m", "t" * 900 + "1"), await call("m", "t" * 900 + "2"), await call("m", "t" * 900 + "1")] == [200, 200, 429]
    await relay.idle()
    _, _, body = await relay.call("GET", f"{relay.url}/api/v1/ai-gateway/usage?by=model")
    assert {row["model"]: row["requests"] for row in json.loads(body)["rows"]} == {clean(LONG + "1"): 2, clean(LONG + "2"): 1, "m": 3}


async def test_a_call_is_found_by_its_long_name(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(b"{}", "Content-Type: application/json"))
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    user, team = "u" * 1000, "t" * 1000
    await relay.call("POST", relay.path("openai", "chat/completions"), json={"user": user}, headers={"cf-aig-metadata": json.dumps({"team": team})})
    await relay.idle()
    for condition, found in ((f"user={user}", 1), (f"metadata.team={team}", 1), (f"user={user}x", 0)):
        _, _, body = await relay.call("GET", f"{relay.url}/api/v1/ai-gateway/logs?{condition}")
        assert len(json.loads(body)["logs"]) == found


async def test_changed_metadata_is_bounded(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(b"{}", "Content-Type: application/json"))
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    _, headers, _ = await relay.call("GET", relay.path("openai", "x"))
    await relay.idle()
    changed = {"metadata": {"n" * 1000: "v" * 1000, "team": "\0"}}
    status, _, body = await relay.call("PATCH", f"{relay.url}/api/v1/ai-gateway/logs/{headers['cf-aig-log-id']}", json=changed)
    assert status == 200 and json.loads(body)["metadata"] == {clean("n" * 1000): clean("v" * 1000), "team": "\ufffd"}
    await _check_bounds(relay)


async def test_a_key_in_a_model_name_of_the_provider_is_redacted_in_log_and_rows(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    answered = {"model": f"m-{KEYS['OPENAI_API_KEY']}", "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    raw.plays(ok(json.dumps(answered).encode(), "Content-Type: application/json"))
    relay = await start({"database": database_setting}, openai=provider(raw.url))
    await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": "m"})
    assert (await rows(relay))[0]["model_answered"] == "m-[redacted]"
    assert not [text for text in await _stored(relay) if "CANARY" in text]


async def test_waiting_rows_are_bounded_in_bytes_and_the_sums_are_right(start: StartRelay, raw: RawUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw.plays(ok(b"{}", "Content-Type: application/json"))
    folder = tmp_path / "not-yet"
    folder.write_text("")
    relay = await start({"database": str(folder / "relay.db"), "ledger": {"bodies": "on"}}, openai=provider(raw.url))
    max_bytes = 20_000
    monkeypatch.setattr("relay.ledger.writer.MAX_ROWS_BYTES", max_bytes)
    headers = {"X-Request-Id": "é" * 256, "cf-aig-metadata": json.dumps({f"n{n}": "v" * 250 for n in range(5)})}
    for _ in range(30):
        await relay.call("POST", relay.path("openai", "chat/completions"), json={}, headers=headers)
    await relay.events("exchange", 30)
    folder.unlink()
    await relay.events("database.recovered")
    kept, lost = await rows(relay), relay.gateway.ledger.lost
    assert 0 < lost.rows == 30 - len(kept) and sum(len(json.dumps(row)) for row in kept) < 2 * max_bytes
    _, _, body = await relay.call("GET", f"{relay.url}/api/v1/ai-gateway/usage")
    assert json.loads(body)["total"]["requests"] == 30
