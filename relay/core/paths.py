"""Check request targets, and split, cut and join paths and queries without decoding them.

Owns the refusal of paths that could escape a provider's prefix, and byte-for-byte operations on the
raw target, still percent-encoded: what is checked is what is sent. The registry finds the provider.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from relay.core.errors import BadPath

# Nearly every target: segments of unreserved characters without a leading dot. They need no further
# check.
_PLAIN = re.compile(r"(?:/[A-Za-z0-9_~:@,=+!$&'()*-][A-Za-z0-9_~:@,=+!$&'()*.-]*)+\Z")
# A target has no controls, space, DEL, backslash and '#', and '%' only before two hex digits.
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f\\#]|%(?![0-9A-Fa-f]{2})")
# Escapes that need a check after decoding: dot, slash, backslash, percent sign, controls.
_SUSPECT_ESCAPE = re.compile(r"%(?:2[eEfF5]|5[cC]|[01][0-9A-Fa-f]|7[fF])")
_DOT_SEGMENT = re.compile(rb"(?:^|[/\\;])\.{1,2}(?:[/\\;]|$)")
_FORBIDDEN_BYTES = re.compile(rb"[\x00-\x1f\x7f\\]")
_VERSION_SEGMENT = re.compile(r"v\d+[a-z0-9]*$")
_MAX_DECODINGS = 4

API = "/api/v1/ai-gateway"
"""Prefix of the native surface's URLs."""


def check_target(raw_target: str) -> None:
    """Raise BadPath unless `raw_target` (path and query as received) is a plain origin-form target.

    Refused are absolute-form, authority-form, `*`, more or less than one leading slash, dot
    segments in any encoding, once or repeatedly encoded, backslashes, control characters, `#`,
    malformed percent escapes and non-ASCII. The query may contain anything but controls, space,
    backslash and `#`.
    """
    if _PLAIN.match(raw_target):
        return
    if not raw_target.startswith("/") or raw_target.startswith("//"):
        raise BadPath("it must begin with exactly one slash")
    path, _, query = raw_target.partition("?")
    if not raw_target.isascii() or _FORBIDDEN.search(path):
        raise BadPath("it contains a character that must be percent-encoded")
    if query and _FORBIDDEN_IN_QUERY.search(query):
        raise BadPath("its query contains a character that must be percent-encoded")
    if "/." in path or ";" in path or _SUSPECT_ESCAPE.search(path):
        _check_decoded(path)


_FORBIDDEN_IN_QUERY = re.compile(r"[\x00-\x20\x7f\\#]")


def _check_decoded(path: str) -> None:
    """Decode as often as a careless server may, and check each stage."""
    stage = path.encode("ascii")
    for _ in range(_MAX_DECODINGS):
        if _DOT_SEGMENT.search(stage):
            raise BadPath("it contains a dot segment")
        if _FORBIDDEN_BYTES.search(stage):
            raise BadPath("it contains an encoded control character or backslash")
        decoded = unquote_to_bytes(stage)
        if decoded == stage:
            return
        stage = decoded
    raise BadPath("it is percent-encoded too many times")


def collapse_slashes(raw_path: str) -> str:
    """`a//b///c` -> `a/b/c`: SDKs whose base URL ends in a slash send such paths."""
    while "//" in raw_path:
        raw_path = raw_path.replace("//", "/")
    return raw_path


# An escape of a character that needs none (RFC 3986 2.3), or of a colon.
_NEEDLESS_ESCAPE = re.compile(
    "%(?:2[DE]|3[0-9A]|4[1-9A-F]|5[0-9AF]|6[1-9A-F]|7[0-9AE])", re.IGNORECASE
)
_ESCAPED_SLASH = re.compile("%2F", re.IGNORECASE)


def readable(raw_path: str) -> str:
    """`v1/%6Dodels/m%3AgenerateContent` -> `v1/models/m:generateContent`: as servers read it, which
    decode a path before they route by it. Escapes of all other characters stay.
    """
    if "%" not in raw_path:
        return raw_path
    return _NEEDLESS_ESCAPE.sub(lambda found: chr(int(found[0][1:], 16)), raw_path)


def with_slashes(path: str) -> str:
    """`text-to-speech%2Fanna` -> `text-to-speech/anna`: as some servers read it, and others not."""
    return _ESCAPED_SLASH.sub("/", path)


