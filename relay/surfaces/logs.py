"""The ledger's calls over HTTP: …/logs, for local administrators while access is open.

Owns: the reading of query and body, and the shape of answers. What they ask for is ledger/'s.
Sums are usage.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from math import floor
from typing import Any, Literal, cast

import msgspec
from aiohttp import web
from aiohttp.web_protocol import RequestPayloadError

from relay.core.errors import (
    BadFraming,
    BadRequest,
    BodyTimeout,
    LedgerBusy,
    LogNotFound,
    QueryTimeout,
    StoreUnavailable,
)
from relay.core.fields import UNREADABLE
from relay.core.metadata import MAX_ENTRIES
from relay.core.numbers import decimal_number, whole_number
from relay.gate.access import require_local
from relay.gateway import GATEWAY
from relay.ledger import changes, csv_rows, queries
from relay.ledger.queries import ABOVE, EQUAL, BadQuery, Filter, moment_s
from relay.storage.database import Database, DatabaseNewer, DatabaseUnavailable, RowsRefused
from relay.storage.readers import QueryRefused, QueryTooSlow, TooManyQueries

Format = Literal["json", "csv"]
CSV = "text/csv; charset=utf-8"
_encode = msgspec.json.Encoder(enc_hook=str).encode
_WHOLE = {"status": (0, 999), "feedback": (-1, 1)}
"""Conditions that are whole numbers, and their bounds."""
_MAX_USD, _MAX = 1_000_000_000, 10**15
_PAGE, _MAX_PAGE = 50, 500
_MAX_BODY_BYTES = 64 * 1024


def add_routes(app: web.Application, prefix: str) -> None:
    """Add the surface."""
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
    database, given = open_query(request)
    with client_errors():
        limit = whole_of("limit", given.pop("limit", str(_PAGE)), 1, _MAX_PAGE)
        cursor = given.pop("cursor", None)
        found = await queries.page(database, _filter(given), cursor, limit)
    return as_json({"logs": found.logs, "cursor": found.cursor})


async def log(request: web.Request) -> web.Response:
    """One call, with its attempts and turns."""
    database, _ = open_query(request)
    with client_errors():
        found = await queries.one(database, request.match_info["id"])
    if found is None:
        raise LogNotFound
    return as_json(found)


async def body(request: web.Request) -> web.Response:
    """The stored body of a request or response; `x-relay-complete: false` if it was cut off."""
    database, _ = open_query(request)
    with client_errors():
        side = request.match_info["side"]
        found = await queries.body(database, request.match_info["id"], side)
    if found is None:
        raise LogNotFound
    # Never as what it calls itself: a browser must not run what a model wrote.
    headers = {"x-relay-complete": str(found[1]).lower(), "x-content-type-options": "nosniff"}
    return web.Response(body=found[0], content_type="application/octet-stream", headers=headers)


async def export(request: web.Request) -> web.StreamResponse:
    """All calls that fit, the oldest first: a JSON object a line, or CSV (`format=csv`)."""
    database, given = open_query(request)
    with client_errors():
        shape = format_of(given.pop("format", "json"))
        calls = queries.export(database, _filter(given))
        first = await _lines(calls, shape)
    kind = CSV if shape == "csv" else "application/x-ndjson"
    response = web.StreamResponse(headers={"content-type": kind})
    await response.prepare(request)
    if shape == "csv":
        first = f"{csv_rows.row(csv_rows.CALL_COLUMNS)}\r\n".encode() + first
    lines = b"" if request.method == "HEAD" else first
    while lines:
        await response.write(lines)
        try:
            lines = await _lines(calls, shape)
        except (DatabaseUnavailable, DatabaseNewer, QueryRefused):
            # What came so far is no whole export: the connection's end says so.
            if request.transport is not None:
                request.transport.close()
            return response
    await response.write_eof()
    return response


async def _lines(calls: AsyncIterator[dict[str, Any]], shape: Format, at_once: int = 200) -> bytes:
    lines = []
    async for call in calls:
        if shape == "csv":
            lines.append(f"{csv_rows.call_row(call)}\r\n".encode())
        else:
            lines.append(_encode(call) + b"\n")
        if len(lines) == at_once:
            break
    return b"".join(lines)


async def patch_log(request: web.Request) -> web.Response:
    """Change feedback (1, -1), score (a number) and metadata of a call; null takes it away. 200
    with the call.
    """
    database, _ = open_query(request)
    with client_errors():
        given = _changes(await _body(request))
        found = await changes.change(database, request.match_info["id"], **given)
        if not found:
            raise LogNotFound
        return as_json(await queries.one(database, request.match_info["id"]))


async def delete_log(request: web.Request) -> web.Response:
    """Delete one call; what it added up to stays. 200 with how many."""
    return await _delete(request, Filter(equal={"id": request.match_info["id"]}))


async def delete_logs(request: web.Request) -> web.Response:
    """Delete the calls that fit; at least one condition must be named. 200 with how many."""
    _, given = open_query(request)
    with client_errors():
        return await _delete(request, _filter(given))


async def _delete(request: web.Request, which: Filter) -> web.Response:
    database, _ = open_query(request)
    with client_errors():
        return as_json({"deleted": await changes.delete(database, which)})


def format_of(text: str) -> Format:
    """What `format` says. Raises BadQuery."""
    if text not in ("json", "csv"):
        raise BadQuery("format is json or csv")
    return cast(Format, text)


def open_query(request: web.Request) -> tuple[Database, dict[str, str]]:
    """The ledger's database and the query. Raises what keeps others out, and StoreUnavailable."""
    require_local(request.remote, request.headers)
    database = request.app[GATEWAY].ledger.database
    if database is None:
        raise StoreUnavailable
    return database, dict(request.query)


