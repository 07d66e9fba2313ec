"""Queries of the ledger over HTTP and on the command line, on both databases."""

from __future__ import annotations

import json
from typing import Any

import pytest

from relay.cli.logs import print_calls
from relay.core.histogram import (
    BUCKETS,
    bound_ms,
    bucket_counts,
    build_histogram,
    from_bytes,
    percentiles,
    to_bytes,
)
from relay.core.record import Record
from tests.cli.test_reports import options
from tests.conftest import StartRelay
from tests.ledger.test_ledger import USAGE, post, rows
from tests.relays import Relay, provider
from tests.upstream.raw import RawUpstream, ok

JSON = "Content-Type: application/json"


async def ask(relay: Relay, path: str, method: str = "GET", **options: Any) -> tuple[int, Any]:
    status, _, body = await relay.call(method, f"{relay.url}/api/v1/ai-gateway/{path}", **options)
    return status, json.loads(body)


@pytest.fixture
async def relay(start: StartRelay, raw: RawUpstream, database_setting: str) -> Relay:
    """Six calls: three of team a, two of team b, of which one failed, and one without a team."""
    for status in ("200 OK",) * 4 + ("500 Broken", "200 OK"):
        raw.plays(ok(USAGE, JSON, status=status))
    made = await start({"database": database_setting}, openai=provider(raw.url))
    for team in ("a", "a", "a", "b", "b", None):
        headers = {"cf-aig-metadata": json.dumps({"team": team}), "cf-aig-event-id": f"event-{team}"} if team else {}
        await post(made, headers=headers)
    await rows(made)
    return made


async def test_pages_have_all_calls_the_latest_first(relay: Relay) -> None:
    seen: list[str] = []
    cursor = ""
    while True:
        _, page = await ask(relay, f"logs?limit=4{cursor}")
        seen += [call["id"] for call in page["logs"]]
        if page["cursor"] is None:
            break
        cursor = f"&cursor={page['cursor']}"
    assert len(seen) == 6 and seen == sorted(seen, reverse=True)


@pytest.mark.parametrize(
    ("condition", "count"),
    [
        ("provider=openai", 6), ("provider=other", 0), ("success=false", 1), ("success=true", 5), ("status=500", 1), ("metadata.team=a", 3),
        ("metadata.team=b&success=true", 1), ("event_id=event-a", 3), ("min_cost_usd=0.0001", 5), ("min_cost_usd=1", 0), ("min_duration_ms=60000", 0),
        ("since=1h", 6), ("until=1h", 0), ("cached=true", 0), ("outcome=relayed", 6), ("model=gpt-4o-mini", 6), ("user=u", 0),
    ],
)  # fmt: skip
async def test_calls_are_found_by_their_fields(relay: Relay, condition: str, count: int) -> None:
    _, page = await ask(relay, f"logs?{condition}")
    assert len(page["logs"]) == count, page


