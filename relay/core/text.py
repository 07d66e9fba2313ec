"""Text that a client or a provider chose, made fit for a log, a database and a label.

Owns: what such text may hold and how long it may be. It is applied where a value enters a record
(ledger/records.py), a log event, an error message or the price list's cache.
"""

from __future__ import annotations

import re
from hashlib import sha256

MAX_CHARACTERS = 256
"""Of a name: a model, a user, an id, an entry of metadata."""
MAX_PATH_CHARACTERS = 512
MAX_QUOTED_CHARACTERS = 80
"""Of what an error message quotes."""
_DIGEST_DIGITS = 12

# C0 and C1 controls, among them NUL, which PostgreSQL refuses, and ESC, which terminals obey; lone
# surrogates, which UTF-8 cannot hold; line separators and bidirectional overrides, which make a
# line read as another.
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028-\u202e\u2066-\u2069]")


def clean(text: str, most: int = MAX_CHARACTERS) -> str:
    """`text` without what no log may hold, in `most` characters. What is longer is cut and ends in
    a digest of the whole, so that two long names that begin alike remain two.
    """
    if len(text) > most:
        digest = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_DIGITS]
        text = f"{text[: most - _DIGEST_DIGITS - 1]}…{digest}"
    return text if text.isprintable() else _UNFIT.sub("\ufffd", text)


def escaped(text: str) -> str:
    """`text` in one line for a terminal: line ends and what a terminal would obey are escaped."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def quoted(text: str) -> str:
    """The same for an error message."""
    return clean(text, MAX_QUOTED_CHARACTERS)
