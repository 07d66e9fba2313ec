"""A self-hosted AI gateway relay: one straight line between AI clients and AI providers."""

__version__ = "0.1.0"
