"""`relay explain METHOD PATH`: show how the relay would send a call, with secrets masked, without
sending it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from relay.cli.sources import load_config
from relay.core import paths, subprotocols
from relay.core.base_urls import guess_provider
from relay.core.credentials import first_of
from relay.core.errors import ProviderNotConfigured, RelayError, UnknownRoute, UpgradeRequired
from relay.core.limits import Rule
from relay.core.models import query_with_model
from relay.core.paths import API
from relay.core.provider import Credential, Keys, Route
from relay.registry.credentials import mask
from relay.registry.load import Config
from relay.registry.registry import check_socket
from relay.upstream.send import upstream_url

WEBSOCKET = "GET (WebSocket)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("method", help="GET, POST, …, or WS for a WebSocket")
    parser.add_argument("path", help=f"path at the relay, such as {API}/providers/openai/models")


def run(options: argparse.Namespace) -> int:
    """Print how the call would be sent; return 0, or 1 if the relay would refuse it."""
    config = load_config(options)
    try:
        print(explain(config, options.method.upper(), options.path))
    except RelayError as error:
        print(f"refused with {error.status} {error}", file=sys.stderr)
        return 1
    return 0


def explain(config: Config, method: str, target: str) -> str:
    """Return the description of a call. The `method` WS is a WebSocket handshake. Raises the error
    that the call would get.
    """
    paths.check_target(target)
    for prefix in (f"{API}/providers/", f"{API}/ws/"):
        if target.startswith(prefix):
            break
    else:
        guess = guess_provider(target.partition("?")[0], {}, config.registry.providers)
        raise UnknownRoute(method, f"{API}/providers/", guess.provider, guess.format)
    if prefix.endswith("/ws/") and method != "WS":
        raise UpgradeRequired
    name, endpoint, query = paths.split_endpoint(target.removeprefix(prefix))
    websocket = method == "WS"
    match = config.registry.match_websocket if websocket else config.registry.match_rest
    route = match(name, endpoint)
    if websocket:
        check_socket(route)
    shown = WEBSOCKET if websocket else method
    return "\n".join(_lines(route, query, shown, config.limits))


def _lines(route: Route, query: str, method: str, limits: Sequence[Rule]) -> list[str]:
    provider, target = route.provider, route.target
    lines = [f"provider     {provider.name}", f"via          {target.via}"]
    try:
        keys = first_of(route)
    except ProviderNotConfigured as error:
        lines.append(f"refused      {error.status} {error.code}: set {', '.join(error.missing)}")
        keys = Keys()
    url = str(upstream_url(route, query, Keys()))
    lines += [f"sends        {method} {url}", f"kind         {route.kind}"]
    lines.append(f"format       {route.format}")
    lines += [
        f"credential   {_shown(credential)}"
        for credential in (keys.provider, keys.gateway)
        if credential
    ]
    if target.proxy is not None:
        lines.append(f"proxy        {target.proxy.shown}   (from {target.proxy.variable})")
    lines += [f"on failure   {_describe_alternative(other, query)}" for other in route.alternatives]
    if provider.headers:
        defaults = ", ".join(f"{name}: {value}" for name, value in provider.headers)
        lines.append(f"defaults     {defaults}")
    if provider.query_credentials:
        lines.append(f"strips       query {', '.join(sorted(provider.query_credentials))}")
    if method == WEBSOCKET and (rules := provider.websocket_rules):
        passed = subprotocols.sort(tuple(rules.subprotocols), rules.subprotocols).passed
        lines.append(f"subprotocols {', '.join(passed) or 'none'}")
        default = ", ".join(f"{name}={value}" for name, value in route.default_query.items())
        lines.append(f"default query  {default or 'none'}")
    applying = [
        rule.name for rule in limits if not rule.providers or provider.name in rule.providers
    ]
    if applying:
        lines.append(f"limits       {', '.join(applying)}")
    if provider.cache.ttl_s is not None:
        lines.append(f"cache        {provider.cache.ttl_s} s, {provider.cache.scope}")
    lines.append(
        f"timeouts     connect {provider.connect_timeout_s:g} s,"
        f" first byte {provider.first_byte_timeout_s:g} s, idle {provider.idle_timeout_s:g} s"
        + (f", keepalive {provider.keepalive_s:g} s" if provider.keepalive_s else "")
    )
    return lines


def _describe_alternative(route: Route, query: str) -> str:
    model, proxy, to = route.replaced_model, route.target.proxy, route.provider.name
    notes = f"   ({to}{f', model {model}' if model else ''}{f', proxy {proxy}' if proxy else ''})"
    if not route.target.pool:
        return f"unavailable: set {', '.join(route.target.missing)}{notes}"
    query = query if model is None else query_with_model(query, model, route.format)
    return f"{upstream_url(route, query, Keys())}{notes}"


def _shown(credential: Credential) -> str:
    place = f"{credential.place} {credential.name}"
    return f"{place}: {mask(credential.value)}   (from {credential.label})"
