"""The Registry: all providers by name, immutable.

Owns the route of a call: its provider, target, and alternatives after a failure. load.py reads the
files, and build.py makes the providers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from relay.core.errors import UnknownProvider, WebSocketNotSupported
from relay.core.injection import can_be_asked
from relay.core.memo import BoundedMemo
from relay.core.models import path_with_model
from relay.core.peek import GENERATION_KINDS, MODEL_NAMES
from relay.core.provider import Fallback, Provider, Route, Target, rest_route, websocket_route
from relay.registry.problems import nearest

_MAX_ROUTES = 2048
_NAMES_OF_PRODUCTS = {
    "chatgpt": "openai", "claude": "anthropic", "gemini": "google-ai-studio", "xai": "grok",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Registry:
    """All providers. A reload replaces the Registry as a whole."""

    providers: Mapping[str, Provider]
    _rest_routes: BoundedMemo[tuple[str, str], Route] = field(init=False, repr=False, compare=False)
    """(provider, endpoint) to the route."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rest_routes", BoundedMemo(self._rest_route, _MAX_ROUTES))

    def provider(self, name: str) -> Provider:
        """Return the provider of this name. Raises UnknownProvider with the most similar name."""
        try:
            return self.providers[name]
        except KeyError:
            names = sorted(self.providers)
            raise UnknownProvider(name, nearest_provider(name, names), names) from None

    def match_rest(self, name: str, endpoint: str) -> Route:
        """Return the route of a REST call. Raises UnknownProvider."""
        return self._rest_routes[name, endpoint]

    def match_websocket(self, name: str, endpoint: str) -> Route:
        """Return the route of a WebSocket; see `check_socket`. Raises UnknownProvider."""
        route = websocket_route(self.provider(name), endpoint)
        return replace(route, alternatives=tuple(self._socket_alternatives(route, endpoint)))

    def _rest_route(self, named: tuple[str, str]) -> Route:
        name, endpoint = named
        route = rest_route(self.provider(name), endpoint)
        return replace(route, alternatives=tuple(self._rest_alternatives(route, endpoint)))

    def _rest_alternatives(self, route: Route, endpoint: str) -> Iterator[Route]:
        """Return the routes after `route` has failed. Only calls that generate have fallbacks."""
        yield from _other_way(route, rest_route, route.provider.rest_after, endpoint)
        if route.kind in GENERATION_KINDS:
            for number, fallback in enumerate(route.provider.fallbacks, 1):
                other = self.providers[fallback.provider]
                named = fallback.endpoint or route.provider.endpoint(endpoint)
                made = rest_route(other, named)
                for each in (made, *_other_way(made, rest_route, other.rest_after, named)):
                    other_route = as_fallback(each, fallback, number)
                    yield _asking_for_usage(other_route, route.provider)

    def _socket_alternatives(self, route: Route, endpoint: str) -> Iterator[Route]:
        after = route.provider.websocket_after
        yield from _other_way(route, websocket_route, after, endpoint)
        for number, fallback in enumerate(route.provider.fallbacks, 1):
            other = self.providers[fallback.provider]
            made = websocket_route(other, fallback.endpoint or "")
            if made.takes_sockets:
                other_route = as_fallback(made, fallback, number)
                yield _naming_model(other_route, fallback.model, route)


def nearest_provider(name: str, names: Sequence[str]) -> str:
    """Return the provider that a wrong name probably means: by the name of a product (`gemini`), a
    similar spelling, or the beginning of a name (`google`, `azure`); empty if there is none.
    """
    product = _NAMES_OF_PRODUCTS.get(name.lower(), "")
    if product in names or not name:
        return product
    return nearest(name, names) or next((each for each in names if each.startswith(name)), "")


def check_socket(route: Route) -> None:
    """Raise WebSocketNotSupported if `route` does not accept WebSockets."""
    if not route.takes_sockets:
        has_some = route.provider.websocket_rules is not None
        raise WebSocketNotSupported(route.provider.name, route.endpoint if has_some else "")


def _other_way(
    route: Route,
    make: Callable[[Provider, str, Target], Route],
    after: Target | None,
    endpoint: str,
) -> Iterator[Route]:
    """Return the route to the same provider by its second way, if it has one."""
    if after is not None:
        made = make(route.provider, endpoint, after)
        if made.target != route.target:
            yield made


def _asking_for_usage(route: Route, called: Provider) -> Route:
    """Inject usage for a fallback without `inject_usage` if the called provider does."""
    if route.provider.inject_usage is None and called.inject_usage:
        return replace(route, injects_usage=can_be_asked(route.endpoint, route.format))
    return route


def _naming_model(route: Route, model: str | None, called: Route) -> Route:
    """Add the fallback's model to its default query if only the called provider's has a model."""
    if model is None:
        return route
    named = {k: model for k in called.default_query if k.lower() in MODEL_NAMES}
    return replace(route, default_query=named | dict(route.default_query))


def as_fallback(route: Route, fallback: Fallback, number: int) -> Route:
    """Return the route as the one of the `number`th fallback, from 1, with its model."""
    made = replace(
        route, fallback_number=number, replaced_model=fallback.model, weight=fallback.weight
    )
    if fallback.model is None:
        return made
    prefix = route.target.prefix  # Azure's path continues with the deployment
    named = path_with_model(prefix + route.path, fallback.model)
    if named is None or not named.startswith(f"{prefix}/"):
        return made
    return replace(made, path=named.removeprefix(prefix), model=fallback.model)