@contextlib.contextmanager
def client_errors() -> Iterator[None]:
    """What keeps a question from its answer, as errors for the client."""
    try:
        yield
    except BadQuery as error:
        raise BadRequest(str(error)) from error
    except RowsRefused as error:
        raise BadRequest("it names a value that no row can have") from error
    except TooManyQueries as error:
        raise LedgerBusy from error
    except QueryTooSlow as error:
        raise QueryTimeout(error.after_s) from error
    except (DatabaseUnavailable, DatabaseNewer) as error:
        raise StoreUnavailable from error


def _filter(given: Mapping[str, str]) -> Filter:
    now_s = time.time()
    equal: dict[str, str | int] = {}
    above: dict[str, int | float] = {}
    metadata: dict[str, str] = {}
    flags: dict[str, bool] = {}
    times: dict[str, float] = {}
    for name, value in given.items():
        column = {"user": "end_user"}.get(name, name)
        measure = name.removeprefix("min_").replace("cost_usd", "cost_nano_usd")
        if column in EQUAL:
            equal[column] = whole_of(name, value, *_WHOLE[name]) if name in _WHOLE else value
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
            raise BadQuery(f"there is no condition '{name[:40]}'")
    if "success" in flags:
        flags["failed"] = not flags.pop("success")
    return Filter(equal=equal, above=above, metadata=metadata, **flags, **times)  # type: ignore[arg-type]


def whole_of(name: str, text: str, min_: int, max_: int) -> int:
    """What a parameter says, within its bounds. Raises BadQuery."""
    number = whole_number(text, min_, max_)
    if number is None:
        raise BadQuery(f"{name} is not a whole number from {min_} to {max_}")
    return number


def _lower_bound(name: str, text: str) -> int | float:
    """What `min_cost_usd` and the like say, in the unit of the column."""
    limit = _MAX_USD if name == "min_cost_usd" else _MAX
    number = decimal_number(text, -limit, limit)
    if number is None:
        raise BadQuery(f"{name} is not a number from -{limit} to {limit}")
    if name in ("min_score", "min_duration_ms"):
        return number
    # Columns of whole numbers: what is more than 2.5 is more than 2.
    return floor(number * 10**9) if name == "min_cost_usd" else floor(number)


async def _body(request: web.Request) -> dict[str, Any]:
    """The JSON object that is the body. Raises BadQuery, BadFraming, BodyTimeout."""
    pause_s = request.app[GATEWAY].settings.server.body_idle_timeout_s
    body = b""
    try:
        while True:
            async with asyncio.timeout(pause_s):
                chunk = await request.content.readany()
            if not chunk:
                return msgspec.json.decode(body, type=dict)
            body += chunk
            if len(body) > _MAX_BODY_BYTES:
                raise BadQuery(f"the body has more than {_MAX_BODY_BYTES} bytes")
    except TimeoutError:
        raise BodyTimeout(pause_s) from None
    except RequestPayloadError:
        raise BadFraming("its body is not framed right") from None
    except UNREADABLE:
        raise BadQuery("the body is no JSON object") from None


def _changes(given: dict[str, Any]) -> dict[str, Any]:
    if unknown := set(given) - {"feedback", "score", "metadata"}:
        raise BadQuery(f"there is no field '{min(unknown)[:40]}' to change")
    feedback, score, metadata = (given.get(name) for name in ("feedback", "score", "metadata"))
    if feedback not in (None, 1, -1) or isinstance(feedback, bool):
        raise BadQuery("feedback is 1, -1 or null")
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    if score is not None and not (is_number and -_MAX <= score <= _MAX):
        raise BadQuery(f"score is a number from -{_MAX} to {_MAX}, or null")
    plain = metadata is None or (
        isinstance(metadata, dict)
        and len(metadata) <= MAX_ENTRIES
        and all(isinstance(value, str | int | float | bool) for value in metadata.values())
    )
    if not plain:
        raise BadQuery(f"metadata is an object of {MAX_ENTRIES} plain entries at most, or null")
    return given


def as_json(answer: Any) -> web.Response:
    """An answer in JSON."""
    return web.Response(body=_encode(answer), content_type="application/json")
