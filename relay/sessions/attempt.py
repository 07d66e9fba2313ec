"""Build and send each attempt of a WebSocket handshake: URL, headers, subprotocols and credential
for its target.

Owns what an attempt sends, and the model of a session before its first message.
upstream/attempts.py decides which attempts are made, upstream/connect.py opens the connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aiohttp import ClientWebSocketResponse
from multidict import CIMultiDict

from relay.calls.call import Call
from relay.calls.transforms import redact_whole, redacted_pairs, redacted_text
from relay.core import paths
from relay.core.errors import HandshakeRefused, RelayError
from relay.core.exchange import Exchange
from relay.core.headers import connection_of
from relay.core.models import query_with_model
from relay.core.provider import Keys, Route
from relay.core.retry_policy import AttemptResult
from relay.core.traces import HEADER as TRACE
from relay.gateway import Gateway
from relay.upstream.attempts import AttemptOptions
from relay.upstream.connect import Handshake, connect
from relay.upstream.failures import BEFORE_ANSWER, map_failure
from relay.upstream.send import upstream_headers, upstream_url

# If the query has one of these parameters, the client chose its session: no default is added.
_CHOOSERS = frozenset({"model", "intent", "call_id", "agent_id"})
_GOOD = AttemptResult(101)


@dataclass(slots=True)
class HandshakeAttempt:
    """Makes the attempts of one handshake."""

    call: Call
    exchange: Exchange
    gateway: Gateway
    options: AttemptOptions
    examines_first_event: bool = False

    async def attempt(self, route: Route, keys: Keys) -> ClientWebSocketResponse[bool]:
        """Connect to `route`. Raises HandshakeRefused, with the provider's own status and body."""
        handshake = self._handshake(route, keys)
        self.exchange.request.kind, self.exchange.routing.keys = route.kind, keys
        self.exchange.request.model = _model(handshake.url.raw_query_string, route)
        try:
            upstream = await connect(self.gateway.upstream.sockets, route, handshake)
        except HandshakeRefused as refusal:
            self._note(refusal.headers)
            _redact(refusal, keys)
            raise
        self._note(upstream._response.headers)
        return upstream

    def _note(self, headers: Mapping[str, str]) -> None:
        """Record the Cloudflare log id of a response."""
        self.exchange.routing.cloudflare_log_id = headers.get("cf-aig-log-id")

    def judge_head(self, upstream: ClientWebSocketResponse[bool]) -> AttemptResult:
        """Accept the open connection."""
        return _GOOD

    async def judge_body(self, upstream: ClientWebSocketResponse[bool]) -> AttemptResult:
        """Accept the open connection: a 101 has no body."""
        return _GOOD

    def drop(self, upstream: ClientWebSocketResponse[bool]) -> None:
        """Close the connection. `judge_head` accepts every one, so this is not called."""
        upstream._response.close()

    def mapped(self, error: Exception, route: Route) -> RelayError:
        """Map the reason for which there is no connection."""
        return map_failure(error, route, BEFORE_ANSWER)

    def _handshake(self, route: Route, keys: Keys) -> Handshake:
        rules, credential = route.provider.websocket_rules, keys.provider
        assert rules is not None
        own = self.call.headers
        query = handshake_query(self.call.query, route, own)
        headers = upstream_headers(route, own.items(), connection_of(own), keys)
        in_query = paths.query_names(query)
        for header, parameter in rules.header_queries.items():
            if header not in own and parameter.lower() in in_query:
                headers.popall(header, None)  # a default of the registry: the query replaces it
        if self.exchange.request.trace is not None:
            headers[TRACE] = self.exchange.request.trace.header
        subprotocols = self.call.offer(route).passed
        if credential is not None and credential.place == "subprotocol":
            subprotocols = (*subprotocols, credential.name + credential.value)
        return Handshake(
            upstream_url(route, query, keys),
            headers,
            subprotocols,
            rules.max_message_bytes,
            self.gateway.settings.websocket.handshake_timeout_s,
        )


def _redact(refusal: HandshakeRefused, keys: Keys) -> None:
    """Redact the relay's credentials in a refused handshake, as in any other error."""
    refusal.reason = redacted_text(refusal.reason, keys)
    headers = CIMultiDict(redacted_pairs(list(refusal.headers.items()), keys))
    refusal.body, refusal.headers = redact_whole(refusal.body, headers, keys), headers


def _with_defaults(raw_query: str, route: Route, headers: Mapping[str, str]) -> str:
    """Add the route's default parameters to `raw_query`, but for those that the client gave in its
    query or in one of its `headers`.
    """
    rules = route.provider.websocket_rules
    if rules is None or not route.default_query:
        return raw_query
    named = paths.query_names(raw_query)
    if named & _CHOOSERS:
        return raw_query
    named |= {
        parameter.lower() for header, parameter in rules.header_queries.items() if header in headers
    }
    added = [
        f"{name}={value}"
        for name, value in route.default_query.items()
        if name.lower() not in named
    ]
    return paths.join_query(raw_query, *added)


def handshake_query(raw_query: str, route: Route, headers: Mapping[str, str]) -> str:
    """Return the query that is sent for `route`: the client's, with the defaults of the registry,
    and with the model of a fallback.
    """
    query = _with_defaults(raw_query, route, headers)
    if route.replaced_model is None:
        return query
    return query_with_model(query, route.replaced_model, route.format)


def session_model(raw_query: str, route: Route, headers: Mapping[str, str]) -> str | None:
    """Return the model that the URL of a session, or the default of its path, names before the
    provider is connected. None if only messages name it.
    """
    return _model(handshake_query(raw_query, route, headers), route)


def _model(raw_query: str, route: Route) -> str | None:
    named = paths.query_value(raw_query, "model") or paths.query_value(raw_query, "model_id")
    return named or route.model
