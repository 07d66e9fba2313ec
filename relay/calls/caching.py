"""Answer a REST call from the cache, or from an identical call that is in flight.

Owns the replay of a cache hit and the coalescing of identical calls: one upstream call is made by a
task of its own, so that it does not end with the client that began it. cache/ holds the entries and
the flights; core/caching.py decides what may be cached.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from aiohttp import web
from multidict import CIMultiDict

from relay import log
from relay.cache.inflight import Flight, Head, Subscriber
from relay.cache.store import Hit
from relay.calls.attempt import RestAttempt
from relay.calls.send import Answer, Source, next_chunk, send_call
from relay.calls.stream import ENDS_AT_EVENT, deliver, drain, finish_event
from relay.core import caching
from relay.core.caching import CachePlan
from relay.core.errors import Draining, RelayError
from relay.core.exchange import CacheUse, Exchange
from relay.core.headers import connection_of
from relay.core.paths import cut_query
from relay.gate.model_access import model_access
from relay.gateway import Gateway


def plan_cache(attempt: RestAttempt) -> CachePlan | None:
    """Plan what the cache does for this call; None if it does nothing. Raises BadRequest."""
    call, exchange = attempt.call, attempt.exchange
    route = exchange.routing.route
    assert route is not None
    provider, header = route.provider, call.headers.get
    ttl_s = caching.requested_ttl_s(header, provider.cache, exchange.request.kind)
    if ttl_s is None or call.method not in ("GET", "POST") or not attempt.options.whole:
        return None
    if route.target.via == "cloudflare" and provider.delegation.cache != "relay":
        return None
    if provider.rewrites is not None and provider.rewrites.pattern(route.endpoint) is not None:
        return None  # its responses contain the URL by which this client calls the relay
    scope, credential = provider.cache.scope, attempt.options.credential
    owner = (
        scope, "" if scope == "shared" else exchange.request.caller.client, provider.name,
        # A client with `models` gets no response of a model that another client may use.
        *((repr(access.patterns),) if (access := model_access(exchange.request.caller)) else ()),
        # Responses to a client's own credential are for that credential alone.
        *(credential.identity if credential else ()),
        # The body has an alias, which means another model after a reload.
        *((f"model {route.replaced_model}",) if route.replaced_model is not None else ()),
    )  # fmt: skip
    affecting = caching.affecting_headers(call.headers.items(), connection_of(call.headers))
    own = header("cf-aig-cache-key")
    if own is None:
        query = cut_query(call.query, provider.query_credentials)
        target = (call.method, route.url(query))
        key = caching.key_of(owner, target, affecting, attempt.body.whole)
    else:
        key = caching.own_key_of(owner, own, affecting)
    reads = not caching.skips(header)
    shares = reads and provider.cache.coalesce and exchange.request.kind in caching.CACHED_KINDS
    return CachePlan(provider.name, key, ttl_s, reads, shares, route.replaced_model)


async def answer_from_cache(
    plan: CachePlan, request: web.Request, attempt: RestAttempt
) -> web.StreamResponse | None:
    """Answer the call from the cache, or from a flight that identical calls share; None if the
    caller must make the call itself.
    """
    exchange, gateway = attempt.exchange, attempt.gateway
    exchange.cache = CacheUse(plan)
    exchange.wait("nothing", gateway.clock())
    if plan.reads and plan.ttl_s:
        hit = await gateway.cache.get(plan)
        if hit is not None:
            return await _replay(hit, request, attempt)
    if not plan.shares:
        return None
    room = gateway.settings.cache.max_answer_bytes
    flight, leads = gateway.inflight.enter(plan.key, room)
    subscriber = flight.subscribe(exchange)
    shared = _launch_flight(flight, plan, attempt) if leads else None
    try:
        return await _follow(flight, subscriber, request, attempt)
    finally:
        if shared is not None:
            _copy_to_leader(exchange, shared)
        flight.unsubscribe(subscriber)


async def _replay(hit: Hit, request: web.Request, attempt: RestAttempt) -> web.StreamResponse:
    entry, exchange, gateway = hit.entry, attempt.exchange, attempt.gateway
    assert exchange.cache is not None
    exchange.cache.is_hit = True
    exchange.usage.saved_nano_usd = entry.cost_nano_usd
    exchange.routing.sent_s = exchange.response.first_byte_s = gateway.clock()
    pairs = [*entry.headers, ("age", str(int(hit.age_s)))]
    first, *more = entry.chunks
    source = _Pieces(more) if more or entry.streamed else None
    answer = Answer(200, entry.reason, pairs, {}, first, source)
    return await deliver(answer, request, exchange, gateway)


class _Pieces(Source):
    """The chunks of a cached response after the first."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = iter(pieces)

    async def read(self) -> bytes:
        """See Source."""
        return next(self._pieces, b"")


def _launch_flight(flight: Flight, plan: CachePlan, attempt: RestAttempt) -> Exchange:
    """Start the task that makes the call for all subscribers. The call has an exchange of its own,
    whose timeouts periodic.py checks; its outcome is written in the leader's row, whenever the
    leader itself ends.
    """
    leader, gateway = attempt.exchange, attempt.gateway
    shared = leader.fork()
    gateway.calls.add(shared)
    work = _run_flight(flight, leader, replace(attempt, exchange=shared))
    shared.task = task = gateway.inflight.start(flight, work)
    # A callback, since a task that is cancelled before its first step runs no `finally`.
    task.add_done_callback(lambda _: _finish_flight(flight, plan, leader, shared, gateway))
    return shared


