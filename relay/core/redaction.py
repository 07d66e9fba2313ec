"""Take secrets out of bytes that are to be stored or logged, or that quote the relay's keys.

Owns: the spellings in which a secret may stand in a body: as it is, or escaped for a URL, JSON or
HTML. It works on bytes, so that binary and cut text are searched like any other.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from html.entities import codepoint2name

from relay.core.meters.unpack import coding_of, unpack
from relay.core.provider import Keys

MARK = b"[redacted]"
SHORTEST = 4
"""A shorter secret would be found everywhere."""
_NEVER_ESCAPED = frozenset(
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.~"
)  # RFC 3986 2.3: no encoder touches these
_ESCAPED_BYTES = 16
"""The longest spelling of one character."""
_SEARCHED_BYTES = 1024 * 1024
_MAX_UNPACKED_BYTES = 1024 * 1024
_KNOWN = 256


class Redactor:
    """Some secrets, and the search for them."""

    __slots__ = ("_patterns", "_plain", "longest")

    def __init__(self, secrets: Iterable[str]) -> None:
        known = {each for secret in secrets for each in _with_decoded(secret)}
        wanted = sorted((s for s in known if len(s) >= SHORTEST), key=lambda s: (-len(s), s))
        plain = [secret for secret in wanted if _NEVER_ESCAPED.issuperset(secret)]
        escaped = [secret for secret in wanted if not _NEVER_ESCAPED.issuperset(secret)]
        self._plain = tuple(secret.encode() for secret in plain)
        self._patterns = tuple(re.compile(b"".join(map(_spellings, s))) for s in escaped)
        self.longest = max(map(longest_spelling, wanted), default=0)
        """Bytes of the longest spelling of any secret."""

    def redact(
        self, data: bytes, most: int | None = None, others: Iterable[Redactor] = ()
    ) -> bytes:
        """The first `most` bytes of `data`, all of them by default, without a secret, of these or
        the `others`. A secret that begins among these bytes and ends behind them is found too, and
        no part of it is left.
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
            at = max(at, end)  # one secret may hold another
        return b"".join([*parts, data[at:most]])

    def mask(self, data: bytes) -> bytes:
        """All of `data`, each byte of a secret an asterisk: it keeps its length."""
        masked: bytearray | None = None
        for start, end in self._spans(data):
            masked = bytearray(data) if masked is None else masked
            masked[start:end] = b"*" * (end - start)
        return data if masked is None else bytes(masked)

    def redact_coded(self, body: bytes, coding: str) -> tuple[bytes, bool]:
        """A whole body without a secret, and whether it is still in its `coding`: unpacked only if
        a secret was found. What cannot be unpacked, or not within bounds, is left out.
        """
        if not body or not coding_of(coding):
            return self.redact(body), True
        unpacked = unpack(body, coding, _MAX_UNPACKED_BYTES)
        if unpacked is None or not unpacked[1]:
            return b"", False
        text = self.redact(unpacked[0])
        return (body, True) if text == unpacked[0] else (text, False)

    def redact_text(self, text: str, others: Iterable[Redactor] = ()) -> str:
        """`text` without a secret, of these or the `others`."""
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
            # In pieces: a search holds Python's lock to its end.
            for start in range(0, len(data), _SEARCHED_BYTES):
                for found in pattern.finditer(data, start, start + _SEARCHED_BYTES + self.longest):
                    yield found.span()


class Secrets:
    """The secrets in force, and those before the last reload, with which calls may still run."""

    __slots__ = ("__weakref__", "_in_force", "redactor")

    def __init__(self, in_force: frozenset[str]) -> None:
        self._in_force = in_force
        self.redactor = Redactor(in_force)

    def replace(self, in_force: frozenset[str]) -> None:
        """Put those of a reload in force."""
        self.redactor = Redactor(self._in_force | in_force)
        self._in_force = in_force


def redactor_of(keys: Keys) -> Redactor | None:
    """Takes the relay's own credentials of a call out of its answer; None if there are none."""
    own = tuple(each.value for each in keys if each is not None and each.label != "client")
    return _redactor_of(own) if own else None


@lru_cache(maxsize=_KNOWN)
def _redactor_of(values: tuple[str, ...]) -> Redactor:
    return Redactor({*values, *(value.rpartition(" ")[2] for value in values)})


def longest_spelling(secret: str) -> int:
    """Bytes of the longest spelling of one secret."""
    return len(secret) * (1 if _NEVER_ESCAPED.issuperset(secret) else _ESCAPED_BYTES)


def _with_decoded(secret: str) -> Iterator[str]:
    """A secret, and what it is in base64: `Basic` credentials stand in gateway.yaml encoded."""
    yield secret
    try:
        decoded = base64.b64decode(secret, validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        return
    if decoded.isprintable() and ":" in decoded:
        yield decoded
        yield decoded.partition(":")[2]


def _spellings(character: str) -> bytes:
    """A pattern for one character of a secret, in any encoder's spelling."""
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
    # Backslashes: JSON within JSON doubles them.
    in_json = rb"\\{0,3}(?:%s|%s)" % (re.escape(raw), unicode)
    return b"(?:%s)" % b"|".join([*others, in_json])  # % and & begin their own spellings
