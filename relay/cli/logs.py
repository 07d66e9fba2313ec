"""`relay logs`: the latest calls of the ledger, a line each, as text, JSON or CSV.

Owns how a call looks on a terminal, and following the calls that end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import uvloop

from relay.cli.ledger_access import (
    add_selection,
    equal_filters,
    open_ledger,
    to_json,
    to_printable,
)
from relay.cli.sources import load_config
from relay.core.text import quoted
from relay.ledger import csv_rows, queries
from relay.ledger.queries import BadQuery, Filter, moment_s
from relay.registry.load import Config
from relay.storage.database import Database

_FOLLOW_S = 0.5
_LATEST_SEEN = 2000
_OUT_OF_ORDER = 100
_AT_A_TIME = 500
Call = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--follow", action="store_true", help="go on with every call that ends")
    parser.add_argument("--limit", type=int, default=20, help="how many of the latest (20)")
    parser.add_argument("--failed", action="store_true", help="only those that went wrong")
    parser.add_argument("--user", help="only of this end user")
    entry = "only with this entry of cf-aig-metadata; several times: with all of them"
    parser.add_argument("--metadata", action="append", default=[], metavar="NAME=VALUE", help=entry)
    add_selection(parser, since=None)


def run(options: argparse.Namespace) -> int:
    """Print the calls; 0. Interrupting `--follow` is its normal end."""
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(print_calls(load_config(options), options, print))
    return 0


async def print_calls(
    config: Config, options: argparse.Namespace, out: Callable[[str], None]
) -> None:
    """Print the latest calls, the last of them at the end. Raises NoAnswer."""
    async with open_ledger(config) as database:
        which = Filter(
            since_s=moment_s("--since", options.since, time.time()) if options.since else None,
            equal=equal_filters(options, "provider", "model", "client", "user"),
            failed=True if options.failed else None,
            metadata=dict(map(_entry, options.metadata)),
        )
        seq = await queries.last_seq(database)
        latest = await _latest(database, which, options.limit)
        if options.csv:
            out(csv_rows.row(csv_rows.CALL_COLUMNS))
        for call in reversed(latest):
            out(_line(call, options))
        if options.follow:
            shown = [call["id"] for call in latest]
            async for call in _following(database, seq, which, shown):
                out(_line(call, options))


async def _latest(database: Database, which: Filter, limit: int) -> list[Call]:
    found: list[Call] = []
    cursor = None
    while len(found) < limit:
        at_once = min(_AT_A_TIME, limit - len(found))
        page = await queries.page(database, which, cursor, at_once)
        found += page.logs
        if (cursor := page.cursor) is None:
            break
    return found


async def _following(
    database: Database, seq: int, which: Filter, shown: Sequence[str]
) -> AsyncIterator[Call]:
    """Every call that ends after a place in the order of writing. Writers may be a little out of
    order: what was seen, or shown before, is known.
    """
    there = await queries.after(database, max(0, seq - _OUT_OF_ORDER), which, _AT_A_TIME)
    seen = dict.fromkeys([*shown, *(call["id"] for at, call in there if at <= seq)])
    while True:
        newest = await queries.last_seq(database)
        found = await queries.after(database, max(0, seq - _OUT_OF_ORDER), which, _AT_A_TIME)
        for _, call in found:
            if call["id"] not in seen:
                yield call
                seen[call["id"]] = None
        # Where a page was full, more may follow before the newest.
        seq = found[-1][0] if len(found) == _AT_A_TIME else max(seq, newest)
        sys.stdout.flush()
        while len(seen) > _LATEST_SEEN:
            seen.pop(next(iter(seen)))
        await asyncio.sleep(_FOLLOW_S)


def _line(call: Call, options: argparse.Namespace) -> str:
    if options.json:
        return to_json(call)
    if options.csv:
        return csv_rows.call_row(call)
    used = call.get("usage") or {}
    provider, model = call["provider"], call.get("model")
    answered = call.get("answered_by") or provider, call.get("model_answered") or model
    parts = [
        f"{call['created_at']}  {call['status']}  {call['outcome']:<11}",
        f"{answered[0]}/{call['endpoint']}",
        answered[1] or "-",
        f"{call['duration_ms']:.0f} ms",
        f"{used.get('input_tokens', 0)}+{used.get('output_tokens', 0)} tokens",
        _cost(call, used),
    ]
    if answered != (provider, model):
        parts.append(f"for {provider}/{model or '-'}")
    if call.get("error"):
        parts.append(call["error"])
    return to_printable("  ".join(parts))


def _cost(call: Call, used: dict[str, Any]) -> str:
    """`~` before what is estimated, `?` where something was used that has no price, and `-` where
    there is nothing to tell.
    """
    if call["cost_usd"] is not None:
        cost = bytes(call["cost_usd"]).decode()
        return f"{'~' if used.get('estimated') else ''}${cost}" if used or cost != "0" else "-"
    return "?" if used else "-"


def _entry(text: str) -> tuple[str, str]:
    """`team=growth`. Raises BadQuery."""
    name, sign, value = text.partition("=")
    if not name or not sign:
        raise BadQuery(f"--metadata is NAME=VALUE, not '{quoted(text)}'")
    return name, value
