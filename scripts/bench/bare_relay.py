"""Run a minimal aiohttp relay, as the baseline of the benchmark. usage: bare_relay.py PORT

It forwards REST and SSE to 127.0.0.1:9000 and WebSockets to 127.0.0.1:9001. It is tuned like the
real relay: uvloop, no decompression, small bodies in one piece, one write for a small response. It
has no checks, no log and no timeouts.
"""

import asyncio
import sys

import uvloop
from aiohttp import ClientSession, ClientTimeout, DummyCookieJar, TCPConnector, WSMsgType, web
from multidict import CIMultiDict
from yarl import URL

HOP = frozenset(
    {
        "host",
        "connection",
        "keep-alive",
        "transfer-encoding",
        "te",
        "upgrade",
        "content-length",
        "authorization",
    }
)
HOP_DOWN = frozenset({"connection", "keep-alive", "transfer-encoding", "te", "upgrade"})
session: ClientSession


async def http(request):
    if request.headers.get("Upgrade"):
        return await websocket(request)
    headers = CIMultiDict([(k, v) for k, v in request.headers.items() if k.lower() not in HOP])
    headers["Authorization"] = "Bearer key"
    data = None
    if request.body_exists:
        n = request.content_length
        data = await request.content.read() if n is not None and n < 65536 else request.content
    url = URL.build(
        scheme="http", host="127.0.0.1", port=9000, path=request.rel_url.raw_path,
        query_string=request.rel_url.raw_query_string, encoded=True,
    )  # fmt: skip
    upstream = await session.request(
        request.method, url, headers=headers, data=data, allow_redirects=False
    )
    try:
        down = CIMultiDict(
            [(k, v) for k, v in upstream.headers.items() if k.lower() not in HOP_DOWN]
        )
        content = upstream.content
        if content.is_eof():
            return web.Response(status=upstream.status, headers=down, body=await content.readany())
        out = web.StreamResponse(status=upstream.status, headers=down)
        await out.prepare(request)
        while chunk := await content.readany():
            await out.write(chunk)
        await out.write_eof()
        return out
    finally:
        upstream.release()


async def pump(source, sink):
    async for message in source:
        if message.type is WSMsgType.TEXT:
            await sink.send_frame(message.data, WSMsgType.TEXT)
        elif message.type is WSMsgType.BINARY:
            await sink.send_bytes(message.data)
    await sink.close(code=source.close_code or 1000)


async def websocket(request):
    downstream = web.WebSocketResponse(decode_text=False, max_msg_size=0, compress=False)
    async with session.ws_connect(
        "http://127.0.0.1:9001/", decode_text=False, max_msg_size=0
    ) as upstream:
        await downstream.prepare(request)
        await asyncio.gather(pump(downstream, upstream), pump(upstream, downstream))
    return downstream


async def main():
    global session
    session = ClientSession(
        connector=TCPConnector(limit=0), auto_decompress=False, cookie_jar=DummyCookieJar(), timeout=ClientTimeout(total=None),
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
    )  # fmt: skip
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", http)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(sys.argv[1])).start()
    await asyncio.Event().wait()


uvloop.run(main())
