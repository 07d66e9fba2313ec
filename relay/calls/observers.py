"""Show the chunks of a response to its observers, which read each chunk and never change it.

Owns which observers a response has (the meter, the cache's recorder, the capture of bodies), and
that none of them can break a stream: a meter that raises is dropped, logged and counted.
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
"""Shorter values in a credential's place are placeholders and are not redacted."""


def observe_response(
    meter: Observer | None,
    upstream: ClientResponse,
    pairs: list[tuple[str, str]],
    attempt: RestAttempt,
) -> Observer | None:
    """Combine the observers of this response into one; None if there are none."""
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
    """Attach the response's meter to the exchange, and return the observer that feeds the meter.
    None if nothing is metered, or if the ledger meters the `whole` response later.
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
    """Feeds chunks to a meter until the meter fails."""

    __slots__ = ("_exchange", "_feed", "_feed_without_usage", "_gateway")

    def __init__(self, meter: AnswerMeter, exchange: Exchange, gateway: Gateway) -> None:
        self._feed: Observer = meter.feed
        self._feed_without_usage: Observer = meter.feed_without_usage
        self._exchange, self._gateway = exchange, gateway

    def see(self, chunk: bytes) -> None:
        try:
            self._feed(chunk)
        except Exception as error:  # any exception: the stream goes on; counted
            self._drop_meter(error)

    def see_past(self, chunk: bytes) -> None:
        try:
            self._feed_without_usage(chunk)
        except Exception as error:  # any exception: the stream goes on; counted
            self._drop_meter(error)

    def _drop_meter(self, error: Exception) -> None:
        self._feed = self._feed_without_usage = _ignore
        self._gateway.ledger.meter_failed(self._exchange, error)


def _ignore(_chunk: bytes) -> None:
    pass


def capture_request(exchange: Exchange, body: bytes, raw_query: str, gateway: Gateway) -> None:
    """Capture the request body, if the bodies of this call are to be stored."""
    rules, headers = gateway.settings.ledger, exchange.request.headers
    if not _is_captured(rules.bodies, headers):
        return
    own = _credentials(exchange, headers, raw_query)
    max_bytes = capture_bytes(rules.body_bytes, own, gateway.secrets.redactor)
    # A host's server has decompressed the request body.
    coding = "" if gateway.mounted else coding_of(headers.get("Content-Encoding"))
    exchange.capture = Capture(body[:max_bytes], coding, rules.body_bytes, max_bytes, own)


def _is_captured(rule: str, headers: Mapping[str, str]) -> bool:
    """True if the bodies of a call are stored: by `ledger.bodies`, and by the call's headers as far
    as that setting lets them override it.
    """
    own = (headers.get(_PAYLOAD) or headers.get(_LOG) or "").strip().lower()
    forbidden = (headers.get(_LOG) or "").strip().lower() == "false"
    if rule == "asked":
        return own == "true" and not forbidden
    return rule == "on" and own != "false" and not forbidden


def _credentials(exchange: Exchange, headers: Mapping[str, str], raw_query: str) -> tuple[str, ...]:
    """Return the values that the client sent in places of credentials: they are redacted in stored
    bodies too.
    """
    assert exchange.routing.route is not None
    provider = exchange.routing.route.provider
    names = {*CREDENTIAL_HEADERS, *provider.credential_headers}
    found = [bare(value) for name in names if (value := headers.get(name))]
    if raw_query:
        for name in provider.query_credentials:
            found.append(paths.query_value(raw_query, name))
    return tuple(secret for secret in found if len(secret) >= _MIN_CREDENTIAL_CHARS)


def capture_response(upstream: ClientResponse, exchange: Exchange) -> Observer | None:
    """Return the observer that captures the response body; None if this call's bodies are not
    stored.
    """
    capture = exchange.capture
    if capture is None:
        return None
    capture.response_coding = coding_of(upstream.headers.get("Content-Encoding"))
    response, max_bytes = capture.response, capture.captured_bytes

    def append(chunk: bytes) -> None:
        room = max_bytes - len(response)
        response.extend(chunk[:room] if room > 0 else b"")

    return append
