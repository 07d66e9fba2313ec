"""Prefilters: one search in C that says whether a message can matter.

Owns: how they are made. To call a meter for every message would cost five times as much once other
work has gone through the CPU's caches.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Prefilter = Callable[..., re.Match[bytes] | None]
"""Called with bytes, and optionally with start and end; finds nothing in what cannot matter."""


def compile_prefilter(pattern: str) -> Prefilter | None:
    """A search for a pattern; None for an empty one: nothing matters."""
    return re.compile(pattern.encode()).search if pattern else None
