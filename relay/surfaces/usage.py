"""The ledger's sums over HTTP: …/usage, for local administrators while access is open.

Owns: the reading of its query, and the shape of its answer. The sums are ledger/usage.py's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from aiohttp import web

from relay.core.text import clean
from relay.gateway import GATEWAY
from relay.ledger import csv_rows
from relay.ledger.group_rollups import grouping
from relay.ledger.queries import BadQuery, moment_s
from relay.ledger.usage import MAX_TOP, SPANS, UsageQuery, columns_of, keys_of, sort_of, usage
from relay.storage.tables import KEYS
from relay.surfaces.logs import CSV, as_json, client_errors, format_of, open_query, whole_of


def add_routes(app: web.Application, prefix: str) -> None:
    """Add the surface."""
    app.router.add_get(f"{prefix}/usage", used)


async def used(request: web.Request) -> web.Response:
    """What was used and what it cost: `?since=7d&by=provider,model&bucket=day`."""
    database, given = open_query(request)
    rules = grouping(request.app[GATEWAY].settings.ledger)
    with client_errors():
        shape = format_of(given.pop("format", "json"))
        question = _usage_query(given)
        answer = await usage(database, question, rules)
    if shape == "json":
        return as_json(answer)
    lines = csv_rows.usage_rows(answer, columns_of(question))
    text = "".join(f"{line}\r\n" for line in lines)
    return web.Response(text=text, headers={"content-type": CSV})


def _usage_query(given: Mapping[str, str]) -> UsageQuery:
    now_s = time.time()
    only = {name: value for name, value in given.items() if name in KEYS}
    if unknown := set(given) - set(only) - {"since", "until", "by", "bucket", "sort", "top"}:
        raise BadQuery(f"unknown parameter '{clean(min(unknown), 40)}'")
    by = keys_of(given.get("by", ""))
    bucket = given.get("bucket")
    if bucket is not None and bucket not in SPANS:
        raise BadQuery("a bucket is a minute, hour or day")
    since_s = moment_s("since", given.get("since", "24h"), now_s)
    until_s = moment_s("until", given["until"], now_s) if "until" in given else now_s
    sort = sort_of(given.get("sort", "cost"))
    top = whole_of("top", given["top"], 1, MAX_TOP) if "top" in given else None
    return UsageQuery(since_s, until_s, now_s, by, bucket, only, sort, top)
