"""The Registry: providers by name, frozen. An Exchange keeps the Registry it began with.

Owns: finding the provider of a call. Does not own: reading files (load.py) or making providers
(build.py).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from relay.core.errors import UnknownProvider, WebSocketNotSupported
from relay.core.provider import Provider, Route, rest_route, websocket_route

_ROUTES_KEPT = 2048


@dataclass(frozen=True, slots=True)
class Registry:
    """All providers. Replaced whole by a reload, never changed."""

    providers: Mapping[str, Provider]
    _routes: dict[tuple[str, str], Route] = field(default_factory=dict, repr=False, compare=False)
    """Routes worked out before; endpoints repeat. Bounded, since they come from outside."""

    def provider(self, name: str) -> Provider:
        """The provider of this name. Raises UnknownProvider with the nearest name."""
        try:
            return self.providers[name]
        except KeyError:
            near = difflib.get_close_matches(name[:80], self.providers, 1, 0.6)
            raise UnknownProvider(name, near[0] if near else "") from None

    def match_rest(self, name: str, endpoint: str) -> Route:
        """The route of a REST call. Raises UnknownProvider."""
        route = self._routes.get((name, endpoint))
        if route is None:
            route = rest_route(self.provider(name), endpoint)
            if len(self._routes) >= _ROUTES_KEPT:
                self._routes.clear()
            self._routes[name, endpoint] = route
        return route

    def match_websocket(self, name: str, endpoint: str) -> Route:
        """The route of a WebSocket. Raises UnknownProvider, WebSocketNotSupported."""
        provider = self.provider(name)
        if provider.websocket_rules is None:
            raise WebSocketNotSupported(name)
        return websocket_route(provider, endpoint)
