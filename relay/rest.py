"""THE REST LINE: everything that happens to a REST call, in order. Read this first.

1. One Exchange, closed exactly once, whatever happens. 2. Refusals come before the body is read and
before anything is dialled. 3. After the first downstream byte there is no retry and no second
answer.
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from relay.body import Body, body_at_hand, read_body
from relay.call import Call, keys_for
from relay.core.exchange import Exchange
from relay.core.peek import peek_body
from relay.core.provider import Route
from relay.gateway import Gateway
from relay.rewrite import rewriter
from relay.stream import stream
from relay.upstream.failures import BEFORE_ANSWER, MAPPED, mapped
from relay.upstream.request import Outgoing
from relay.upstream.send import send, upstream_headers, upstream_url


async def relay_rest(request: web.Request, gateway: Gateway, call: Call) -> web.StreamResponse:
    """Relay one REST call. Raises the RelayError that the middleware answers with."""
    exchange = gateway.begin(request, "rest")
    exchange.provider, exchange.endpoint = call.provider, call.endpoint
    try:
        gateway.access.check(request.host, request.headers.get("Origin"))
        exchange.route = route = gateway.registry.match_rest(call.provider, call.endpoint)
        exchange.rewriter = rewriter(request, call, route, gateway)
        keys = keys_for(request, call, route, gateway)
        url = upstream_url(route, call.query, keys)
        body = body_at_hand(request, exchange, gateway)
        if body is None:
            body = await read_body(request, exchange, gateway)
        _peek(exchange, request, body, route)
        headers = upstream_headers(
            route, request.headers.items(), request.headers.get("Connection"), keys
        )
        if exchange.rewriter is not None and exchange.rewriter.fields is not None:
            headers["Accept-Encoding"] = "identity"
        if body.stream is not None and body.length is not None:
            headers["Content-Length"] = str(body.length)
        if gateway.mounted and request.body_exists:
            headers.popall("Content-Encoding", None)

        exchange.sent_s = gateway.clock()
        if body.stream is None:
            exchange.wait("first_byte", exchange.sent_s)
        try:
            outgoing = Outgoing(headers, body.stream or body.whole)
            upstream = await send(gateway.upstream.rest, route, request.method, url, outgoing)
        except MAPPED as error:
            raise body.error or mapped(error, route, BEFORE_ANSWER) from error
        exchange.first_byte_s = gateway.clock()
        body.whole = b""
        gateway.let_go(exchange, exchange.held_bytes)
        try:
            return await stream(upstream, request, exchange, gateway)
        finally:
            upstream.close()
    except (Exception, asyncio.CancelledError) as error:
        raise exchange.verdict(error) from error
    finally:
        gateway.close(exchange)


def _peek(exchange: Exchange, request: web.Request, body: Body, route: Route) -> None:
    """What the call is about: for logs now, for rules and meters later."""
    exchange.kind, exchange.model = route.kind, route.model
    if body.whole:
        seen = peek_body(body.whole, request.headers.get("Content-Type", ""))
        exchange.stream = seen.stream
        exchange.model = seen.model or route.model
