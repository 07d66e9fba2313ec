"""web/AIGatewayClient.js: run its tests (web/test/) with a real relay."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType, web

from tests.conftest import StartRelay
from tests.processes import ROOT, output
from tests.relays import CLIENT_KEY, packaged_provider, provider
from tests.sdk.test_node import need_packages
from tests.upstream import media, vendors

pytestmark = pytest.mark.programs

WEB = ROOT / "web"


class Scripted:
    """A provider that executes commands in the messages of a session and reports what it got."""

    def __init__(self) -> None:
        self.openai: list[Any] = []
        self.drops = False
        self.cancelled = False
        self.tickets = ""

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/session", self.session)
        app.router.add_get("/{app:.+}/realtime", self.session)
        app.router.add_get("/cut", self.cut)
        app.router.add_get("/endless", self.endless)
        app.router.add_get("/refuses", self.refuses)
        app.router.add_get("/openai", self.report_openai)
        app.router.add_get("/cancelled", self.report_cancelled)
        app.router.add_get("/reset", self.reset)
        app.router.add_post("/ticket", self.ticket)
        return app

    async def session(self, request: web.Request) -> web.StreamResponse:
        if self.drops:
            raise web.HTTPServiceUnavailable
        socket = web.WebSocketResponse(max_msg_size=0)
        await socket.prepare(request)
        async for message in socket:
            command = json.loads(message.data) if message.type is WSMsgType.TEXT and message.data.startswith("{") else {}
            match command.get("do"):
                case "close":
                    await socket.close(code=command["code"], message=command["reason"].encode())
                case "drop" | "drop always" as what:
                    self.drops = what == "drop always"
                    assert request.transport is not None
                    request.transport.abort()  # type: ignore[attr-defined]
                case "sleep":
                    await asyncio.sleep(command["ms"] / 1000)
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

    async def report_openai(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"messages": self.openai})

    async def report_cancelled(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"cancelled": self.cancelled})

    async def ticket(self, request: web.Request) -> web.StreamResponse:
        """The backend of an app: it gets a ticket for the provider in the query, or refuses."""
        if status := request.query.get("status"):
            return web.Response(status=int(status))
        headers, wanted = {"Authorization": f"Bearer {CLIENT_KEY}"}, {"provider": request.query["provider"]}
        async with aiohttp.ClientSession() as session, session.post(self.tickets, json=wanted, headers=headers) as answer:
            return web.json_response(await answer.json())

    async def reset(self, request: web.Request) -> web.StreamResponse:
        self.drops = False
        return web.json_response({})


async def test_the_tests_of_the_client_pass_with_a_real_relay(start: StartRelay, aiohttp_server: Any, sqlite_setting: str) -> None:
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
    clients = {"web": {"key": CLIENT_KEY, "origins": "https://app.example"}}
    relay = await start({"providers": entries, "clients": clients, "database": sqlite_setting})
    script.tickets = f"{relay.url}/api/v1/ai-gateway/tickets"

    class Live(list):  # type: ignore[type-arg]
        """Passes the messages that the OpenAI stand-in receives to the scripted provider."""

        def append(self, seen: Any) -> None:
            super().append(seen)
            script.openai = seen.messages

    live: Any = Live()
    openai._state[vendors.SEEN] = live
    await output("node_modules/.bin/vitest", "run", cwd=WEB, env={"RELAY_URL": relay.url, "BACKEND_URL": scripted})
