"""Relay a WebSocket session: the whole request path, in order. Read this after rest.py.

1. The relay connects to the provider first and upgrades the client only after that, so that a
refused handshake keeps the provider's status and body. 2. Two pumps copy messages, one in each
direction; when one ends, the session ends. 3. Both legs are always closed within
`websocket.close_timeout_s`, and the Exchange is closed exactly once.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from dataclasses import replace
from functools import partial

from aiohttp import ClientWebSocketResponse, web

from relay import log
from relay.calls.affinity import learner_of_session, tie_to_key
from relay.calls.call import Call, attempt_options
from relay.calls.response import RelayedWebSocket
from relay.calls.transforms import redacted_text
from relay.core.errors import BadRequest, ClientGone, Draining, HandshakeRefused
from relay.core.exchange import Exchange, SessionSummary
from relay.core.headers import connection_of, downstream_headers, upgrades
from relay.core.key_refusals import refusal_in_close, refusal_in_message
from relay.gate.model_access import model_access
from relay.gate.rights import route_of_client
from relay.gateway import Gateway
from relay.registry.registry import check_socket
from relay.sessions.admission import MessageCheck, allowed_route
from relay.sessions.attempt import HandshakeAttempt, session_model
from relay.sessions.observers import observe_session
from relay.sessions.pump import broken, lost, pump
from relay.sessions.session import NAMES, Ending, Leg, Session
from relay.sessions.spending import follow_session, reserve_first_slice
from relay.sessions.tickets import limit_messages, note_refusal, redeem_ticket, session_rules
from relay.sessions.unified import Renaming, choose_socket


async def relay_websocket(request: web.Request, gateway: Gateway, call: Call) -> web.StreamResponse:
    """Relay one WebSocket session. Raises the RelayError that refuses the handshake."""
    exchange = gateway.begin(call, "websocket", request)
    try:
        gateway.callers.authorize_session(call.caller, call.headers, call.provider)
        _check_handshake(call)
        is_unified = call.surface == "unified"
        if is_unified:
            call, route = await choose_socket(call, exchange, gateway)
        else:
            route = gateway.registry.match_websocket(call.provider, call.endpoint)
        exchange.routing.route = route
        check_socket(route)
        await redeem_ticket(call, route, exchange, gateway)
        if (client := exchange.request.caller.record) is not None:
            exchange.routing.route = route = route_of_client(client, route)
        exchange.request.model = session_model(call.query, route, call.headers)
        limits = gateway.limits_of(exchange.request.caller)
        if limits is not None and (wait := limits.admit(exchange, call.headers)):
            await wait
        access = model_access(exchange.request.caller)
        if access is not None:
            route = allowed_route(access, route, call.query, call.headers)
            exchange.routing.route = route
        await reserve_first_slice(exchange, call.query, gateway)
        options = attempt_options(call, route, call.offer(route))
        options.affinity = tie_to_key(call, route, exchange.request.caller.client)
        attempt = HandshakeAttempt(call, exchange, gateway, options)
        exchange.routing.sent_s = gateway.clock()
        try:
            upstream = await gateway.attempts.open(attempt)
        except HandshakeRefused as refusal:
            exchange.response.first_byte_s = gateway.clock()
            exchange.response.body_bytes = len(refusal.body)
            raise
        exchange.response.first_byte_s = gateway.clock()
        try:
            downstream = await _upgrade(request, attempt, upstream)
            exchange.response.status = 101
            exchange.move_to("committed")
            session = _session(exchange, request, downstream, upstream, gateway)
            session.made = learner_of_session(exchange, options.affinity, gateway)
            if access is not None:
                MessageCheck(access, exchange, call.query, call.headers).attach(session.downstream)
            if is_unified:
                session.downstream.rename = Renaming(exchange, gateway.unified)
            limit_messages(exchange, session.downstream)
            gateway.open_session(exchange)
        except BaseException:
            upstream._response.close()
            raise
        await _run(session, call.query, gateway)
        return downstream
    except (Exception, asyncio.CancelledError) as error:
        raise await note_refusal(exchange.end_with(error), call, exchange, gateway) from None
    finally:
        gateway.close(exchange)


async def _run(session: Session, query: str, gateway: Gateway) -> None:
    """Pump both ways until the session ends, then close both sides. Any exception in here ends the
    session too, so that neither side waits for ever.
    """
    pumps: list[asyncio.Task[None]] = []
    gateway.sessions.add(session, 0.0)
    try:
        _start(pumps, session, query, gateway)
        if gateway.draining:
            session.end(draining())
        await asyncio.shield(session.ended)
    except asyncio.CancelledError:
        # The client's connection was lost; or the client closed it, and the pump has set the
        # ending already.
        session.end(lost(session.downstream))
    except Exception as error:  # any exception: it is logged, and both sides get a close frame
        session.end(broken(error))
    gateway.sessions.discard(session)
    closing = asyncio.create_task(_end(session, pumps, gateway))
    try:
        await asyncio.shield(closing)
    except asyncio.CancelledError:
        await closing  # aiohttp cancels the handler when the client disconnects: still close both


def _start(pumps: list[asyncio.Task[None]], session: Session, query: str, gateway: Gateway) -> None:
    client, provider, clock = session.downstream, session.upstream, gateway.clock
    route = session.exchange.routing.route
    assert route is not None
    sent, received = observe_session(session, route, query, gateway)
    follow_session(session, gateway)
    for source, sink, observe in ((client, provider, sent), (provider, client, received)):
        task = asyncio.create_task(pump(source, sink, session, clock, observe))
        task.add_done_callback(partial(_end_after_pump, session))
        pumps.append(task)


def _end_after_pump(session: Session, task: asyncio.Task[None]) -> None:
    """End the session of a pump that stopped. A pump that works sets the ending before it returns;
    if there is none, the pump has failed.
    """
    if not session.ended.done():
        error = None if task.cancelled() else task.exception()
        session.end(broken(error or RuntimeError("a pump was cancelled by other code")))


async def _end(session: Session, pumps: list[asyncio.Task[None]], gateway: Gateway) -> None:
    """Stop the pumps, record the session's result, and close both sides."""
    exchange, ending = session.exchange, session.ended.result()
    if ending.by == "upstream" and ending.reason:
        ending = replace(ending, reason=redacted_text(ending.reason, exchange.routing.keys))
    for task in pumps:
        task.cancel()
    for error in await asyncio.gather(*pumps, return_exceptions=True):
        if isinstance(error, Exception) and error is not ending.error:
            log.bug("session.pump_failed", error, id=exchange.id)
    session.downstream.pay = None  # which refers to the session: a cycle
    _record_result(exchange, session, ending)
    await session.close(ending, gateway.settings.websocket.close_timeout_s)


