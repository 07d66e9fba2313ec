"""Make the Record of an exchange that has ended.

Owns which parts of an Exchange are recorded, and that every text from outside is truncated and
cleaned. No function here waits, and none raises for text that a client or provider sent.
"""

from __future__ import annotations

from functools import lru_cache

from relay.core.agents import agent_session
from relay.core.errors import RelayError, UpstreamNotConnected
from relay.core.exchange import Exchange, SessionSummary
from relay.core.metadata import HEADER, metadata_of, user_of
from relay.core.record import Record
from relay.core.redaction import Redactor
from relay.core.text import MAX_PATH_CHARACTERS, clean

EVENT_ID = "cf-aig-event-id"
_TURNS_SHOWN = 50


def record_of(exchange: Exchange, secrets: Redactor) -> Record:
    """Make the record of an exchange. The fields that every call has are passed to Record together,
    in its order: to set a field later takes three times as long.
    """
    request, response, outcome = exchange.request, exchange.response, exchange.outcome
    usage, routing, model = exchange.usage, exchange.routing, exchange.request.model
    error, route, meter = outcome.error, routing.route, usage.meter
    caller, user_agent = request.caller, request.headers.get("User-Agent")
    provider = route.provider.name if route is not None else request.provider
    answered = meter.model if meter is not None else None
    if answered is not None:
        answered = _from_provider(secrets, answered) if answered != model else None
    model = clean(model) if model is not None else None
    record = Record(
        exchange.id,
        request.transport,
        request.surface,
        clean(request.method),
        clean(request.provider),
        clean(request.endpoint, MAX_PATH_CHARACTERS),
        response.status or (error.status if error else 0),
        outcome.name or "failed",
        _ms(request.started_s, outcome.ended_s),
        request.body_bytes,
        response.body_bytes,
        clean(caller.client),
        int(response.overhead_s * 1e5) / 100,
        request.kind,
        model,
        _ms(request.started_s, response.first_byte_s) if response.first_byte_s else None,
        route.target.via if route is not None else None,
        provider if provider != request.provider else None,
        answered,
        request.stream,
        routing.attempts or None,
        exchange.cache.status if exchange.cache is not None else None,
        usage.used,
        usage.cost_nano_usd,
        usage.saved_nano_usd,
        caller.key.id if caller.key is not None else None,
        clean(user_agent) if user_agent else None,
    )
    if request.transport == "websocket":
        _add_session(record, exchange)
    if error is not None:
        record.error = error.code
        record.cause = _cause(error, outcome.cause)
    _add_names(record, exchange, secrets)
    return record


def _add_session(record: Record, exchange: Exchange) -> None:
    session = exchange.session or _REFUSED
    record.messages_up, record.messages_down = session.messages_up, session.messages_down
    record.close_code, record.closed_by = session.close_code, session.closed_by
    turns = session.turns
    if turns is not None and turns.found:
        record.turns = tuple(turns.found[:_TURNS_SHOWN])
        record.interruptions = turns.interruptions or None


_REFUSED = SessionSummary()


def _add_names(record: Record, exchange: Exchange, secrets: Redactor) -> None:
    """Add the ids and names that the client, the provider and traces gave the call."""
    if (trace := exchange.request.trace) is not None:
        record.trace_id, record.span_id = f"{trace.trace_id:032x}", f"{trace.span_id:016x}"
        record.parent_id = f"{trace.parent_id:016x}" if trace.parent_id else None
        record.sampled = trace.sampled
    if exchange.request.request_id:
        record.request_id = clean(exchange.request.request_id)
    if exchange.routing.cloudflare_log_id:
        record.cloudflare_log_id = _from_provider(secrets, exchange.routing.cloudflare_log_id)
    header = exchange.request.headers.get
    if event_id := header(EVENT_ID):
        record.event_id = clean(event_id)
    if (session := agent_session(header)) is not None:
        record.agent_session, record.agent_parent = session
    metadata = metadata_of(header(HEADER), exchange.request.caller.metadata)
    record.metadata = metadata or None
    if user := user_of(metadata, exchange.request.user):
        record.user = clean(user)


@lru_cache(maxsize=1024)
def _from_provider(secrets: Redactor, text: str) -> str:
    """Clean and redact text of a provider, which may contain the key that it was called with."""
    return secrets.redact_text(clean(text))


def _ms(from_s: float, to_s: float) -> float:
    """Return the milliseconds between two times, to the hundredth."""
    return int((to_s - from_s) * 1e5) / 100


def _cause(error: RelayError, cause: BaseException | None) -> str | None:
    """Return the cause of an error: its message if no connection was established, else the type of
    the exception and of its own cause, since their texts may contain URLs with keys.
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
