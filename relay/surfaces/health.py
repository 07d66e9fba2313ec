"""Health and metrics: `/healthz` (the process runs), `/readyz` (it accepts calls), `/version`,
`/metrics`.

Owns their responses. The first three are for load balancers: any Host, no access check; the
counters of `/readyz` are for who may read `/metrics`. ledger/metrics.py makes the figures.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

import relay
from relay import log
from relay.gateway import GATEWAY, Gateway
from relay.ledger.metrics import CONTENT_TYPE
from relay.surfaces.management import may_read_metrics, require_metrics
from relay.surfaces.native import unknown_route


def add_routes(app: web.Application, prefix: str) -> None:
    """Add the routes under `prefix`."""
    app.router.add_get(f"{prefix}/healthz", healthz)
    app.router.add_get(f"{prefix}/readyz", readyz)
    app.router.add_get(f"{prefix}/version", version)
    app.router.add_get(f"{prefix}/metrics", metrics)


async def healthz(request: web.Request) -> web.Response:
    """200 while the event loop runs."""
    return web.json_response({"status": "ok"})


async def readyz(request: web.Request) -> web.Response:
    """200 while the relay accepts calls, 503 while it drains. The body has counters of what is
    degraded, for who may read metrics.
    """
    gateway = request.app[GATEWAY]
    body: dict[str, Any] = {"status": "draining" if gateway.draining else "ready"}
    if may_read_metrics(request):
        body |= _counters(gateway)
    response = web.json_response(body, status=503 if gateway.draining else 200)
    if gateway.draining:
        response.force_close()
    return response


def _counters(gateway: Gateway) -> dict[str, Any]:
    ledger = gateway.ledger
    body: dict[str, Any] = {
        "in_flight": len(gateway.running),
        "sessions": len(gateway.sessions),
        "log_lines_lost": log.losses.lines,
        "meter_failures": ledger.lost.meters,
        "requests_shed": gateway.requests_shed,
        "background_dropped": gateway.background.dropped,
    }
    if ledger.database is not None:
        body |= {
            "access": "ok" if gateway.keys.is_fresh else "unavailable",
            "ledger": ledger.state,
            "ledger_rows_waiting": ledger.waiting,
            "ledger_failures": ledger.lost.failures,
            "ledger_rows_dropped": ledger.lost.rows,
            "ledger_bodies_dropped": ledger.lost.bodies,
        }
    if (shared := gateway.shared) is not None:
        # Without Redis the relay stays ready: limits and cache go on in the process's memory.
        body |= {"redis": shared.state, "redis_failures": shared.failures}
    return body


async def metrics(request: web.Request) -> web.Response:
    """Metrics in Prometheus' text format, of all workers, whichever one answers. Raises what
    refuses a caller who may not read them; UnknownRoute where metrics are off.
    """
    gateway = request.app[GATEWAY]
    require_metrics(request)
    if gateway.metrics is None:
        raise unknown_route(request)
    gateway.metrics.update(gateway.gauges(), gateway.counters())
    text = await asyncio.to_thread(gateway.metrics.render)
    return web.Response(body=text, headers={"content-type": CONTENT_TYPE})


async def version(request: web.Request) -> web.Response:
    """The relay's version."""
    return web.json_response({"name": "relay", "version": relay.__version__})
