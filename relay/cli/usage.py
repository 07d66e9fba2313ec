"""`relay usage`: print usage and cost of the calls in the ledger, as a table, JSON or CSV.

Owns the layout of the table. The query is in ledger/usage.py.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import msgspec
import uvloop

from relay.cli.ledger_access import (
    add_selection,
    equal_filters,
    open_ledger,
    to_json,
)
from relay.cli.options import whole
from relay.cli.sources import load_config
from relay.core.text import escaped
from relay.ledger import csv_rows
from relay.ledger.group_rollups import grouping
from relay.ledger.queries import moment_s
from relay.ledger.usage import MAX_TOP, SORTS, SPANS, UsageQuery, columns_of, keys_of, usage
from relay.registry.load import Config
from relay.storage.tables import KEYS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    groups = f"{', '.join(KEYS)}, separated by commas"
    parser.add_argument(
        "--by",
        default="provider",
        help=f"{groups}; or user, team, agent_session or metadata.NAME, alone or with provider and"
        " model",
    )
    parser.add_argument("--bucket", choices=sorted(SPANS), help="a row for each span of time")
    parser.add_argument("--until", help="end of the period, as --since (now)")
    parser.add_argument(
        "--sort", default="cost", choices=SORTS, metavar="WHAT", help=f"{', '.join(SORTS)} (cost)"
    )
    parser.add_argument(
        "--top",
        type=whole(1, MAX_TOP),
        help="the first rows (of each bucket), and the sum of the others",
    )
    add_selection(parser, since="24h")


def run(options: argparse.Namespace) -> int:
    """Print the table; 0."""
    uvloop.run(print_usage(load_config(options), options, print))
    return 0


async def print_usage(
    config: Config, options: argparse.Namespace, out: Callable[[str], None]
) -> None:
    """Print usage and cost. Raises NoAnswer."""
    async with open_ledger(config) as database:
        query = _usage_query(options)
        answer = await usage(database, query, grouping(config.settings.ledger))
    keys = columns_of(query)
    if options.json:
        lines = [to_json(answer)]
    elif options.csv:
        lines = csv_rows.usage_rows(answer, keys)
    else:
        total = dict.fromkeys(keys, "") | {keys[0] if keys else "total": "total"} | answer["total"]
        lines = list(map(escaped, _table(keys, [*answer["rows"], total])))
        lines += _remarks(total)
    for line in lines:
        out(line)


def _usage_query(options: argparse.Namespace) -> UsageQuery:
    """Raises BadQuery."""
    now_s = time.time()
    until_s = moment_s("--until", options.until, now_s) if options.until else now_s
    return UsageQuery(
        moment_s("--since", options.since, now_s),
        until_s,
        now_s,
        keys_of(options.by),
        options.bucket,
        equal_filters(options, "provider", "model", "client"),
        options.sort,
        options.top,
    )


_HEADS = (
    "requests", "errors", "cache hits", "input", "output", "cached tokens", "characters",
    "seconds", "cost USD", "p50 ms", "p95 ms",
)  # fmt: skip


def _table(keys: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    """A header and a line for each row; numbers are right-aligned, cost by its decimal point."""
    unmarked = "    " if any(row["unpriced"] for row in rows) else ""
    cells = [[*keys, *_HEADS], *(_cells(row, keys, unmarked) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        texts = [
            text.ljust(width) if at < len(keys) else text.rjust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(texts).rstrip())
    return lines


def _cells(row: dict[str, Any], keys: Sequence[str], unmarked: str) -> list[str]:
    latency = row["latency_ms"] or {}
    cost = ("~" if row["estimated"] else "") + _dollars(row["cost_usd"])
    cost += " + ?" if row["unpriced"] else unmarked
    return [
        *(str(row.get(key, "") or ("-" if key in row else "")) for key in keys),
        str(row["requests"]), str(row["errors"]), str(row["cache_hits"]),
        str(row["input_tokens"]), str(row["output_tokens"]), str(row["cache_read_tokens"]),
        str(row["characters"]), f"{row['audio_ms'] / 1000:.1f}", cost,
        _number(latency.get("p50")), _number(latency.get("p95")),
    ]  # fmt: skip


def _dollars(raw: msgspec.Raw) -> str:
    """Dollars with four decimals; `<0.0001` for less."""
    exact = Decimal(bytes(raw).decode())
    shown = exact.quantize(Decimal("0.0001"), ROUND_HALF_UP)
    return "<0.0001" if exact > 0 and not shown else f"{shown:f}"


def _remarks(total: dict[str, Any]) -> list[str]:
    """The legend of the marks beside the cost."""
    remarks = []
    if total["estimated"]:
        remarks.append(f"~  usage of {_calls(total['estimated'])} is estimated: docs/ledger.md")
    if count := total["unpriced"]:
        has = "has" if count == 1 else "have"
        remarks.append(f"?  {_calls(count)} {has} no price: docs/pricing.md")
    return remarks


def _calls(count: int) -> str:
    return "1 call" if count == 1 else f"{count} calls"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"