def split_endpoint(raw_tail: str) -> tuple[str, str, str]:
    """`openai//v1/models?x=1` -> (`openai`, `v1/models`, `x=1`): provider, endpoint, query, raw."""
    path, _, query = raw_tail.partition("?")
    if "//" in path:
        path = collapse_slashes(path)
    provider, _, endpoint = path.partition("/")
    return provider, endpoint, query


def is_within(endpoint: str, prefix: str) -> bool:
    """True if `endpoint` begins with the segments of `prefix`: `a/b` is within `a`, `ab` is not."""
    return endpoint == prefix or endpoint.startswith(f"{prefix}/")


@lru_cache(maxsize=256)
def version_prefixes(base_path: str) -> tuple[str, ...]:
    """Return the endpoint prefixes that repeat the version of a base path, the longest first.

    `/openai/v1` -> (`openai/v1/`, `v1/`): an SDK works with and without the version in its base
    URL. A base path that does not end in a version has no such prefixes.
    """
    segments = [segment for segment in base_path.split("/") if segment]
    if not segments or not _VERSION_SEGMENT.match(segments[-1]):
        return ()
    return tuple("/".join(segments[start:]) + "/" for start in range(len(segments)))


def drop_version(endpoint: str, base_path: str) -> str:
    """`v1/chat/completions` under `/v1` -> `chat/completions`. A second prefix, which an SDK has
    added to a base URL that ends in one, is removed too: `api/v1/v1/messages` under `/api/v1`.
    """
    prefixes = version_prefixes(base_path)
    for _ in range(2):
        prefix = next((each for each in prefixes if endpoint.startswith(each)), "")
        endpoint = endpoint[len(prefix) :]
    return endpoint


class VersionRule(NamedTuple):
    """`version` is added to endpoints that match `pattern` (`*` matches anything) and have none."""

    pattern: str
    version: str


def put_version(endpoint: str, rules: Sequence[VersionRule]) -> str:
    """`messages` -> `v1/messages`, by the first rule that matches. An endpoint that begins with a
    version keeps it; a repeated version, which an SDK has added to a base URL that ends in it, is
    removed once. The empty endpoint is the base URL itself, which has no version.
    """
    if not rules or not endpoint:
        return endpoint
    first, _, rest = endpoint.partition("/")
    if _VERSION_SEGMENT.match(first):
        return rest if rest.startswith(f"{first}/") else endpoint
    for pattern, version in rules:
        if fnmatchcase(endpoint, pattern):
            has_it = not version or endpoint.startswith(f"{version}/")
            return endpoint if has_it else f"{version}/{endpoint}"
    return endpoint


def cut_query(raw_query: str, names: frozenset[str]) -> str:
    """Remove the raw `&` segments whose decoded, case-folded name is in `names`.

    The others stay in order, byte for byte.
    """
    if not raw_query or not names:
        return raw_query
    return "&".join(part for part in raw_query.split("&") if query_name(part) not in names)


def query_name(segment: str) -> str:
    """Return the decoded, lower-case name of one raw `name=value` segment."""
    name = segment.partition("=")[0]
    if "%" in name or "+" in name:
        name = unquote_to_bytes(name.replace("+", " ")).decode("utf-8", "replace")
    return name.lower().strip()


def segment_value(segment: str) -> str:
    """Return the decoded value of one raw `name=value` segment."""
    value = segment.partition("=")[2]
    if "%" in value or "+" in value:
        value = unquote_to_bytes(value.replace("+", " ")).decode("utf-8", "replace")
    return value


def segment_text(segment: str) -> str:
    """Return the decoded value of one raw segment; of one without `=`, all of it."""
    return segment_value(segment if "=" in segment else f"={segment}")


def cut_values(raw_query: str, is_cut: Callable[[str], bool]) -> str:
    """Remove the raw `&` segments for whose `segment_text` `is_cut` is true."""
    if not raw_query:
        return raw_query
    return "&".join(part for part in raw_query.split("&") if not is_cut(segment_text(part)))


def query_names(raw_query: str) -> set[str]:
    """Return the decoded, lower-case names of all segments."""
    return {query_name(segment) for segment in raw_query.split("&")} if raw_query else set()


def query_value(raw_query: str, *names: str) -> str:
    """Return the decoded value of the first segment that has one of `names` and a value, or ""."""
    for segment in raw_query.split("&"):
        if query_name(segment) in names and (value := segment_value(segment)):
            return value
    return ""


def join_query(*parts: str) -> str:
    """Join raw query parts, without the empty ones."""
    return "&".join(part for part in parts if part)
