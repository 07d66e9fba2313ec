"""Call any provider through the relay from Python: REST, streams and WebSockets.

    from relay.client import aiGateway

    answer = await aiGateway.request(
        provider="openai", endpoint="chat/completions", data={"model": "gpt-5", "messages": […]}
    )
    print(answer.status, answer.json())

    async for event in aiGateway.stream(provider="openai", endpoint="chat/completions", data={…}):
        print(event.data)

    async with aiGateway.connect(provider="openai") as session:
        await session.send({"type": "response.create"})
        async for message in session: …

The client needs no provider key: the relay adds it. A provider's own error is returned as an answer
(`answer.ok`, `answer.raise_for_status()`); a call that the relay refuses, or that fails on the way,
raises AIGatewayError.
"""

from __future__ import annotations

from relay.client.answers import Answer, Call, Stream
from relay.client.errors import (
    AIGatewayError,
    ProviderError,
    RelayFailed,
    RelayUnreachable,
    RequestRefused,
    SessionClosed,
    UpstreamFailed,
)
from relay.client.gateway import AIGateway, Ticket, TicketTerms
from relay.client.session import Session
from relay.core.sse import Event

__all__ = [
    "AIGateway", "AIGatewayError", "Answer", "Call", "Event", "ProviderError", "RelayFailed",
    "RelayUnreachable", "RequestRefused", "Session", "SessionClosed", "Stream", "Ticket",
    "TicketTerms", "UpstreamFailed", "aiGateway",
]  # fmt: skip

aiGateway = AIGateway()
"""The relay at RELAY_URL, by default http://127.0.0.1:8787."""
