"""THE WEBSOCKET LINE: everything that happens to a session, in order. Read this after rest.py.

1. The provider is connected first; only then is the client upgraded, so that a refusal keeps its
status. 2. Two pumps, one each way; the first end of either is the end of both. 3. Whatever happens,
both legs are closed within `websocket.close_timeout_s` and the Exchange is closed once.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Mapping

from aiohttp import ClientWebSocketResponse, web

from relay.call import Call, keys_for
from relay.core import paths, subprotocols
from relay.core.errors import BadRequest, ClientGone, Draining, TooManySessions
from relay.core.exchange import Exchange
from relay.core.provider import Route
from relay.core.subprotocols import Offer
from relay.gateway import Gateway
from relay.pump import lost, pump
from relay.session import NAMES, Ending, Leg, Session
from relay.upstream.connect import Handshake, connect, offered_upstream
from relay.upstream.send import upstream_headers, upstream_url

# A client that names one of these has chosen its session itself: no default of ours is added.
_CHOOSERS = frozenset({"model", "intent", "call_id", "agent_id"})


async def relay_websocket(request: web.Request, gateway: Gateway, call: Call) -> web.StreamResponse:
    """Relay one WebSocket session. Raises the RelayError that refuses the handshake."""
    exchange = gateway.begin(request, "websocket")
    exchange.provider, exchange.endpoint = call.provider, call.endpoint
    try:
        gateway.access.check(request.host, request.headers.get("Origin"))
        _check_handshake(request)
        exchange.route = route = gateway.registry.match_websocket(call.provider, call.endpoint)
        _check_room(exchange, gateway)
        rules = route.provider.websocket_rules
        assert rules is not None
        offer = subprotocols.sort(
            subprotocols.split(request.headers.getall("Sec-WebSocket-Protocol", ())),
            rules.subprotocols,
        )
        handshake = _handshake(request, call, route, gateway, offer)
        exchange.kind, exchange.model = route.kind, _model(route, handshake)
        exchange.sent_s = gateway.clock()
        upstream = await connect(gateway.upstream.sockets, route, handshake)
        exchange.first_byte_s = gateway.clock()
        try:
            downstream = await _upgrade(request, offer, upstream, handshake)
            exchange.status, exchange.committed = 101, True
            session = _session(exchange, request, downstream, upstream, gateway)
        except BaseException:
            upstream._response.close()
            raise
        await _run(session, gateway)
        return downstream
    except (Exception, asyncio.CancelledError) as error:
        raise exchange.verdict(error) from error
    finally:
        gateway.close(exchange)


async def _run(session: Session, gateway: Gateway) -> None:
    """Pump both ways until the session ends, then say goodbye to both sides."""
    clock = gateway.clock
    pumps = (
        asyncio.create_task(pump(session.downstream, session.upstream, session, clock)),
        asyncio.create_task(pump(session.upstream, session.downstream, session, clock)),
    )
    gateway.sessions.add(session)
    if gateway.draining:
        session.end(draining())
    try:
        await asyncio.shield(session.ended)
    except asyncio.CancelledError:
        # The client's connection is gone; or it closed, and the pump knows why already.
        session.end(lost(session.downstream))
    gateway.sessions.discard(session)
    for task in pumps:
        task.cancel()
    await asyncio.gather(*pumps, return_exceptions=True)
    ending = session.ended.result()
    _account(session.exchange, session, ending)
    await _farewell(session, ending, gateway.settings.websocket.close_timeout_s)


async def _farewell(session: Session, ending: Ending, timeout_s: float) -> None:
    """Both goodbyes, even if the client's end of the connection cancels the handler meanwhile."""
    goodbye = asyncio.create_task(session.close(ending, timeout_s))
    try:
        await asyncio.shield(goodbye)
    except asyncio.CancelledError:
        await goodbye


def draining() -> Ending:
    """The end of a session by a restart."""
    error = Draining()
    return Ending(error.close_code, "the relay is restarting", "relay", error)


