"""`/openapi.json`: the relay's own routes in OpenAPI 3.1, made from one table.

Owns the table and the schemas of what management takes and answers. A test compares the table with
the routes of the application, both ways, and the schemas with real responses. The bodies of calls
are those of the providers, which describe them. Nothing here is secret: any caller may read it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import msgspec
from aiohttp import web

import relay
from relay.core.budgets import PERIODS
from relay.core.errors import CATALOGUE
from relay.gate.administration import MAX_GRACE_S
from relay.registry.schema import ClientRecord

Access = Literal["client", "management", "none"]
_Schema = dict[str, Any]
_REF = "#/components/schemas/{model}"
_CALL_METHODS = ("get", "post", "put", "patch", "delete", "options", "head")
_TEXT: _Schema = {"type": "string"}
_TIME: _Schema = {"type": ["string", "null"], "format": "date-time"}
_COUNT: _Schema = {"type": "integer", "minimum": 0}
_EXPIRES: _Schema = {
    "type": ["string", "null"],
    "description": "When the key expires: 30d, or a date or time in ISO 8601.",
    "examples": ["30d", "2027-01-31"],
}


def _ref(name: str) -> _Schema:
    return {"$ref": _REF.format(model=name)}


def _object(properties: Mapping[str, _Schema], *required: str) -> _Schema:
    """Describe an object; without `required` it has every property."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required or properties),
    }


def _page(name: str, item: str, **more: _Schema) -> _Schema:
    """Describe a page: a list, and the cursor of the next one."""
    cursor = {"type": ["string", "null"], "description": "For the next page; null: the last one."}
    return _object({name: {"type": "array", "items": _ref(item)}, "cursor": cursor, **more})


class Operation(NamedTuple):
    """One method of one path."""

    method: str
    path: str
    """Below the prefix of the API if it begins with `…/`, else at the root."""
    summary: str
    answer: _Schema | None = None
    """The JSON of a success; None: something else."""
    query: tuple[str, ...] = ()
    body: _Schema | None = None
    status: int = 200
    access: Access = "management"


_PAGE = ("cursor", "limit")
_CALLS = ("provider", "model", "client", "status", "outcome", "since", "until", "user", "success")

OPERATIONS = (
    Operation("get", "/healthz", "200 while the process lives", {}, access="none"),
    Operation("get", "/readyz", "200 while it accepts calls, else 503", {}, access="none"),
    Operation("get", "/version", "Name and version", {}, access="none"),
    Operation("get", "/openapi.json", "This document", {}, access="none"),
    Operation("get", "/metrics", "Prometheus metrics"),
    Operation("get", "/", "The status page"),
    Operation("get", "…/providers", "List the providers with their health", {}),
    Operation("post", "…/providers/reload", "Read the configuration again", {}),
    Operation(
        "delete", "…/cache", "Remove cached responses", _object({"purged": _COUNT}),
        ("key", "provider", "older_than_s"),
    ),
    Operation(
        "get", "…/keys", "List the keys of the database", _page("keys", "Key"), ("client", *_PAGE)
    ),
    Operation(
        "post", "…/keys", "Make a key, which is shown this once", _ref("NewKey"),
        body=_ref("MakeKey"), status=201,
    ),
    Operation("get", "…/keys/{id}", "Show a key, without its secret", _ref("Key")),
    Operation("delete", "…/keys/{id}", "Revoke a key", _ref("Key")),
    Operation("get", "…/clients", "List the clients", _page("clients", "Client"), _PAGE),
    Operation("get", "…/clients/{name}", "Show a client with its keys", _ref("ClientWithKeys")),
    Operation(
        "put", "…/clients/{name}", "Create a client, or replace its record", _ref("Client"),
        body=_ref("ClientRecord"),
    ),
    Operation(
        "delete", "…/clients/{name}", "Delete a client and revoke its keys",
        _object({"keys_revoked": _COUNT}),
    ),
    Operation(
        "post", "…/clients/{name}/rotate", "Make a new key; the older ones expire",
        _ref("NewKey"), body=_ref("Rotate"), status=201,
    ),
    Operation(
        "get", "…/sessions", "List the open WebSockets of all workers",
        _page("sessions", "Session", missing={"type": "array", "items": _TEXT}), _PAGE,
    ),
    Operation("delete", "…/sessions/{id}", "End a WebSocket with 4403", _object({"ended": _TEXT})),
    Operation(
        "get", "…/budgets", "List budgets, by default of the current period",
        _page("budgets", "Budget"),
        ("periods", "key", "rule", "subject", "spent_percent", *_PAGE),
    ),
    Operation(
        "get", "…/budgets/ledger", "Show a budget, beside the ledger's sum of its calls",
        _object({"budget": _ref("Budget"), "ledger": _ref("LedgerOfBudget")}), ("key",),
    ),
    Operation(
        "post", "…/budgets/raise", "Add to the limit of a budget for the rest of the period",
        _ref("Budget"), body=_ref("RaiseBudget"),
    ),
    Operation(
        "post", "…/budgets/reset", "Let the period of a budget begin anew", _ref("Budget"),
        body=_ref("ChangeBudget"),
    ),
    Operation(
        "post", "…/budgets/release", "Give back what dead processes left unaccounted",
        _ref("Budget"), body=_ref("ChangeBudget"),
    ),
    Operation("get", "…/audit", "List who changed what", _page("audit", "AuditRow"), _PAGE),
    Operation("get", "…/logs", "List calls, the latest first", {}, (*_CALLS, *_PAGE)),
    Operation("delete", "…/logs", "Delete calls", _object({"deleted": _COUNT}), _CALLS),
    Operation("get", "…/logs/export", "Export calls as JSON or CSV", None, ("format", *_CALLS)),
    Operation("get", "…/logs/{id}", "Show a call", {}),
    Operation(
        "patch", "…/logs/{id}", "Set feedback, score and metadata of a call", {},
        body=_ref("Annotations"),
    ),
    Operation("delete", "…/logs/{id}", "Delete a call", _object({"deleted": _COUNT})),
    Operation("get", "…/logs/{id}/{side}", "The stored body of a `request` or `response`"),
    Operation(
        "get", "…/usage", "Usage and cost", {},
        ("since", "until", "by", "bucket", "sort", "top", "format", "provider", "model", "client"),
    ),
    Operation(
        "post", "…/tickets", "Issue a ticket, which opens one WebSocket", _ref("Ticket"),
        body=_ref("IssueTicket"), status=201, access="client",
    ),
    *(
        Operation(
            method, "…/providers/{provider}/{endpoint}", "Call a provider", access="client"
        )
        for method in _CALL_METHODS
    ),
    *(
        Operation(
            method, "/v1/{endpoint}", "Call the provider that the model picks", access="client"
        )
        for method in _CALL_METHODS
    ),
    Operation(
        "get", "…/ws/{provider}", "Open a WebSocket at the default path of a provider",
        status=101, access="client",
    ),
    Operation(
        "get", "…/ws/{provider}/{endpoint}", "Open a WebSocket", status=101, access="client"
    ),
)  # fmt: skip
"""Every route but HEAD, which each GET answers too, and preflights of CORS."""


