"""Relay a REST call: the whole request path, in order. Read this module first.

1. A call is one Exchange, which is closed exactly once. 2. Access, the route and the limits that
need no body are checked before the body is read, everything before the provider is called.
3. After the first downstream byte there is no retry and no second response.
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from relay.calls.affinity import tie_to_key
from relay.calls.attempt import RestAttempt
from relay.calls.body import Body, body_at_hand, keep_start, read_body
from relay.calls.caching import answer_from_cache, plan_cache
from relay.calls.call import Call, attempt_options
from relay.calls.observers import capture_request
from relay.calls.send import send_call
from relay.calls.stream import deliver
from relay.calls.unified import choose_target
from relay.core.dearest import images
from relay.core.media import AUDIO_START_BYTES, PLAIN_BYTES, input_tokens
from relay.core.named_models import CallText
from relay.core.paths import query_names
from relay.core.peek import NOTHING, model_elsewhere, paid_fields, peek_body
from relay.core.provider import Route
from relay.gate.model_access import (
    ModelAccess,
    check_call,
    check_endpoint_model,
    model_access,
    path_of,
    without_forbidden_targets,
)
from relay.gate.rights import route_of_client
from relay.gateway import Gateway


async def relay_rest(request: web.Request, gateway: Gateway, call: Call) -> web.StreamResponse:
    """Relay one REST call. Raises the RelayError that the middleware answers with."""
    exchange = gateway.begin(call, "rest", request)
    try:
        gateway.callers.authorize(call.caller, call.headers, call.provider)
        body: Body | None = None
        if call.surface == "unified":
            route, body = await choose_target(request, call, exchange, gateway)
        else:
            route = gateway.registry.match_rest(call.provider, call.endpoint)
        exchange.routing.route = route
        access: ModelAccess | None = None
        client = call.caller.record
        if client is not None and (client.rights.restricts_calls or route.alternatives):
            route = route_of_client(client, route)
            if (access := model_access(call.caller)) is not None:
                if (alias := exchange.request.requested_model) is not None:
                    access = access.through(alias, route)
                check_endpoint_model(access, route, call.method)
                route = without_forbidden_targets(access, route)
            exchange.routing.route = route
        limits = gateway.limits_of(call.caller)
        if limits is not None and (wait := limits.admit(exchange, call.headers)):
            await wait
        options = attempt_options(call, route)
        body = body or body_at_hand(request, exchange, gateway)
        if body is None:
            body = await read_body(request, exchange, gateway)
        options.whole = body.stream is None
        attempt = RestAttempt(call, exchange, gateway, body, options)
        _peek(attempt, route)
        if access is not None:
            await check_call(access, route, call.method, _call_text(attempt, route))
        if gateway.settings.ledger.bodies != "off":
            capture_request(exchange, body.whole, call.query, gateway)
        if limits is not None and limits.needs_body:
            await limits.check(exchange, body.text, call.headers.get("Content-Type", ""))
        plan = plan_cache(attempt)
        if plan is not None:
            response = await answer_from_cache(plan, request, attempt)
            if response is not None:
                return response
        answer = await send_call(attempt)
        try:
            return await deliver(answer, request, exchange, gateway)
        finally:
            if answer.source is not None:
                answer.source.release()
    except (Exception, asyncio.CancelledError) as error:
        raise exchange.end_with(error) from None
    finally:
        gateway.close(exchange)


def _call_text(attempt: RestAttempt, route: Route) -> CallText:
    """Return the parts of a call that can name a model."""
    types = attempt.call.headers.getall("Content-Type", ())
    return CallText(route.format, path_of(route), attempt.call.query, types, attempt.body.text)


def _peek(attempt: RestAttempt, route: Route) -> None:
    """Read the kind, model, user, session and billable input of a call from its path, query,
    headers and body, for limits, attempts, meters and the ledger.
    """
    call, options, facts = attempt.call, attempt.options, attempt.exchange.request
    text = attempt.body.text or b""
    facts.kind = route.kind
    facts.model = (
        route.replaced_model
        or route.model
        or model_elsewhere(route.format, route.endpoint, call.query)
    )
    if route.kind == "transcription" and "callback" in query_names(call.query):
        options.submits = True  # Deepgram delivers the transcript to that URL
    if route.kind == "speech":
        facts.billable_input = paid_fields(text)
    elif route.kind == "image":
        asked = images(text, call.headers.get("Content-Type", "")) or 1
        facts.billable_input = b'{"n":%d}' % asked
    elif route.kind == "transcription":
        facts.billable_input = text[:AUDIO_START_BYTES]
        if attempt.body.stream is not None:
            keep_start(attempt.body, facts, AUDIO_START_BYTES)
    if len(text) > PLAIN_BYTES or len(text) > len(attempt.body.whole):
        facts.input_estimate = input_tokens(text, route.format)
    seen = NOTHING
    if text:
        seen = attempt.body.seen or peek_body(text, call.headers.get("Content-Type", ""))
        attempt.body.seen = seen
        facts.stream, facts.user = seen.stream, seen.user
        options.submits = options.submits or seen.submits
        # Providers ignore a model in the body if the path or the query names one.
        facts.model = facts.model or seen.model
    if len(route.target.pool) > 1 or route.alternatives:
        options.affinity = tie_to_key(call, route, call.caller.client, seen)
