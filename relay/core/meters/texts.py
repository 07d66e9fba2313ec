"""How much text a stream has carried so far: what its output is estimated by, if its usage is never
told.

Owns: that count. The first bytes are looked at only if they must be, at the end; the text in what
follows is taken to stand as densely.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

BYTES_A_TOKEN = 4
"""Of text in UTF-8: English has about four, other scripts have more bytes a character and fewer
characters a token."""
_LOOKED_AT_BYTES = 32 * 1024
_REST = rb'\s*"((?:[^"\\]++|\\.)*+)'


class Texts:
    """Sees the chunks of a response. `keys` are those of its texts, such as `"content":`."""

    __slots__ = ("_bytes", "_held", "_held_bytes", "_keys")

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = keys
        self._bytes = self._held_bytes = 0
        self._held: list[bytes] = []

    def feed(self, chunk: bytes) -> None:
        """Count one chunk."""
        self._bytes += len(chunk)
        if self._held_bytes < _LOOKED_AT_BYTES:
            self._held.append(chunk)
            self._held_bytes += len(chunk)

    @property
    def tokens(self) -> int:
        """About as many as the text comes to."""
        start = b"".join(self._held)[:_LOOKED_AT_BYTES]
        if not start or not self._keys:
            return 0
        pattern = b"(?:" + b"|".join(map(re.escape, self._keys)) + b")" + _REST
        text_bytes = sum(len(text) for text in re.findall(pattern, start, re.DOTALL))
        return round(text_bytes * self._bytes / len(start) / BYTES_A_TOKEN)
