"""Match the name of a model with the patterns of a client.

Owns the patterns: `*` stands for any text, `?` for one character, and the case counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

_MAX_MODEL_CHARS = 256
"""A longer name matches nothing. Vendors have none of that length."""
_MAX_PATTERNS = 4096


def allowed(patterns: Sequence[str], model: str) -> bool:
    """True if `model` matches one of `patterns`."""
    if len(model) > _MAX_MODEL_CHARS:
        return False
    return any(_compiled(pattern).fullmatch(model) is not None for pattern in patterns)


@lru_cache(_MAX_PATTERNS)
def _compiled(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a pattern. It takes no exponential time: what is between two
    stars matches at the first possible place, and no other place is tried.
    """
    first, *more = (re.escape(part).replace(r"\?", ".") for part in pattern.split("*"))
    if not more:
        return re.compile(first, re.DOTALL)
    *between, last = more
    middle = "".join(f"(?>.*?{part})" for part in between if part)
    return re.compile(f"{first}{middle}.*{last}", re.DOTALL)
