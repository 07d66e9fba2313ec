"""`relay logs`: print the latest calls of the ledger, one line each, as text, JSON or CSV.

Owns the text of a line, and `--follow`. The queries are in ledger/queries.py.
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
)
from relay.cli.options import whole
from relay.cli.sources import load_config
from relay.core.text import escaped, quoted
from relay.ledger import csv_rows, queries
from relay.ledger.queries import BadQuery, Filter, moment_s
from relay.registry.load import Config
from relay.storage.database import Database

_FOLLOW_S = 0.5
_MAX_PRINTED_IDS = 2000
_OUT_OF_ORDER = 100
"""How far behind the newest row a writer may still add one."""
_PAGE_ROWS = 500
_EQUAL = (
    "provider", "model", "client", "user", "team", "key_id", "user_agent", "agent_session",
    "agent_parent",
)  # fmt: skip
Call = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--follow", action="store_true", help="print further calls as they end")
    parser.add_argument("--limit", type=whole(1, 10**9), default=20, help="number of calls (20)")
    parser.add_argument("--failed", action="store_true", help="only failed calls")
    parser.add_argument("--user", help="only calls of this end user")
    parser.add_argument("--team", help="only calls of this team")
    parser.add_argument("--key-id", help="only calls with the key of this id")
    parser.add_argument(
        "--user-agent", help="only calls of this program; `claude-cli/*` is any version of it"
    )
    parser.add_argument("--agent-session", help="only calls of this session of a coding agent")
    parser.add_argument("--agent-parent", help="only calls of sub-agents that this agent started")
    parser.add_argument(
        "--metadata",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="only calls with this entry of cf-aig-metadata; repeat it to require several",
    )
    add_selection(parser, since=None)


def run(options: argparse.Namespace) -> int:
    """Print the calls; 0. An interrupt is the normal end of `--follow`."""
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(print_calls(load_config(options), options, print))
    return 0


async def print_calls(
    config: Config, options: argparse.Namespace, out: Callable[[str], None]
) -> None:
    """Print the latest calls, the newest one last. Raises NoAnswer."""
    async with open_ledger(config) as database:
        which = Filter(
            since_s=moment_s("--since", options.since, time.time()) if options.since else None,
            equal=equal_filters(options, *_EQUAL),
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
            printed = [call["id"] for call in latest]
            async for call in _following(database, seq, which, printed):
                out(_line(call, options))


async def _latest(database: Database, which: Filter, limit: int) -> list[Call]:
    found: list[Call] = []
    cursor = None
    while len(found) < limit:
        page = await queries.page(database, which, cursor, min(_PAGE_ROWS, limit - len(found)))
        found += page.logs
        if (cursor := page.cursor) is None:
            break
    return found


async def _following(
    database: Database, seq: int, which: Filter, printed: Sequence[str]
) -> AsyncIterator[Call]:
    """Every call whose row is written after row `seq`, without those in `printed`.

    Several writers may finish slightly out of order, so each query starts _OUT_OF_ORDER rows back
    and skips the calls that are known.
    """
    before = await queries.after(database, max(0, seq - _OUT_OF_ORDER), which, _PAGE_ROWS)
    known = dict.fromkeys([*printed, *(call["id"] for row, call in before if row <= seq)])
    while True:
        newest = await queries.last_seq(database)
        found = await queries.after(database, max(0, seq - _OUT_OF_ORDER), which, _PAGE_ROWS)
        for _, call in found:
            if call["id"] not in known:
                yield call
                known[call["id"]] = None
        # Behind a full page more rows may follow before the newest.
        seq = found[-1][0] if len(found) == _PAGE_ROWS else max(seq, newest)
        sys.stdout.flush()
        while len(known) > _MAX_PRINTED_IDS:
            known.pop(next(iter(known)))
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
    return escaped("  ".join(parts))


def _cost(call: Call, used: dict[str, Any]) -> str:
    """`~` before an estimate, `?` for usage without a price, `-` without usage and cost."""
    if call["cost_usd"] is not None:
        cost = bytes(call["cost_usd"]).decode()
        return f"{'~' if used.get('estimated') else ''}${cost}" if used or cost != "0" else "-"
    return "?" if used else "-"


def _entry(text: str) -> tuple[str, str]:
    """Name and value of an entry such as `team=growth`. Raises BadQuery."""
    name, sign, value = text.partition("=")
    if not name or not sign:
        raise BadQuery(f"--metadata must be NAME=VALUE, not '{quoted(text)}'")
    return name, value
