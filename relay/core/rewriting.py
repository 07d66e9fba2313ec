"""Absolute URLs of a provider's own hosts, and the relay's URLs that lead to the same place.

Owns: both directions. An answer that names such a URL in a header or JSON field listed under
`rewrite:` comes back with the relay's, so that a client's next call does not bypass the relay with
the relay's key in its hand; a URL that a client names (fal's proxy convention) becomes an endpoint.
Nothing else in a header or body is touched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_STRING = rb'"(?:[^"\\]|\\.)*"'
_EVENT_END = re.compile(rb"(?:\r\n|\n|\r(?!\n)){2}")
_SECURE = {"http": "http", "ws": "http", "https": "https", "wss": "https"}
CHANGED_WITH_BODY = ("ETag", "Digest", "Content-Digest", "Repr-Digest", "Content-MD5")
"""Headers that a rewritten body makes untrue."""


@dataclass(frozen=True, slots=True)
class Home:
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

    homes: Sequence[Home]
    root: str
    headers: frozenset[str]
    fields: re.Pattern[bytes] | None

    def url(self, url: str) -> str:
        """`url` as the relay's own if it leads to one of the provider's hosts, else unchanged."""
        named = endpoint_of(url, self.homes)
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
        """JSON text, the listed fields rewritten and every other byte kept."""
        return self.fields.sub(self._field, body) if self.fields else body

    def _field(self, found: re.Match[bytes]) -> bytes:
        try:
            given = json.loads(found[2])
        except ValueError:
            return found[0]
        ours = self.url(given)
        return found[0] if ours == given else found[1] + json.dumps(ours).encode()


def endpoint_of(url: str, homes: Iterable[Home]) -> tuple[str, str] | None:
    """(endpoint, raw query) of a URL on one of `homes`; None on any other host, or below its path.

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
    for home in homes:
        if origin == home.origin and (slash + path + "/").startswith(home.path + "/"):
            return home.endpoint + (slash + path)[len(home.path) :].lstrip("/"), query
    return None


def split_events(events: bytes) -> list[bytes]:
    """Whole SSE events, one by one, each with its end."""
    ends = [0, *(end.end() for end in _EVENT_END.finditer(events))]
    return [events[start:end] for start, end in zip(ends, [*ends[1:], len(events)], strict=True)]


def whole_events(held: bytes) -> int:
    """How many bytes of `held` are complete SSE events."""
    return max((end.end() for end in _EVENT_END.finditer(held)), default=0)
