"""Choose the route of a call to the unified surface by its model.

Owns the order of the choice: an alias, then `PROVIDER/MODEL`, then the first provider of
`unified.order` that lists the model. Nothing is translated between wire formats: a provider that
does not have the endpoint is not called.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

from relay.core.errors import EndpointNotSupported, ModelNotFound, UnknownProvider
from relay.core.memo import BoundedMemo
from relay.core.provider import Fallback, Provider, Route
from relay.core.subprotocols import SubprotocolUse
from relay.core.unified import Alias, Member, Unified, path_at, paths_instead
from relay.registry.registry import Registry, as_fallback

_MAX_ROUTES = 2048
_COMPARED_CHARACTERS = 80
_NEAREST = 3


class ModelNames(Protocol):
    """The lists of models of the providers (upstream/model_lists.py)."""

    version: int

    def models(self, provider: Provider) -> Sequence[str]:
        """Return the ids of the models of a provider, as far as they are known."""
        ...

    def has(self, provider: Provider, model: str) -> bool:
        """True if a provider lists this model."""
        ...


class AllPlaces(NamedTuple):
    """Where a client may send a credential to any of the providers (gate.identify.KeyPlaces)."""

    query_credentials: frozenset[str]
    credential_headers: tuple[str, ...]
    subprotocols: Mapping[str, SubprotocolUse]
    accepts_client_keys: bool


def all_places(providers: Collection[Provider]) -> AllPlaces:
    """Return the places of all providers together: the one of a call is not known yet."""
    subprotocols: dict[str, SubprotocolUse] = {}
    for each in providers:
        for name, use in each.subprotocols.items():
            if use == "credential" or name not in subprotocols:
                subprotocols[name] = use
    return AllPlaces(
        frozenset().union(*(each.query_credentials for each in providers)),
        (),  # one provider's own header would be forwarded to another one, with the key in it
        subprotocols,
        any(each.accepts_client_keys for each in providers),
    )


def _in_order(providers: Mapping[str, Provider], order: Sequence[str]) -> tuple[Provider, ...]:
    if order:
        return tuple(providers[name] for name in order if name in providers)
    ready = [each for each in providers.values() if not each.rest.missing and each.speaks]
    # The built-in provider answers only if no other one has the model.
    return tuple(sorted(ready, key=lambda each: each.name == "demo"))


class UnifiedRoutes:
    """The routes of the unified surface in one configuration."""

    def __init__(self, registry: Registry, rules: Unified, lists: ModelNames) -> None:
        self._registry, self._rules, self._lists = registry, rules, lists
        self._version = lists.version
        self._routes = BoundedMemo(self._make, _MAX_ROUTES)
        self.places = all_places(registry.providers.values())
        self.providers = _in_order(registry.providers, rules.order)
        """The providers in which a model is looked for, in order."""

    @property
    def aliases(self) -> Mapping[str, Alias]:
        """The aliases of `models`."""
        return self._rules.aliases

    @property
    def sockets(self) -> Mapping[str, str]:
        """Kind of socket to the provider that answers it if no model is named."""
        return self._rules.sockets

    def route(self, endpoint: str, model: str) -> Route:
        """Return the route of a call to `endpoint` for `model`. Raises ModelNotFound, and
        EndpointNotSupported.
        """
        if self._version != self._lists.version:
            self._version = self._lists.version
            self._routes.clear()
        return self._routes[endpoint, model]

    def members(self, model: str) -> tuple[Member, ...]:
        """Return the targets of a model. Raises ModelNotFound."""
        alias = self.aliases.get(model)
        if alias is not None:
            return alias.members
        head, slash, rest = model.partition("/")
        if slash and rest and head in self._registry.providers:
            return (Member(head, rest),)
        for provider in self.providers:
            if self._lists.has(provider, model):
                return (Member(provider.name, model),)
        raise ModelNotFound(model, self._nearest(model))

    def _nearest(self, model: str) -> list[str]:
        known = [*self.aliases]
        for provider in self.providers:
            known += self._lists.models(provider)
        return difflib.get_close_matches(model[:_COMPARED_CHARACTERS], known, _NEAREST, 0.6)

    def _make(self, named: tuple[str, str]) -> Route:
        endpoint, model = named
        members = self.members(model)
        alias = self.aliases.get(model)
        made = list(self._targets(endpoint, model, members))
        if not made:
            provider = self._provider(members[0].provider)
            raise EndpointNotSupported(
                provider.name, members[0].model, endpoint, paths_instead(provider.speaks)
            )
        first, *others = made
        by_weight = alias.by_weight if alias is not None else first.by_weight
        if alias is None or not others:
            return replace(first, by_weight=by_weight)
        # The targets of an alias replace the fallbacks of its first provider.
        own_ways = [each for each in first.alternatives if not each.is_alternative]
        return replace(first, alternatives=(*own_ways, *others), by_weight=by_weight)

    def _targets(self, endpoint: str, model: str, members: Sequence[Member]) -> Iterator[Route]:
        """Yield the routes to those members that have the endpoint, the first one as it is called
        by itself.
        """
        number = 0
        for member in members:
            provider = self._provider(member.provider)
            path = path_at(provider.speaks, endpoint)
            if path is None:
                continue
            route = self._registry.match_rest(provider.name, path)
            replaced = member.model if member.model != model else None
            if number:
                fallback = Fallback(provider.name, replaced, None, member.weight)
                yield as_fallback(replace(route, alternatives=()), fallback, number)
            else:
                yield replace(naming(route, replaced), weight=member.weight)
            number += 1

    def _provider(self, name: str) -> Provider:
        try:
            return self._registry.provider(name)
        except UnknownProvider:
            raise ModelNotFound(name) from None


def naming(route: Route, model: str | None) -> Route:
    """Return the route with its alternatives, each with `model` unless it has its own."""
    if model is None:
        return route
    alternatives = [
        each if each.replaced_model is not None else replace(each, replaced_model=model)
        for each in route.alternatives
    ]
    return replace(route, replaced_model=model, alternatives=tuple(alternatives))
