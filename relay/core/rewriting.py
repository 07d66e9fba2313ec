"""Translate between URLs of a provider's own hosts and the equivalent URLs of the relay.

Owns both directions. In responses, such a URL in a header or JSON field that `rewrite:` lists is
replaced by the relay's, so that the client's next call does not bypass the relay. In requests, a
target URL (fal's proxy convention) becomes an endpoint. No other byte of a header or body changes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from relay.core.fields import STRING

_MAX_FIELDS = 1000
"""Maximum number of URLs that are rewritten in one text; each takes about 5 us."""
_SECURE = {"http": "http", "ws": "http", "https": "https", "wss": "https"}
CHANGED_WITH_BODY = ("ETag", "Digest", "Content-Digest", "Repr-Digest", "Content-MD5")
"""Headers that become wrong if the body changes."""


@dataclass(frozen=True, slots=True)
class ProviderOrigin:
    """A host and path of a provider, and the endpoint prefix of the relay for it.

    Example: `https://queue.fal.run`, no path, `queue/`.
    """

    origin: str
    path: str
    endpoint: str


@dataclass(frozen=True, slots=True)
class Rewrites:
    """What is rewritten in a provider's responses: headers, and JSON fields by endpoint prefix."""

    headers: frozenset[str] = frozenset()
    """Lower-case names."""
    fields: tuple[tuple[str, re.Pattern[bytes]], ...] = ()

    def pattern(self, endpoint: str) -> re.Pattern[bytes] | None:
        """Return the pattern of the fields of this endpoint; None if none are listed for it."""
        return next((found for prefix, found in self.fields if endpoint.startswith(prefix)), None)


def field_pattern(names: Iterable[str]) -> re.Pattern[bytes]:
    """Return a pattern that finds `"name": "string"` for these names anywhere in JSON text."""
    alternatives = b"|".join(re.escape(name.encode()) for name in names)
    return re.compile(rb'("(?:' + alternatives + rb')"\s*:\s*)(' + STRING + rb")")


@dataclass(frozen=True, slots=True)
class Rewriter:
    """Rewrites the URLs of one response. `root` is the client's URL of the provider:
    `https://host/…/providers/fal/`.

    `fields` is None if the body is not rewritten.
    """

    own_origins: Sequence[ProviderOrigin]
    root: str
    headers: frozenset[str]
    fields: re.Pattern[bytes] | None

    def url(self, url: str) -> str:
        """Return the relay's URL for `url` if it has one of the provider's hosts, else `url`."""
        named = endpoint_of(url, self.own_origins)
        if named is None:
            return url
        scheme, _, rest = self.root.partition("://")
        if url.lower().startswith("ws"):
            scheme = "wss" if scheme == "https" else "ws"
        endpoint, query = named
        return f"{scheme}://{rest}{endpoint}{'?' if query else ''}{query}"

    def pairs(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return the headers with the listed ones rewritten."""
        return [
            (name, self.url(value) if name.lower() in self.headers else value)
            for name, value in pairs
        ]

    def body(self, body: bytes) -> bytes:
        """Return JSON text with up to 1,000 listed fields rewritten, and every other byte kept."""
        return self.fields.sub(self._field, body, _MAX_FIELDS) if self.fields else body

    def _field(self, found: re.Match[bytes]) -> bytes:
        try:
            given = json.loads(found[2])
        except ValueError:
            return found[0]
        ours = self.url(given)
        return found[0] if ours == given else found[1] + json.dumps(ours).encode()


def endpoint_of(url: str, own_origins: Iterable[ProviderOrigin]) -> tuple[str, str] | None:
    """Return (endpoint, raw query) of a URL under one of `own_origins`; None for any other URL.

    The authority must be identical: no user, no other port, no trailing dot. A fragment is dropped.
    """
    scheme, separator, rest = url.partition("://")
    rest = rest.partition("#")[0]
    location, _, query = rest.partition("?")
    authority, slash, path = location.partition("/")
    origin = f"{_SECURE.get(scheme.lower(), '')}://{authority.lower()}"
    if not separator:
        return None
    for own_origin in own_origins:
        if origin == own_origin.origin and (slash + path + "/").startswith(own_origin.path + "/"):
            return own_origin.endpoint + (slash + path)[len(own_origin.path) :].lstrip("/"), query
    return None


def whole_events(held: bytes) -> int:
    """Return how many bytes of `held` are complete SSE events.

    A blank line ends an event, and a line ends in LF, CR or CRLF. `re` takes ten times as long.
    """
    end = held.rfind(b"\n\n") + 2
    if b"\r" in held:
        end = max(end, _behind_cr(held, max(held.rfind(b"\n\r"), held.rfind(b"\r\r"))))
    return end if end > 1 else 0


def first_event(held: bytes) -> int:
    """Return how many bytes of `held` are its first complete SSE event; 0 if none is complete."""
    ends = [held.find(b"\n\n") + 2]
    if b"\r" in held:
        ends += [_behind_cr(held, held.find(pair)) for pair in (b"\n\r", b"\r\r")]
    return min((end for end in ends if end > 1), default=0)


def _behind_cr(held: bytes, at: int) -> int:
    """Return the position after the line end at `at` and the next CR or CRLF; 0 if `at` is -1."""
    return 0 if at < 0 else at + 3 if held[at + 2 : at + 3] == b"\n" else at + 2


class EventChanger:
    """Applies `change` to the complete events of an SSE stream in chunks. Each chunk is searched
    once.

    An incomplete event is buffered until it ends. One above `max_bytes` passes unchanged.
    """

    __slots__ = ("_change", "_held", "_last", "_max_bytes")

    def __init__(self, change: Callable[[bytes], bytes], max_bytes: int) -> None:
        self._change, self._max_bytes = change, max_bytes
        self._held = bytearray()
        self._last = b""
        """The last byte so far of an event that is too large; empty outside such an event."""

    def feed(self, chunk: bytes) -> bytes:
        """Return the bytes to send now; empty while an event is buffered."""
        if self._last:
            return self._pass(chunk)
        held = self._held
        before = bytes(held[-1:])
        end = whole_events(before + chunk) - len(before)
        changed = b""
        if end > 0:
            held += chunk[:end]
            self._held = bytearray(chunk[end:])
            changed = self._change(bytes(held))
        else:
            held += chunk
        if len(self._held) <= self._max_bytes:
            return changed
        self._last = bytes(self._held[-1:])
        return changed + self.rest()

    def rest(self) -> bytes:
        """Return the buffered bytes, at the end of a stream those of an incomplete event."""
        rest = bytes(self._held)
        self._held.clear()
        return rest

    def _pass(self, chunk: bytes) -> bytes:
        """Pass an event that is too large, up to its end."""
        end = first_event(self._last + chunk) - 1
        if end <= 0:
            self._last = chunk[-1:] or self._last
            return chunk
        self._last = b""
        return chunk[:end] + self.feed(chunk[end:])
