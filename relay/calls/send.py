"""Send a call and read the head of its response, for one client or for all that share the call.

Owns the order of the steps (reserve tokens and money, make the attempts, stamp the first byte,
release the request body, examine the head), and how much of a response is read before its head is
sent downstream. upstream/attempts.py makes the attempts; stream.py copies the response.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple, Protocol

from aiohttp import ClientResponse
from multidict import CIMultiDict

from relay.calls.affinity import learn_response
from relay.calls.attempt import RestAttempt
from relay.calls.observers import attach_meter, observe_response
from relay.calls.recording import Observer
from relay.calls.spending import follow_stream
from relay.calls.transforms import (
    Transform,
    leave_out,
    plan_transform,
    redacted_pairs,
    redacted_text,
)
from relay.core.exchange import Exchange, WaitingFor
from relay.core.headers import connection_of, downstream_headers
from relay.gate.batches import has_requests, reserve_batch
from relay.gateway import Gateway
from relay.upstream.failures import MAPPABLE_ERRORS, WITHIN_ANSWER, map_failure
from relay.upstream.send import end_with_connection

_ENVELOPE_PEEK_BYTES = 64 * 1024


class Source(Protocol):
    """Where the rest of a response comes from."""

    waits_for: WaitingFor = "nothing"
    """What the exchange waits for while `read` runs."""

    def read(self) -> Awaitable[bytes]:
        """The next chunk; empty at the end. Raises one of MAPPABLE_ERRORS, or a RelayError."""

    def rest(self) -> bytes:
        """Return the bytes that were received and not read, after `read` has failed."""
        return b""

    def release(self) -> None:
        """Free the source: nothing more is read."""
        return


class Answer(NamedTuple):
    """A response of which nothing has been sent downstream yet."""

    status: int
    reason: str | None
    pairs: list[tuple[str, str]]
    """The headers that are sent downstream."""
    raw: Mapping[str, str]
    """The headers as the provider sent them."""
    first: bytes
    """The part of the body that has been received."""
    source: Source | None
    """The rest of the body; None if `first` is all of it."""
    observe: Observer | None = None
    """Called with each chunk."""


async def send_call(attempt: RestAttempt) -> Answer:
    """Send a call. The caller must release the answer's source when the call has ended. Raises the
    RelayError that ended the last attempt, or that refuses the call.
    """
    exchange, gateway, body = attempt.exchange, attempt.gateway, attempt.body
    limits = gateway.limits_of(exchange.request.caller)
    fields = body.seen.fields if body.seen is not None else None
    if limits is not None and limits.counts_tokens:
        await limits.reserve(exchange, body.text or body.whole, fields)
    if (budgets := gateway.budgets) is not None:
        plan = budgets.plan_of(exchange.request)
        if plan is not None:
            if exchange.request.kind == "batch" and body.text and has_requests(exchange):
                await reserve_batch(exchange, budgets, plan, body.text)
            else:
                length = len(body.whole) if body.stream is None else body.length or 0
                wait = budgets.reserve(exchange, plan, body.text, length, fields)
                if wait is not None:
                    await wait
    upstream = await gateway.attempts.open(attempt)
    exchange.response.first_byte_s = gateway.clock()
    body.let_go()
    if exchange.request.held_bytes and body.stream is None:  # a stream does so chunk by chunk
        gateway.let_go(exchange, exchange.request.held_bytes)
    try:
        return await _make_answer(upstream, attempt)
    except BaseException:
        upstream.close()
        raise


async def _make_answer(upstream: ClientResponse, attempt: RestAttempt) -> Answer:
    """Make an Answer of a provider's response. For most responses it reads only the bytes that have
    been received.
    """
    exchange, gateway = attempt.exchange, attempt.gateway
    route = exchange.routing.route
    if route is not None and route.target.via == "cloudflare":
        exchange.routing.cloudflare_log_id = upstream.headers.get("cf-aig-log-id")
    transform = plan_transform(upstream, attempt)
    first, whole = await _read_first(upstream, transform, attempt)
    pairs = _passed_headers(upstream, transform, attempt)
    if attempt.options.affinity is not None or exchange.request.surface == "unified":
        learn_response(upstream, attempt, first)
    meter = attach_meter(upstream, exchange, gateway, first if whole else None)
    if meter is not None and transform is not None and transform.removes_usage:
        # The meter needs the provider's bytes: the transform of a stream feeds it.
        if whole:
            meter(first)
        meter = None
    observe = observe_response(meter, upstream, pairs, attempt)
    if upstream.status >= 400:
        pairs.append(("x-relay-error-source", error_source(exchange, first)))
    left_out = not whole and transform is not None and transform.leaves_out_stream
    if transform is not None and (whole or left_out):
        headers = CIMultiDict(pairs)
        first = transform.change_whole(first, headers) if whole else leave_out(headers)
        if exchange.capture is not None and "Content-Encoding" not in headers:
            exchange.capture.response_coding = ""
        pairs = list(headers.items())
    source = None
    if left_out:
        upstream.close()
    elif not whole:
        source = _FromUpstream(upstream, transform, exchange)
        first = source.begin(first)
        if exchange.budget is not None:
            follow_stream(exchange, upstream, gateway)
    reason = upstream.reason or ""
    if upstream.status >= 400:
        reason = redacted_text(reason, exchange.routing.keys)  # the reason may quote a key too
    return Answer(upstream.status, reason, pairs, upstream.headers, first, source, observe)


async def _read_first(
    upstream: ClientResponse, transform: Transform | None, attempt: RestAttempt
) -> tuple[bytes, bool]:
    """Read the part of a body that is needed before the head is sent; True if that is all of it."""
    body_start, attempt.body_start = attempt.body_start, b""
    content = upstream.content
    whole = content.is_eof()
    # An error's `x-relay-error-source` depends on the beginning of its body.
    wanted_bytes = transform.bytes_first if transform is not None else 0
    wanted_bytes = max(wanted_bytes, 1 if upstream.status >= 400 else 0)
    if not whole and len(body_start) < wanted_bytes:
        read = bytearray(body_start)
        while not whole and len(read) < wanted_bytes:
            read += await next_chunk(content.readany, attempt.exchange, attempt.gateway)
            whole = content.is_eof()
        body_start = bytes(read)
    if not whole:
        return body_start, False
    left: bytes = content.read_nowait()
    return body_start + left if body_start else left, True


async def next_chunk(
    read: Callable[[], Awaitable[bytes]], exchange: Exchange, gateway: Gateway
) -> bytes:
    """Read the next chunk before anything was sent downstream. Raises a RelayError."""
    exchange.wait("upstream", gateway.clock())
    try:
        return await read()
    except MAPPABLE_ERRORS as error:
        assert exchange.routing.route is not None
        raise map_failure(error, exchange.routing.route, WITHIN_ANSWER) from error


class _FromUpstream:
    """The rest of a response, from its provider."""

    waits_for: WaitingFor = "upstream"

    def __init__(
        self, upstream: ClientResponse, transform: Transform | None, exchange: Exchange
    ) -> None:
        self._upstream = upstream
        change = None if transform is None else transform.stream(upstream.content.readany, exchange)
        self._change = change
        self.read = upstream.content.readany if change is None else change.next
        self._forget = end_with_connection(upstream)

    def begin(self, start: bytes) -> bytes:
        """Return what is sent downstream of `start`, the bytes that have been read already."""
        return start if self._change is None or not start else self._change.begin(start)

    def rest(self) -> bytes:
        """See Source."""
        left: bytes = self._upstream.content._read_nowait(-1)
        return left if self._change is None else self._change.rest(left)

    def release(self) -> None:
        """See Source."""
        self._forget()
        if self._change is not None:
            self._change.close()
        self._upstream.close()


def error_source(exchange: Exchange, start: bytes) -> str:
    """Return whose error a response is: `cloudflare` or `provider`. Cloudflare's own errors have an
    envelope: `AiGatewayError`, or `success` in its v4 API.
    """
    assert exchange.routing.route is not None
    if exchange.routing.route.target.via == "cloudflare":
        head = start[:_ENVELOPE_PEEK_BYTES].replace(b" ", b"")
        if b'"AiGatewayError"' in head or b'"success":false' in head:
            return "cloudflare"
    return "provider"


def _passed_headers(
    upstream: ClientResponse, transform: Transform | None, attempt: RestAttempt
) -> list[tuple[str, str]]:
    """Return the headers of a response that are sent downstream."""
    headers, keys = upstream.headers, attempt.exchange.routing.keys
    pairs = downstream_headers(headers.items(), connection_of(headers))
    if attempt.rewriter is not None:
        pairs = attempt.rewriter.pairs(pairs)
    if upstream.status >= 300 or (keys.provider is not None and keys.provider.place == "query"):
        pairs = redacted_pairs(pairs, keys)
    if transform is not None:
        pairs = transform.true_headers(pairs)
    if "Transfer-Encoding" in headers and "Content-Length" in headers:
        return [pair for pair in pairs if pair[0].lower() != "content-length"]
    return pairs
