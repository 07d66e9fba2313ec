"""Apply the rights of a client to a call: the kinds of endpoints that it may call.

Owns these checks, each of which raises the error that names the client and what it asked for. The
provider, address and origin are checked with the key (identify.py).
"""

from __future__ import annotations

from relay.core.access import Client
from relay.core.errors import EndpointNotAllowed


def check_endpoint(client: Client, kind: str) -> None:
    """Raise EndpointNotAllowed if the client's record lists kinds of endpoints, and not `kind`."""
    listed = client.rights.endpoints
    if listed and kind not in listed:
        raise EndpointNotAllowed(client.name, kind)
