"""WebSocket sessions: the handshake, the two pumps, and the observers of messages."""
