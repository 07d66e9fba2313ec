"""Apply the rights of a client to the route of a call: kinds of endpoints, providers of fallbacks.

Owns these checks, and that of the provider of a call to the unified surface, which names none. The
provider that any other call names, its address and its origin are checked with the key
(identify.py), models in model_access.py.
"""

from __future__ import annotations

from dataclasses import replace

from relay.core.access import Client
from relay.core.errors import EndpointNotAllowed
from relay.core.exchange import Request
from relay.core.provider import Route
from relay.gate.identify import check_provider


def take_chosen(route: Route, request: Request) -> None:
    """Note the provider that was chosen for a call which names none. Raises ProviderNotAllowed if
    its client may not call it.
    """
    request.provider, request.endpoint = route.provider.name, route.endpoint
    if (record := request.caller.record) is not None:
        check_provider(record, route.provider.name)


def route_of_client(client: Client, route: Route) -> Route:
    """Return the route without the fallbacks to providers that the client may not call. Raises
    EndpointNotAllowed if its record lists kinds of endpoints, and not that of the route.
    """
    rights = client.rights
    if rights.endpoints and route.kind not in rights.endpoints:
        raise EndpointNotAllowed(client.name, route.kind)
    if not rights.providers or not route.alternatives:
        return route
    kept = tuple(each for each in route.alternatives if each.provider.name in rights.providers)
    return replace(route, alternatives=kept)
