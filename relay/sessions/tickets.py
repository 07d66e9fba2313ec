"""Open a session with a ticket: redeem it, apply its terms, and keep why it was refused.

Owns the order of these steps, of which the redemption comes first: whatever refuses the handshake
afterwards, the ticket is used. gate/tickets.py makes and redeems tickets.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec

from relay.calls.call import Call
from relay.core.access import TicketTerms
from relay.core.errors import RelayError, TicketForged, TicketMismatch
from relay.core.exchange import Exchange
from relay.core.paths import is_within
from relay.core.provider import Route, WebSocketRules
from relay.gateway import Gateway
from relay.sessions.session import Admit, Ending, Leg


async def redeem_ticket(call: Call, route: Route, exchange: Exchange, gateway: Gateway) -> None:
    """Redeem the ticket of a handshake, if it has one. From then on the client that the ticket was
    issued to is the caller of `exchange`.

    Raises TicketInvalid, or TooManyAttempts after many forged ones; TicketMismatch for another
    session than that of its terms; what the client's record does not allow; StoreUnavailable.
    """
    if not call.caller.ticket:
        return
    try:
        key, terms = await gateway.tickets.redeem(call.caller.ticket, exchange.id)
    except TicketForged as error:
        raise gateway.keys.wrong_tries.refusal(call.caller.address, error) from error
    client = key.client
    exchange.request.caller = msgspec.structs.replace(
        call.caller, client=client.name, record=client, key=key, ticket="", terms=terms
    )
    gateway.callers.check_holder(exchange.request.caller, call.headers, call.provider)
    _check_endpoint(terms, route, call.endpoint)


def _check_endpoint(terms: TicketTerms, route: Route, endpoint: str) -> None:
    prefix = terms.path_prefix
    if prefix and not (
        is_within(endpoint, prefix) or is_within(route.endpoint, route.provider.endpoint(prefix))
    ):
        raise TicketMismatch("endpoint", prefix, endpoint)


async def note_refusal(
    error: BaseException, call: Call, exchange: Exchange, gateway: Gateway
) -> BaseException:
    """Return the error that refuses a handshake. If its ticket was redeemed, keep the error with
    the ticket: browsers show no page why a handshake failed, but a page may ask.
    """
    if exchange.request.caller.terms is not None and isinstance(error, RelayError):
        await gateway.tickets.note_refusal(call.caller.ticket, error)
    return error


def session_rules(exchange: Exchange, rules: WebSocketRules) -> WebSocketRules:
    """Return the rules of a session: those of its provider, with the time limit of its ticket."""
    terms = exchange.request.caller.terms
    if terms is None or terms.max_session_s is None:
        return rules
    most_s = terms.max_session_s
    return replace(rules, max_session_s=min(most_s, rules.max_session_s or most_s))


def limit_messages(exchange: Exchange, client: Leg) -> None:
    """End the session after as many messages of the client as its ticket allows."""
    terms = exchange.request.caller.terms
    if terms is None or (most := terms.max_messages) is None:
        return
    if client.admit_binary is not None:
        client.admit_binary = _limited(client, client.admit_binary, most)
    client.admit = _limited(client, client.admit, most)


def _limited(client: Leg, admit: Admit | None, most: int) -> Admit:
    def judge(data: bytes) -> bytes | Ending | None:
        if client.messages >= most:
            return Ending(4409, f"the session reached its limit of {most} messages", "relay")
        return admit(data) if admit is not None else None

    return judge
