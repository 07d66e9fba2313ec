"""Prepare the captured bodies of a call for storage: decompress, redact, truncate.

Owns that order: a key in compressed bytes, or one that the truncation would divide, is redacted
too. A body that cannot be decompressed, and so not be searched, is not stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from relay.core.exchange import Exchange
from relay.core.meters.unpack import unpack
from relay.core.record import Bodies
from relay.core.redaction import Redactor, longest_spelling

_AT_ONCE_BYTES = 256 * 1024
"""A larger body is searched in a thread, since that would block the loop."""


async def bodies_of(exchange: Exchange, secrets: Redactor) -> Bodies | None:
    """Return the captured bodies of a call, without the relay's `secrets` and the credentials of
    its client; None if none were captured.
    """
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
            found.append(await asyncio.to_thread(_prepare, *arguments))
        else:
            found.append(_prepare(*arguments))
            await asyncio.sleep(0)
    return Bodies(*found[0], *found[1])


def _prepare(
    body: bytes,
    coding: str,
    passed_bytes: int,
    max_bytes: int,
    redactors: tuple[Redactor, Redactor],
) -> tuple[bytes, bool]:
    """Return the part of a body that is stored, and whether that is all of it. `redactors` are that
    of the relay's secrets and that of the client's credentials.
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
    stored_bytes = max_bytes
    if not whole:
        # The body was truncated: the first part of a key may be at its end.
        stored_bytes = min(max_bytes, max(0, len(body) - max(0, longest - 1)))
    # Truncated again, since a mark of the redaction may be longer than the key.
    stored = secrets.redact(body, stored_bytes, (own,))[:max_bytes]
    return stored, whole and len(body) <= max_bytes


def capture_bytes(max_bytes: int, credentials: Sequence[str], secrets: Redactor) -> int:
    """Return how many bytes of a body must be captured to store `max_bytes` without a secret."""
    longest = max([secrets.longest, *map(longest_spelling, credentials)])
    return max_bytes + max(0, longest - 1)
