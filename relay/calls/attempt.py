"""Build and send each attempt of a REST call: URL, headers, credential and body for its target.

Owns what an attempt sends, and how its response is judged. Each attempt is built from the client's
call, so that nothing of one target reaches another. upstream/attempts.py decides which attempts
are made.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable
from dataclasses import dataclass

from aiohttp import ClientResponse
from multidict import CIMultiDict

from relay import log
from relay.calls.body import Body
from relay.calls.call import Call
from relay.core.errors import RelayError
from relay.core.exchange import Exchange
from relay.core.headers import connection_of
from relay.core.injection import asking_for_usage, refusal_key
from relay.core.key_refusals import MAX_ERROR_BYTES, read_key_refusal
from relay.core.meters.inner_errors import FirstEvent
from relay.core.meters.unpack import coding_of, unpacker
from relay.core.models import (
    body_with_added_model,
    body_with_model,
    query_names_model,
    query_with_model,
)
from relay.core.provider import Keys, Route
from relay.core.retry_policy import AttemptResult, result_of_answer
from relay.core.rewriting import CHANGED_WITH_BODY, Rewriter
from relay.core.traces import HEADER as TRACE
from relay.gateway import Gateway
from relay.upstream.attempts import AttemptOptions
from relay.upstream.failures import BEFORE_ANSWER, MAPPABLE_ERRORS, map_failure
from relay.upstream.request import Outgoing
from relay.upstream.send import end_with_connection, send, upstream_headers, upstream_url

SSE = "text/event-stream"
_GOOD = AttemptResult(200)
_REFUSALS = (400, 422)
_ERROR_BODY_S = 2.0
"""How long to wait for the beginning of an error's body before the error is relayed."""
_ADDED = b"stream_options"
_HELD_BYTES, _HELD_S = 64 * 1024, 15.0
"""A stream is relayed without this check if its first event is larger, or takes longer."""


