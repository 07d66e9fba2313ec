"""List the private parts of other packages that the relay uses, and check that they exist.

Owns the list of all names with a leading underscore that belong to other packages.
docs/decisions/0006 says why each is needed, which public way was tried and which test covers it.
What a private part does is known only for the version that was tested, so another version of
aiohttp is refused.
"""

from __future__ import annotations

import dis
import pkgutil
from types import FunctionType
from typing import Any

import aiohttp
from aiohttp import http_parser

from relay.core.errors import OperatorError

AIOHTTP_VERSION = "3.14.5"

PRIVATE_PARTS = {
    "aiohttp:BaseConnector": ("_create_connection", "_factory"),
    "aiohttp:ClientRequest": (
        "_get_content_length", "_session", "_skip_auto_headers", "_timer", "_traces", "_writer",
    ),
    "aiohttp:ClientSession": ("_retry_connection",),
    "aiohttp:ClientWebSocketResponse": ("_reader", "_response", "_writer"),
    "aiohttp:StreamReader": ("_read_nowait",),
    "aiohttp:TCPConnector": ("_create_proxy_connection",),
    "aiohttp.client_proto:ResponseHandler": ("_reading_paused",),
    "aiohttp.http_writer": ("_serialize_headers",),
    "aiohttp.http_writer:StreamWriter": ("_headers_buf", "_write"),
    "aiohttp.web:AppRunner": ("_make_server",),
    "aiohttp.web:Request": ("_match_info",),
    "aiohttp.web:Server": ("_kwargs",),
    "aiohttp.web:StreamResponse": (
        "_eof_sent", "_keep_alive", "_must_be_empty_body", "_payload_writer", "_prepare_headers",
        "_req", "_send_headers_immediately", "_write_headers",
    ),
    "aiohttp.web:UrlMappingMatchInfo": ("_apps",),
    "aiohttp.web:WebSocketResponse": ("_reader",),
    "aiohttp.web_protocol:RequestHandler": (
        "_current_request", "_messages", "_parser", "_reading_paused", "_request_count",
        "_task_handler", "_upgraded", "_waiter",
    ),
    "aiohttp_cors:CorsConfig": ("_cors_impl",),
    "aiohttp_cors.cors_config:_CorsConfigImpl": ("_preflight_handler",),
    "prometheus_client:Histogram": ("_buckets", "_sum"),
}  # fmt: skip
"""Private names by the module, or the class in it ("module:Class"), that has them."""


class UnknownLibrary(OperatorError):
    """A package has another version, or another build, than the relay was tested with."""


def check_private_parts() -> None:
    """Raise UnknownLibrary unless aiohttp has the tested version and every private part exists."""
    if aiohttp.__version__ != AIOHTTP_VERSION:
        raise UnknownLibrary(
            f"aiohttp {aiohttp.__version__} is installed, but the relay uses private parts of"
            f" aiohttp and was tested with {AIOHTTP_VERSION}:"
            f" pip install 'aiohttp=={AIOHTTP_VERSION}'"
        )
    for owner, names in PRIVATE_PARTS.items():
        for name in names:
            if not _has(owner, name):
                raise UnknownLibrary(
                    f"{owner.replace(':', '.')} has no {name}, which the relay uses: install the"
                    " package versions that requirements/ lists"
                )


def require_c_parser() -> None:
    """Raise UnknownLibrary if aiohttp uses its parser in Python: most of its request smuggling bugs
    were in that parser.
    """
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise UnknownLibrary(
            "aiohttp runs without its C parser; reinstall it, and unset AIOHTTP_NO_EXTENSIONS"
        )


def _has(owner: str, name: str) -> bool:
    """True if a module or class has the attribute, or if a method of the class sets it."""
    try:
        found: Any = pkgutil.resolve_name(owner)
    except (ImportError, AttributeError):
        return False
    if hasattr(found, name):
        return True
    methods = (each for base in getattr(found, "__mro__", ()) for each in vars(base).values())
    return any(
        step.opname == "STORE_ATTR" and step.argval == name
        for method in methods
        if isinstance(method, FunctionType) and name in method.__code__.co_names
        for step in dis.get_instructions(method)
    )
