"""Encode the relay's own errors in the wire format that the provider's SDK parses.

Owns the JSON bodies, SSE error events, WebSocket messages and headers of these errors. A provider's
error passes unchanged. OpenAI's format is that of most providers; the others have their vendors'.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import msgspec

from relay.core.budget_headers import refusal_headers
from relay.core.budgets import utc_text
from relay.core.errors import BudgetExhausted, RelayError

_Format = Callable[[RelayError, str], dict[str, Any]]
_SocketEvent = Callable[[RelayError, str, str], dict[str, Any]]

CHALLENGE = 'Bearer realm="AI gateway relay"'
_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 429: "rate_limit_error",
}  # fmt: skip
_GOOGLE_STATUSES = {
    400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 502: "UNAVAILABLE", 503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}  # fmt: skip


def error_body(error: RelayError, format_: str, request_id: str) -> bytes:
    """Return the JSON body of `error` for clients of a provider with the wire format `format_`."""
    return msgspec.json.encode(_FORMATS.get(format_, _openai)(error, request_id))


def error_event(error: RelayError, format_: str, kind: str, request_id: str) -> bytes:
    """Return `error` as an SSE event with its blank line, for a stream at an event boundary."""
    data: dict[str, Any]
    if format_ == "openai" and kind == "responses":
        _, code = _openai_kind(error)
        data = {"type": "error", "code": code, "message": error.message, "param": None}
        return b"event: error\ndata: " + msgspec.json.encode(data) + b"\n\n"
    if format_ == "cartesia":
        data = _cartesia_event(error, "", request_id)
        return b"event: error\ndata: " + msgspec.json.encode(data) + b"\n\n"
    name = b"event: error\n" if format_ == "anthropic" else b""
    return name + b"data: " + error_body(error, format_, request_id) + b"\n\n"


def socket_event(error: RelayError, format_: str, endpoint: str, request_id: str) -> bytes:
    """Return `error` as the message by which the vendor of a WebSocket reports an error; empty if
    it has none and closes the socket only.
    """
    event = _SOCKET_EVENTS.get(format_, _openai_event)(error, endpoint, request_id)
    return msgspec.json.encode(event) if event else b""


def error_headers(error: RelayError, format_: str = "openai") -> dict[str, str]:
    """Return the headers of `error`: its code, its source, and whether an SDK should retry; with a
    401 the challenge that RFC 9110 (15.5.2) requires.
    """
    headers = {"x-relay-error": error.code, "x-relay-error-source": "relay"}
    if error.status == 401:
        headers["www-authenticate"] = CHALLENGE
    if not error.retryable:
        headers["x-should-retry"] = "false"
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, ceil(error.retry_after_s)))
    if isinstance(error, BudgetExhausted):
        headers.update(refusal_headers(error, format_))
    return headers


def _type_of(error: RelayError, other: str) -> str:
    return _TYPES.get(error.status, "invalid_request_error" if error.side == "client" else other)


def _openai(error: RelayError, request_id: str) -> dict[str, Any]:
    kind, code = _openai_kind(error)
    return {
        "error": {
            "message": error.message, "type": kind, "param": None, "code": code,
            "request_id": request_id,
        }
    }  # fmt: skip


def _openai_kind(error: RelayError) -> tuple[str, str]:
    """Return `type` and `code` of an error. By this code clients know an OpenAI account whose money
    is gone, and stop.
    """
    if isinstance(error, BudgetExhausted):
        return "insufficient_quota", "insufficient_quota"
    return _type_of(error, "server_error"), error.code


def _anthropic(error: RelayError, request_id: str) -> dict[str, Any]:
    kind = _type_of(error, "api_error")
    if isinstance(error, BudgetExhausted):
        kind = "billing_error"
    inner = {"type": kind, "message": error.message, "code": error.code}
    return {"type": "error", "error": inner, "request_id": request_id}


def _google(error: RelayError, request_id: str) -> dict[str, Any]:
    metadata = {"request_id": request_id}
    if isinstance(error, BudgetExhausted):
        metadata |= {"budget": error.budget, "remaining_usd": error.left}
        if error.resets_s is not None:
            metadata["resets_at"] = utc_text(error.resets_s)
    detail = {
        "@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": error.code,
        "metadata": metadata,
    }  # fmt: skip
    status = _GOOGLE_STATUSES.get(error.status, "UNKNOWN")
    return {
        "error": {
            "code": error.status,
            "message": error.message,
            "status": status,
            "details": [detail],
        }
    }


def _elevenlabs(error: RelayError, request_id: str) -> dict[str, Any]:
    return {"detail": {"status": error.code, "message": error.message, "request_id": request_id}}


def _cohere(error: RelayError, request_id: str) -> dict[str, Any]:
    return {"id": request_id, "message": error.message, "code": error.code}


def _cartesia(error: RelayError, request_id: str) -> dict[str, Any]:
    return {
        "error_code": error.code, "title": "Error of the relay", "message": error.message,
        "request_id": request_id,
    }  # fmt: skip


def _fal(error: RelayError, request_id: str) -> dict[str, Any]:
    # The client for Python reads `detail`, the one for JavaScript `message`.
    return {
        "detail": error.message, "message": error.message, "error_type": error.code,
        "request_id": request_id,
    }  # fmt: skip


def _deepgram(error: RelayError, request_id: str) -> dict[str, Any]:
    # The fields of both forms of Deepgram: one of transcription, and one of the newer APIs.
    return {
        "err_code": error.code, "err_msg": error.message, "category": error.code,
        "message": error.message, "request_id": request_id,
    }  # fmt: skip


def _assemblyai(error: RelayError, request_id: str) -> dict[str, Any]:
    return {"error": error.message, "code": error.code, "request_id": request_id}


def _openai_event(error: RelayError, endpoint: str, request_id: str) -> dict[str, Any]:
    kind, code = _openai_kind(error)
    inner = {"type": kind, "code": code, "message": error.message, "param": None}
    if endpoint.endswith("responses"):
        return {"type": "error", "status": error.status, "error": inner}
    return {"type": "error", "event_id": f"event_{request_id}", "error": inner}


def _elevenlabs_event(error: RelayError, endpoint: str, request_id: str) -> dict[str, Any]:
    if "convai" in endpoint:
        return {}
    if "speech-to-text" in endpoint:
        return {"message_type": "error", "error": error.message}
    return {"message": error.message, "error": error.code, "code": error.close_code}


def _cartesia_event(error: RelayError, endpoint: str, request_id: str) -> dict[str, Any]:
    inner = _cartesia(error, request_id)
    return {"type": "error", "done": True, "status_code": error.status} | inner


def _deepgram_event(error: RelayError, endpoint: str, request_id: str) -> dict[str, Any]:
    event = {"type": "Error", "code": error.code, "description": error.message}
    if endpoint.endswith("v2/listen"):
        return event | {"sequence_id": 0}
    return event | {"variant": error.code, "message": error.message}


def _assemblyai_event(error: RelayError, endpoint: str, request_id: str) -> dict[str, Any]:
    return {"type": "Error", "error_code": error.close_code, "error": error.message}


def _fal_event(error: RelayError, endpoint: str, request_id: str) -> dict[str, Any]:
    return {"type": "x-fal-error", "error": error.code, "reason": error.message}


_SOCKET_EVENTS: dict[str, _SocketEvent] = {
    "elevenlabs": _elevenlabs_event,
    "cartesia": _cartesia_event,
    "deepgram": _deepgram_event,
    "assemblyai": _assemblyai_event,
    "fal": _fal_event,
    "google": lambda error, endpoint, request_id: {},
}

_FORMATS: dict[str, _Format] = {
    "anthropic": _anthropic,
    "google": _google,
    "elevenlabs": _elevenlabs,
    "cohere": _cohere,
    "cartesia": _cartesia,
    "fal": _fal,
    "deepgram": _deepgram,
    "assemblyai": _assemblyai,
}
