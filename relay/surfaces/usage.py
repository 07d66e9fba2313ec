"""Sums of usage and cost over HTTP: GET …/usage, a part of management.

Owns the parameters of the query, and the shape of the response. ledger/usage.py reads the sums.
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
    """Add the route under `prefix`."""
    app.router.add_get(f"{prefix}/usage", get_usage)


async def get_usage(request: web.Request) -> web.Response:
    """Usage and cost, such as `?since=7d&by=provider,model&bucket=day`; CSV with `format=csv`."""
    database, parameters = open_query(request)
    rules = grouping(request.app[GATEWAY].settings.ledger)
    with client_errors():
        format_ = format_of(parameters.pop("format", "json"))
        query = _usage_query(parameters)
        report = await usage(database, query, rules)
    if format_ == "json":
        return as_json(report)
    lines = csv_rows.usage_rows(report, columns_of(query))
    text = "".join(f"{line}\r\n" for line in lines)
    return web.Response(text=text, headers={"content-type": CSV})


def _usage_query(parameters: Mapping[str, str]) -> UsageQuery:
    now_s = time.time()
    only = {name: value for name, value in parameters.items() if name in KEYS}
    if unknown := set(parameters) - set(only) - {"since", "until", "by", "bucket", "sort", "top"}:
        raise BadQuery(f"unknown parameter '{clean(min(unknown), 40)}'")
    by = keys_of(parameters.get("by", ""))
    bucket = parameters.get("bucket")
    if bucket is not None and bucket not in SPANS:
        raise BadQuery("bucket is minute, hour or day")
    since_s = moment_s("since", parameters.get("since", "24h"), now_s)
    until = parameters.get("until")
    until_s = now_s if until is None else moment_s("until", until, now_s)
    sort = sort_of(parameters.get("sort", "cost"))
    top = whole_of("top", parameters["top"], 1, MAX_TOP) if "top" in parameters else None
    return UsageQuery(since_s, until_s, now_s, by, bucket, only, sort, top)
