"""Management over HTTP: GET …/providers, POST …/providers/reload and DELETE …/cache.

Owns the queries and responses of these. management.py decides who may.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web

from relay import log
from relay.cache.store import Purge
from relay.core.caching import MAX_TTL_S
from relay.core.errors import BadRequest
from relay.core.numbers import whole_number
from relay.core.provider import Provider
from relay.gateway import GATEWAY
from relay.surfaces.management import audit, authorize, parameters_of
from relay.upstream.health import Health

BESIDE_CALLS = frozenset({"reload"})
"""Names below …/providers/ that are management: no provider can have one of these names."""


def add_routes(app: web.Application, prefix: str) -> None:
    """Add the routes of management under `prefix`."""
    app.router.add_get(f"{prefix}/providers", providers)
    app.router.add_delete(f"{prefix}/cache", purge)
    app.router.add_post(f"{prefix}/providers/reload", reload)


async def providers(request: web.Request) -> web.Response:
    """200 with every provider: how it is reached, which variables it lacks (their names, never
    values), and the health of its targets and keys.
    """
    authorize(request)
    gateway = request.app[GATEWAY]
    known = gateway.registry.providers.values()
    health = gateway.attempts.health
    return web.json_response({"providers": [_describe(provider, health) for provider in known]})


async def reload(request: web.Request) -> web.Response:
    """Load gateway.yaml again. 200 with the providers, the changed settings, and those
    of them that need a restart.

    Raises ConfigInvalid (422) with every problem, and the old configuration stays in force;
    WorkersIncomplete (503) with the workers that did not take the new one.
    """
    manager = authorize(request)
    gateway = request.app[GATEWAY]
    assert gateway.reload is not None
    result = await gateway.reload()
    await audit(request, manager, "config.reload")
    providers = sorted(gateway.registry.providers)
    return web.json_response({"reloaded": True, "providers": providers, **result._asdict()})


async def purge(request: web.Request) -> web.Response:
    """Delete responses from the cache: those that match every parameter (`?key=`, `?provider=`,
    `?older_than_s=`), or all without parameters. 200 with the number of them.

    Raises BadRequest, StoreUnavailable.
    """
    manager = authorize(request)
    gateway, query = request.app[GATEWAY], parameters_of(request, "key", "provider", "older_than_s")
    older_than_s = None
    if (text := query.get("older_than_s")) is not None:
        older_than_s = whole_number(text, 0, MAX_TTL_S)
        if older_than_s is None:
            raise BadRequest(f"older_than_s is not a whole number from 0 to {MAX_TTL_S}")
    conditions = Purge(query.get("key"), query.get("provider"), older_than_s)
    count = await gateway.purge(conditions)
    await audit(request, manager, "cache.purge")
    log.event("cache.purged", count=count, provider=conditions.provider, older_than_s=older_than_s)
    return web.json_response({"purged": count})


def _describe(provider: Provider, health: Health) -> dict[str, Any]:
    return {
        "name": provider.name,
        "format": provider.format,
        "configured": not provider.missing,
        "missing": list(provider.missing),
        "rest": provider.rest.via,
        "websocket": provider.websocket.via if provider.websocket_rules else None,
        "health": [
            health.describe(provider.name, target)
            for target in (provider.rest, provider.rest_after)
            if target is not None
        ],
    }
