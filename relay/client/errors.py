"""Define the errors of a call through the relay, one class for each party that can fail.

Owns these classes, and the mapping of the relay's error codes (docs/errors.md) to them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp

from relay.core.errors import CATALOGUE, HandshakeRefused


@dataclass(eq=False)
class AIGatewayError(Exception):
    """A call failed. `code` is stable; docs/errors.md lists the relay's codes."""

    code: str
    message: str
    status: int = 0
    """The HTTP status, or the WebSocket close code; 0 if there was neither."""
    source: str = "client"
    """The party that failed: relay, cloudflare, provider or client."""
    request_id: str = ""

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class RelayUnreachable(AIGatewayError):
    """There was no connection to the relay, or it was lost."""


class RequestRefused(AIGatewayError):
    """The relay refused the call, which must be changed."""


class RelayFailed(AIGatewayError):
    """The relay could not serve the call: a provider is not configured, or it restarts."""


class UpstreamFailed(AIGatewayError):
    """The provider could not be reached, or its response was cut."""


class ProviderError(AIGatewayError):
    """The provider answered with an error of its own."""


class SessionClosed(AIGatewayError):
    """A WebSocket session did not end with a normal close; `message` is the reason of the close."""


_BY_SIDE = {"client": RequestRefused, "relay": RelayFailed, "upstream": UpstreamFailed}
_BY_CODE = {error.code: _BY_SIDE[error.side] for error in CATALOGUE}


def is_of_relay(headers: Mapping[str, str]) -> bool:
    """True for an error of the relay's own, by both of its headers. `x-relay-error` alone is not
    enough: some relays pass a provider's header of that name to clients.
    """
    return "x-relay-error" in headers and headers.get("x-relay-error-source") == "relay"


def error_of(status: int, headers: Mapping[str, str], body: bytes) -> AIGatewayError:
    """Return the error for a response of status 400 or higher, or for a refused handshake."""
    source = headers.get("x-relay-error-source", "provider")
    code = headers.get("x-relay-error", "provider_error")
    if not is_of_relay(headers) and code != HandshakeRefused.code:
        code = "provider_error"
    request_id = headers.get("cf-aig-log-id", "")
    kind = _BY_CODE.get(code, ProviderError)
    return kind(code, _message(body) or f"answered with {status}", status, source, request_id)


def _message(body: bytes) -> str:
    """Return the message in an error's body, in any vendor's format."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):  # RecursionError: nested too deeply
        return body[:500].decode("utf-8", "replace").strip()
    for key in ("error", "detail", "message"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    return found if isinstance(found, str) else json.dumps(found)[:500]


def unreachable(error: aiohttp.ClientError) -> RelayUnreachable:
    """Return the error for a connection that failed."""
    return RelayUnreachable("relay_unreachable", f"no answer from the relay: {error}")
