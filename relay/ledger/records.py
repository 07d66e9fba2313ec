"""The record of an exchange that ended.

Owns: what of an Exchange goes into its Record, and that every text from outside is cut and cleaned
as it enters. Nothing here waits, and nothing raises for what a client or provider sent.
"""

from __future__ import annotations

from functools import lru_cache

from relay.core.errors import RelayError, UpstreamNotConnected
from relay.core.exchange import Exchange
from relay.core.metadata import HEADER, metadata
from relay.core.meters.turns import Turns
from relay.core.record import Record
from relay.core.redaction import Redactor
from relay.core.text import MOST_PATH_CHARACTERS, clean

EVENT_ID = "cf-aig-event-id"
_TURNS_SHOWN = 50


def record_of(exchange: Exchange, secrets: Redactor) -> Record:
    """All that is known of it. What every call has is given at once, in the order of Record's
    fields: to set a field later takes three times as long.
    """
    error, route, meter, model = exchange.error, exchange.route, exchange.meter, exchange.model
    provider = route.provider.name if route is not None else exchange.provider
    answered = meter.model if meter is not None else None
    if answered is not None:
        answered = _from_provider(secrets, answered) if answered != model else None
    model = clean(model) if model is not None else None
    record = Record(
        exchange.id,
        exchange.transport,
        exchange.surface,
        clean(exchange.method),
        clean(exchange.provider),
        clean(exchange.endpoint, MOST_PATH_CHARACTERS),
        exchange.status or (error.status if error else 0),
        exchange.outcome,
        _ms(exchange.started_s, exchange.ended_s),
        exchange.request_bytes,
        exchange.response_bytes,
        clean(exchange.caller.client),
        int(exchange.overhead_s * 1e5) / 100,
        exchange.kind,
        model,
        _ms(exchange.started_s, exchange.first_byte_s) if exchange.first_byte_s else None,
        route.target.via if route is not None else None,
        provider if provider != exchange.provider else None,
        answered,
        exchange.stream,
        exchange.attempts or None,
        exchange.cache_status or None,
        exchange.used,
        exchange.cost_nano_usd,
        exchange.saved_nano_usd,
    )
    if exchange.transport == "websocket":
        _add_session(record, exchange)
    if error is not None:
        record.error = error.code
        record.cause = _cause(error, exchange.cause)
    _add_names(record, exchange, secrets)
    return record


def _add_session(record: Record, exchange: Exchange) -> None:
    record.messages_up, record.messages_down = exchange.messages_up, exchange.messages_down
    record.close_code, record.closed_by = exchange.close_code, exchange.closed_by
    turns: Turns | None = exchange.turns
    if turns is not None and turns.found:
        record.turns = tuple(turns.found[:_TURNS_SHOWN])
        record.interruptions = turns.interruptions or None


def _add_names(record: Record, exchange: Exchange, secrets: Redactor) -> None:
    """What others call it by."""
    if (trace := exchange.trace) is not None:
        record.trace_id, record.span_id = f"{trace.trace_id:032x}", f"{trace.span_id:016x}"
        record.parent_id = f"{trace.parent_id:016x}" if trace.parent_id else None
        record.sampled = trace.sampled
    if exchange.request_id:
        record.request_id = clean(exchange.request_id)
    if exchange.user:
        record.user = clean(exchange.user)
    if exchange.cloudflare_log_id:
        record.cloudflare_log_id = _from_provider(secrets, exchange.cloudflare_log_id)
    header = exchange.headers.get if exchange.headers is not None else None
    if header is None:
        return
    if given := header(EVENT_ID):
        record.event_id = clean(given)
    if given := header(HEADER):
        record.metadata = metadata(given) or None


@lru_cache(maxsize=1024)
def _from_provider(secrets: Redactor, text: str) -> str:
    """Text that a provider chose, which knows the key that it was called with."""
    return secrets.redact_text(clean(text))


def _ms(from_s: float, to_s: float) -> float:
    """Milliseconds between two stamps, to the hundredth."""
    return int((to_s - from_s) * 1e5) / 100


def _cause(error: RelayError, cause: BaseException | None) -> str | None:
    """Where no connection came up; else the types of a failure and of what caused it: their texts
    may hold URLs with keys.
    """
    if isinstance(error, UpstreamNotConnected):
        return clean(error.message)
    if cause is None:
        return None
    names = [type(cause).__name__]
    inner = cause.__cause__ or getattr(cause, "os_error", None)
    if inner is not None and inner is not cause:
        names.append(type(inner).__name__)
    return " from ".join(names)
