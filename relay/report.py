"""`relay logs` and `relay usage`: the ledger's answers on a terminal, as tables or as JSON lines.

Owns: how they look. They are asked of the database itself, whether or not a relay runs.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from relay.ledger import queries
from relay.ledger.queries import BadQuestion, Filter, moment_s
from relay.ledger.usage import SPANS, Question, keys_of, usage
from relay.registry.load import Config
from relay.storage.database import Database, DatabaseAway, database_url
from relay.storage.readers import QuestionRefused
from relay.storage.tables import KEYS

_FOLLOW_S = 0.5
_LATEST_SEEN = 2000
_OUT_OF_ORDER = 100
_encode = msgspec.json.Encoder(enc_hook=str).encode
Print = Callable[[str], None]


class NoAnswer(Exception):
    """There is no ledger, or it cannot be asked; the text says why."""


def add_arguments(logs: argparse.ArgumentParser, usage_of: argparse.ArgumentParser) -> None:
    """The options of both commands."""
    logs.add_argument("--follow", action="store_true", help="go on with every call that ends")
    logs.add_argument("--limit", type=int, default=20, help="how many of the latest (20)")
    logs.add_argument("--failed", action="store_true", help="only those that went wrong")
    usage_of.add_argument(
        "--by", default="provider", help=f"{', '.join(KEYS)} (several with commas); metadata.NAME"
    )
    usage_of.add_argument("--bucket", choices=sorted(SPANS), help="a row for each")
    usage_of.add_argument("--until", help="until when (now)")
    for parser, since in ((logs, None), (usage_of, "24h")):
        parser.add_argument("--since", default=since, help="7d, 12h, or a day or time in ISO 8601")
        parser.add_argument("--provider", help="only this one")
        parser.add_argument("--model", help="only this one")
        parser.add_argument("--client", help="only this one")
        parser.add_argument("--json", action="store_true", help="JSON, for programs")


async def logs(config: Config, options: argparse.Namespace, out: Print) -> None:
    """Print the latest calls, the last of them at the end. Raises NoAnswer."""
    database = _database(config)
    try:
        which = Filter(
            since_s=moment_s("--since", options.since, time.time()) if options.since else None,
            equal=_equal(options),
            failed=True if options.failed else None,
        )
        seq = await queries.last_seq(database)
        found: list[dict[str, Any]] = []
        cursor = None
        while len(found) < options.limit:
            page = await queries.page(database, which, cursor, options.limit - len(found))
            found += page.logs
            cursor = page.cursor
            if cursor is None:
                break
        for call in reversed(found):
            out(_line(call, options.json))
        if options.follow:
            await _follow(database, seq, options, out)
    except (BadQuestion, DatabaseAway, QuestionRefused) as error:
        raise NoAnswer(str(error)) from error
    finally:
        await database.close()


async def _follow(database: Database, seq: int, options: argparse.Namespace, out: Print) -> None:
    """Until somebody stops it. Writers may be a little out of order: what was seen is known."""
    there = await queries.after(database, max(0, seq - _OUT_OF_ORDER))
    seen: dict[str, None] = {call["id"]: None for at, call in there if at <= seq}
    equal = _equal(options)
    while True:
        for at, call in await queries.after(database, max(0, seq - _OUT_OF_ORDER)):
            if call["id"] in seen:
                continue
            fits = all(call.get(name) == value for name, value in equal.items())
            if fits and (not options.failed or not call["success"]):
                out(_line(call, options.json))
            seen[call["id"]] = None
            seq = max(seq, at)
        sys.stdout.flush()
        while len(seen) > _LATEST_SEEN:
            seen.pop(next(iter(seen)))
        await asyncio.sleep(_FOLLOW_S)


async def spent(config: Config, options: argparse.Namespace, out: Print) -> None:
    """Print what was used and what it cost. Raises NoAnswer."""
    database = _database(config)
    try:
        now_s = time.time()
        by = keys_of(options.by)
        until_s = moment_s("--until", options.until, now_s) if options.until else now_s
        since_s = moment_s("--since", options.since, now_s)
        asked = Question(since_s, until_s, now_s, by, options.bucket, _equal(options))
        answer = await usage(database, asked)
    except (BadQuestion, DatabaseAway, QuestionRefused) as error:
        raise NoAnswer(str(error)) from error
    finally:
        await database.close()
    if options.json:
        out(_encode(answer).decode())
        return
    keys = (["at"] if options.bucket else []) + by
    total = dict.fromkeys(keys, "") | {keys[0] if keys else "total": "total"} | answer["total"]
    rows = [_columns(row, keys) for row in (*answer["rows"], total)]
    for line in _table([*keys, *_HEADS], rows):
        out(_shown(line))
    if answer["total"]["unpriced"]:
        out(f"{answer['total']['unpriced']} calls have no price: docs/pricing.md")


_HEADS = ("requests", "errors", "input", "output", "cached", "cost USD", "p50 ms", "p95 ms")


def _columns(row: dict[str, Any], keys: Sequence[str]) -> list[str]:
    latency = row["latency_ms"] or {}
    cost = ("~" if row["estimated"] else "") + _text(row["cost_usd"])
    return [
        *(str(row.get(key, "") or ("-" if key in row else "")) for key in keys),
        str(row["requests"]), str(row["errors"]), str(row["input_tokens"]),
        str(row["output_tokens"]), str(row["cache_hits"]),
        f"{cost} + ?" if row["unpriced"] else cost,
        _text(latency.get("p50")), _text(latency.get("p95")),
    ]  # fmt: skip


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return bytes(value).decode() if isinstance(value, msgspec.Raw) else f"{value:g}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    words = len(heads) - len(_HEADS)
    lines = []
    for row in (heads, *rows):
        cells = [
            text.ljust(width) if at < words else text.rjust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _line(call: dict[str, Any], as_json: bool) -> str:
    if as_json:
        return _encode(call).decode()
    usage_of = call.get("usage") or {}
    cost = _text(call["cost_usd"])
    mark = "~$" if usage_of.get("estimated") else "$"
    return _shown(
        f"{call['created_at']}  {call['status']}  {call['outcome']:<11}  {call['provider']}/"
        f"{call['endpoint']}  {call.get('model') or '-'}  {call['duration_ms']:.0f} ms"
        f"  {usage_of.get('input_tokens', 0)}+{usage_of.get('output_tokens', 0)} tokens"
        f"  {mark + cost if cost != '-' else 'not priced'}"
        + (f"  {call['error']}" if call.get("error") else "")
    )


def _shown(text: str) -> str:
    """`text` without what a terminal obeys: models and endpoints are what clients call them."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _equal(options: argparse.Namespace) -> dict[str, str]:
    given = {name: getattr(options, name) for name in ("provider", "model", "client")}
    return {name: value for name, value in given.items() if value is not None}


def _database(config: Config) -> Database:
    if not config.settings.database:
        raise NoAnswer("gateway.yaml names no `database`: there is no ledger")
    return Database(database_url(config.settings.database))
