"""URLs, paths and header names that gateway.yaml may hold.

Owns: their form, and the words for what is wrong with one. Nothing is repaired but blanks around a
URL: a wrong one is refused at start, not by the first call.
"""

from __future__ import annotations

import re
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
    """The text says what is wrong, to go behind the name of the setting."""


def read_url(given: str) -> URL:
    """An http:// or https:// URL without credentials, query and fragment, as it is written but for
    blanks around it. Raises BadUrl.
    """
    text = given.strip()
    scheme, colon, after = text.partition("://")
    if colon and scheme.lower() in _SOCKET_SCHEMES:
        raise BadUrl(f"should begin with http{scheme[2:].lower()}://, for sockets too")
    if not colon or scheme.lower() not in _SCHEMES or not after:
        raise BadUrl("should be an http:// or https:// URL")
    if _BLANK.search(after):
        raise BadUrl("holds a blank or a control character")
    authority, slash, path = after.partition("/")
    if "@" in authority:
        raise BadUrl("may have no user and password (…@); a credential goes under `auth`")
    if problem := path_problem(after):
        raise BadUrl(problem)
    _check_authority(authority)
    return URL(f"{scheme.lower()}://{authority}{slash}{path}", encoded=True)


def _check_authority(authority: str) -> None:
    try:
        url = URL(f"http://{authority}/", encoded=True)
        host, port = url.raw_host or "", url.explicit_port
    except ValueError:
        raise BadUrl("has a host or a port that cannot be") from None
    if not host.isascii():
        raise BadUrl("should have its host in ASCII (xn--…)")
    if not authority.startswith("[") and (len(host) > _MAX_HOST or not _HOST.match(host)):
        raise BadUrl("has a host name that cannot be")
    if authority.endswith(":") or port == 0 or (port or 0) > _MAX_PORT:
        raise BadUrl("should have a port from 1 to 65535, or none")


def is_service_url(given: str) -> bool:
    """True if a database's or Redis's URL can be taken apart: its password is found, and its port
    is a number.
    """
    try:
        return (urlsplit(given).port or 1) > 0
    except ValueError:
        return False


def path_problem(path: str) -> str:
    """Words for what is wrong with a path, or with what stands behind `://`; empty: nothing."""
    for character, name in (("?", "query (?…)"), ("#", "fragment (#…)"), ("\\", "backslash")):
        if character in path:
            return f"may have no {name}"
    return endpoint_problem(path.partition("/")[2] if "/" in path else "")


def endpoint_problem(endpoint: str) -> str:
    """The same for what stands behind the first slash; it may have a query."""
    try:
        check_target(f"/{endpoint.lstrip('/')}")
    except BadPath as error:
        return error.reason.removeprefix("it ").removeprefix("its ")
    return ""


def _url(given: str) -> str:
    try:
        return str(read_url(given))
    except BadUrl as error:
        raise PydanticCustomError("url", "{words}", {"words": str(error)}) from None


def _path(given: str) -> str:
    if problem := path_problem(f"/{given}"):
        raise PydanticCustomError("path", "{words}", {"words": problem})
    return given


def _endpoint(given: str) -> str:
    if problem := endpoint_problem(given):
        raise PydanticCustomError("path", "{words}", {"words": problem})
    return given


def _header(given: str) -> str:
    if not _TOKEN.match(given):
        raise PydanticCustomError("header", "should be a header's name: letters, digits and dashes")
    return given


def _default_header(given: str) -> str:
    if given.lower() in _OF_THE_CONNECTION:
        raise PydanticCustomError("header", "is a header that the relay itself sets")
    return given


def _query(given: str) -> str:
    if not _QUERY_NAME.match(given):
        raise PydanticCustomError("query", "should be a plain name: letters, digits, . _ and -")
    return given


HttpUrl = Annotated[str, AfterValidator(_url)]
"""A setting that `read_url` takes."""
UrlPath = Annotated[str, AfterValidator(_path)]
"""A path, or a part of one, without query and fragment."""
Endpoint = Annotated[str, AfterValidator(_endpoint)]
"""An endpoint of a provider's, which may have a query."""
HeaderName = Annotated[str, AfterValidator(_header)]
DefaultHeader = Annotated[HeaderName, AfterValidator(_default_header)]
"""A header that the relay may send of its own accord."""
QueryName = Annotated[str, AfterValidator(_query)]
