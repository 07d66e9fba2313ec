"""What a call through the relay can fail with, typed by whose failure it is.

Owns: the mapping from the relay's codes (docs/errors.md) to these classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp

from relay.core.errors import CATALOGUE, HandshakeRefused


@dataclass(eq=False)
class AIGatewayError(Exception):
    """A call that brought no answer. `code` is stable; docs/errors.md lists the relay's."""

    code: str
    message: str
    status: int = 0
    """HTTP status, or the WebSocket close code; 0 if there was neither."""
    source: str = "client"
    """Whose failure it is: relay, cloudflare, provider, client."""
    request_id: str = ""

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class RelayUnreachable(AIGatewayError):
    """No connection to the relay, or it broke."""


class RequestRefused(AIGatewayError):
    """The relay refused the call: something about it must change."""


class RelayFailed(AIGatewayError):
    """The relay could not serve the call: a provider is not configured, or it restarts."""


class UpstreamFailed(AIGatewayError):
    """The provider could not be reached, or broke off."""


class ProviderError(AIGatewayError):
    """The provider answered with an error of its own."""


class SessionClosed(AIGatewayError):
    """A WebSocket session ended other than by a normal close; `message` is the reason given."""


_BY_SIDE = {"client": RequestRefused, "relay": RelayFailed, "upstream": UpstreamFailed}
_BY_CODE = {error.code: _BY_SIDE[error.side] for error in CATALOGUE}


def is_of_relay(headers: Mapping[str, str]) -> bool:
    """True for an error of the relay's own, which names its source. A provider's header of the name
    alone makes none: not every relay keeps those from its clients.
    """
    return "x-relay-error" in headers and headers.get("x-relay-error-source") == "relay"


def error_of(status: int, headers: Mapping[str, str], body: bytes) -> AIGatewayError:
    """The error that an answer is."""
    source = headers.get("x-relay-error-source", "provider")
    code = headers.get("x-relay-error", "provider_error")
    if not is_of_relay(headers) and code != HandshakeRefused.code:
        code = "provider_error"
    request_id = headers.get("cf-aig-log-id", "")
    kind = _BY_CODE.get(code, ProviderError)
    return kind(code, _message(body) or f"answered with {status}", status, source, request_id)


def _message(body: bytes) -> str:
    """The sentence in an error's body, whichever vendor's shape it has."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):  # the second for one that is nested without end
        return body[:500].decode("utf-8", "replace").strip()
    for key in ("error", "detail", "message"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    return found if isinstance(found, str) else json.dumps(found)[:500]


def unreachable(error: aiohttp.ClientError) -> RelayUnreachable:
    """The error that a broken connection is."""
    return RelayUnreachable("relay_unreachable", f"no answer from the relay: {error}")
