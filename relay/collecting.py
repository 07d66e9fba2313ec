"""Bodies, where they are collected: what a REST call said and was told, each up to a bound.

Owns: whether, and the collecting. What becomes of them is the ledger's (ledger/bodies.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from aiohttp import ClientResponse

from relay.core import paths
from relay.core.credentials import bare
from relay.core.exchange import Capture, Exchange
from relay.core.headers import CREDENTIAL_HEADERS
from relay.core.meters.unpack import coding_of
from relay.gateway import Gateway
from relay.ledger.bodies import capture_bytes

_LOG, _PAYLOAD = "cf-aig-collect-log", "cf-aig-collect-log-payload"
_SHORTEST_CREDENTIAL = 8
"""A client may send anything in a credential's place; a shorter one is a placeholder."""


def collect(exchange: Exchange, body: bytes, raw_query: str, gateway: Gateway) -> None:
    """Begin with the request's, if this call's bodies are to be kept."""
    rules, headers = gateway.settings.ledger, exchange.headers
    if headers is None or not _wanted(rules.bodies, headers):
        return
    own = _credentials(exchange, headers, raw_query)
    most_bytes = capture_bytes(rules.body_bytes, own)
    # A host's server has undone a request's coding.
    given = "" if gateway.mounted else coding_of(headers.get("Content-Encoding"))
    exchange.capture = Capture(body[:most_bytes], given, rules.body_bytes, most_bytes, own)


def _wanted(rule: str, headers: Mapping[str, str]) -> bool:
    """As the file says; a call has the last word where the file leaves it one."""
    said = (headers.get(_PAYLOAD) or headers.get(_LOG) or "").strip().lower()
    forbidden = (headers.get(_LOG) or "").strip().lower() == "false"
    if rule == "asked":
        return said == "true" and not forbidden
    return rule == "on" and said != "false" and not forbidden


def _credentials(exchange: Exchange, headers: Mapping[str, str], raw_query: str) -> tuple[str, ...]:
    """What the client brought in a place of credentials: no body shows that either."""
    assert exchange.route is not None
    provider = exchange.route.provider
    names = {*CREDENTIAL_HEADERS, *provider.credential_headers}
    found = [bare(value) for name in names if (value := headers.get(name))]
    if raw_query:
        for name in provider.query_credentials:
            found.append(paths.query_value(raw_query, name) or "")
    return tuple(secret for secret in found if len(secret) >= _SHORTEST_CREDENTIAL)


def collector(upstream: ClientResponse, exchange: Exchange) -> Callable[[bytes], None] | None:
    """What takes the chunks of the answer; None where bodies are not collected."""
    capture = exchange.capture
    if capture is None:
        return None
    capture.response_coding = coding_of(upstream.headers.get("Content-Encoding"))
    response, most = capture.response, capture.captured_bytes

    def take(chunk: bytes) -> None:
        response.extend(chunk[: most - len(response)] if len(response) < most else b"")

    return take
