"""The texts that the demo answers with, and the pieces in which it streams them."""

from __future__ import annotations

REPLY = (
    "Hello! You are talking to the demo provider that is built into this relay. Every word of this"
    " answer came to you as its own event, through the relay, the moment it was made. Put a key"
    " into .env and call a real provider the same way."
)
SPOKEN = "Hello from the demo provider, live through the relay."


def pieces(text: str) -> list[str]:
    """Words, each with the space before it."""
    first, *rest = text.split(" ")
    return [first, *(f" {word}" for word in rest)]
