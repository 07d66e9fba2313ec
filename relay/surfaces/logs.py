"""The ledger's calls over HTTP: …/logs, a part of management.

Owns the parameters of queries, the bodies of requests, and the shape of responses.
ledger/queries.py runs the queries, ledger/changes.py makes changes, and surfaces/usage.py reports
sums.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from math import floor
from typing import Any, Literal, cast

import msgspec
from aiohttp import web

from relay.core.errors import (
    BadRequest,
    LedgerBusy,
    LogNotFound,
    QueryTimeout,
    StoreUnavailable,
)
from relay.core.metadata import MAX_ENTRIES
from relay.core.numbers import decimal_number, whole_number
from relay.core.text import clean
from relay.gate.management import Manager
from relay.ledger import changes, csv_rows, queries
from relay.ledger.queries import ABOVE, EQUAL, BadQuery, Filter, moment_s
from relay.storage.database import Database, DatabaseNewer, DatabaseUnavailable, RowsRefused
from relay.storage.readers import QueryRefused, QueryTooSlow, TooManyQueries
from relay.surfaces.management import audit, authorize, database_of, read_json

Format = Literal["json", "csv"]
CSV = "text/csv; charset=utf-8"
_encode = msgspec.json.Encoder(enc_hook=str).encode
_BOUNDS = {"status": (0, 999), "feedback": (-1, 1)}
"""Parameters that are whole numbers, with their bounds."""
_MAX_USD, _MAX = 1_000_000_000, 10**15
_PAGE_CALLS, _MAX_PAGE_CALLS = 50, 500
_EXPORT_BATCH_CALLS = 200


def add_routes(app: web.Application, prefix: str) -> None:
    """Add the routes under `prefix`."""
    router = app.router
    router.add_get(f"{prefix}/logs", logs)
    router.add_delete(f"{prefix}/logs", delete_logs)
    router.add_get(f"{prefix}/logs/export", export)
    router.add_get(f"{prefix}/logs/{{id}}", log)
    router.add_patch(f"{prefix}/logs/{{id}}", patch_log)
    router.add_delete(f"{prefix}/logs/{{id}}", delete_log)
    router.add_get(f"{prefix}/logs/{{id}}/{{side:request|response}}", body)


async def logs(request: web.Request) -> web.Response:
    """A page of calls, the latest first: `{"logs": […], "cursor": …}`."""
    database, parameters = open_query(request)
    with client_errors():
        limit_text = parameters.pop("limit", str(_PAGE_CALLS))
        limit = whole_of("limit", limit_text, 1, _MAX_PAGE_CALLS)
        cursor = parameters.pop("cursor", None)
        page = await queries.page(database, _filter(parameters), cursor, limit)
    return as_json({"logs": page.logs, "cursor": page.cursor})


async def log(request: web.Request) -> web.Response:
    """One call, with its attempts and turns."""
    database, _ = open_query(request)
    with client_errors():
        call = await queries.one(database, request.match_info["id"])
    if call is None:
        raise LogNotFound
    return as_json(call)


async def body(request: web.Request) -> web.Response:
    """The stored body of a request or response; `x-relay-complete: false` if it was cut off."""
    database, _ = open_query(request)
    with client_errors():
        side = request.match_info["side"]
        stored = await queries.body(database, request.match_info["id"], side)
    if stored is None:
        raise LogNotFound
    content, is_complete = stored
    # Never with its own content type: a browser must not run what a model wrote.
    headers = {"x-relay-complete": str(is_complete).lower(), "x-content-type-options": "nosniff"}
    return web.Response(body=content, content_type="application/octet-stream", headers=headers)


async def export(request: web.Request) -> web.StreamResponse:
    """All calls that match, the oldest first: one JSON object per line, or CSV (`format=csv`)."""
    database, parameters = open_query(request)
    with client_errors():
        format_ = format_of(parameters.pop("format", "json"))
        calls = queries.export(database, _filter(parameters))
        first = await _next_lines(calls, format_)
    content_type = CSV if format_ == "csv" else "application/x-ndjson"
    response = web.StreamResponse(headers={"content-type": content_type})
    await response.prepare(request)
    if format_ == "csv":
        first = f"{csv_rows.row(csv_rows.CALL_COLUMNS)}\r\n".encode() + first
    lines = b"" if request.method == "HEAD" else first
    while lines:
        await response.write(lines)
        try:
            lines = await _next_lines(calls, format_)
        except (DatabaseUnavailable, DatabaseNewer, QueryRefused):
            # The export is incomplete: a connection closed without the last chunk shows that.
            if request.transport is not None:
                request.transport.close()
            return response
    await response.write_eof()
    return response


async def _next_lines(calls: AsyncIterator[dict[str, Any]], format_: Format) -> bytes:
    """The lines of the next calls; empty after the last one."""
    lines = []
    async for call in calls:
        if format_ == "csv":
            lines.append(f"{csv_rows.call_row(call)}\r\n".encode())
        else:
            lines.append(_encode(call) + b"\n")
        if len(lines) == _EXPORT_BATCH_CALLS:
            break
    return b"".join(lines)


async def patch_log(request: web.Request) -> web.Response:
    """Change feedback (1, -1), score (a number) and metadata of a call; null removes one. 200 with
    the call.
    """
    database, _ = open_query(request)
    with client_errors():
        fields = _checked_changes(await read_json(request, dict))
        is_changed = await changes.change(database, request.match_info["id"], **fields)
        if not is_changed:
            raise LogNotFound
        return as_json(await queries.one(database, request.match_info["id"]))


async def delete_log(request: web.Request) -> web.Response:
    """Delete one call; the sums keep it. 200 with the number of calls deleted."""
    manager = authorize(request)
    return await _delete(request, manager, Filter(equal={"id": request.match_info["id"]}))


async def delete_logs(request: web.Request) -> web.Response:
    """Delete the calls that match; a parameter is required. 200 with the number of calls."""
    manager = authorize(request)
    database_of(request)  # its absence is reported before a wrong parameter
    with client_errors():
        return await _delete(request, manager, _filter(dict(request.query)))


async def _delete(request: web.Request, manager: Manager, conditions: Filter) -> web.Response:
    database = database_of(request)
    with client_errors():
        deleted = await changes.delete(database, conditions)
    await audit(request, manager, "logs.delete", str(conditions.equal.get("id", "")))
    return as_json({"deleted": deleted})


def format_of(text: str) -> Format:
    """The value of the parameter `format`. Raises BadQuery."""
    if text not in ("json", "csv"):
        raise BadQuery("format is json or csv")
    return cast(Format, text)


def open_query(request: web.Request) -> tuple[Database, dict[str, str]]:
    """The ledger's database, and the parameters of the query. Raises what refuses a caller who may
    not manage the relay, and StoreUnavailable.
    """
    authorize(request)
    return database_of(request), dict(request.query)


@contextlib.contextmanager
def client_errors() -> Iterator[None]:
    """Raise errors of the database and of queries as errors for the client."""
    try:
        yield
    except BadQuery as error:
        raise BadRequest(str(error)) from error
    except RowsRefused as error:
        raise BadRequest("a parameter has a value that no row can have") from error
    except TooManyQueries as error:
        raise LedgerBusy from error
    except QueryTooSlow as error:
        raise QueryTimeout(error.after_s) from error
    except (DatabaseUnavailable, DatabaseNewer) as error:
        raise StoreUnavailable from error


def _filter(parameters: Mapping[str, str]) -> Filter:
    """The conditions of a query. Raises BadQuery."""
    now_s = time.time()
    equal: dict[str, str | int] = {}
    above: dict[str, int | float] = {}
    metadata: dict[str, str] = {}
    flags: dict[str, bool] = {}
    times: dict[str, float] = {}
    for name, value in parameters.items():
        column = {"user": "end_user"}.get(name, name)
        measure = name.removeprefix("min_").replace("cost_usd", "cost_nano_usd")
        if column in EQUAL:
            equal[column] = whole_of(name, value, *_BOUNDS[name]) if name in _BOUNDS else value
        elif name in ("since", "until"):
            times[f"{name}_s"] = moment_s(name, value, now_s)
        elif name in ("success", "cached"):
            if value not in ("true", "false"):
                raise BadQuery(f"{name} is true or false")
            flags[name] = value == "true"
        elif name.startswith("metadata."):
            metadata[name.removeprefix("metadata.")] = value
        elif name.startswith("min_") and measure in ABOVE:
            above[measure] = _lower_bound(name, value)
        else:
            raise BadQuery(f"unknown parameter '{clean(name, 40)}'")
    if "success" in flags:
        flags["failed"] = not flags.pop("success")
    return Filter(equal=equal, above=above, metadata=metadata, **flags, **times)  # type: ignore[arg-type]


def whole_of(name: str, text: str, min_: int, max_: int) -> int:
    """The whole number that a parameter is, within its bounds. Raises BadQuery."""
    number = whole_number(text, min_, max_)
    if number is None:
        raise BadQuery(f"{name} is not a whole number from {min_} to {max_}")
    return number


def _lower_bound(name: str, text: str) -> int | float:
    """The bound that `min_cost_usd` and the like set, in the unit of the column."""
    limit = _MAX_USD if name == "min_cost_usd" else _MAX
    number = decimal_number(text, -limit, limit)
    if number is None:
        raise BadQuery(f"{name} is not a number from -{limit} to {limit}")
    if name in ("min_score", "min_duration_ms"):
        return number
    # Columns of whole numbers: more than 2.5 is more than 2.
    return floor(number * 10**9) if name == "min_cost_usd" else floor(number)


def _checked_changes(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a PATCH. Raises BadQuery."""
    if unknown := set(fields) - {"feedback", "score", "metadata"}:
        raise BadQuery(f"unknown field '{clean(min(unknown), 40)}'")
    feedback, score, metadata = (fields.get(name) for name in ("feedback", "score", "metadata"))
    if feedback not in (None, 1, -1) or isinstance(feedback, bool):
        raise BadQuery("feedback is 1, -1 or null")
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    if score is not None and not (is_number and -_MAX <= score <= _MAX):
        raise BadQuery(f"score is a number from -{_MAX} to {_MAX}, or null")
    is_plain = metadata is None or (
        isinstance(metadata, dict)
        and len(metadata) <= MAX_ENTRIES
        and all(isinstance(value, str | int | float | bool) for value in metadata.values())
    )
    if not is_plain:
        raise BadQuery(
            f"metadata is null, or an object of at most {MAX_ENTRIES} texts, numbers and booleans"
        )
    return fields


def as_json(content: Any) -> web.Response:
    """A response in JSON."""
    return web.Response(body=_encode(content), content_type="application/json")
