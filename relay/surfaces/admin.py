"""Management: GET …/providers, POST …/providers/reload and DELETE …/cache, for local
administrators alone (gate/access.py).
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
from relay.gate.access import require_local
from relay.gateway import GATEWAY
from relay.upstream.health import Health

BESIDE_CALLS = frozenset({"reload"})
"""Paths of these under …/providers/: no provider can be called so."""


def add_routes(app: web.Application, prefix: str) -> None:
    """Add the surface."""
    app.router.add_get(f"{prefix}/providers", providers)
    app.router.add_delete(f"{prefix}/cache", purge)
    app.router.add_post(f"{prefix}/providers/reload", reload)


async def providers(request: web.Request) -> web.Response:
    """Every provider, the way it is reached, and what it is missing. Names of variables, never
    values.
    """
    require_local(request.remote, request.headers)
    gateway = request.app[GATEWAY]
    known = gateway.registry.providers.values()
    health = gateway.attempts.health
    return web.json_response({"providers": [_shown(provider, health) for provider in known]})


async def reload(request: web.Request) -> web.Response:
    """Load gateway.yaml again: 200 with the providers and the changed settings that need a restart;
    422 with every problem and the old one kept; 503 with the workers that did not take it.
    """
    require_local(request.remote, request.headers)
    gateway = request.app[GATEWAY]
    assert gateway.reload is not None
    restart = await gateway.reload()
    providers = sorted(gateway.registry.providers)
    return web.json_response({"reloaded": True, "providers": providers, "needs_restart": restart})


async def purge(request: web.Request) -> web.Response:
    """Forget kept answers: `?key=`, `?provider=`, `?older_than_s=`, all that fits each given; all
    without any. 200 with how many.

    Raises BadRequest, StoreUnavailable.
    """
    require_local(request.remote, request.headers)
    gateway, given = request.app[GATEWAY], request.query
    if unknown := set(given) - {"key", "provider", "older_than_s"}:
        raise BadRequest(f"there is no condition '{min(unknown)[:40]}' to purge by")
    older_s = None
    if (text := given.get("older_than_s")) is not None:
        older_s = whole_number(text, 0, MAX_TTL_S)
        if older_s is None:
            raise BadRequest(f"older_than_s is not a whole number from 0 to {MAX_TTL_S}")
    which = Purge(given.get("key"), given.get("provider"), older_s)
    count = await gateway.purge(which)
    log.event("cache.purged", count=count, provider=which.provider, older_than_s=older_s)
    return web.json_response({"purged": count})


def _shown(provider: Provider, health: Health) -> dict[str, Any]:
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
