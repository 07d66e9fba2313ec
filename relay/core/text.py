"""Clean and truncate text from clients and providers, for logs, the database and labels.

Owns the allowed characters and lengths. Callers clean a value where it enters a record
(ledger/records.py), a log event, an error message or the price list's cache.
"""

from __future__ import annotations

import re
from hashlib import sha256

MAX_CHARACTERS = 256
"""Maximum length of a name: a model, a user, an id, an entry of metadata."""
MAX_PATH_CHARACTERS = 512
MAX_QUOTED_CHARACTERS = 80
"""Maximum length of a quotation in an error message."""
_DIGEST_DIGITS = 12

# C0 and C1 controls, such as NUL, which PostgreSQL refuses, and ESC, which terminals interpret;
# lone surrogates, which UTF-8 cannot encode; line separators and bidirectional overrides, which
# display a line as another.
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028-\u202e\u2066-\u2069]")

_COLOUR = re.compile("\x1b\\[[0-9;]*m")


def clean(text: str, most: int = MAX_CHARACTERS) -> str:
    """Replace characters that no log may have, and truncate `text` to `most` characters. Truncated
    text ends in a digest of the whole, so that long names with a common beginning stay distinct.
    """
    if len(text) > most:
        digest = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_DIGITS]
        text = f"{text[: most - _DIGEST_DIGITS - 1]}…{digest}"
    return text if text.isprintable() else _UNFIT.sub("\ufffd", text)


def escaped(text: str) -> str:
    """Escape line ends and control characters, to print `text` as one line on a terminal."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def escaped_lines(text: str) -> str:
    """Escape control characters except line ends, and remove colours, to print on a terminal."""
    return "\n".join(map(escaped, _COLOUR.sub("", text).split("\n")))


def quoted(text: str) -> str:
    """Clean and truncate `text` for an error message."""
    return clean(text, MAX_QUOTED_CHARACTERS)
