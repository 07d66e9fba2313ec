"""Tie a call to the key of its session, and learn which key made a response.

Owns when a call is tied, and where the id of a new response is read: in what has been received
before the head is sent downstream, else by the meter, so that no chunk is read for it.
"""

from __future__ import annotations

from functools import partial

from aiohttp import ClientResponse

from relay.calls.attempt import RestAttempt
from relay.calls.call import Call
from relay.core.affinity import Affinity, affinity_of, digest_of, made_response
from relay.core.exchange import Exchange
from relay.core.meters.answer_meter import AnswerMeter
from relay.core.meters.unpack import coding_of, unpack
from relay.core.peek import NOTHING, Peek
from relay.core.provider import Keys, Route
from relay.upstream.health import Health

_SEARCHED_BYTES = 64 * 1024


def tie_to_key(call: Call, route: Route, client: str, seen: Peek = NOTHING) -> Affinity | None:
    """Return what ties a call to a key; None if no target has several keys. `seen` are the fields
    of its body.
    """
    if not route.has_affinity and not any(each.has_affinity for each in route.alternatives):
        return None
    return affinity_of(
        client, call.headers.get, route.endpoint, seen.prompt_cache_key, seen.previous_response_id
    )


def learn_response(upstream: ClientResponse, attempt: RestAttempt, start: bytes) -> None:
    """Remember the key of the response that `start` begins: calls that continue the response, or
    read it, use that key.
    """
    exchange, health = attempt.exchange, attempt.gateway.attempts.health
    affinity, route = attempt.options.affinity, exchange.routing.route
    if affinity is None or route is None or route.kind != "responses" or not route.has_affinity:
        return
    if upstream.status >= 300:
        return
    remember = partial(_remember, health, route, exchange.routing.keys, affinity.client)
    start = start[:_SEARCHED_BYTES]
    if start and (coding := coding_of(upstream.headers.get("Content-Encoding"))):
        unpacked = unpack(start, coding, _SEARCHED_BYTES)
        start = unpacked[0] if unpacked is not None else b""
    if (made := made_response(start)) is not None:
        remember(made)
    elif not upstream.content.is_eof():
        exchange.at_end += (lambda: remember(_id_of(exchange)),)


def _id_of(exchange: Exchange) -> str:
    """Return the id that the meter of a response has read."""
    meter = exchange.usage.meter
    return meter.object_id if isinstance(meter, AnswerMeter) else ""


def _remember(health: Health, route: Route, keys: Keys, client: str, made: str) -> None:
    if made:
        health.remember(route, keys, digest_of(client, "response", made))
