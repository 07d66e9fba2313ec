"""Apply the rights of a client to the route of a call: kinds of endpoints, providers of fallbacks.

Owns these checks. The provider that the call names, its address and its origin are checked with the
key (identify.py), models in model_access.py.
"""

from __future__ import annotations

from dataclasses import replace

from relay.core.access import Client
from relay.core.errors import EndpointNotAllowed
from relay.core.provider import Route


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