async def test_a_page_reads_a_bounded_number_of_rows_and_its_cursor_continues(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.ledger.queries.SCANNED", 2)
    found, cursor, pages = 0, "", 0
    while True:
        _, page = await ask(relay, f"logs?metadata.team=a{cursor}")
        found, pages = found + len(page["logs"]), pages + 1
        if page["cursor"] is None:
            break
        cursor = f"&cursor={page['cursor']}"
    assert (found, pages) == (3, 4)


@pytest.mark.parametrize("question", ["logs?colour=red", "logs?since=whenever", "logs?limit=x", "logs?success=maybe", "usage?by=colour", "usage?bucket=year", "usage?by=metadata.a&bucket=day", "usage?by=metadata.a&since=30d"])  # fmt: skip
async def test_an_invalid_query_is_refused_with_the_reason(relay: Relay, question: str) -> None:
    status, answer = await ask(relay, question)
    assert (status, answer["error"]["code"]) == (400, "bad_request")


@pytest.mark.parametrize("question", ["logs?status=99999", "logs?feedback=99999", "logs?id=%00", "logs?provider=%00", "logs?cursor=%00", "logs?metadata.%00=a", "usage?provider=%00", "logs?provider=%ED%A0%80", "logs?min_cost_usd=1e300"])  # fmt: skip
async def test_values_that_no_row_can_have_match_nothing_or_are_refused(relay: Relay, question: str) -> None:
    """The database decides which of the two; neither is a failure of the relay."""
    status, answer = await ask(relay, question)
    assert (status, answer.get("error", {}).get("code")) in ((200, None), (400, "bad_request"))
    assert relay.gateway.ledger.state == "ok"


async def test_feedback_score_and_metadata_can_be_added_later(relay: Relay) -> None:
    _, page = await ask(relay, "logs?limit=1")
    at = f"logs/{page['logs'][0]['id']}"
    status, changed = await ask(relay, at, "PATCH", json={"feedback": -1, "score": 0.5, "metadata": {"team": "c", "n": 1}})
    assert (status, changed["feedback"], changed["score"], changed["metadata"]) == (200, -1, 0.5, {"team": "c", "n": 1})
    assert (await ask(relay, "logs?metadata.team=c"))[1]["logs"][0]["id"] == changed["id"]
    _, taken = await ask(relay, at, "PATCH", json={"feedback": None, "metadata": None})
    assert (taken["feedback"], taken["score"], taken["metadata"]) == (None, 0.5, None)


@pytest.mark.parametrize("change", [{"feedback": 2}, {"feedback": True}, {"score": "good"}, {"metadata": {"a": {}}}, {"metadata": dict.fromkeys("abcdef", 1)}, {"cost": 0}, [], {"score": 10**400}])
async def test_an_invalid_change_is_refused(relay: Relay, change: Any) -> None:
    _, page = await ask(relay, "logs?limit=1")
    assert (await ask(relay, f"logs/{page['logs'][0]['id']}", "PATCH", json=change))[0] == 400


async def test_calls_can_be_deleted_and_their_sums_stay(relay: Relay) -> None:
    assert (await ask(relay, "logs?metadata.team=a", "DELETE"))[1] == {"deleted": 3}
    assert (await ask(relay, "logs", "DELETE"))[0] == 400, "not all at once by mistake"
    _, page = await ask(relay, "logs")
    assert len(page["logs"]) == 3
    assert (await ask(relay, f"logs/{page['logs'][0]['id']}", "DELETE"))[1] == {"deleted": 1}
    assert (await ask(relay, f"logs/{page['logs'][0]['id']}"))[0] == 404
    assert (await ask(relay, "usage"))[1]["total"]["requests"] == 6


async def test_an_export_is_a_line_a_call_the_oldest_first(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.ledger.queries._EXPORTED", 2)
    _, headers, body = await relay.call("GET", f"{relay.url}/api/v1/ai-gateway/logs/export")
    calls = [json.loads(line) for line in body.splitlines()]
    assert headers["content-type"].startswith("application/x-ndjson")
    assert len(calls) == 6 and [call["id"] for call in calls] == sorted(call["id"] for call in calls)
    _, _, some = await relay.call("GET", f"{relay.url}/api/v1/ai-gateway/logs/export?success=false")
    assert [json.loads(line)["status"] for line in some.splitlines()] == [500]


@pytest.mark.parametrize("bucket", [None, "minute", "hour", "day"])
@pytest.mark.parametrize("since", ["1h", "7d", "30d"])
async def test_usage_adds_up_in_every_rollup(relay: Relay, since: str, bucket: str | None) -> None:
    _, answer = await ask(relay, f"usage?since={since}&by=provider,model" + (f"&bucket={bucket}" if bucket else ""))
    total = answer["total"]
    assert (total["requests"], total["errors"], total["input_tokens"], total["cache_read_tokens"]) == (6, 1, 5000, 1000)
    assert (total["cost_usd"], total["unpriced"]) == (0.002175, 0)
    assert sum(row["requests"] for row in answer["rows"]) == 6 and {row["model"] for row in answer["rows"]} <= {"gpt-4o-mini", ""}
    assert 0 < total["overhead_ms"]["p50"] <= total["latency_ms"]["p95"]


async def test_without_usage_there_are_no_rows_and_the_total_is_zero(relay: Relay) -> None:
    _, answer = await ask(relay, "usage?provider=nobody")
    assert (answer["rows"], answer["total"]["requests"], answer["total"]["latency_ms"]) == ([], 0, None)


@pytest.mark.parametrize("path", ["logs", "usage", "logs/export", "logs/x"])
async def test_only_local_administrators_read_the_ledger(relay: Relay, path: str) -> None:
    url = f"{relay.url}/api/v1/ai-gateway/{path}"
    for headers in ({"X-Forwarded-For": "10.0.0.1"}, {"Origin": "https://evil.example"}, {"Host": "evil.example"}):
        assert (await relay.call("GET", url, headers=headers))[0] == 403


async def test_without_a_ledger_the_error_says_so(start: StartRelay) -> None:
    relay = await start({"providers": {}})
    status, answer = await ask(relay, "logs")
    assert (status, answer["error"]["code"]) == (503, "store_unavailable")


async def test_following_prints_every_call_that_ends(relay: Relay, raw: RawUpstream) -> None:
    import asyncio

    lines: list[str] = []
    following = asyncio.create_task(print_calls(relay.gateway.config, options("logs", "--follow", "--limit", "1", "--json"), lines.append))
    async with asyncio.timeout(20):
        while not lines:
            await asyncio.sleep(0.01)
        raw.plays(ok(USAGE, JSON))
        ids = []
        for _ in range(3):
            _, headers, _ = await post(relay)
            ids.append(headers["cf-aig-log-id"])
        while len(lines) < 4:
            await asyncio.sleep(0.05)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert [json.loads(line)["id"] for line in lines[1:]] == ids


def test_a_histogram_is_one_number_and_two_are_merged_by_addition() -> None:
    times = (1.0, 1.0, 100.0, 10_000.0)
    whole = sum(build_histogram([ms], [ms / 2], []) for ms in times)
    found = bucket_counts(whole)
    assert sum(found["duration"]) == sum(found["first_byte"]) == 4 and not any(found["overhead"])
    assert from_bytes(to_bytes(whole)) == whole
    at = percentiles(whole, "duration", (50, 99))
    assert at is not None and 0.7 <= at["p50"] <= 1.0 and 7_000 <= at["p99"] <= 11_600
    assert percentiles(whole, "overhead", (50,)) is None


@pytest.mark.parametrize("ms", [0.07, 1.0, 812.0, 2165.0, 3000.0, 600_000.0])
def test_the_percentiles_of_a_single_call_are_near_its_duration(ms: float) -> None:
    found = percentiles(build_histogram([ms], [], []), "duration", (50, 95, 99))
    assert found is not None
    assert [pytest.approx(ms, rel=0.21)] * 3 == list(found.values())


def _bucket(ms: float) -> int:
    return bucket_counts(build_histogram([ms], [], []))["duration"].index(1)


def test_a_bucket_holds_the_values_within_its_bounds() -> None:
    for number in range(BUCKETS - 1):
        assert _bucket(bound_ms(number)) == number and _bucket(bound_ms(number) * 1.001) == number + 1
    assert _bucket(1e12) == BUCKETS - 1


def test_every_field_of_a_record_is_documented() -> None:
    from tests.processes import ROOT

    text = (ROOT / "docs/ledger.md").read_text()
    assert [name for name in Record.__struct_fields__ if f"| `{name}` |" not in text] == []
