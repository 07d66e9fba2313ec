"""web/AIGatewayClient.js: its own tests (web/test/) against a real relay."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import WSMsgType, web

from tests.conftest import StartRelay
from tests.processes import ROOT, output
from tests.relays import packaged_provider, provider
from tests.sdk.test_node import need_packages
from tests.upstream import media, vendors

pytestmark = pytest.mark.programs

WEB = ROOT / "web"


class Scripted:
    """A provider that does what a session's messages say, and reports what arrived."""

    def __init__(self) -> None:
        self.openai: list[Any] = []
        self.drops = False
        self.cancelled = False

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/session", self.session)
        app.router.add_get("/{app:.+}/realtime", self.session)
        app.router.add_get("/cut", self.cut)
        app.router.add_get("/endless", self.endless)
        app.router.add_get("/refuses", self.refuses)
        app.router.add_get("/openai", self.tell_openai)
        app.router.add_get("/cancelled", self.tell_cancelled)
        app.router.add_get("/reset", self.reset)
        return app

    async def session(self, request: web.Request) -> web.StreamResponse:
        if self.drops:
            raise web.HTTPServiceUnavailable
        socket = web.WebSocketResponse(max_msg_size=0)
        await socket.prepare(request)
        async for message in socket:
            asked = json.loads(message.data) if message.type is WSMsgType.TEXT and message.data.startswith("{") else {}
            match asked.get("do"):
                case "close":
                    await socket.close(code=asked["code"], message=asked["reason"].encode())
                case "drop" | "drop always" as what:
                    self.drops = what == "drop always"
                    assert request.transport is not None
                    request.transport.abort()  # type: ignore[attr-defined]
                case "sleep":
                    await asyncio.sleep(asked["ms"] / 1000)
                case "query":
                    await socket.send_json({"query": request.query_string})
                case _ if message.type is WSMsgType.TEXT:
                    await socket.send_str(message.data)
                case _:
                    await socket.send_bytes(message.data)
        return socket

    async def cut(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(b"data: 1\n\ndata: ha")
        await asyncio.sleep(0.05)
        assert request.transport is not None
        request.transport.close()
        return answer

    async def endless(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        try:
            while True:
                await answer.write(b"data: tick\n\n")
                await asyncio.sleep(0.01)
        except (ConnectionError, asyncio.CancelledError):
            self.cancelled = True
            raise

    async def refuses(self, request: web.Request) -> web.StreamResponse:
        raise web.HTTPForbidden

    async def tell_openai(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"messages": self.openai})

    async def tell_cancelled(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"cancelled": self.cancelled})

    async def reset(self, request: web.Request) -> web.StreamResponse:
        self.drops = False
        return web.json_response({})


async def test_it_behaves_against_a_real_relay(start: StartRelay, aiohttp_server: Any) -> None:
    need_packages(WEB)
    script = Scripted()
    scripted = str((await aiohttp_server(script.app())).make_url("/")).rstrip("/")
    openai = vendors.openai()
    servers = {"openai": openai, "google-ai-studio": media.google(), "cartesia": media.cartesia(), "elevenlabs": media.elevenlabs()}
    entries = {name: packaged_provider(name, str((await aiohttp_server(app)).make_url("/")).rstrip("/")) for name, app in servers.items()}
    entries |= {
        "fal": packaged_provider("fal", scripted),
        "scripted": provider(scripted, websocket={"default_path": "session"}),
        "seen": provider(scripted),
        "rest-only": provider(scripted),
        "unset": provider(scripted, "NOT_SET_KEY", websocket={"default_path": "session"}),
    }
    relay = await start({"providers": entries})

    class Live(list):  # type: ignore[type-arg]
        """Gives what the OpenAI stand-in has received to the scripted provider."""

        def append(self, seen: Any) -> None:
            super().append(seen)
            script.openai = seen.messages

    live: Any = Live()
    openai._state[vendors.SEEN] = live
    await output("node_modules/.bin/vitest", "run", cwd=WEB, env={"RELAY_URL": relay.url})
