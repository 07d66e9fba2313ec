"""CORS by aiohttp-cors, the same for every route: the origins of `cors.origins`, and whatever
headers a page wants to send.

Owns the adapter between aiohttp-cors, which is configured route by route, and surfaces that take
any path. Only OPTIONS with Access-Control-Request-Method is a preflight; every other OPTIONS is a
call. Which origins may call is decided in gate/access.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from aiohttp import hdrs, web
from aiohttp_cors import CorsConfig, ResourceOptions
from aiohttp_cors.abc import AbstractRouterAdapter

from relay.gateway import Gateway

EXPOSED = (
    "x-request-id", "retry-after", "server-timing", "x-should-retry", "www-authenticate",
    "x-relay-error", "x-relay-error-source", "x-relay-cache-key", "age",
    "cf-aig-log-id", "cf-aig-event-id", "cf-aig-request-id", "cf-aig-cache-status", "cf-aig-step",
    "cf-aig-model", "cf-aig-provider",
    "x-cloudflare-aig-log-id", "x-cloudflare-aig-event-id", "x-cloudflare-aig-request-id",
    "x-cloudflare-aig-cache-status", "x-cloudflare-aig-step",
    "ratelimit", "ratelimit-policy", "ratelimit-limit", "ratelimit-remaining", "ratelimit-reset",
    "x-relay-budget", "x-relay-budget-remaining-usd", "x-relay-budget-resets-at",
    "x-goog-upload-url", "x-goog-upload-status", "x-goog-upload-chunk-granularity",
    "x-goog-upload-control-url",
)  # fmt: skip
"""Response headers that a page may read. Listed one by one: CORS has no pattern like `cf-aig-*`."""


def is_preflight(request: web.Request) -> bool:
    """True if a browser asks whether it may send a call (Fetch Standard, CORS preflight)."""
    return request.method == "OPTIONS" and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers


class _Options(Mapping[str, ResourceOptions]):
    """A table of origins as aiohttp-cors expects it, which matches wildcards too."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._max_age_s = -1
        self._options: ResourceOptions | None = None

    def __getitem__(self, origin: str) -> ResourceOptions:
        if origin == "*" or not self._gateway.callers.allow_origin(origin):
            raise KeyError(origin)
        max_age_s = self._gateway.settings.cors.max_age_s
        if self._options is None or max_age_s != self._max_age_s:
            self._max_age_s = max_age_s
            self._options = ResourceOptions(  # type: ignore[no-untyped-call]
                allow_credentials=False, expose_headers=EXPOSED, allow_headers="*",
                allow_methods="*", max_age=max_age_s,
            )  # fmt: skip
        return self._options

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return int(self._gateway.lists_origins)


class _Adapter(AbstractRouterAdapter):
    """Gives aiohttp-cors one configuration for every request."""

    def __init__(self, options: _Options) -> None:
        self._options = options

    def add_preflight_handler(
        self, routing_entity: Any, handler: Any, webview: bool = False
    ) -> None:
        """Do nothing: `Cors.preflight` answers preflights."""

    def is_preflight_request(self, request: web.Request) -> bool:
        return is_preflight(request)

    def is_cors_enabled_on_request(self, request: web.Request) -> bool:
        return hdrs.ORIGIN in request.headers

    def set_config_for_routing_entity(self, routing_entity: Any, config: Any) -> None:
        """Do nothing: there is one configuration."""

    async def get_preflight_request_config(
        self, preflight_request: web.Request, origin: str, requested_method: str
    ) -> Any:
        return self._options

    def get_non_preflight_request_config(self, request: web.Request) -> Any:
        return self._options


class Cors:
    """CORS of `app`: aiohttp-cors's response signal adds headers to calls, `preflight` answers
    preflights.
    """

    def __init__(self, app: web.Application, gateway: Gateway) -> None:
        config = CorsConfig(app, router_adapter=_Adapter(_Options(gateway)))
        # 0.8.1 registers this handler per route only, and a `*` route takes none. The version is
        # pinned, and tested.
        self._handler: Any = config._cors_impl._preflight_handler  # type: ignore[union-attr]

    async def preflight(self, request: web.Request) -> web.StreamResponse:
        """Answer a preflight: 200 with what is allowed, or 403."""
        response: web.Response = await self._handler(request)
        response.headers.add("Vary", "Origin")
        response.headers.add("Vary", "Access-Control-Request-Headers")
        return response


CORS = web.AppKey("cors", Cors)
