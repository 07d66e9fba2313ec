"""Cloudflare's gateway as the relay meets it: its URLs, its own 401, its headers.

Stand-in vendors are behind it.
"""

from __future__ import annotations

import asyncio
import io

from aiohttp import ClientSession, web

from tests.upstream.vendors import SEEN, note

UNAUTHORIZED = {
    "success": False, "result": [], "messages": [], "error": [{"code": 2009, "message": "Unauthorized"}],
    "name": "AiGatewayError", "httpCode": 401, "internalCode": 2009,
}  # fmt: skip
_SLUGS = {"google": "google-ai-studio"}


def cloudflare(vendors: dict[str, str], token: str) -> web.Application:
    """Serve `/v1/{account}/{gateway}/{slug}/…` in front of vendors, given as slug to base URL."""
    app = web.Application(client_max_size=2**31)
    app[SEEN] = []

    async def front(request: web.Request) -> web.StreamResponse:
        body = b"" if "Upgrade" in request.headers else await request.read()
        note(request, body)
        if request.headers.get("cf-aig-authorization") != f"Bearer {token}":
            return web.json_response(UNAUTHORIZED, status=401)
        slug = request.match_info["slug"]
        url = f"{vendors[_SLUGS.get(slug, slug)]}/{request.match_info.get('tail', '')}"
        url += f"?{request.rel_url.raw_query_string}" if request.rel_url.raw_query_string else ""
        forwarded = {k: v for k, v in request.headers.items() if not k.lower().startswith(("cf-aig-", "host", "sec-web", "connection", "upgrade", "content-length", "transfer-"))}
        async with ClientSession() as session:
            if "Upgrade" in request.headers:
                return await _socket(request, session, url, forwarded)
            async with session.request(request.method, url, headers=forwarded, data=io.BytesIO(body)) as answer:
                return await _copy(request, answer)

    app.router.add_route("*", "/v1/{account}/{gateway}/{slug}", front)
    app.router.add_route("*", "/v1/{account}/{gateway}/{slug}/{tail:.*}", front)
    return app


async def _copy(request: web.Request, answer: object) -> web.StreamResponse:
    out = web.StreamResponse(status=answer.status, headers={  # type: ignore[attr-defined]
        "Content-Type": answer.headers["Content-Type"],  # type: ignore[attr-defined]
        "cf-aig-cache-status": "MISS", "cf-aig-log-id": "01cloudflare", "cf-aig-step": "0",
    })  # fmt: skip
    await out.prepare(request)
    async for chunk in answer.content.iter_any():  # type: ignore[attr-defined]
        await out.write(chunk)
    return out


async def _socket(request: web.Request, session: ClientSession, url: str, headers: dict[str, str]) -> web.StreamResponse:
    """Relay messages until either side closes; good enough for tests, not for measurements."""
    offered = [p.strip() for p in request.headers.get("Sec-WebSocket-Protocol", "").split(",") if p]
    async with session.ws_connect(url, headers=headers, protocols=offered) as upstream:
        socket = web.WebSocketResponse(protocols=[upstream.protocol] if upstream.protocol else ())
        await socket.prepare(request)

        async def pump(source: object, sink: object) -> None:
            async for message in source:  # type: ignore[attr-defined]
                await (sink.send_str if isinstance(message.data, str) else sink.send_bytes)(message.data)  # type: ignore[attr-defined]
            await sink.close(code=source.close_code or 1000)  # type: ignore[attr-defined]

        await asyncio.gather(pump(socket, upstream), pump(upstream, socket))
    return socket
