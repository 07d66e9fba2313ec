"""Queries with invalid numbers, times or bodies get 400 with the name of the parameter, on both
databases.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from relay.cli.logs import print_calls
from relay.cli.main import build_parser
from tests.conftest import StartRelay
from tests.ledger.test_ledger import USAGE, post, rows
from tests.relays import Relay, provider
from tests.surfaces.test_questions import JSON, ask
from tests.upstream.raw import RawUpstream, ok

LONG = "9" * 5000


@pytest.fixture
async def relay(start: StartRelay, raw: RawUpstream, database_setting: str) -> Relay:
    """A relay with one call."""
    raw.plays(ok(USAGE, JSON))
    made = await start({"database": database_setting, "server": {"body_idle_timeout_s": 1}}, openai=provider(raw.url))
    await post(made)
    await rows(made)
    return made


ODD = {
    "limit": ["-1", "--5", "0", "501", "1.5", "", "+5", "\u0665", LONG, "1e2"],
    "status": ["--1", "-1", "1000", "", "2_00", LONG, "abc"],
    "feedback": ["2", "--1", "-2", "1.0", LONG],
    "since": ["999999w", "-5d", "", "0001-01-01", "1969-12-31", "9999-99-99", "99999999999d", "9999-12-31T23:59:59-14:00", LONG, "\u0665d"],
    "until": ["999999w", "1900-01-01", "yesterday", LONG],
    "min_cost_usd": ["nan", "inf", "1e999", "--1", "1_0", "", LONG, "1e10"],
    "min_duration_ms": ["nan", "-inf", LONG],
    "min_input_tokens": ["nan", "99999999999999999999999", "1e99", LONG],
    "min_output_tokens": ["inf", ""],
    "min_score": ["nan", "0x1", LONG],
}  # fmt: skip


async def test_an_invalid_number_in_a_query_is_400_and_names_its_parameter(relay: Relay) -> None:
    for name, values in ODD.items():
        for value in values:
            for path in ("logs", "usage") if name in ("since", "until") else ("logs",):
                status, answer = await ask(relay, path, params={name: value})
                assert status == 400 and name in answer["error"]["message"], (path, name, value[:30], answer)
                assert len(answer["error"]["message"]) < 200
    status, _ = await ask(relay, "logs/export", params={"since": LONG})
    assert status == 400


async def test_numbers_within_their_bounds_are_accepted(relay: Relay) -> None:
    found = {
        "limit=500": 1, "status=200": 1, "status=999": 0, "feedback=-1": 0, "since=1d": 1, "since=1970-01-01": 1, "until=9999-12-31": 1, "min_cost_usd=-1": 1,
        "min_cost_usd=0.5": 0, "min_input_tokens=0": 1, "min_input_tokens=0.5": 1, "min_input_tokens=1e15": 0, "min_output_tokens=-1000000000000000": 1,
        "min_duration_ms=0.0001": 1, "min_score=-1e15": 0, "min_cost_usd=1000000000": 0,
    }  # fmt: skip
    for question, count in found.items():
        status, answer = await ask(relay, f"logs?{question}")
        assert (status, len(answer.get("logs", []))) == (200, count), question


@pytest.mark.parametrize("value", ["-1", "--1", "1.5", "", LONG, "\u0661", "1e3", str(31 * 86400)])
async def test_a_purge_by_an_invalid_age_is_400(relay: Relay, value: str) -> None:
    status, answer = await ask(relay, "cache", "DELETE", params={"older_than_s": value})
    assert status == 400 and "older_than_s" in answer["error"]["message"]


async def _patch(relay: Relay, *pieces: bytes, length: int | None = None) -> tuple[int, bytes]:
    """Send a PATCH whose body goes out in pieces, each after the relay has read the one before."""
    _, page = await ask(relay, "logs?limit=1")
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    size = sum(map(len, pieces)) if length is None else length
    lines = [f"PATCH /api/v1/ai-gateway/logs/{page['logs'][0]['id']} HTTP/1.1", "Host: localhost", f"Content-Length: {size}", "Connection: close"]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n")
    for piece in pieces:
        # A round trip on another connection: the loop has read what was written before.
        await ask(relay, "logs?limit=1")
        writer.write(piece)
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), body


async def test_a_change_whose_body_comes_in_pieces_is_made(relay: Relay) -> None:
    body = b'{"feedback": -1, "score": 0.5, "metadata": {"team": "a"}}'
    status, answer = await _patch(relay, body[:11], body[11:30], body[30:])
    assert status == 200, answer
    changed = json.loads(answer)
    assert (changed["feedback"], changed["score"], changed["metadata"]) == (-1, 0.5, {"team": "a"})


async def test_a_change_whose_body_is_too_large_or_never_ends_is_refused(relay: Relay) -> None:
    status, answer = await _patch(relay, b'{"score": 1, "metadata": {"a": "', b"x" * 70_000, b'"}}')
    assert status == 400 and b"65536 bytes" in answer
    status, answer = await _patch(relay, b'{"score"', length=100)
    assert status == 408 and b"body_timeout" in answer


@pytest.mark.parametrize("body", ['{"score": 1e16}', '{"score": -1e300}', f'{{"score": {"9" * 400}}}', f'{{"score": {LONG}}}', '{"score": true}', '{"feedback": 1.5}', f'{{"feedback": {LONG}}}'])  # fmt: skip
async def test_a_change_to_a_number_out_of_bounds_is_400(relay: Relay, body: str) -> None:
    status, _ = await _patch(relay, body.encode())
    assert status == 400


async def test_text_of_clients_sends_no_control_sequence_to_the_terminal(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    raw.plays(ok(b"{}", JSON))
    relay = await start({"database": str(tmp_path / "relay.db")}, openai=provider(raw.url))
    body = json.dumps({"model": "m\x1b[2J\x1b]0;title\x07\r\nfake line \u65e5\u672c"})
    await relay.call("POST", relay.path("openai", "chat/completions"), data=body, headers={"Content-Type": "application/json"})
    await rows(relay)
    lines: list[str] = []
    await print_calls(relay.gateway.config, build_parser().parse_args(["logs"]), lines.append)
    (line,) = lines
    assert line.isprintable() and "fake line \u65e5\u672c" in line