def add_routes(app: web.Application, prefix: str) -> None:
    """Add the route at the root; `prefix` is that of the API."""

    async def openapi(request: web.Request) -> web.Response:
        mount = request.path.removesuffix("/openapi.json")
        return web.Response(body=_encoded(prefix, mount), content_type="application/json")

    app.router.add_get("/openapi.json", openapi)


@functools.lru_cache(maxsize=4)
def _encoded(prefix: str, mount: str) -> bytes:
    return msgspec.json.encode(document(prefix, mount))


def document(prefix: str, mount: str = "") -> dict[str, Any]:
    """Make the document of an application that is mounted at `mount`."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        path = operation.path.replace("…", prefix)
        paths.setdefault(path, {})[operation.method] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "AI gateway relay",
            "version": relay.__version__,
            "description": (
                "Calls take any path of a provider: {endpoint} may contain slashes. Their bodies"
                " are the provider's own. A client's key goes wherever its SDK puts the key of the"
                " provider; management takes its own tokens."
            ),
        },
        "servers": [{"url": mount or "/"}],
        "paths": paths,
        "components": {"schemas": _schemas(), "securitySchemes": _SECURITY},
    }


_SECURITY = {
    "client": {"type": "http", "scheme": "bearer", "description": "A client's key: rk_…"},
    "management": {
        "type": "http",
        "scheme": "bearer",
        "description": "RELAY_ADMIN_TOKEN; to read, RELAY_READ_TOKEN. Local callers may need none.",
    },
}


def _described(operation: Operation) -> dict[str, Any]:
    names = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": _TEXT} for name in names
    ] + [{"name": name, "in": "query", "schema": _TEXT} for name in operation.query]
    success: dict[str, Any] = {"description": operation.summary}
    if operation.answer is not None:
        success["content"] = {"application/json": {"schema": operation.answer}}
    error = {
        "description": "An error of the relay, with its code in x-relay-error",
        "content": {"application/json": {"schema": _ref("Error")}},
    }
    described: dict[str, Any] = {
        "operationId": _id_of(operation),
        "summary": operation.summary,
        "tags": ["calls" if operation.access == "client" else "management"],
        "parameters": parameters,
        "responses": {str(operation.status): success, "default": error},
        "security": [] if operation.access == "none" else [{operation.access: []}, {}],
    }
    if operation.body is not None:
        content = {"application/json": {"schema": operation.body}}
        described["requestBody"] = {
            "content": content,
            "required": operation.body != _ref("Rotate"),
        }
    return described


def _id_of(operation: Operation) -> str:
    words = operation.path.replace("…", "").replace(".", "/").split("/")
    return "_".join([operation.method, *(word.strip("{}") for word in words if word)])


def _schemas() -> dict[str, _Schema]:
    record: _Schema = ClientRecord.model_json_schema(ref_template=_REF)
    inner: dict[str, _Schema] = record.pop("$defs", {})
    state = {"enum": ["valid", "expired", "revoked", "no client"]}
    source = {"enum": ["database", "gateway.yaml"]}
    key = {
        "id": _TEXT, "client": _TEXT, "source": source, "state": state, "created_at": _TIME,
        "created_by": {"type": ["string", "null"]}, "expires_at": _TIME, "revoked_at": _TIME,
    }  # fmt: skip
    own = ("id", "client", "source", "state", "expires_at")
    client = {
        "name": _TEXT, "source": source, "record": _ref("ClientRecord"), "created_at": _TIME,
        "created_by": _TEXT,
    }  # fmt: skip
    keys = {"type": "array", "items": _ref("Key")}
    warnings = {"type": "array", "items": _TEXT}
    grace = {"type": "integer", "minimum": 0, "maximum": MAX_GRACE_S, "default": 86400}
    error = {
        "message": _TEXT,
        "type": _TEXT,
        "param": {"type": "null"},
        "code": {"enum": sorted(error.code for error in CATALOGUE)},
        "request_id": _TEXT,
    }
    return inner | {
        "ClientRecord": record,
        "Key": _object(key, *own),
        "NewKey": _object({"key": _TEXT, **key, "warnings": warnings}),
        "MakeKey": _object(
            {"client": _TEXT, "record": _ref("ClientRecord"), "expires": _EXPIRES}, "client"
        ),
        "Rotate": _object({"grace_s": grace, "expires": _EXPIRES}) | {"required": []},
        "Client": _object(client, "name", "source", "record"),
        "ClientWithKeys": _object({**client, "keys": keys}, "name", "source", "record", "keys"),
        "Session": _object(
            {
                "id": _TEXT, "client": _TEXT, "key_id": {"type": ["string", "null"]},
                "address": _TEXT, "provider": _TEXT, "endpoint": _TEXT,
                "model": {"type": ["string", "null"]}, "age_s": {"type": "number"},
                "messages_up": _COUNT, "messages_down": _COUNT, "bytes_up": _COUNT,
                "bytes_down": _COUNT,
            }
        ),
        **_budget_schemas(),
        "AuditRow": _object(
            {
                "seq": _COUNT, "at": _TIME, "actor": _TEXT, "action": _TEXT, "target": _TEXT,
                "details": {"type": "object"},
            }
        ),
        "Annotations": _object(
            {
                "feedback": {"enum": [1, -1, None]}, "score": {"type": ["number", "null"]},
                "metadata": {"type": ["object", "null"]},
            }
        ) | {"required": []},
        "IssueTicket": _object(
            {
                "provider": _TEXT, "endpoint": _TEXT, "models": {"type": "array", "items": _TEXT},
                "origin": _TEXT, "max_session_s": {"type": "number", "minimum": 1},
                "max_messages": {"type": "integer", "minimum": 1},
            },
            "provider",
        ),
        "Ticket": _object(
            {
                "ticket": _TEXT, "openai_ticket": _TEXT, "expires_at": _COUNT,
                "websocket_url": _TEXT, "subprotocols": {"type": "array", "items": _TEXT},
            },
            "ticket", "expires_at", "websocket_url", "subprotocols",
        ),
        "Error": _object({"error": _object(error)}),
    }  # fmt: skip


def _budget_schemas() -> dict[str, _Schema]:
    amount = {"type": "number"}
    amounts = (
        "limit_usd", "raised_usd", "spent_usd", "left_usd", "spent_percent", "leased_usd",
        "reserved_usd", "unaccounted_usd", "unpriced_usd", "over_usd", "reset_usd",
    )  # fmt: skip
    explained = _object(dict.fromkeys(("unpriced_usd", "reset_usd", "other_usd"), amount))
    ledger = _object(
        {
            "ledger_usd": amount, "calls": _COUNT, "calls_without_cost": _COUNT,
            "difference_usd": amount, "explained": explained,
        }
    )  # fmt: skip
    key = {"type": "string", "description": "The key of a budget, from the list of budgets."}
    positive = {"type": "number", "minimum": 1e-9, "maximum": 1e9}
    return {
        "Budget": _object(
            {
                "key": _TEXT, "rule": _TEXT, "subject": _TEXT, "period": {"enum": [*PERIODS]},
                "starts_at": _TIME, "resets_at": _TIME, **dict.fromkeys(amounts, amount),
            }
        ),
        "LedgerOfBudget": ledger | {"type": ["object", "null"]},
        "ChangeBudget": _object({"key": key}),
        "RaiseBudget": _object({"key": key, "usd": positive}),
    }  # fmt: skip