async def _run_flight(flight: Flight, leader: Exchange, attempt: RestAttempt) -> None:
    """Make the call for all subscribers, and record in its exchange how it ended."""
    exchange = attempt.exchange
    try:
        answer = await send_call(attempt)
        _copy_to_leader(leader, exchange)
        await _share(answer, flight, exchange, attempt.gateway)
        exchange.finish()
    except Exception as error:
        exchange.fail(exchange.failure_of(error), error)
    except asyncio.CancelledError:
        _fail_cancelled(flight, exchange)


def _fail_cancelled(flight: Flight, shared: Exchange) -> None:
    """Record why the call was cancelled: by a timeout, since the last client left, or since the
    process stops.
    """
    is_own = shared.waiting.expired is not None or flight.left
    shared.fail(shared.failure_of(asyncio.CancelledError()) if is_own else Draining())


def _finish_flight(
    flight: Flight, plan: CachePlan, leader: Exchange, shared: Exchange, gateway: Gateway
) -> None:
    """Close the call. Even if that fails, the flight ends for its subscribers and the leader gets
    its row.
    """
    if shared.outcome.name is None:
        _fail_cancelled(flight, shared)
    try:
        gateway.ledger.settle(shared)
    except Exception as error:
        # The cost is worked out again for the leader's row; the error is logged.
        log.bug("shared_call.failed", error, id=leader.id)
    finally:
        _copy_to_leader(leader, shared)
        flight.cost_nano_usd = shared.usage.cost_nano_usd
        gateway.inflight.remove(plan.key, flight)
        flight.ended(shared.outcome.error)
        gateway.release(shared)
        gateway.end_lead(leader)
        shared.task = None
        shared.let_go()


async def _share(answer: Answer, flight: Flight, exchange: Exchange, gateway: Gateway) -> None:
    """Copy a response to the flight, chunk by chunk."""
    assert exchange.routing.route is not None
    exchange.response.status = answer.status
    raw = CIMultiDict(answer.raw)
    flight.set_head(Head(answer.status, answer.reason or "", tuple(answer.pairs), raw))
    chunk, source, drain_s = answer.first, answer.source, exchange.routing.route.provider.drain_s
    tail = b""
    try:
        while chunk or (
            source is not None and (chunk := await next_chunk(source.read, exchange, gateway))
        ):
            if answer.observe is not None:
                answer.observe(chunk)
            exchange.response.body_bytes += len(chunk)
            exchange.wait("nothing", gateway.clock())
            tail = chunk if len(chunk) >= 4 else tail[-4:] + chunk
            await flight.add(chunk)
            chunk = b""
    except asyncio.CancelledError:
        if isinstance(exchange.waiting.expired, ENDS_AT_EVENT) and (
            rest := await finish_event(answer, tail)
        ):
            await flight.add(rest)
        is_abandoned = flight.left and exchange.waiting.expired is None
        if source is not None and drain_s is not None and is_abandoned:
            await drain(source, exchange, gateway.clock, drain_s)
        raise
    finally:
        if source is not None:
            source.release()


def _copy_to_leader(leader: Exchange, shared: Exchange) -> None:
    """Copy the results of the shared call to its leader, whose record is that of the call. A leader
    that has ended keeps its own first byte and cause.
    """
    leader.limit_states, leader.budget = shared.limit_states, shared.budget
    if leader.state != "ended":
        leader.response.first_byte_s = shared.response.first_byte_s
        leader.outcome.cause = leader.outcome.cause or shared.outcome.cause


async def _follow(
    flight: Flight, subscriber: Subscriber, request: web.Request, attempt: RestAttempt
) -> web.StreamResponse | None:
    """Answer one client from the flight. None for a client that does not lead, if the call failed:
    its caller makes the call again.
    """
    exchange, gateway = attempt.exchange, attempt.gateway
    cache, began_s = exchange.cache, gateway.clock()
    assert cache is not None
    leads = cache.leads
    try:
        head = await flight.wait_for_head()
    except RelayError:
        if leads:
            raise
        return None
    if not leads:
        if head.status != 200:
            return None
        cache.is_hit = True
        exchange.routing.sent_s, exchange.response.first_byte_s = began_s, gateway.clock()
    source: Source | None = _SubscriberSource(flight, subscriber)
    first = b""
    if flight.over.is_set():
        first = await flight.next(subscriber)
        source = None if flight.error is None else source
    answer = Answer(head.status, head.reason, list(head.pairs), head.raw, first, source)
    response = await deliver(answer, request, exchange, gateway)
    if not leads:
        exchange.usage.saved_nano_usd = flight.cost_nano_usd
    return response


class _SubscriberSource(Source):
    """The rest of a response that several clients read. `waits_for` is "nothing": the exchange of
    the flight times the provider, and a wait for a slower client is not the provider's fault.
    """

    def __init__(self, flight: Flight, subscriber: Subscriber) -> None:
        self._flight, self._subscriber = flight, subscriber

    async def read(self) -> bytes:
        """See Source."""
        return await self._flight.next(self._subscriber)
