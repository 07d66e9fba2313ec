"""Redact secrets in bytes that are stored or logged, and in responses that quote the relay's keys.

Owns the spellings of a secret in a body: plain, or escaped for a URL, JSON or HTML. It works on
bytes, so that it can search binary data and truncated text too.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from html.entities import codepoint2name

from relay.core.meters.unpack import coding_of, unpack
from relay.core.provider import Keys

MARK = b"[redacted]"
SHORTEST = 4
"""Shorter secrets are not redacted: they would match everywhere."""
_MADE = re.compile(rb"(?:(?<![A-Za-z0-9])|(?<=\\[nrt]))r[kt]_[A-Za-z0-9_-]{32}")
"""Keys and tickets that a relay made, of which only the hashes are known; not the end of a name
such as work_….
"""
_FORM_BYTES = 35
_NEVER_ESCAPED = frozenset(
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.~"
)  # RFC 3986 2.3: no encoder escapes these
_ESCAPED_BYTES = 16
"""Length of the longest spelling of one character."""
_SEARCHED_BYTES = 1024 * 1024
_MAX_UNPACKED_BYTES = 1024 * 1024
_KNOWN = 256


class Redactor:
    """Finds and replaces a set of secrets."""

    __slots__ = ("_patterns", "_plain", "longest")

    def __init__(self, secrets: Iterable[str], forms: Sequence[re.Pattern[bytes]] = ()) -> None:
        """`forms` match secrets that are not known themselves, of at most _FORM_BYTES."""
        known = {each for secret in secrets for each in _with_decoded(secret)}
        wanted = sorted((s for s in known if len(s) >= SHORTEST), key=lambda s: (-len(s), s))
        plain = [secret for secret in wanted if _NEVER_ESCAPED.issuperset(secret)]
        escaped = [secret for secret in wanted if not _NEVER_ESCAPED.issuperset(secret)]
        self._plain = tuple(secret.encode() for secret in plain)
        spelled = (re.compile(b"".join(map(_spellings, secret))) for secret in escaped)
        self._patterns = (*spelled, *forms)
        spans = [*map(longest_spelling, wanted), *[_FORM_BYTES for _ in forms]]
        self.longest = max(spans, default=0)
        """Length of the longest spelling of any secret, in bytes."""

    def redact(
        self, data: bytes, most: int | None = None, others: Iterable[Redactor] = ()
    ) -> bytes:
        """Return the first `most` bytes of `data`, by default all, without the secrets of this and
        the `others`. A secret that begins within these bytes and ends after them is removed too.
        """
        most = len(data) if most is None else most
        found = itertools.chain(self._spans(data), *[other._spans(data) for other in others])
        spans = sorted(span for span in found if span[0] < most)
        if not spans:
            return data[:most]
        parts, at = [], 0
        for start, end in spans:
            if start >= at:
                parts += [data[at:start], MARK]
            at = max(at, end)  # one secret may contain another
        return b"".join([*parts, data[at:most]])

    def mask(self, data: bytes) -> bytes:
        """Return `data` with each byte of a secret replaced by an asterisk, at the same length."""
        masked: bytearray | None = None
        for start, end in self._spans(data):
            masked = bytearray(data) if masked is None else masked
            masked[start:end] = b"*" * (end - start)
        return data if masked is None else bytes(masked)

    def redact_coded(self, body: bytes, coding: str) -> tuple[bytes, bool]:
        """Redact a complete body, and return whether it still has its `coding`: it is decompressed
        only if it contains a secret. A body that cannot be decompressed within bounds becomes
        empty.
        """
        if not body or not coding_of(coding):
            return self.redact(body), True
        unpacked = unpack(body, coding, _MAX_UNPACKED_BYTES)
        if unpacked is None or not unpacked[1]:
            return b"", False
        text = self.redact(unpacked[0])
        return (body, True) if text == unpacked[0] else (text, False)

    def redact_text(self, text: str, others: Iterable[Redactor] = ()) -> str:
        """Return `text` without the secrets of this and the `others`."""
        data = text.encode("utf-8", "surrogatepass")
        found = self.redact(data, None, others)
        return text if found is data else found.decode("utf-8", "surrogatepass")

    def _spans(self, data: bytes) -> Iterator[tuple[int, int]]:
        for secret in self._plain:
            at = data.find(secret)
            while at >= 0:
                yield at, at + len(secret)
                at = data.find(secret, at + len(secret))
        for pattern in self._patterns:
            # In pieces, because a search holds the GIL to its end.
            for start in range(0, len(data), _SEARCHED_BYTES):
                for found in pattern.finditer(data, start, start + _SEARCHED_BYTES + self.longest):
                    yield found.span()


class Secrets:
    """The secrets in force, and those before the last reload, which running calls may still use."""

    __slots__ = ("__weakref__", "_in_force", "redactor")

    def __init__(self, in_force: frozenset[str]) -> None:
        self._in_force = in_force
        self.redactor = Redactor(in_force, (_MADE,))

    def replace(self, in_force: frozenset[str]) -> None:
        """Replace the secrets in force, after a reload."""
        self.redactor = Redactor(self._in_force | in_force, (_MADE,))
        self._in_force = in_force


def redactor_of(keys: Keys) -> Redactor | None:
    """Return a redactor of the relay's own credentials in `keys`; None if there are none."""
    own = tuple(each.value for each in keys if each is not None and each.label != "client")
    return _redactor_of(own) if own else None


@lru_cache(maxsize=_KNOWN)
def _redactor_of(values: tuple[str, ...]) -> Redactor:
    return Redactor({*values, *(value.rpartition(" ")[2] for value in values)})


def longest_spelling(secret: str) -> int:
    """Return the length of the longest spelling of one secret, in bytes."""
    return len(secret) * (1 if _NEVER_ESCAPED.issuperset(secret) else _ESCAPED_BYTES)


def _with_decoded(secret: str) -> Iterator[str]:
    """Return a secret and its base64-decoded parts: `Basic` credentials are configured encoded."""
    yield secret
    try:
        decoded = base64.b64decode(secret, validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        return
    if decoded.isprintable() and ":" in decoded:
        yield decoded
        yield decoded.partition(":")[2]


def _spellings(character: str) -> bytes:
    """Return a pattern for one character of a secret, in the spelling of any encoder."""
    if character in _NEVER_ESCAPED:
        return re.escape(character).encode()
    raw, code = character.encode("utf-8", "surrogatepass"), ord(character)
    percent = b"".join(b"(?i:%%%02x)" % byte for byte in raw)
    units = character.encode("utf-16-be", "surrogatepass")
    pairs = [units[at : at + 2].hex().encode() for at in range(0, len(units), 2)]
    unicode = rb"\\{0,3}".join(b"(?i:u%s)" % pair for pair in pairs)
    html = [b"#0{0,2}%d" % code, b"(?i:#x0{0,2}%x)" % code]
    if code in codepoint2name:
        html.append(codepoint2name[code].encode())
    others = [percent, b"&(?:%s);" % b"|".join(html)]
    if character == " ":
        others.append(rb"\+")
    # JSON within JSON doubles the backslashes.
    in_json = rb"\\{0,3}(?:%s|%s)" % (re.escape(raw), unicode)
    return b"(?:%s)" % b"|".join([*others, in_json])  # % and & start their own spellings
