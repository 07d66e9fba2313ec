"""Shed load: refuse REST calls while the relay's concurrency limit is reached.

Owns the refusal, by a prepared response, of a request that aiohttp's parser has found complete,
before aiohttp builds a Request. A refusal on the request path costs 65 % of a relayed call, so that
at twice the capacity no time would be left for calls; this one costs 14 %. A request that is not
certainly a call goes on to the request path (docs/decisions/0011).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from aiohttp.web_protocol import RequestHandler

from relay.core import error_bodies
from relay.core.errors import Overloaded
from relay.gateway import Gateway


class LoadShedder:
    """Refuses REST calls beyond the `calls_at_once` limit that all clients share."""

    __slots__ = ("_answers", "_gateway", "_prefixes")

    def __init__(self, gateway: Gateway, prefixes: Iterable[str]) -> None:
        self._gateway, self._prefixes = gateway, tuple(prefixes)
        self._answers: dict[str, tuple[bytes, bytes]] = {}

    @property
    def active(self) -> bool:
        """True if gateway.yaml sets such a limit."""
        limits = self._gateway.limits
        return limits is not None and limits.max_calls is not None

    def refusal(self, message: Any, payload: Any, connection: RequestHandler) -> bytes | None:
        """The response for a request that is refused here; None for one that is admitted.

        An admitted request counts as running before it is handled: of a thousand that arrive in one
        turn of the loop, only as many as the limit allows may become calls.
        """
        gateway, path = self._gateway, message.path
        limits, admitted = gateway.limits, gateway.admitted
        if limits is None or limits.max_calls is None or not path.startswith(self._prefixes):
            return None
        headers = message.headers
        if message.upgrade or "Origin" in headers:
            return None
        if limits.running + len(admitted) < limits.max_calls:
            admitted.add(connection)
            return None
        if message.should_close or "Expect" in headers or not payload.is_eof():
            return None
        prefix = next(filter(path.startswith, self._prefixes))
        name = path[len(prefix) :].partition("/")[0]
        provider = gateway.registry.providers.get(name)
        if provider is None:
            return None
        gateway.requests_shed += 1
        answer = self._answers.get(provider.format)
        if answer is None:
            answer = self._answers[provider.format] = _prepare(provider.format)
        head, body = answer
        return head if message.method == "HEAD" else head + body

    def free(self, connection: RequestHandler) -> None:
        """Stop counting the admitted request of this connection, if there is one."""
        self._gateway.admitted.discard(connection)


def _prepare(format_: str) -> tuple[bytes, bytes]:
    """Head and body of a refusal. It has no id: a refused request is counted, and has no record."""
    error = Overloaded(rule="")
    body = error_bodies.error_body(error, format_, "")
    head = [
        "HTTP/1.1 503 Service Unavailable",
        *(f"{name}: {value}" for name, value in error_bodies.error_headers(error).items()),
        "content-type: application/json",
        f"content-length: {len(body)}",
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n", body


class SheddingParser:
    """aiohttp's parser while load shedding is active: refused requests do not leave it."""

    __slots__ = ("_connection", "_parser", "_shedder", "_transport")

    def __init__(
        self,
        parser: Any,
        shedder: LoadShedder,
        connection: RequestHandler,
        transport: asyncio.Transport,
    ) -> None:
        self._parser, self._shedder = parser, shedder
        self._connection, self._transport = connection, transport

    def feed_data(self, data: bytes) -> tuple[Any, bool, bytes]:
        """The parser's result without a refused request. Pipelined requests are not refused."""
        messages, upgraded, tail = self._parser.feed_data(data)
        if len(messages) != 1:
            return messages, upgraded, tail
        message, payload = messages[0]
        answer = self._shedder.refusal(message, payload, self._connection)
        if answer is None:
            return messages, upgraded, tail
        self._transport.write(answer)
        self._parser.message_consumed()
        return (), upgraded, tail
