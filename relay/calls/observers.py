"""Observers of a response: they see each chunk as it passes and never touch it.

Owns: which observers a response has (the meter, the recorder of the cache, the capture of bodies),
and that none of them does harm: a meter that raises is dropped, logged and counted.
"""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import ClientResponse

from relay.calls.attempt import RestAttempt
from relay.calls.recording import Observer, record_response
from relay.core import paths
from relay.core.credential_headers import CREDENTIAL_HEADERS
from relay.core.credentials import bare
from relay.core.exchange import Capture, Exchange, UnreadResponse
from relay.core.meters.answer_meter import AnswerMeter, answer_meter
from relay.core.meters.sent_call import SentCall
from relay.core.meters.unpack import coding_of
from relay.gateway import Gateway
from relay.ledger.bodies import capture_bytes

_MAX_HELD_BYTES = 64 * 1024
_LOG, _PAYLOAD = "cf-aig-collect-log", "cf-aig-collect-log-payload"
_MIN_CREDENTIAL_CHARS = 8
"""A client may send anything in a credential's place; a shorter one is a placeholder."""


def observe_response(
    meter: Observer | None,
    upstream: ClientResponse,
    pairs: list[tuple[str, str]],
    attempt: RestAttempt,
) -> Observer | None:
    """One observer for all that see the chunks of this response; None if nothing does."""
    exchange = attempt.exchange
    if exchange.cache is None and exchange.capture is None:
        return meter
    recorder = record_response(upstream, pairs, attempt) if exchange.cache else None
    observers = [each for each in (meter, recorder, capture_response(upstream, exchange)) if each]
    if len(observers) < 2:
        return observers[0] if observers else None

    def observe_all(chunk: bytes) -> None:
        for observe in observers:
            observe(chunk)

    return observe_all


def attach_meter(
    upstream: ClientResponse, exchange: Exchange, gateway: Gateway, whole: bytes | None
) -> Observer | None:
    """Give the exchange the meter of this response, and return what shows it the chunks. None if
    nothing is metered, or where the response is `whole` and the ledger reads it later.
    """
    if upstream.status >= 300 or exchange.routing.route is None:
        return None
    if whole and len(whole) <= _MAX_HELD_BYTES:
        exchange.usage.unread = UnreadResponse(whole, upstream.headers)
        return None
    meter = answer_meter(exchange.routing.route.format, SentCall.of(exchange), upstream.headers.get)
    if meter is None:
        return None
    exchange.usage.meter = meter
    exchange.response.meter_observer = observer = _Guarded(meter, exchange, gateway)
    return observer.see


class _Guarded:
    """Shows chunks to a meter until it fails."""

    __slots__ = ("_exchange", "_gateway", "_look", "_look_past")

    def __init__(self, meter: AnswerMeter, exchange: Exchange, gateway: Gateway) -> None:
        self._look: Observer = meter.feed
        self._look_past: Observer = meter.feed_without_usage
        self._exchange, self._gateway = exchange, gateway

    def see(self, chunk: bytes) -> None:
        try:
            self._look(chunk)
        except Exception as error:  # whatever it is, the stream goes on; counted
            self._failed(error)

    def see_past(self, chunk: bytes) -> None:
        try:
            self._look_past(chunk)
        except Exception as error:  # likewise
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._look = self._look_past = _blind
        self._gateway.ledger.meter_failed(self._exchange, error)


def _blind(_chunk: bytes) -> None:
    pass


def capture_request(exchange: Exchange, body: bytes, raw_query: str, gateway: Gateway) -> None:
    """Capture the request body, if the bodies of this call are to be stored."""
    rules, headers = gateway.settings.ledger, exchange.request.headers
    if not _wanted(rules.bodies, headers):
        return
    own = _credentials(exchange, headers, raw_query)
    max_bytes = capture_bytes(rules.body_bytes, own, gateway.secrets.redactor)
    # A host's server has undone a request's coding.
    coding = "" if gateway.mounted else coding_of(headers.get("Content-Encoding"))
    exchange.capture = Capture(body[:max_bytes], coding, rules.body_bytes, max_bytes, own)


def _wanted(rule: str, headers: Mapping[str, str]) -> bool:
    """By the rule of the file, which a call may override where that allows it."""
    own = (headers.get(_PAYLOAD) or headers.get(_LOG) or "").strip().lower()
    forbidden = (headers.get(_LOG) or "").strip().lower() == "false"
    if rule == "asked":
        return own == "true" and not forbidden
    return rule == "on" and own != "false" and not forbidden


def _credentials(exchange: Exchange, headers: Mapping[str, str], raw_query: str) -> tuple[str, ...]:
    """What the client sent in a place of credentials: no stored body shows that either."""
    assert exchange.routing.route is not None
    provider = exchange.routing.route.provider
    names = {*CREDENTIAL_HEADERS, *provider.credential_headers}
    found = [bare(value) for name in names if (value := headers.get(name))]
    if raw_query:
        for name in provider.query_credentials:
            found.append(paths.query_value(raw_query, name))
    return tuple(secret for secret in found if len(secret) >= _MIN_CREDENTIAL_CHARS)


def capture_response(upstream: ClientResponse, exchange: Exchange) -> Observer | None:
    """The observer that captures the response body; None where bodies are not stored."""
    capture = exchange.capture
    if capture is None:
        return None
    capture.response_coding = coding_of(upstream.headers.get("Content-Encoding"))
    response, most = capture.response, capture.captured_bytes

    def take(chunk: bytes) -> None:
        response.extend(chunk[: most - len(response)] if len(response) < most else b"")

    return take
