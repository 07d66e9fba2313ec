"""`relay usage` and `relay logs` as text, JSON and CSV: amounts, marks and unsafe text."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from relay.cli.ledger_access import NoAnswer
from relay.cli.logs import print_calls
from relay.cli.main import OK, build_parser, main
from relay.cli.usage import _dollars, print_usage
from relay.core.exchange import uuid7
from relay.core.record import Record
from relay.core.usage import Usage
from relay.gateway import new_id
from relay.ledger import csv_rows
from relay.ledger.group_rollups import Grouping
from relay.ledger.queries import usd
from relay.ledger.retention import Retention
from relay.ledger.rollups import by_key
from relay.ledger.rows import entry_of
from relay.ledger.writer import Lost, Writer
from relay.registry.load import Config, Sources, load
from relay.storage.database import Database, database_url
from tests.conftest import StartRelay
from tests.processes import ROOT
from tests.relays import provider, write_config
from tests.upstream.raw import RawUpstream, ok

ESCAPE = "\x1b[2J"
_number = itertools.count()


def options(*arguments: str) -> argparse.Namespace:
    return build_parser().parse_args(list(arguments))


def call(**facts: Any) -> Record:
    at_ms = time.time_ns() // 1_000_000 - 1000 + next(_number)
    record = Record(uuid7(at_ms * 1_000_000, random.getrandbits), "rest", "native", "POST", "openai", "chat/completions", 200, "relayed", 12.0, 10, 20, "10.0.0.1", kind="chat", model="gpt-5", via="direct")
    for name, value in facts.items():
        setattr(record, name, value)
    record.event, record.level, record.timestamp = "exchange", "info", "2026-11-24T12:00:00.000000Z"
    return record


CALLS = (
    call(usage=Usage(1000, 500, cache_read_tokens=200), cost_nano_usd=12_345_678_900, user="ann", metadata={"team": "growth"}),
    call(provider="openai", answered_by="azure", model_answered="gpt-5.1", usage=Usage(10, 5, estimated=True), cost_nano_usd=50_000, metadata={"team": "growth"}),
    call(provider="cartesia", endpoint="tts/bytes", model="sonic", usage=Usage(characters=42, audio_ms=1500), cost_nano_usd=None, metadata={"team": "=1+2"}),
    call(outcome="cached", cache="HIT", cost_nano_usd=0, saved_nano_usd=7, user="bob"),
    call(status=404, outcome="refused", error="unknown_provider", provider="nobody", via=None, model=f"m{ESCAPE}"),
)


@pytest.fixture
async def config(database_setting: str, tmp_path: Path) -> Config:
    """The configuration that the commands read, with a ledger that contains CALLS."""
    writer = Writer(Database(database_url(database_setting)), new_id, Lost())
    await writer.start(lambda: Retention(86400, 86400), lambda: Grouping(("user", "metadata.team")))
    writer.take([entry_of(record, None, None) for record in CALLS], CALLS, by_key(CALLS))
    await writer.stop()
    write_config(tmp_path, {"database": database_setting, "ledger": {"group_by": ["team"]}, "providers": {"openai": provider("http://127.0.0.1:1")}})
    return load(Sources(tmp_path / "gateway.yaml", None))


async def printed(command: Any, config: Config, *arguments: str) -> list[str]:
    lines: list[str] = []
    await command(config, options("logs" if command is print_calls else "usage", *arguments), lines.append)
    return lines


async def test_usage_is_a_table_with_aligned_amounts_of_four_decimals(config: Config) -> None:
    head, *lines = await printed(print_usage, config, "--by", "provider")
    columns = ["requests", "errors", "cache hits", "input", "output", "cached tokens", "characters", "seconds", "cost USD", "p50 ms", "p95 ms"]
    assert [name for name in columns if name not in head] == []
    table = {line.split()[0]: line.split() for line in lines if not line.startswith(("~", "?"))}
    assert table["openai"][1:10] == ["2", "0", "1", "1000", "500", "200", "0", "0.0", "12.3457"]
    assert table["azure"][1:10] == ["1", "0", "0", "10", "5", "0", "0", "0.0", "~0.0001"]
    assert table["cartesia"][1:11] == ["1", "0", "0", "0", "0", "0", "42", "1.5", "0.0000", "+"]
    assert table["total"][1:11] == ["5", "1", "1", "1010", "505", "200", "42", "1.5", "~12.3457", "+"]
    points = {line.index(cells[9]) + cells[9].index(".") for cells in table.values() for line in lines if line.split() == cells}
    assert len(points) == 1, "the decimal points are aligned"
    assert len({len(line) for line in (head, *lines[: len(table)])}) == 1
    assert lines[-2:] == ["~  usage of 1 call is estimated: docs/ledger.md", "?  1 call has no price: docs/pricing.md"]


def test_an_amount_below_four_decimals_is_not_shown_as_zero() -> None:
    shown = {nano: _dollars(usd(nano)) for nano in (0, 1, 49_999, 50_000, 123_450_000, 10**18 + 50_000)}  # type: ignore[arg-type]
    assert shown == {0: "0.0000", 1: "<0.0001", 49_999: "<0.0001", 50_000: "0.0001", 123_450_000: "0.1235", 10**18 + 50_000: "1000000000.0001"}


async def test_usage_by_team_and_by_user_with_sort_and_top(config: Config) -> None:
    _, *lines = await printed(print_usage, config, "--by", "metadata.team,model", "--sort", "requests", "--since", "7d")
    pairs = [line.split()[:2] for line in lines[:5]]
    assert sorted(pairs) == [["(none)", "gpt-5"], ["(none)", r"m\x1b[2J"], ["=1+2", "sonic"], ["growth", "gpt-5"], ["growth", "gpt-5.1"]]
    _, *lines = await printed(print_usage, config, "--by", "metadata.team", "--top", "1")
    assert [line.split()[:2] for line in lines[:3]] == [["growth", "2"], ["(rest)", "3"], ["total", "5"]]
    _, *lines = await printed(print_usage, config, "--by", "user", "--sort", "name")
    assert [line.split()[:2] for line in lines[:4]] == [["(none)", "3"], ["ann", "1"], ["bob", "1"], ["total", "5"]]
    for arguments, why in (
        (("--by", "metadata.cost"), "ledger.group_by"), (("--since", "never"), "--since is not a time"),
    ):  # fmt: skip
        with pytest.raises(NoAnswer, match=why):
            await printed(print_usage, config, *arguments)


async def test_usage_as_csv_has_every_sum_and_counts_estimated_and_unpriced_calls(config: Config) -> None:
    found = list(csv.DictReader(await printed(print_usage, config, "--by", "provider,model", "--csv")))
    by_provider = {row["provider"]: row for row in found}
    assert (by_provider["azure"]["estimated"], by_provider["azure"]["cost_usd"], by_provider["azure"]["model"]) == ("1", "0.00005", "gpt-5.1")
    assert (by_provider["cartesia"]["unpriced"], by_provider["cartesia"]["characters"], by_provider["cartesia"]["audio_ms"]) == ("1", "42", "1500")
    assert sum(int(row["requests"]) for row in found) == 5, "no row sums up other rows"
    assert float(by_provider["openai"]["latency_ms_p50"]) > 0
    buckets = list(csv.DictReader(await printed(print_usage, config, "--by", "metadata.team", "--bucket", "day", "--csv")))
    assert {row["metadata.team"] for row in buckets} == {"growth", "'=1+2", "(none)"} and all(row["at"].endswith("Z") for row in buckets)


async def test_usage_and_logs_in_json_mark_estimates(config: Config) -> None:
    (line,) = await printed(print_usage, config, "--json")
    assert json.loads(line)["total"]["estimated"] == 1
    calls = [json.loads(line) for line in await printed(print_calls, config, "--json")]
    assert [(call.get("usage") or {}).get("estimated") for call in calls] == [None, True, None, None, None]


async def test_logs_show_the_provider_that_responded_and_the_known_cost(config: Config) -> None:
    lines = await printed(print_calls, config)
    assert lines[0].endswith("  200  relayed      openai/chat/completions  gpt-5  12 ms  1000+500 tokens  $12.3456789")
    assert lines[1].endswith("  azure/chat/completions  gpt-5.1  12 ms  10+5 tokens  ~$0.00005  for openai/gpt-5")
    assert lines[2].endswith("  cartesia/tts/bytes  sonic  12 ms  0+0 tokens  ?")
    assert lines[3].endswith("  0+0 tokens  -") and lines[4].endswith("  0+0 tokens  -  unknown_provider")


async def test_logs_print_no_terminal_control_character(config: Config, database_setting: str) -> None:
    """This holds also for a row that an older relay stored without cleaning it."""
    writer = Writer(Database(database_url(database_setting)), new_id, Lost())
    await writer.start(lambda: Retention(86400, 86400), Grouping)
    unsafe = call(model=f"m{ESCAPE}\x9b31m\u202ex\r\nfake", endpoint="a\tb", user=f"{ESCAPE}")
    writer.take([entry_of(unsafe, None, None)], [unsafe], by_key([unsafe]))
    await writer.stop()
    for arguments in ((), ("--json",), ("--csv",)):
        lines = await printed(print_calls, config, "--limit", "1", *arguments)
        assert all(line.isprintable() for line in lines), (arguments, lines)
    assert json.loads((await printed(print_calls, config, "--limit", "1", "--json"))[0])["model"] == unsafe.model


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (("--metadata", "team=growth"), 2), (("--user", "ann"), 1), (("--metadata", "team=growth", "--user", "ann"), 1), (("--metadata", "team==1+2"), 1),
        (("--metadata", "team=growth", "--metadata", "env=x"), 0), (("--model", "gpt-5.1"), 1), (("--provider", "azure"), 1), (("--failed",), 1),
    ],
)  # fmt: skip
async def test_logs_are_filtered_by_metadata_user_model_provider_and_failure(config: Config, arguments: tuple[str, ...], count: int) -> None:
    assert len(await printed(print_calls, config, *arguments)) == count


async def test_a_metadata_filter_without_a_value_is_refused(config: Config) -> None:
    with pytest.raises(NoAnswer, match="--metadata must be NAME=VALUE, not 'team'"):
        await printed(print_calls, config, "--metadata", "team")


async def test_logs_as_csv_have_one_row_per_call(config: Config) -> None:
    found = list(csv.DictReader(await printed(print_calls, config, "--csv")))
    assert [row["estimated"] for row in found] == ["", "true", "", "", ""]
    assert [row["cost_usd"] for row in found] == ["12.3456789", "0.00005", "", "0", ""]
    assert found[0]["metadata"] == '{"team": "growth"}' and found[0]["user"] == "ann" and found[1]["answered_by"] == "azure"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1", "-5", "=cmd|' /C calc'!A0"])
def test_a_text_that_a_spreadsheet_would_evaluate_is_quoted(text: str) -> None:
    ((cell, number),) = csv.reader([csv_rows.row([text, -5])])
    assert cell.startswith("'") and number == "-5", "numbers stay as they are"


@pytest.mark.parametrize("value", [-1, -0.5, 0, 10**15, 1.5])
def test_a_number_is_not_quoted_in_csv(value: float) -> None:
    assert csv_rows.row([value]) == str(value)


def test_harmless_texts_are_not_changed_in_csv() -> None:
    given = ["growth", "a=b", "1-2", "", 'say "x"', "a,b", "caf\u00e9", "(none)"]
    assert next(csv.reader([csv_rows.row(given)])) == given


async def test_csv_over_http_quotes_formulas_too(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(b'{"model": "m", "choices": [{"message": {"content": "word"}}]}', "Content-Type: application/json"))
    relay = await start({"database": database_setting, "ledger": {"group_by": ["team"]}}, openai=provider(raw.url))
    body = {"model": "gpt-4o-mini", "messages": [], "user": "@ann"}
    _, answered, _ = await relay.call("POST", relay.path("openai", "chat/completions"), json=body, headers={"cf-aig-metadata": '{"team": "=1+2", "n": -5}'})
    await relay.idle()
    at = f"{relay.url}/api/v1/ai-gateway"
    await relay.call("PATCH", f"{at}/logs/{answered['cf-aig-log-id']}", json={"score": -0.5, "feedback": -1})
    status, headers, text = await relay.call("GET", f"{at}/logs/export?format=csv")
    (row,) = csv.DictReader(text.decode().splitlines())
    assert (status, headers["content-type"]) == (200, "text/csv; charset=utf-8") and text.endswith(b"\r\n")
    assert (row["user"], row["score"], row["feedback"], row["estimated"]) == ("'@ann", "-0.5", "-1", "true")
    status, headers, text = await relay.call("GET", f"{at}/usage?by=metadata.team&format=csv")
    (row,) = csv.DictReader(text.decode().splitlines())
    assert (status, headers["content-type"], row["metadata.team"], row["estimated"]) == (200, "text/csv; charset=utf-8", "'=1+2", "1")
    assert (await relay.call("GET", f"{at}/logs/export?format=xml"))[0] == 400


@pytest.mark.programs
def test_a_closed_pipe_ends_a_command_without_a_message(tmp_path: Path) -> None:
    """As in `relay schema | head -1`: no traceback, no message at exit, and exit code 0."""
    reading, writing = os.pipe()
    os.close(reading)
    completed = subprocess.run([sys.executable, "-m", "relay", "schema"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (completed.returncode, completed.stderr) == (OK, b"")


def test_a_pipe_that_closes_during_a_report_ends_it_without_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tmp_path, {"database": str(tmp_path / "relay.db"), "providers": {}})
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", buffering=1) as out:
        monkeypatch.setattr("sys.stdout", out)
        assert main(["usage", "--config", str(tmp_path / "gateway.yaml")]) == OK
