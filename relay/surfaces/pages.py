"""The status page at `/`, for a browser on the relay's own machine: providers, the last calls, the
spend of the day, and a box to try a call.

Owns the page's delivery: to whom, and with which Content-Security-Policy. What the page shows comes
from the management API and the native surface, which have their own checks.
"""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

from aiohttp import web

from relay.surfaces.management import may_see_page
from relay.surfaces.native import unknown_route

_PAGE = Path(__file__).with_name("status.html").read_bytes()


def _hash_of(element: bytes) -> str:
    """The CSP source of the one inline `element` of the page (CSP Level 3, 2.3.1)."""
    [content] = re.findall(rb"<%s>(.*?)</%s>" % (element, element), _PAGE, re.DOTALL)
    return f"'sha256-{b64encode(sha256(content).digest()).decode()}'"


_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hash_of(b'script')}; style-src {_hash_of(b'style')};"
        " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def add_routes(app: web.Application) -> None:
    """Add the page, at the root of the relay's own server."""
    app.router.add_get("/", status_page)


async def status_page(request: web.Request) -> web.Response:
    """The page, for whom management is; 404 for others. HEAD is 200 and empty for everyone: clients
    probe the connection with it (Claude Code does).
    """
    if request.method == "HEAD":
        return web.Response()
    if not may_see_page(request):
        raise unknown_route(request)
    return web.Response(body=_PAGE, content_type="text/html", charset="utf-8", headers=_HEADERS)