def draining() -> Ending:
    """Return the ending of a session that a restart of the relay ends."""
    error = Draining()
    return Ending(error.close_code, "the relay is restarting", "relay", error)


def _record_result(exchange: Exchange, session: Session, ending: Ending) -> None:
    client, provider = session.downstream, session.upstream
    exchange.request.body_bytes, exchange.response.body_bytes = client.bytes, provider.bytes
    exchange.session = SessionSummary(
        client.messages, provider.messages, ending.code, NAMES[ending.by], session.turns
    )
    session.refused(refusal_in_message(session.last_event))
    if ending.by == "upstream":
        session.refused(refusal_in_close(ending.code, ending.reason))
    if ending.error is not None:
        exchange.fail(exchange.failure_of(ending.error), ending.error)
    elif ending.lost == "downstream":
        exchange.fail(ClientGone())
    elif ending.lost == "upstream":
        exchange.outcome.name = "failed"
    exchange.finish()


def _check_handshake(call: Call) -> None:
    """Raise BadRequest for a handshake that could not be upgraded once the provider is connected
    (RFC 6455 4.2.1).
    """
    if call.method != "GET":
        raise BadRequest("the method of a WebSocket handshake must be GET")
    if call.headers.get("Sec-WebSocket-Version") != "13":
        raise BadRequest("Sec-WebSocket-Version is not 13")
    try:
        nonce = base64.b64decode(call.headers.get("Sec-WebSocket-Key", ""), validate=True)
    except (binascii.Error, ValueError):
        nonce = b""
    if len(nonce) != 16:
        raise BadRequest("Sec-WebSocket-Key is not the base64 of 16 bytes")
    if not upgrades(call.headers):
        raise BadRequest("the Connection header does not list Upgrade")


async def _upgrade(
    request: web.Request, attempt: HandshakeAttempt, upstream: ClientWebSocketResponse[bool]
) -> web.WebSocketResponse[bool]:
    """Answer the client's handshake with the headers of the provider's 101. Offer.echo chooses the
    subprotocol.
    """
    exchange, route = attempt.exchange, attempt.exchange.routing.route
    assert route is not None and route.provider.websocket_rules is not None
    echo = attempt.call.offer(route).echo(upstream.protocol)
    downstream = RelayedWebSocket(
        timeout=1.0,
        autoclose=False,
        autoping=False,
        protocols=(echo,) if echo else (),
        compress=False,
        max_msg_size=route.provider.websocket_rules.max_message_bytes + 1,
        decode_text=False,
    )
    headers = upstream._response.headers
    pairs = downstream_headers(headers.items(), connection_of(headers))
    downstream.take_headers(pairs, headers, exchange, attempt.gateway)
    await downstream.prepare(request)
    return downstream


def _session(
    exchange: Exchange, request: web.Request, downstream: web.WebSocketResponse[bool],
    upstream: ClientWebSocketResponse[bool], gateway: Gateway,
) -> Session:  # fmt: skip
    route = exchange.routing.route
    assert route is not None and route.provider.websocket_rules is not None
    now, health = gateway.clock(), gateway.attempts.health
    transport = request.transport
    if transport is None:
        raise ClientGone
    return Session(
        exchange,
        session_rules(exchange, route.provider.websocket_rules),
        Leg("downstream", downstream, transport, heard_s=now, message_s=now),
        Leg("upstream", upstream, upstream._writer.transport, heard_s=now, message_s=now),
        partial(health.report_refused_key, route, exchange.routing.keys),
    )
