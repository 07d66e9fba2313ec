"""The Call that a surface passes to the request paths, and the Caller that is identified once."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from relay.calls.call import Call
from relay.core.exchange import Caller
from relay.gate.access import OpenAccess, Origins
from relay.gate.identify import Callers, Identified, Proxies
from relay.gate.keys import ClientKeys
from relay.surfaces import native
from tests.conftest import StartRelay
from tests.relays import provider
from tests.upstream.raw import CLOSE, SSE_HEAD, RawUpstream, chunk, ok

ROOT = Path(__file__).parent.parent.parent
READS_THE_REQUEST = {"body.py", "response.py"}
"""They read the body's framing, and frame a response by the version and method of the request."""


def change_calls(monkeypatch: pytest.MonkeyPatch, **changed: Any) -> None:
    """Let the native surface make calls that differ from its requests."""
    make = native.Calls._call

    def make_changed(self: native.Calls, request: web.Request) -> Call:
        return msgspec.structs.replace(make(self, request), **changed)

    monkeypatch.setattr(native.Calls, "_call", make_changed)


async def test_a_call_is_sent_as_its_surface_makes_it_whatever_the_request_was(start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    raw.plays(ok(b"{}"))
    relay = await start(openai=provider(raw.url))
    headers = CIMultiDictProxy(CIMultiDict({"Host": "localhost", "X-Changed": "yes", "X-Request-Id": "r-1"}))
    change_calls(monkeypatch, method="PUT", endpoint="real%2Fendpoint", query="q=1", headers=headers, caller=Caller("198.51.100.7"))
    _, response_headers, _ = await relay.call("POST", relay.path("openai", "other?no=1"), data=b"body", headers={"X-Only-Here": "1"})
    arrived = raw.arrived[-1]
    assert arrived.head.startswith(b"PUT /real%2Fendpoint?q=1 ")
    assert (arrived.header("x-changed"), arrived.header("x-only-here"), arrived.body) == (["yes"], [], b"body")
    assert response_headers["x-request-id"] == "r-1"
    assert (await relay.events())[0]["client"] == "198.51.100.7"


async def test_the_surface_chooses_the_format_of_the_relays_own_errors(start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    relay = await start(openai=provider(raw.url))
    change_calls(monkeypatch, error_format="anthropic")
    raw.plays(CLOSE)
    raw.plays(SSE_HEAD, chunk(b"data: 1\n\n"), CLOSE)
    _, _, body = await relay.call("POST", relay.path("openai", "x"), data=b"{}")
    assert json.loads(body)["type"] == "error"
    async with relay.client.post(relay.path("openai", "x"), data=b"{}") as streamed:
        with pytest.raises(Exception, match="payload"):
            async for line in streamed.content:
                body = line if line.startswith(b"data: {") else body
    assert json.loads(body.removeprefix(b"data: "))["type"] == "error"


@pytest.mark.parametrize("transport", ["rest", "websocket"])
async def test_a_caller_is_identified_once_before_anything_is_sent(start: StartRelay, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    calls: list[int] = []
    identify = Callers.identify

    def counted(self: Callers, *arguments: Any) -> Identified:
        calls.append(len(raw.arrived))
        return identify(self, *arguments)

    monkeypatch.setattr(Callers, "identify", counted)
    document = {
        "server": {"trusted_proxies": ["127.0.0.1"]}, "limits": [{"requests": 9, "window_s": 60, "per": "client"}],
        "cache": {"ttl_s": 60, "coalesce": True}, "retries": {"max_attempts": 3, "delay_s": 0.001},
    }  # fmt: skip
    rules = {"websocket": {"default_path": "x"}}
    relay = await start({**document, "providers": {"openai": provider(raw.url, **rules)}})
    raw.plays(ok(b"no", status="503 Service Unavailable"))
    headers = {"X-Forwarded-For": "198.51.100.7"}
    if transport == "rest":
        await relay.call("POST", relay.path("openai", "chat/completions"), data=b'{"model":"m"}', headers=headers)
    else:
        with pytest.raises(Exception, match="503"):
            await relay.client.ws_connect(relay.ws("openai"), headers=headers)
    assert (calls, len(raw.arrived) > 1) == ([0], True)
    assert (await relay.events())[0]["client"] == "198.51.100.7"


def test_below_the_request_paths_only_modules_that_move_bytes_read_the_request() -> None:
    read: dict[str, set[str]] = {}
    for module in (ROOT / "relay/rest.py", ROOT / "relay/websocket.py", *(ROOT / "relay/calls").glob("*.py"), *(ROOT / "relay/sessions").glob("*.py")):
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "request":
                read.setdefault(module.name, set()).add(node.attr)
    others = set().union(*(names for name, names in read.items() if name not in READS_THE_REQUEST))
    assert others == {"writer", "transport"}


def test_the_repr_of_a_call_shows_no_credential() -> None:
    headers = CIMultiDictProxy(CIMultiDict({"Authorization": "Bearer CANARY-client"}))
    call = Call("GET", "openai", "x", "key=CANARY-client", headers, "/providers/", Caller("c"), ("xi-api-key.CANARY-client",))
    assert "CANARY" not in repr(call)


def test_the_public_url_of_a_request_without_host_needs_no_name_lookup() -> None:
    """HTTP/1.0 allows a request without Host."""
    callers = Callers(Proxies([]), OpenAccess([], Origins([])), None, ClientKeys(lambda: 0.0), lambda: 0.0)
    assert callers.public_url(Caller("c", scheme="https"), {}) == "https://localhost"
