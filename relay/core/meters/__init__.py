"""Meters: read-only observers of responses and sessions that report usage."""
