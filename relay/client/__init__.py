"""The Python client: REST, streams and WebSockets of any provider through the relay.

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

It holds no provider key: the relay does. A
provider's own error is an answer like any other (`answer.ok`, `answer.raise_for_status()`); what
fails on the way, or is refused by the relay, is raised.
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
from relay.client.gateway import AIGateway
from relay.client.session import Session
from relay.core.sse import Event

__all__ = [
    "AIGateway", "AIGatewayError", "Answer", "Call", "Event", "ProviderError", "RelayFailed",
    "RelayUnreachable", "RequestRefused", "Session", "SessionClosed", "Stream", "UpstreamFailed",
    "aiGateway",
]  # fmt: skip

aiGateway = AIGateway()
"""The relay at RELAY_URL, by default http://127.0.0.1:8787."""
