"""Tie a call to the key of its session, and learn which key made a response.

Owns when a call is tied, and where the id of a new response is read: in what has been received
before the head is sent downstream, else by the meter, so that no chunk is read for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import msgspec
from aiohttp import ClientResponse

from relay.calls.attempt import RestAttempt
from relay.calls.call import Call
from relay.core.affinity import Affinity, affinity_of, digest_of, made_response
from relay.core.exchange import Exchange
from relay.core.fields import ABSENT, Reader, value
from relay.core.meters.answer_meter import AnswerMeter
from relay.core.meters.unpack import coding_of, unpack
from relay.core.peek import NOTHING, Peek
from relay.core.provider import Keys, Route
from relay.gate.made_objects import MadeObjects
from relay.gateway import Gateway
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
    read it, use that key. Of a call to `/v1`, remember too who has made it, and where.
    """
    exchange, route = attempt.exchange, attempt.exchange.routing.route
    if route is None or route.kind != "responses" or upstream.status >= 300:
        return
    learners = _learners(exchange, attempt.options.affinity, attempt.gateway)
    if not learners:
        return
    start = start[:_SEARCHED_BYTES]
    if start and (coding := coding_of(upstream.headers.get("Content-Encoding"))):
        unpacked = unpack(start, coding, _SEARCHED_BYTES)
        start = unpacked[0] if unpacked is not None else b""
    made = made_response(start) or _id_of_object(start)
    if made is None:
        if not upstream.content.is_eof():
            exchange.at_end += (lambda: _tell(learners, _id_of(exchange)),)
        return
    _tell(learners, made)


def learner_of_session(
    exchange: Exchange, affinity: Affinity | None, gateway: Gateway
) -> Callable[[str], None] | None:
    """Return what remembers the responses that a session makes; None if nothing does."""
    learners = _learners(exchange, affinity, gateway)
    return partial(_tell, learners) if learners else None


def _learners(
    exchange: Exchange, affinity: Affinity | None, gateway: Gateway
) -> Sequence[Callable[[str], None]]:
    facts, routing = exchange.request, exchange.routing
    route, learners = routing.route, []
    assert route is not None
    if affinity is not None and route.has_affinity:
        health = gateway.attempts.health
        learners.append(partial(_remember, health, route, routing.keys, affinity.client))
    makes = facts.method == "POST" or facts.transport == "websocket"
    if facts.surface == "unified" and makes:
        client, provider = facts.caller.client, route.provider.name
        learners.append(partial(_note, gateway.made_objects, client, provider))
    return learners


def _tell(learners: Sequence[Callable[[str], None]], made: str) -> None:
    if made:
        for learn in learners:
            learn(made)


class _Object(msgspec.Struct):
    id: msgspec.Raw = ABSENT


_object = Reader(_Object)


def _id_of_object(start: bytes) -> str | None:
    """Return the id of a whole JSON object, whatever its form."""
    found = _object.read(start) if start.startswith(b"{") else None
    named = value(found.id) if found is not None else None
    return named if isinstance(named, str) else None


def _id_of(exchange: Exchange) -> str:
    """Return the id that the meter of a response has read."""
    meter = exchange.usage.meter
    return meter.object_id if isinstance(meter, AnswerMeter) else ""


def _remember(health: Health, route: Route, keys: Keys, client: str, made: str) -> None:
    health.remember(route, keys, digest_of(client, "response", made))


def _note(objects: MadeObjects, client: str, provider: str, made: str) -> None:
    objects.note(client, made, provider)
