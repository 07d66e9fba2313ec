"""Load shedding: REST calls are refused while as many run, of all together, as may.

Owns: the refusal of a request that aiohttp's parser has found whole, by a few ready-made bytes,
before anything is made of it. A refusal on the request path costs two thirds of a call: at twice
the capacity there would be nothing left to answer with. What is not plainly such a request goes on
to the request path (docs/decisions/0011).
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
    """Refuses REST calls beyond `calls_at_once` of all callers together."""

    __slots__ = ("_answers", "_gateway", "_prefixes")

    def __init__(self, gateway: Gateway, prefixes: Iterable[str]) -> None:
        self._gateway, self._prefixes = gateway, tuple(prefixes)
        self._answers: dict[str, tuple[bytes, bytes]] = {}

    @property
    def active(self) -> bool:
        """True if there is such a limit."""
        limits = self._gateway.limits
        return limits is not None and limits.max_calls is not None

    def refusal(self, message: Any, payload: Any, connection: RequestHandler) -> bytes | None:
        """The answer to a request that is refused at once; None if it is let in.

        What was let in and is not handled yet counts as running: of a thousand that come in one
        turn of the loop no more than there is room for may become calls.
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
            answer = self._answers[provider.format] = _ready(provider.format)
        head, body = answer
        return head if message.method == "HEAD" else head + body

    def free(self, connection: RequestHandler) -> None:
        """Give back the place of what arrived on this connection, if it has one."""
        self._gateway.admitted.discard(connection)


def _ready(format_: str) -> tuple[bytes, bytes]:
    """Head and body of an answer. It has no id: nothing is recorded of such a call but that there
    was one.
    """
    error = Overloaded("calls at once, of all together,")
    body = error_bodies.error_body(error, format_, "")
    head = [
        "HTTP/1.1 503 Service Unavailable",
        *(f"{name}: {value}" for name, value in error_bodies.error_headers(error).items()),
        "content-type: application/json",
        f"content-length: {len(body)}",
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n", body


class SheddingParser:
    """aiohttp's parser while load is shed: it keeps to itself what was refused."""

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
        """As the parser's. Of several requests at once none is refused here."""
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
