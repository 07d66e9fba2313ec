"""Choose the provider of a WebSocket of the unified surface, before any message, and replace the
names of models in its messages by the provider's.

Owns both. The provider of a session cannot change: a message that names a model of another one ends
the session with its vendor's error event.
"""

from __future__ import annotations

from functools import partial

import msgspec

from relay.calls.call import Call
from relay.core.error_bodies import socket_event
from relay.core.errors import (
    ModelNotFound,
    ModelNotInSession,
    TargetAmbiguous,
    UnknownRoute,
    WebSocketNotSupported,
)
from relay.core.exchange import Exchange
from relay.core.models import message_with_models
from relay.core.paths import query_value
from relay.core.provider import Route, websocket_route
from relay.core.text import quoted
from relay.core.unified import SOCKETS
from relay.gate.rights import take_chosen
from relay.gateway import Gateway
from relay.registry.unified_routes import UnifiedRoutes, naming
from relay.sessions.session import Ending


async def choose_socket(call: Call, exchange: Exchange, gateway: Gateway) -> tuple[Call, Route]:
    """Return a call to the provider of a socket, and its route: the provider of `?model=`, else
    that of `unified.sockets`, else the only one that has such a socket. Raises ModelNotFound,
    TargetAmbiguous, WebSocketNotSupported, ProviderNotAllowed.
    """
    route = await route_of_socket(call, gateway)
    if route.replaced_model is not None:
        exchange.request.requested_model = query_value(call.query, "model")
    take_chosen(route, exchange.request)
    return msgspec.structs.replace(call, provider=route.provider.name), route


async def route_of_socket(call: Call, gateway: Gateway) -> Route:
    """Return the route of a socket, for any client. Raises UnknownRoute, ModelNotFound,
    TargetAmbiguous, WebSocketNotSupported.
    """
    endpoint, unified = call.endpoint, gateway.unified
    if endpoint not in SOCKETS:
        raise UnknownRoute(call.method, call.root)
    gateway.model_lists.refresh(unified.providers)
    if model := query_value(call.query, "model"):
        find = partial(_route_of_model, model, endpoint, gateway)
        return await gateway.model_lists.find(find)
    return gateway.registry.match_websocket(_only_provider(endpoint, unified), endpoint)


def _route_of_model(model: str, endpoint: str, gateway: Gateway) -> Route:
    members = gateway.unified.members(model)
    for member in members:
        route = gateway.registry.match_websocket(member.provider, endpoint)
        if _takes(route):
            return naming(route, member.model if member.model != model else None)
    raise WebSocketNotSupported(members[0].provider, endpoint)


def _only_provider(endpoint: str, unified: UnifiedRoutes) -> str:
    kind = SOCKETS[endpoint]
    if (named := unified.sockets.get(kind)) is not None:
        return named
    names = [each.name for each in unified.providers if _takes(websocket_route(each, endpoint))]
    if not names:
        raise WebSocketNotSupported("", endpoint)
    if len(names) > 1:
        raise TargetAmbiguous(kind, names)
    return names[0]


def _takes(route: Route) -> bool:
    return route.takes_sockets and route.format == "openai"


class Renaming:
    """Replaces the aliases and prefixes of models in the messages of a client."""

    __slots__ = ("_exchange", "_route", "_unified")

    def __init__(self, exchange: Exchange, unified: UnifiedRoutes) -> None:
        route = exchange.routing.route
        assert route is not None
        self._exchange, self._route, self._unified = exchange, route, unified

    def __call__(self, data: bytes) -> bytes | Ending:
        """Return a message with the provider's name of its model, or the Ending of the session."""
        if b'"model"' not in data:
            return data
        try:
            return message_with_models(data, self._renamed)
        except ModelNotInSession as error:
            return self._end(error)

    def _renamed(self, model: str) -> str:
        own = self._route.provider.name
        if model not in self._unified.aliases and "/" not in model:
            return model  # the provider's own name, or one that it refuses by itself
        try:
            members = self._unified.members(model)
        except ModelNotFound:
            return model
        for member in members:
            if member.provider == own:
                return member.model
        raise ModelNotInSession(model, own)

    def _end(self, error: ModelNotInSession) -> Ending:
        event = socket_event(error, self._route.format, self._route.endpoint, self._exchange.id)
        reason = f"{error.code}: {quoted(error.model)}"
        return Ending(error.close_code, reason, "relay", error, event=event)
