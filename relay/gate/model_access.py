"""Apply the models of a client's record and ticket to its calls.

Owns which models a caller may use, and the errors for others. core/named_models.py finds the models
that a request names; sessions/admission.py checks the messages of sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from relay.core.errors import EndpointNotAllowed, ModelNotAllowed, ModelUnknown
from relay.core.exchange import Caller
from relay.core.model_patterns import allowed
from relay.core.model_search import Named, Unreadable
from relay.core.named_models import (
    CallText,
    is_named_at,
    models_in_path,
    models_of_call,
    places_of_call,
    reads_model,
)
from relay.core.peek import GENERATION_KINDS
from relay.core.provider import Route
from relay.gate.limits import yield_to_others


class ModelAccess(NamedTuple):
    """The models that a caller may use."""

    client: str
    patterns: tuple[tuple[str, ...], ...]
    """A model must match one pattern of each of these: of the client's record, of its ticket."""
    endpoints: frozenset[str]
    """The kinds of endpoints that the client's record lists."""
    alias: str = ""
    """The name by which the call asks for a model, and which the relay replaces (`through`)."""

    def allows(self, model: str) -> bool:
        """True if the caller may use this model."""
        return all(allowed(each, model) for each in self.patterns)

    def through(self, alias: str, route: Route) -> ModelAccess:
        """Return the same rights for a call that names `alias`, which `route` replaces by a model.
        Raises ModelNotAllowed unless the client may use one of both: a record may list aliases.
        """
        access = self._replace(alias=alias)
        if not _may_call(access, route):
            raise ModelNotAllowed(self.client, alias)
        return access

    def refusal(self, named: Sequence[Named]) -> ModelNotAllowed | None:
        """Return the error for the first of these models that the caller may not use."""
        for each in named:
            if each.model != self.alias and not self.allows(each.model):
                return ModelNotAllowed(self.client, each.model)
        return None

    def check(self, named: Sequence[Named]) -> None:
        """Raise ModelNotAllowed if the caller may not use one of these models."""
        if (error := self.refusal(named)) is not None:
            raise error

    def check_unread(self, kind: str) -> None:
        """Raise EndpointNotAllowed unless the record lists `kind`, whose model the relay does not
        read.
        """
        if kind not in self.endpoints:
            raise EndpointNotAllowed(self.client, kind)


def model_access(caller: Caller) -> ModelAccess | None:
    """Return the models that `caller` may use; None if it may use all."""
    record, terms = caller.record, caller.terms
    if record is None or (terms is None and not record.rights.models):
        return None
    lists = (record.rights.models, terms.models if terms is not None else ())
    patterns = tuple(each for each in lists if each)
    return ModelAccess(record.name, patterns, record.rights.endpoints) if patterns else None


def check_endpoint_model(access: ModelAccess, route: Route, method: str) -> None:
    """Raise EndpointNotAllowed for a REST call whose model the relay does not read, unless the
    client's record lists its kind. It needs no body.
    """
    if not reads_model(method, route.format, route.endpoint):
        access.check_unread(route.kind)


async def check_call(access: ModelAccess, route: Route, method: str, call: CallText) -> None:
    """Raise ModelNotAllowed if a REST call names a model that the client may not use, and
    ModelUnknown if it names none where its vendor reads it, or may name one that the relay does not
    see.
    """
    await yield_to_others(call.body)
    found = models_of_call(call)
    is_read = reads_model(method, route.format, route.endpoint)
    if isinstance(found, Unreadable):
        # A GET whose header asks for another method generates too.
        if is_read or route.kind in GENERATION_KINDS:
            raise ModelUnknown(found.reason)
        return
    access.check(found)
    places = places_of_call(method, route.format, route.endpoint) if is_read else ""
    if places and not is_named_at(places, found):
        raise ModelUnknown("it names no model where the provider reads it")


def without_forbidden_targets(access: ModelAccess, route: Route) -> Route:
    """Return the route without the fallbacks whose own model the client may not use."""
    if not route.alternatives:
        return route
    kept = tuple(each for each in route.alternatives if _may_call(access, each))
    return replace(route, alternatives=kept)


def _may_call(access: ModelAccess, route: Route) -> bool:
    model = route.replaced_model
    if model is not None and not access.allows(model):
        return bool(access.alias) and access.allows(access.alias)
    named = models_in_path(route.format, path_of(route))
    return all(access.allows(each.model) for each in named)


def path_of(route: Route) -> str:
    """Return the raw path in which a route names its model, with the provider's base path: that of
    Azure ends in `deployments`, and the model follows.
    """
    return route.endpoint if route.format == "fal" else route.provider.base_path + route.path
