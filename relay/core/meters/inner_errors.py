"""Detect errors inside a 200: the error objects and error events of every format.

Owns the forms of such errors, and the HTTP status that corresponds to each. Before the first byte
downstream, core/retry_policy.py decides the consequences; after it, the ledger records the error.
"""

from __future__ import annotations

from typing import Any

import msgspec

from relay.core.fields import BYTE_ORDER_MARK, UNREADABLE
from relay.core.meters.documents import Document, Scanner, Wanted
from relay.core.meters.events import DONE, data_of, first_end, last_end, split_events

ERROR_PLACES = ("type", "error", "delta.error")
"""Paths of error objects: at the top level for OpenAI, Anthropic and Google, in the delta of a
stream's last event for Cohere."""
_NO_ERROR = frozenset({b"null", b"false", b'""', b"{}", b"[]", b"0"})
_ERROR_TYPES = frozenset({b'"error"', b'"response.failed"'})
_ERROR_NAMES = frozenset({b"error", b"response.failed"})
_NO_DATA = frozenset({b"", DONE})
_MAX_BYTES = 64 * 1024

_STATUSES = {
    "invalid_request_error": 400, "INVALID_ARGUMENT": 400, "FAILED_PRECONDITION": 400,
    "authentication_error": 401, "invalid_api_key": 401, "UNAUTHENTICATED": 401,
    "billing_error": 402, "permission_error": 403, "PERMISSION_DENIED": 403,
    "not_found_error": 404, "NOT_FOUND": 404, "request_too_large": 413,
    "rate_limit_error": 429, "rate_limit_exceeded": 429, "insufficient_quota": 429,
    "RESOURCE_EXHAUSTED": 429, "api_error": 500, "server_error": 500, "INTERNAL": 500,
    "UNAVAILABLE": 503, "timeout_error": 504, "DEADLINE_EXCEEDED": 504, "overloaded_error": 529,
}  # fmt: skip
"""The HTTP status of OpenAI, Anthropic and Google for the same error."""
_wanted = Wanted(*ERROR_PLACES)


def is_error(document: Document) -> bool:
    """True if a document, that of an event or a whole response, is an error."""
    if document.get("type") in _ERROR_TYPES:
        return True
    return any(document.get(place, b"null") not in _NO_ERROR for place in ERROR_PLACES[1:])


def contains_error(events: bytes) -> bool:
    """True if one of the events is an error. The first and the last may be incomplete."""
    if b"error" not in events and b"response.failed" not in events:
        return False
    return any(_is_error_event(event) for event in split_events(events))


def is_empty(events: bytes) -> bool:
    """True if no event has data: a stream of only such events has failed."""
    return all(_data_of(event) in _NO_DATA for event in split_events(events))


class FirstEvent:
    """Detects an error in the first event that is no comment. Call `feed` until it returns True, or
    `end`; then read `error_status`.
    """

    __slots__ = ("_held", "_tail", "error", "error_status")

    def __init__(self) -> None:
        self._held: list[bytes] = []
        self._tail = b""
        self.error = b""
        """The data of the first event if it is an error."""
        self.error_status: int | None = None
        """For a stream that is empty or begins with an error: the HTTP status that corresponds to
        the error, 0 if unknown. None for any other stream."""

    def feed(self, chunk: bytes) -> bool:
        """Read a chunk; True after the first event."""
        self._held.append(chunk)
        seen, self._tail = self._tail + chunk, (self._tail + chunk)[-3:]
        if first_end(seen) < 0:
            return False
        text = b"".join(self._held)
        end = last_end(text)
        self._held = [text[end:]]
        return any(self._judge(event) for event in split_events(text[:end]) if event)

    def end(self) -> None:
        """Read the end of the stream, whose rest may be the first event."""
        if not self._judge(b"".join(self._held)):
            self.error_status = 0

    def _judge(self, event: bytes) -> bool:
        data = _data_of(event)
        if not data and _name_of(event) not in _ERROR_NAMES:
            return False
        if data == DONE:
            self.error_status = 0
        elif _is_error_event(event):
            self.error, self.error_status = data, _status_of(data)
        return True


def _is_error_event(event: bytes) -> bool:
    if b"error" not in event and b"response.failed" not in event:
        return False
    if _name_of(event) in _ERROR_NAMES:
        return True
    data = _data_of(event)
    if data[:1] != b"[":
        return is_error(_wanted.of(data))
    return any(is_error(document) for document in Scanner(_wanted).feed(data))


def _data_of(event: bytes) -> bytes:
    """Return the data of an event. JSON without SSE framing is data too."""
    bare = event.removeprefix(BYTE_ORDER_MARK).strip()
    return bare if bare[:1] in (b"{", b"[") else data_of(event).strip()


def _name_of(event: bytes) -> bytes:
    for line in event.removeprefix(BYTE_ORDER_MARK).splitlines():
        if line.startswith(b"event:"):
            return line[6:].strip()
    return b""


def _status_of(data: bytes) -> int:
    """Return the HTTP status that corresponds to an error; 0 if unknown."""
    try:
        reported = msgspec.json.decode(data) if len(data) <= _MAX_BYTES else None
    except UNREADABLE:
        return 0
    if isinstance(reported, list) and reported:
        reported = reported[0]
    response = reported.get("response") if isinstance(reported, dict) else None
    for place in (reported, response):
        if isinstance(place, dict):
            for each in (place.get("error"), place):
                if isinstance(each, dict) and (status := _status_in(each)):
                    return status
    return 0


def _status_in(error: dict[str, Any]) -> int:
    for name in ("code", "status", "status_code", "type"):
        reported = error.get(name)
        if isinstance(reported, int) and 400 <= reported <= 599:
            return reported
        if isinstance(reported, str) and reported in _STATUSES:
            return _STATUSES[reported]
    return 0
