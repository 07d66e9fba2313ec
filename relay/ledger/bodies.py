"""The bodies of a call, as they are stored: unpacked, without any key, cut.

Owns: that order. A key that the cut would divide is taken out first, and so is one that stands in
compressed bytes. What cannot be searched is not stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from relay.core.exchange import Exchange
from relay.core.meters.unpack import unpack
from relay.core.record import Bodies
from relay.core.redaction import Redactor, longest_spelling

_AT_ONCE_BYTES = 256 * 1024
"""A larger body is searched in a thread: it would hold up the loop."""


async def bodies_of(exchange: Exchange, secrets: Redactor) -> Bodies | None:
    """The captured bodies of a call, without the relay's `secrets`; None where there are none."""
    capture = exchange.capture
    if capture is None:
        return None
    redactors = (secrets, Redactor(capture.credentials))
    request, response = bytes(capture.request), bytes(capture.response)
    found = []
    for body, coding, passed_bytes in (
        (request, capture.request_coding, exchange.request.body_bytes),
        (response, capture.response_coding, exchange.response.body_bytes),
    ):
        arguments = (body, coding, passed_bytes, capture.max_bytes, redactors)
        if len(body) > _AT_ONCE_BYTES or (coding and capture.max_bytes > _AT_ONCE_BYTES):
            found.append(await asyncio.to_thread(_stored, *arguments))
        else:
            found.append(_stored(*arguments))
            await asyncio.sleep(0)
    return Bodies(*found[0], *found[1])


def _stored(
    body: bytes,
    coding: str,
    passed_bytes: int,
    max_bytes: int,
    redactors: tuple[Redactor, Redactor],
) -> tuple[bytes, bool]:
    """What is stored of a body, and whether that is all of it. `redactors` know the relay's secrets
    and those of the call's client.
    """
    secrets, own = redactors
    longest = max(secrets.longest, own.longest)
    whole = len(body) == passed_bytes
    if coding and body:
        unpacked = unpack(body, coding, max_bytes + longest)
        if unpacked is None:
            return b"", False
        body, ended = unpacked
        whole = whole and ended
    kept_bytes = max_bytes
    if not whole:
        # Where it was cut, the beginning of a key may stand at the end of what is here.
        kept_bytes = min(max_bytes, max(0, len(body) - max(0, longest - 1)))
    kept = secrets.redact(body, kept_bytes, (own,))[:max_bytes]  # a mark may be longer than a key
    return kept, whole and len(body) <= max_bytes


def capture_bytes(max_bytes: int, credentials: Sequence[str], secrets: Redactor) -> int:
    """How much of a body must be captured, so that so much can be stored without a secret."""
    longest = max([secrets.longest, *map(longest_spelling, credentials)])
    return max_bytes + max(0, longest - 1)
