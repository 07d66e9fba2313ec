"""WebSocket sessions: the handshake, the two pumps, and what watches the messages."""
