"""`relay logs` and `relay usage`: the ledger's answers on a terminal, as tables, JSON or CSV.

Owns: how they look. They are asked of the database itself, whether or not a relay runs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import msgspec

from relay.core.text import quoted
from relay.ledger import queries, sheets
from relay.ledger.groups import grouping
from relay.ledger.queries import BadQuestion, Filter, moment_s
from relay.ledger.usage import MOST_TOP, SORTS, SPANS, Question, columns_of, keys_of, usage
from relay.registry.load import Config
from relay.storage.database import Database, DatabaseAway, database_url
from relay.storage.readers import QuestionRefused
from relay.storage.tables import KEYS

_FOLLOW_S = 0.5
_LATEST_SEEN = 2000
_OUT_OF_ORDER = 100
_AT_A_TIME = 500
_encode = msgspec.json.Encoder(enc_hook=str).encode
Print = Callable[[str], None]
Call = dict[str, Any]


class NoAnswer(Exception):
    """There is no ledger, or it cannot be asked; the text says why."""


def add_arguments(logs: argparse.ArgumentParser, usage_of: argparse.ArgumentParser) -> None:
    """The options of both commands."""
    logs.add_argument("--follow", action="store_true", help="go on with every call that ends")
    logs.add_argument("--limit", type=int, default=20, help="how many of the latest (20)")
    logs.add_argument("--failed", action="store_true", help="only those that went wrong")
    logs.add_argument("--user", help="only of this end user")
    entry = "only with this entry of cf-aig-metadata; several times: with all of them"
    logs.add_argument("--metadata", action="append", default=[], metavar="NAME=VALUE", help=entry)
    names = "or user or metadata.NAME, alone or with provider and model"
    usage_of.add_argument(
        "--by", default="provider", help=f"{', '.join(KEYS)} (several with commas); {names}"
    )
    usage_of.add_argument("--bucket", choices=sorted(SPANS), help="a row for each")
    usage_of.add_argument("--until", help="until when (now)")
    usage_of.add_argument(
        "--sort", default="cost", choices=SORTS, metavar="WHAT", help=f"{', '.join(SORTS)} (cost)"
    )
    usage_of.add_argument("--top", type=int, help="so many rows (of each bucket), and the rest")
    for parser, since in ((logs, None), (usage_of, "24h")):
        parser.add_argument("--since", default=since, help="7d, 12h, or a day or time in ISO 8601")
        parser.add_argument("--provider", help="only this one")
        parser.add_argument("--model", help="only this one")
        parser.add_argument("--client", help="only this one")
        shape = parser.add_mutually_exclusive_group()
        shape.add_argument("--json", action="store_true", help="JSON, for programs")
        shape.add_argument("--csv", action="store_true", help="CSV, for spreadsheets")


async def logs(config: Config, options: argparse.Namespace, out: Print) -> None:
    """Print the latest calls, the last of them at the end. Raises NoAnswer."""
    async with _asking(config) as database:
        which = Filter(
            since_s=moment_s("--since", options.since, time.time()) if options.since else None,
            equal=_equal(options, "provider", "model", "client", "user"),
            failed=True if options.failed else None,
            metadata=dict(map(_entry, options.metadata)),
        )
        seq = await queries.last_seq(database)
        latest = await _latest(database, which, options.limit)
        if options.csv:
            out(sheets.row(sheets.CALL_COLUMNS))
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


async def spent(config: Config, options: argparse.Namespace, out: Print) -> None:
    """Print what was used and what it cost. Raises NoAnswer."""
    async with _asking(config) as database:
        asked = _question(options)
        answer = await usage(database, asked, grouping(config.settings.ledger))
    keys = columns_of(asked)
    if options.json:
        lines = [_json(answer)]
    elif options.csv:
        lines = sheets.usage_rows(answer, keys)
    else:
        total = dict.fromkeys(keys, "") | {keys[0] if keys else "total": "total"} | answer["total"]
        lines = list(map(_shown, _table(keys, [*answer["rows"], total])))
        lines += _remarks(total)
    for line in lines:
        out(line)


def _question(options: argparse.Namespace) -> Question:
    """Raises BadQuestion."""
    now_s = time.time()
    until_s = moment_s("--until", options.until, now_s) if options.until else now_s
    if options.top is not None and not 1 <= options.top <= MOST_TOP:
        raise BadQuestion(f"--top is not a number from 1 to {MOST_TOP}")
    return Question(
        moment_s("--since", options.since, now_s),
        until_s,
        now_s,
        keys_of(options.by),
        options.bucket,
        _equal(options, "provider", "model", "client"),
        options.sort,
        options.top,
    )


_HEADS = (
    "requests", "errors", "cache hits", "input", "output", "cached tokens", "characters",
    "seconds", "cost USD", "p50 ms", "p95 ms",
)  # fmt: skip


def _table(keys: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    """A head and a line a row; numbers stand to the right, money digit under digit."""
    is_marked = any(row["unpriced"] for row in rows)
    cells = [[*keys, *_HEADS], *(_cells(row, keys, is_marked=is_marked) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        texts = [
            text.ljust(width) if at < len(keys) else text.rjust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(texts).rstrip())
    return lines


def _cells(row: dict[str, Any], keys: Sequence[str], *, is_marked: bool) -> list[str]:
    latency = row["latency_ms"] or {}
    cost = ("~" if row["estimated"] else "") + _money(row["cost_usd"])
    if is_marked:
        cost += " + ?" if row["unpriced"] else "    "
    return [
        *(str(row.get(key, "") or ("-" if key in row else "")) for key in keys),
        str(row["requests"]), str(row["errors"]), str(row["cache_hits"]),
        str(row["input_tokens"]), str(row["output_tokens"]), str(row["cache_read_tokens"]),
        str(row["characters"]), f"{row['audio_ms'] / 1000:.1f}", cost,
        _number(latency.get("p50")), _number(latency.get("p95")),
    ]  # fmt: skip


def _money(given: msgspec.Raw) -> str:
    """Dollars with four digits; what is less than that, but not nothing, shows as such."""
    exact = Decimal(bytes(given).decode())
    shown = exact.quantize(Decimal("0.0001"), ROUND_HALF_UP)
    return "<0.0001" if exact > 0 and not shown else f"{shown:f}"


def _remarks(total: dict[str, Any]) -> list[str]:
    """What the marks beside money mean."""
    remarks = []
    if total["estimated"]:
        remarks.append(f"~  usage of {total['estimated']} calls is estimated: docs/ledger.md")
    if total["unpriced"]:
        remarks.append(f"?  {total['unpriced']} calls have no price: docs/pricing.md")
    return remarks


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _line(call: Call, options: argparse.Namespace) -> str:
    if options.json:
        return _json(call)
    if options.csv:
        return sheets.call_row(call)
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
    return _shown("  ".join(parts))


def _cost(call: Call, used: dict[str, Any]) -> str:
    """`~` before what is estimated, `?` where something was used that has no price, and `-` where
    there is nothing to tell.
    """
    if call["cost_usd"] is not None:
        cost = bytes(call["cost_usd"]).decode()
        return f"{'~' if used.get('estimated') else ''}${cost}" if used or cost != "0" else "-"
    return "?" if used else "-"


def _json(answer: Any) -> str:
    """In JSON, with JSON's own escapes for what a terminal obeys."""
    text: str = _encode(answer).decode()
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def _shown(text: str) -> str:
    """`text` without what a terminal obeys: models and endpoints are what clients call them."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _entry(text: str) -> tuple[str, str]:
    """`team=growth`. Raises BadQuestion."""
    name, sign, value = text.partition("=")
    if not name or not sign:
        raise BadQuestion(f"--metadata is NAME=VALUE, not '{quoted(text)}'")
    return name, value


def _equal(options: argparse.Namespace, *names: str) -> dict[str, str]:
    given = {{"user": "end_user"}.get(name, name): getattr(options, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}


@contextlib.asynccontextmanager
async def _asking(config: Config) -> AsyncIterator[Database]:
    """The ledger's database. Raises NoAnswer for what keeps a question from its answer."""
    if not config.settings.database:
        raise NoAnswer("gateway.yaml names no `database`: there is no ledger")
    database = Database(database_url(config.settings.database))
    try:
        yield database
    except DatabaseAway as error:
        raise NoAnswer(f"the database cannot be read ({error})") from error
    except (BadQuestion, QuestionRefused) as error:
        raise NoAnswer(str(error)) from error
    finally:
        await database.close()
