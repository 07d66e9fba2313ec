"""Absolute URLs of a provider's own hosts, and the relay's URLs that lead to the same place.

Owns: both directions. An answer that names such a URL in a header or JSON field listed under
`rewrite:` comes back with the relay's, so that a client's next call does not bypass the relay with
the relay's key in its hand; a URL that a client names (fal's proxy convention) becomes an endpoint.
Nothing else in a header or body is touched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_MAX_FIELDS = 1000
"""So many URLs of one text are rewritten; each takes about 5 us."""
_SECURE = {"http": "http", "ws": "http", "https": "https", "wss": "https"}
CHANGED_WITH_BODY = ("ETag", "Digest", "Content-Digest", "Repr-Digest", "Content-MD5")
"""Headers that a changed body makes untrue."""


@dataclass(frozen=True, slots=True)
class ProviderOrigin:
    """A host of a provider's own, and the endpoint prefix under which the relay reaches it.

    `https://queue.fal.run`, no path, `queue/`.
    """

    origin: str
    path: str
    endpoint: str


@dataclass(frozen=True, slots=True)
class Rewrites:
    """What of a provider's answers is rewritten: headers, and JSON fields by endpoint prefix."""

    headers: frozenset[str] = frozenset()
    """Lower-case."""
    fields: tuple[tuple[str, re.Pattern[bytes]], ...] = ()

    def pattern(self, endpoint: str) -> re.Pattern[bytes] | None:
        """What finds the fields in the answers of this endpoint, if any are listed for it."""
        return next((found for prefix, found in self.fields if endpoint.startswith(prefix)), None)


def field_pattern(names: Iterable[str]) -> re.Pattern[bytes]:
    """Finds `"name": "string"` for these names in JSON text, wherever it stands."""
    alternatives = b"|".join(re.escape(name.encode()) for name in names)
    return re.compile(rb'("(?:' + alternatives + rb')"\s*:\s*)(' + _STRING + rb")")


@dataclass(frozen=True, slots=True)
class Rewriter:
    """For one call. `root` is where its client finds the provider: `https://host/…/providers/fal/`.

    `fields` is None where the body stays as it is.
    """

    own_origins: Sequence[ProviderOrigin]
    root: str
    headers: frozenset[str]
    fields: re.Pattern[bytes] | None

    def url(self, url: str) -> str:
        """`url` as the relay's own if it leads to one of the provider's hosts, else unchanged."""
        named = endpoint_of(url, self.own_origins)
        if named is None:
            return url
        scheme, _, rest = self.root.partition("://")
        if url.lower().startswith("ws"):
            scheme = "wss" if scheme == "https" else "ws"
        endpoint, query = named
        return f"{scheme}://{rest}{endpoint}{'?' if query else ''}{query}"

    def pairs(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Headers, the listed ones rewritten."""
        return [
            (name, self.url(value) if name.lower() in self.headers else value)
            for name, value in pairs
        ]

    def body(self, body: bytes) -> bytes:
        """JSON text, the listed fields rewritten, up to 1,000, and every other byte kept."""
        return self.fields.sub(self._field, body, _MAX_FIELDS) if self.fields else body

    def _field(self, found: re.Match[bytes]) -> bytes:
        try:
            given = json.loads(found[2])
        except ValueError:
            return found[0]
        ours = self.url(given)
        return found[0] if ours == given else found[1] + json.dumps(ours).encode()


def endpoint_of(url: str, own_origins: Iterable[ProviderOrigin]) -> tuple[str, str] | None:
    """(endpoint, raw query) of a URL on one of `own_origins`; None elsewhere, or below its path.

    The authority must be the very same: no user, no other port, no trailing dot. A fragment is
    nobody's.
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
    """How many bytes of `held` are complete SSE events.

    A blank line ends an event, and a line ends with LF, CR or CRLF. `re` takes ten times as long.
    """
    end = held.rfind(b"\n\n") + 2
    if b"\r" in held:
        end = max(end, _behind_cr(held, max(held.rfind(b"\n\r"), held.rfind(b"\r\r"))))
    return end if end > 1 else 0


def first_event(held: bytes) -> int:
    """How many bytes of `held` are its first complete SSE event; 0 if none is complete."""
    ends = [held.find(b"\n\n") + 2]
    if b"\r" in held:
        ends += [_behind_cr(held, held.find(pair)) for pair in (b"\n\r", b"\r\r")]
    return min((end for end in ends if end > 1), default=0)


def _behind_cr(held: bytes, at: int) -> int:
    """Behind the end of a line at `at` and the CR or CRLF that follows; 0 if `at` is -1."""
    return 0 if at < 0 else at + 3 if held[at + 2 : at + 3] == b"\n" else at + 2


class EventChanger:
    """SSE in pieces, whole events changed. Each piece is searched once, however events are cut.

    Up to `max_bytes` of an event are held until it ends. A larger one flows on unchanged.
    """

    __slots__ = ("_change", "_held", "_last", "_max_bytes")

    def __init__(self, change: Callable[[bytes], bytes], max_bytes: int) -> None:
        self._change, self._max_bytes = change, max_bytes
        self._held = bytearray()
        self._last = b""
        """In the middle of an event that is too large: its last byte so far."""

    def feed(self, chunk: bytes) -> bytes:
        """What goes down now; empty while an event is held."""
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
        """What is held: where a stream ends it is no whole event, and stays as it is."""
        rest = bytes(self._held)
        self._held.clear()
        return rest

    def _pass(self, chunk: bytes) -> bytes:
        """Go on with an event that is too large, up to its end."""
        end = first_event(self._last + chunk) - 1
        if end <= 0:
            self._last = chunk[-1:] or self._last
            return chunk
        self._last = b""
        return chunk[:end] + self.feed(chunk[end:])
