"""One attempt of a REST call, made afresh each time: URL, headers, credential and body for whoever
is asked now.

Owns: that making. Which attempts there are is upstream/attempts.py's.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable
from dataclasses import dataclass

from aiohttp import ClientResponse, web
from multidict import CIMultiDict

from relay.body import Body
from relay.call import Call
from relay.core.errors import RelayError
from relay.core.exchange import Exchange
from relay.core.peek import asking_for_usage, with_model
from relay.core.policy import Tried, answered
from relay.core.provider import Keys, Route
from relay.core.traces import HEADER as TRACE
from relay.gateway import Gateway
from relay.rewrite import rewriter
from relay.upstream.failures import BEFORE_ANSWER, mapped
from relay.upstream.request import Outgoing
from relay.upstream.send import send, upstream_headers, upstream_url

_GOOD = Tried(200)


@dataclass(slots=True)
class Sending:
    """The call as its client made it."""

    request: web.Request
    call: Call
    exchange: Exchange
    gateway: Gateway
    body: Body

    def attempt(self, route: Route, keys: Keys) -> Awaitable[ClientResponse]:
        """Send it to `route`; await it for the head of the answer."""
        exchange, gateway, body = self.exchange, self.gateway, self.body
        exchange.rewriter = rewriter(self.request, self.call, route, gateway)
        url = upstream_url(route, self.call.query, keys)
        headers = self._headers(route, keys)
        whole = body.whole
        if route.replaced_model is not None and whole:
            whole = with_model(whole, route.replaced_model)
        exchange.asks_usage = False
        if route.provider.inject_usage and exchange.stream and exchange.kind == "chat":
            asking = asking_for_usage(whole)
            if asking is not None:
                whole, exchange.asks_usage = asking, True
                headers["Accept-Encoding"] = "identity"
        now = gateway.clock()
        exchange.sent_s = exchange.sent_s or now
        if body.stream is None:
            exchange.wait("first_byte", now)
        outgoing = Outgoing(headers, body.stream or whole)
        return send(gateway.upstream.rest, route, self.request.method, url, outgoing)

    def mapped(self, error: Exception, route: Route) -> RelayError:
        """Why it failed: the client's upload, or the upstream leg."""
        return self.body.error or mapped(error, route, BEFORE_ANSWER)

    def drop(self, answer: ClientResponse) -> None:
        """Another attempt follows."""
        answer.close()

    def _headers(self, route: Route, keys: Keys) -> CIMultiDict[str]:
        request, body = self.request, self.body
        headers = upstream_headers(
            route, request.headers.items(), request.headers.get("Connection"), keys
        )
        if self.exchange.rewriter is not None and self.exchange.rewriter.fields is not None:
            headers["Accept-Encoding"] = "identity"
        if body.stream is not None and body.length is not None:
            headers["Content-Length"] = str(body.length)
        if self.gateway.mounted and request.body_exists:
            headers.popall("Content-Encoding", None)
        if self.exchange.trace is not None:
            headers[TRACE] = self.exchange.trace.header
        key = route.provider.idempotency_header
        if key is not None and request.method == "POST" and key not in headers:
            headers[key] = self.exchange.id
        return headers

    def look(self, answer: ClientResponse) -> Tried:
        """What the head of an answer says of the attempt."""
        if answer.status < 400:
            return _GOOD
        return answered(answer.status, answer.headers.get, time.time())
