"""Bodies, where they are collected: what a REST call said and was told, each up to a bound.

Owns: whether, and the collecting. What becomes of them is the ledger's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from relay.core.exchange import Exchange
from relay.gateway import Gateway

_LOG, _PAYLOAD = "cf-aig-collect-log", "cf-aig-collect-log-payload"


def collect(exchange: Exchange, body: bytes, gateway: Gateway) -> None:
    """Begin with the request's, if this call's bodies are to be kept."""
    rules = gateway.settings.ledger
    if exchange.headers is not None and _wanted(rules.bodies, exchange.headers):
        exchange.said = body[: rules.body_bytes]
        exchange.told = bytearray()


def _wanted(rule: str, headers: Mapping[str, str]) -> bool:
    """As the file says; a call has the last word where the file leaves it one."""
    said = (headers.get(_PAYLOAD) or headers.get(_LOG) or "").strip().lower()
    forbidden = (headers.get(_LOG) or "").strip().lower() == "false"
    if rule == "asked":
        return said == "true" and not forbidden
    return rule == "on" and said != "false" and not forbidden


def collector(exchange: Exchange, gateway: Gateway) -> Callable[[bytes], None] | None:
    """What takes the chunks of the answer; None where bodies are not collected."""
    told, most = exchange.told, gateway.settings.ledger.body_bytes
    if told is None:
        return None

    def take(chunk: bytes) -> None:
        told.extend(chunk[: most - len(told)] if len(told) < most else b"")

    return take
