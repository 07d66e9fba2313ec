"""Where calls come in: the URL prefixes of all surfaces, for what looks at a request before it is
routed (load shedding, the fast path of server/connection.py).
"""

from __future__ import annotations

from typing import NamedTuple

from aiohttp import web
from aiohttp.web_urldispatcher import ResourceRoute


class CallPrefix(NamedTuple):
    """The path under which a surface has its REST calls."""

    path: str
    """Ends in a slash; the provider's name follows."""
    route: ResourceRoute


CALL_PREFIXES = web.AppKey("call_prefixes", list[CallPrefix])
"""Every surface adds its own."""