def _account(exchange: Exchange, session: Session, ending: Ending) -> None:
    client, provider = session.downstream, session.upstream
    exchange.messages_up, exchange.request_bytes = client.messages, client.bytes
    exchange.messages_down, exchange.response_bytes = provider.messages, provider.bytes
    exchange.close_code, exchange.closed_by = ending.code, NAMES[ending.by]
    if ending.error is not None:
        exchange.fail(ending.error)
    elif ending.lost == "downstream":
        exchange.fail(ClientGone())
    elif ending.lost == "upstream":
        exchange.outcome = "failed"
    exchange.finish()


def _check_handshake(request: web.Request) -> None:
    """Refuse before anything is dialled what cannot be upgraded afterwards (RFC 6455 4.2.1)."""
    if request.method != "GET":
        raise BadRequest("a WebSocket handshake is a GET")
    if request.headers.get("Sec-WebSocket-Version") != "13":
        raise BadRequest("Sec-WebSocket-Version is not 13")
    try:
        nonce = base64.b64decode(request.headers.get("Sec-WebSocket-Key", ""), validate=True)
    except (binascii.Error, ValueError):
        nonce = b""
    if len(nonce) != 16:
        raise BadRequest("Sec-WebSocket-Key is not 16 bytes in base64")
    if "upgrade" not in request.headers.get("Connection", "").lower():
        raise BadRequest("Connection does not name Upgrade")


def _check_room(exchange: Exchange, gateway: Gateway) -> None:
    limit = gateway.settings.websocket.max_sessions_per_client
    if not limit:
        return
    held = sum(
        1
        for other in gateway.running
        if other.surface == "websocket" and other.client == exchange.client
    )
    if held > limit:
        raise TooManySessions(limit)


def _handshake(
    request: web.Request, call: Call, route: Route, gateway: Gateway, offer: Offer
) -> Handshake:
    rules = route.provider.websocket_rules
    assert rules is not None
    keys = keys_for(request, call, route, gateway, offer)
    url = upstream_url(route, _with_defaults(call.query, rules.default_query), keys)
    headers = upstream_headers(
        route, request.headers.items(), request.headers.get("Connection"), keys
    )
    return Handshake(
        url=url,
        headers=headers,
        subprotocols=offered_upstream(offer.passed, keys),
        max_message_bytes=rules.max_message_bytes,
        timeout_s=gateway.settings.websocket.handshake_timeout_s,
    )


def _with_defaults(raw_query: str, defaults: Mapping[str, str]) -> str:
    named = {paths.query_name(segment) for segment in raw_query.split("&")} if raw_query else set()
    if named & _CHOOSERS:
        return raw_query
    added = [f"{name}={value}" for name, value in defaults.items() if name.lower() not in named]
    return paths.join_query(raw_query, *added)


def _model(route: Route, handshake: Handshake) -> str | None:
    query = handshake.url.raw_query_string
    return paths.query_value(query, "model") or paths.query_value(query, "model_id") or route.model


async def _upgrade(
    request: web.Request,
    offer: Offer,
    upstream: ClientWebSocketResponse[bool],
    handshake: Handshake,
) -> web.WebSocketResponse[bool]:
    """Answer the client's handshake. The subprotocol is ours to pick: see Offer.echo."""
    echo = offer.echo(upstream.protocol)
    downstream: web.WebSocketResponse[bool] = web.WebSocketResponse(
        timeout=1.0,
        autoclose=False,
        autoping=False,
        protocols=(echo,) if echo else (),
        compress=False,
        max_msg_size=handshake.max_message_bytes + 1,
        decode_text=False,
    )
    await downstream.prepare(request)
    return downstream


def _session(
    exchange: Exchange, request: web.Request, downstream: web.WebSocketResponse[bool],
    upstream: ClientWebSocketResponse[bool], gateway: Gateway,
) -> Session:  # fmt: skip
    assert exchange.route is not None and exchange.route.provider.websocket_rules is not None
    now = gateway.clock()
    transport = request.transport
    if transport is None:
        raise ClientGone
    return Session(
        exchange,
        exchange.route.provider.websocket_rules,
        Leg("downstream", downstream, transport, heard_s=now, message_s=now),
        Leg("upstream", upstream, upstream._writer.transport, heard_s=now, message_s=now),
    )
