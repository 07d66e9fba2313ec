"""Tell a page why its handshake was refused: browsers hide it, so the page sends a plain GET to the
URL of the session.

Owns which checks of a handshake are made for that: all that need neither the provider nor a ticket.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from relay.calls.call import Call, attempt_options
from relay.core.errors import UpgradeRequired
from relay.gate.identify import check_provider
from relay.gate.model_access import model_access
from relay.gateway import Gateway
from relay.registry.registry import check_socket
from relay.sessions.admission import allowed_route
from relay.sessions.unified import route_of_socket


async def explain_refusal(call: Call, gateway: Gateway) -> NoReturn:
    """Raise for a plain GET the error that a handshake would get, or that the handshake with this
    ticket got; UpgradeRequired if nothing refuses it.
    """
    caller = call.caller
    if caller.ticket and (error := await gateway.tickets.refusal(caller.ticket)):
        raise error
    if not (caller.ticket and _is_of_own_page(call.headers)):
        gateway.callers.authorize_session(caller, call.headers, call.provider)
    if call.surface == "unified":
        route = await route_of_socket(call, gateway)
        if caller.record is not None:
            check_provider(caller.record, route.provider.name)
    else:
        route = gateway.registry.match_websocket(call.provider, call.endpoint)
    check_socket(route)
    if (access := model_access(caller)) is not None:
        allowed_route(access, route, call.query, call.headers)
    attempt_options(call, route)
    raise UpgradeRequired


def _is_of_own_page(headers: Mapping[str, str]) -> bool:
    """True for a GET of a page of the relay's own origin: browsers send it without Origin, unlike
    the handshake.
    """
    return "Origin" not in headers and headers.get("Sec-Fetch-Site", "").lower() == "same-origin"
