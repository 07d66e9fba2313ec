"""Validate URLs, paths and header names in gateway.yaml.

Owns their valid forms and the error messages. Except for blanks around a URL nothing is repaired: a
wrong one is refused at start, not by the first call.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError
from yarl import URL

from relay.core.errors import BadPath
from relay.core.headers import HOP_BY_HOP
from relay.core.paths import check_target

_SCHEMES = ("http", "https")
_SOCKET_SCHEMES = ("ws", "wss")
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?\Z")
_BLANK = re.compile(r"[\x00-\x20\x7f]")
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,256}\Z")  # RFC 9110 5.6.2
_QUERY_NAME = re.compile(r"[A-Za-z0-9._~\[\]-]{1,256}\Z")
_OF_THE_CONNECTION = HOP_BY_HOP | {"content-length"}
_MAX_HOST = 253
_MAX_PORT = 65535


class BadUrl(ValueError):
    """A URL is refused. The text says why, and follows the name of the setting in a message."""


def read_url(value: str) -> URL:
    """Parse an http(s) URL without credentials, query and fragment. Raises BadUrl."""
    text = value.strip()
    scheme, colon, after = text.partition("://")
    if colon and scheme.lower() in _SOCKET_SCHEMES:
        raise BadUrl(f"should begin with http{scheme[2:].lower()}://, also for WebSockets")
    if not colon or scheme.lower() not in _SCHEMES or not after:
        raise BadUrl("should be an http:// or https:// URL")
    if _BLANK.search(after):
        raise BadUrl("contains a blank or a control character")
    authority, slash, path = after.partition("/")
    if "@" in authority:
        raise BadUrl("must not have user and password (…@); put the credential under `auth`")
    if problem := path_problem(after):
        raise BadUrl(problem)
    _check_authority(authority)
    return URL(f"{scheme.lower()}://{authority}{slash}{path}", encoded=True)


def _check_authority(authority: str) -> None:
    try:
        url = URL(f"http://{authority}/", encoded=True)
        host, port = url.raw_host or "", url.explicit_port
    except ValueError:
        raise BadUrl("has an invalid host or port") from None
    if not host.isascii():
        raise BadUrl("should have its host in ASCII (xn--…)")
    if not authority.startswith("[") and (len(host) > _MAX_HOST or not _HOST.match(host)):
        raise BadUrl("has an invalid host name")
    if authority.endswith(":") or port == 0 or (port or 0) > _MAX_PORT:
        raise BadUrl("should have a port from 1 to 65535, or none")


def is_service_url(value: str) -> bool:
    """True if the URL of a database or of Redis can be parsed, its port included."""
    try:
        return (urlsplit(value).port or 1) > 0
    except ValueError:
        return False


def path_problem(path: str) -> str:
    """Return what is wrong with a path, or with the text after `://`; empty if it is valid."""
    for character, name in (("?", "query (?…)"), ("#", "fragment (#…)"), ("\\", "backslash")):
        if character in path:
            return f"must not have a {name}"
    return endpoint_problem(path.partition("/")[2] if "/" in path else "")


def endpoint_problem(endpoint: str) -> str:
    """Return what is wrong with an endpoint, which may have a query; empty if it is valid."""
    try:
        check_target(f"/{endpoint.lstrip('/')}")
    except BadPath as error:
        return error.reason.removeprefix("it ").removeprefix("its ")
    return ""


def matching(pattern: re.Pattern[str], words: str) -> AfterValidator:
    """Return a validator that refuses text without a match, with the message `words`."""

    def check(value: str) -> str:
        if not pattern.match(value):
            raise PydanticCustomError("pattern", "{words}", {"words": words})
        return value

    return AfterValidator(check)


def optional_url(example: str) -> AfterValidator:
    """Return a validator for an optional URL, which removes slashes at its end."""

    def check(value: str | None) -> str | None:
        text = (value or "").strip()
        try:
            return str(read_url(text)).rstrip("/") if text else None
        except BadUrl as error:
            words = f"{error} (such as {example})"
            raise PydanticCustomError("url", "{words}", {"words": words}) from None

    return AfterValidator(check)


def _url(value: str) -> str:
    try:
        return str(read_url(value))
    except BadUrl as error:
        raise PydanticCustomError("url", "{words}", {"words": str(error)}) from None


def _without_problem(find: Callable[[str], str]) -> AfterValidator:
    def check(value: str) -> str:
        if problem := find(value):
            raise PydanticCustomError("path", "{words}", {"words": problem})
        return value

    return AfterValidator(check)


def _default_header(value: str) -> str:
    if value.lower() in _OF_THE_CONNECTION:
        raise PydanticCustomError("header", "is a header that the relay itself sets")
    return value


HttpUrl = Annotated[str, AfterValidator(_url)]
"""A URL that `read_url` accepts."""
UrlPath = Annotated[str, _without_problem(lambda value: path_problem(f"/{value}"))]
"""A path, or a part of one, without query and fragment."""
Endpoint = Annotated[str, _without_problem(endpoint_problem)]
"""An endpoint of a provider, which may have a query."""
HeaderName = Annotated[
    str, matching(_TOKEN, "should be a header's name: letters, digits and dashes")
]
DefaultHeader = Annotated[HeaderName, AfterValidator(_default_header)]
"""A header that the relay may add to requests."""
QueryName = Annotated[
    str, matching(_QUERY_NAME, "should be a plain name: letters, digits, . _ and -")
]
