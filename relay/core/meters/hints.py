"""Whether a message may matter at all: one search in C, where a call of ours costs five times as
much once other work has gone through the CPU's caches.

Owns: how such a search is made. A message in which it finds nothing cannot matter.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Hint = Callable[..., re.Match[bytes] | None]
"""Given bytes, and optionally from and until where."""


def hint(pattern: str) -> Hint | None:
    """A search for a pattern; None for an empty one: nothing matters."""
    return re.compile(pattern.encode()).search if pattern else None
