"""The entry of the built-in provider `demo`, as gateway.yaml would have it.

Owns: that entry. The provider that runs behind it is relay/demo/provider.py.
"""

from __future__ import annotations

from decimal import Decimal

from relay.registry.entries import Pricing, ProviderEntry, ProviderWebSocket

_PRICE = Pricing(
    input_per_mtok=Decimal(2),
    output_per_mtok=Decimal(8),
    input_audio_per_mtok=Decimal(32),
    output_audio_per_mtok=Decimal(64),
    characters_per_million=Decimal(15),
)
"""Nobody pays it: the first question about costs shows what an answer looks like."""


def demo_entry(url: str) -> ProviderEntry:
    """The entry of a demo that listens at `url`."""
    return ProviderEntry(
        base_url=url,
        inject_usage=True,
        pricing=[_PRICE],
        websocket=ProviderWebSocket(
            default_path="realtime",
            default_query={"model": "demo-realtime"},
            subprotocols={"realtime": "pass", "openai-beta.": "drop"},
        ),
    )