@dataclass(slots=True)
class RestAttempt:
    """Makes the attempts of one call."""

    call: Call
    exchange: Exchange
    gateway: Gateway
    body: Body
    options: AttemptOptions
    examines_first_event: bool = False
    rewriter: Rewriter | None = None
    """Replaces the provider's URLs in the last attempt's response with the relay's."""
    asks_usage: bool = False
    """True if the relay added `stream_options` to the last attempt: the usage event is removed."""
    refused: tuple[str, str] | None = None
    """The provider and model that refused `stream_options` in this call (`refusal_key`)."""
    body_start: bytes = b""
    """The part of the last attempt's response body that has been read already."""

    def attempt(self, route: Route, keys: Keys) -> Awaitable[ClientResponse]:
        """Send the call to `route`; the result is awaited for the head of the response."""
        exchange, gateway, body = self.exchange, self.gateway, self.body
        self.rewriter = self._rewriter(route)
        query, whole, self.asks_usage = self.call.query, body.whole, False
        if route.replaced_model is not None:
            query = query_with_model(query, route.replaced_model, route.format)
        url, headers = upstream_url(route, query, keys), self._headers(route, keys)
        if body.text and (route.replaced_model is not None or route.injects_usage):
            whole = self._changed(body.text, route)
            if whole is not body.whole:
                for name in (*CHANGED_WITH_BODY, "Content-Encoding"):
                    headers.popall(name, None)
        if self.asks_usage:
            headers["Accept-Encoding"] = "identity"
        self.body_start, exchange.routing.keys = b"", keys
        now = gateway.clock()
        exchange.routing.sent_s = exchange.routing.sent_s or now
        if body.stream is None:
            exchange.wait("first_byte", now)
        outgoing = Outgoing(headers, body.stream or whole)
        return send(gateway.upstream.rest, route, self.call.method, url, outgoing)

    def _rewriter(self, route: Route) -> Rewriter | None:
        """Return the Rewriter of this call's response; None if its provider needs none here."""
        rewrites, callers = route.provider.rewrites, self.gateway.callers
        if rewrites is None:
            return None
        fields = rewrites.pattern(route.endpoint)
        if fields is None and not rewrites.headers:
            return None
        public_url = callers.public_url(self.call.caller, self.call.headers)
        root = f"{public_url}{self.call.root}{route.provider.name}/"
        return Rewriter(route.provider.own_origins, root, rewrites.headers, fields)

    def _changed(self, text: bytes, route: Route) -> bytes:
        """Return the body for `route`, decompressed if the relay changes anything in it."""
        changed = self._with_model(text, route)
        if self._may_ask_usage(route):
            with_usage = asking_for_usage(changed)
            self.asks_usage = with_usage is not None
            changed = with_usage or changed
        return self.body.whole if changed is text else changed

    def _with_model(self, text: bytes, route: Route) -> bytes:
        model = route.replaced_model
        if model is None:
            return text
        content_type = self.call.headers.get("Content-Type", "")
        changed = body_with_model(text, content_type, model, route.format)
        if changed is not text or route.model is not None or query_names_model(self.call.query):
            return changed
        return body_with_added_model(text, model, route.format)

    def _may_ask_usage(self, route: Route) -> bool:
        streams = self.exchange.request.stream
        if not (route.injects_usage and streams and self.call.method == "POST"):
            return False
        model = self._model(route)
        return model != self.refused and model not in self.gateway.usage_refusals

    def _model(self, route: Route) -> tuple[str, str]:
        model = route.replaced_model or self.exchange.request.model
        return refusal_key(route.provider.name, model, route.endpoint)

    def mapped(self, error: Exception, route: Route) -> RelayError:
        """Map `error`: to the error of the client's upload if there is one, else as upstream's."""
        return self.body.error or map_failure(error, route, BEFORE_ANSWER)

    def drop(self, answer: ClientResponse) -> None:
        """Close the response: another attempt follows."""
        answer.close()

    def _headers(self, route: Route, keys: Keys) -> CIMultiDict[str]:
        own, body = self.call.headers, self.body
        headers = upstream_headers(route, own.items(), connection_of(own), keys)
        if self.rewriter is not None and self.rewriter.fields is not None:
            headers["Accept-Encoding"] = "identity"
        if body.stream is not None and body.length is not None:
            headers["Content-Length"] = str(body.length)
        if body.is_decoded:
            headers.popall("Content-Encoding", None)
        if self.exchange.request.trace is not None:
            headers[TRACE] = self.exchange.request.trace.header
        key = route.provider.idempotency_header
        if key is not None and self.call.method == "POST" and key not in headers:
            headers[key] = self.exchange.id
        return headers

    def judge_head(self, answer: ClientResponse) -> AttemptResult | None:
        """See AttemptMaker. None for an error, and for a stream that may begin with one: the
        body decides.
        """
        if answer.status >= 400 or (self.examines_first_event and is_stream(answer)):
            return None
        return self._accepted()

    def _accepted(self) -> AttemptResult:
        if self.refused is not None:
            self._remember(self.refused)
        return _GOOD

    async def judge_body(self, answer: ClientResponse) -> AttemptResult:
        """Judge the attempt, its key and the `stream_options` that the relay added by the body of
        an error, or by the first event of a stream.
        """
        headers = answer.headers
        try:
            if answer.status < 400:
                return await self._examine_stream(answer)
            self.body_start = read = await _beginning(answer)
        except BaseException:
            answer.close()
            raise
        if self.asks_usage and answer.status in _REFUSALS:
            unpack = unpacker(headers.get("Content-Encoding", ""))
            if _ADDED in (read if unpack is None else unpack.feed(read)):
                assert self.exchange.routing.route is not None
                self.refused = self._model(self.exchange.routing.route)
                return AttemptResult(answer.status, note="stream_options_refused")
        whole = read if answer.content.is_eof() else b""
        return result_of_answer(answer.status, headers.get, time.time(), whole)

    async def _examine_stream(self, answer: ClientResponse) -> AttemptResult:
        """Read a stream up to its first event that is not a comment, and judge that event."""
        coding = coding_of(answer.headers.get("Content-Encoding"))
        unpack = unpacker(coding)
        if unpack is None and coding:
            return self._accepted()
        first, held = FirstEvent(), bytearray()
        self.exchange.wait("upstream", self.gateway.clock())
        forget = end_with_connection(answer)
        try:
            async with asyncio.timeout(_HELD_S):
                while len(held) < _HELD_BYTES:
                    chunk = await answer.content.readany()
                    held += chunk
                    if not chunk:
                        first.end()
                        break
                    if first.feed(chunk if unpack is None else unpack.feed(chunk)):
                        break
        except TimeoutError:
            pass  # a slow stream is not an error: it is relayed
        finally:
            forget()
        self.body_start, status = bytes(held), first.error_status
        if status is None:
            return self._accepted()
        refusal = read_key_refusal(status or 400, first.error, "", time.time())
        return AttemptResult(
            answer.status, None, refusal.wait_s, refusal.dead, first_event_status=status
        )

    def _remember(self, refused: tuple[str, str]) -> None:
        """Note that the call was accepted without `stream_options`: until a reload the relay does
        not add it again for this model.
        """
        known, route = self.gateway.usage_refusals, self.exchange.routing.route
        assert route is not None
        if refused == self._model(route) and refused not in known:
            known.add(refused)
            log.warn("inject_usage.refused", provider=refused[0], model=refused[1])


def is_stream(answer: ClientResponse) -> bool:
    """True for a successful response of server-sent events."""
    return answer.status < 300 and answer.content_type == SSE


async def _beginning(answer: ClientResponse) -> bytes:
    """Read the beginning of a body, up to MAX_ERROR_BYTES. A read error ends it; the next reader of
    the body gets that error again.
    """
    read, content = bytearray(), answer.content
    with contextlib.suppress(*MAPPABLE_ERRORS):  # TimeoutError is an OSError
        async with asyncio.timeout(_ERROR_BODY_S):
            while len(read) < MAX_ERROR_BYTES and (chunk := await content.readany()):
                read += chunk
    return bytes(read)
