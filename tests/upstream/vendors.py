"""The vendors' APIs as far as the tests use them, with the usage fields that the real ones send.

Every application records the requests that arrive in `app[SEEN]`.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import WSMsgType, web


@dataclass
class Seen:
    """One request as it arrived."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes = b""
    messages: list[Any] = field(default_factory=list)
    close_code: int | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def header(self, name: str) -> str | None:
        """The first value of a header."""
        return next((v for n, v in self.headers if n.lower() == name.lower()), None)

    @property
    def names(self) -> set[str]:
        """Lower-case header names."""
        return {name.lower() for name, _ in self.headers}


SEEN: web.AppKey[list[Seen]] = web.AppKey("seen", list)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

OPENAI_CHAT_USAGE = {
    "prompt_tokens": 19, "completion_tokens": 10, "total_tokens": 29,
    "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
}  # fmt: skip
OPENAI_REALTIME_USAGE = {
    "total_tokens": 253, "input_tokens": 132, "output_tokens": 121,
    "input_token_details": {
        "text_tokens": 119, "audio_tokens": 13, "image_tokens": 0, "cached_tokens": 64,
        "cached_tokens_details": {"text_tokens": 64, "audio_tokens": 0, "image_tokens": 0},
    },
    "output_token_details": {"text_tokens": 30, "audio_tokens": 91},
}  # fmt: skip
GEMINI_USAGE = {"promptTokenCount": 7, "candidatesTokenCount": 5, "thoughtsTokenCount": 4, "totalTokenCount": 16}
WORDS = ("Hel", "lo ", "wör", "ld")


def note(request: web.Request, body: bytes = b"") -> Seen:
    """Record a request."""
    raw = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in request.raw_headers]
    seen = Seen(request.method, request.raw_path, raw, body)
    request.app[SEEN].append(seen)
    return seen


async def noted(request: web.Request) -> tuple[Seen, Any]:
    """Record a request with its body; return the record and the body, parsed if it is JSON."""
    body = await request.read()
    try:
        data = json.loads(body) if body else None
    except ValueError:
        data = None
    return note(request, body), data


def vendor(*routes: tuple[str, str, Handler]) -> web.Application:
    """Return an application with these routes: (method, path, handler)."""
    app = web.Application(client_max_size=2**31)
    app[SEEN] = []
    for method, path, handler in routes:
        app.router.add_route(method, path, handler)
    return app


async def _sse(request: web.Request, events: list[tuple[str | None, Any]], end: bytes = b"\n\n") -> web.StreamResponse:
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream", "x-request-id": "req_upstream"})
    await answer.prepare(request)
    for name, data in events:
        text = data if isinstance(data, str) else json.dumps(data)
        lead = f"event: {name}\n" if name else ""
        await answer.write(f"{lead}data: {text}".encode() + end)
        await asyncio.sleep(0.002)
    return answer


# OpenAI -----------------------------------------------------------------------------------------


async def openai_chat(request: web.Request) -> web.StreamResponse:
    _, sent = await noted(request)
    head = {"id": "chatcmpl-1", "created": 1, "model": sent["model"], "system_fingerprint": None}
    if not sent.get("stream"):
        message = {"role": "assistant", "content": "".join(WORDS), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        body = head | {"object": "chat.completion", "choices": [choice], "usage": OPENAI_CHAT_USAGE}
        return web.json_response(body, headers={"x-request-id": "req_upstream", "openai-version": "2020-10-01"})
    head["object"] = "chat.completion.chunk"
    events: list[tuple[str | None, Any]] = [
        (None, head | {"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]}) for word in WORDS
    ]
    if (sent.get("stream_options") or {}).get("include_usage"):
        events.append((None, head | {"choices": [], "usage": OPENAI_CHAT_USAGE}))
    return await _sse(request, [*events, (None, "[DONE]")])


def _response(model: str, status: str = "completed") -> dict[str, Any]:
    part = {"type": "output_text", "text": "".join(WORDS), "annotations": []}
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    return {
        "id": "resp_1", "object": "response", "created_at": 1, "status": status, "model": model, "output": [item],
        "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "error": None,
        "usage": {
            "input_tokens": 36, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 87,
            "output_tokens_details": {"reasoning_tokens": 11}, "total_tokens": 123,
        },
    }  # fmt: skip


def _response_events(model: str) -> list[dict[str, Any]]:
    at = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "logprobs": []}
    events = [
        {"type": "response.created", "response": _response(model, "in_progress") | {"usage": None, "output": []}},
        *({"type": "response.output_text.delta", "delta": word, **at} for word in WORDS),
        {"type": "response.completed", "response": _response(model)},
    ]
    return [event | {"sequence_number": number} for number, event in enumerate(events)]


async def openai_responses(request: web.Request) -> web.StreamResponse:
    if request.headers.get("Upgrade", "").lower() == "websocket":
        return await openai_responses_socket(request)
    _, sent = await noted(request)
    if not sent.get("stream"):
        return web.json_response(_response(sent["model"]))
    return await _sse(request, [(event["type"], event) for event in _response_events(sent["model"])])


async def openai_embeddings(request: web.Request) -> web.StreamResponse:
    _, sent = await noted(request)
    vector: Any = [0.25, -0.5]
    if sent.get("encoding_format") == "base64":
        vector = base64.b64encode(bytes.fromhex("0000803e000000bf")).decode()
    data = [{"object": "embedding", "index": 0, "embedding": vector}]
    usage = {"prompt_tokens": 8, "total_tokens": 8}
    return web.json_response({"object": "list", "data": data, "model": sent["model"], "usage": usage})


async def openai_files(request: web.Request) -> web.StreamResponse:
    body = await request.read()
    note(request, body)
    answer = {"id": "file-1", "object": "file", "bytes": len(body), "created_at": 1, "filename": "f", "purpose": "batch", "status": "processed"}
    return web.json_response(answer)


async def openai_models(request: web.Request) -> web.StreamResponse:
    note(request)
    return web.json_response({"object": "list", "data": [{"id": "gpt-5", "object": "model", "created": 1, "owned_by": "openai"}]})


async def openai_speech(request: web.Request) -> web.StreamResponse:
    await noted(request)
    answer = web.StreamResponse(headers={"Content-Type": "audio/mpeg"})
    await answer.prepare(request)
    for _ in range(8):
        await answer.write(bytes(range(256)) * 8)
    return answer


async def openai_realtime(request: web.Request) -> web.StreamResponse:
    """Respond with events of the GA API; the session ends when the client closes it."""
    seen = note(request)
    socket = web.WebSocketResponse(protocols=("realtime",), max_msg_size=0)
    await socket.prepare(request)
    model = request.query.get("model", "")
    session = {"type": "realtime", "object": "realtime.session", "id": "sess_1", "model": model}
    await socket.send_json({"type": "session.created", "event_id": "e1", "session": session})
    async for message in socket:
        if message.type is not WSMsgType.TEXT:
            break
        event = json.loads(message.data)
        seen.messages.append(event)
        if event["type"] == "response.create":
            for word in WORDS:
                await socket.send_json({"type": "response.output_text.delta", "event_id": "e2", "delta": word, "response_id": "r", "item_id": "i", "output_index": 0, "content_index": 0})
            done = {"object": "realtime.response", "id": "r", "status": "completed", "output": [], "usage": OPENAI_REALTIME_USAGE}
            await socket.send_json({"type": "response.done", "event_id": "e3", "response": done})
    seen.close_code = socket.close_code
    seen.ended.set()
    return socket


Reply = Callable[[web.WebSocketResponse, Any], Awaitable[None]]


async def session(request: web.Request, reply: Reply, *greetings: Any, protocols: tuple[str, ...] = ()) -> web.WebSocketResponse:
    """Serve a socket that responds to each message with `reply`.

    JSON is parsed, other data is passed as it is; `seen.messages` records both.
    """
    seen = note(request)
    socket = web.WebSocketResponse(protocols=protocols)
    await socket.prepare(request)
    for greeting in greetings:
        await socket.send_json(greeting)
    async for message in socket:
        try:
            sent = json.loads(message.data)
        except ValueError:
            sent = message.data
        seen.messages.append(sent)
        await reply(socket, sent)
    seen.ended.set()
    return socket


async def openai_responses_socket(request: web.Request) -> web.StreamResponse:
    async def reply(socket: web.WebSocketResponse, sent: Any) -> None:
        for answer in _response_events("gpt-5"):
            await socket.send_json(answer)

    return await session(request, reply)


def openai() -> web.Application:
    """OpenAI under /v1 and at the root, where REST calls and sockets through Cloudflare arrive."""
    routes = [
        ("POST", "chat/completions", openai_chat), ("*", "responses", openai_responses),
        ("POST", "embeddings", openai_embeddings), ("POST", "files", openai_files),
        ("GET", "models", openai_models), ("POST", "audio/speech", openai_speech),
        ("GET", "realtime", openai_realtime),
    ]  # fmt: skip
    return vendor(
        *((method, f"{base}/{path}", handler) for base in ("/v1", "") for method, path, handler in routes),
        ("GET", "/", openai_realtime),
        ("GET", "/realtime/echo", echo), ("GET", "/v1/realtime/echo", echo),
    )


# Other vendors


async def anthropic_messages(request: web.Request) -> web.StreamResponse:
    _, sent = await noted(request)
    usage = {"input_tokens": 12, "output_tokens": 1, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": sent["model"], "content": [], "stop_reason": None, "usage": usage}
    if not sent.get("stream"):
        return web.json_response(message | {"content": [{"type": "text", "text": "Hi"}], "stop_reason": "end_turn"})
    delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}}
    return await _sse(
        request,
        [
            ("message_start", {"type": "message_start", "message": message}),
            ("content_block_start", {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}),
            ("ping", {"type": "ping"}),
            ("content_block_delta", delta),
            ("content_block_stop", {"type": "content_block_stop", "index": 0}),
            ("message_delta", {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 6}}),
            ("message_stop", {"type": "message_stop"}),
        ],
    )


def anthropic() -> web.Application:
    return vendor(("POST", "/v1/messages", anthropic_messages))


async def google_generate(request: web.Request) -> web.StreamResponse:
    await noted(request)
    part = {"candidates": [{"content": {"role": "model", "parts": [{"text": "Hi"}]}}], "usageMetadata": GEMINI_USAGE, "modelVersion": "gemini-2.5-flash"}
    if "streamGenerateContent" in request.path:
        return await _sse(request, [(None, part), (None, part)], end=b"\r\n\r\n")
    return web.json_response(part)


async def google_live(request: web.Request) -> web.StreamResponse:
    """Respond with JSON in binary frames, as Gemini Live does."""
    seen = note(request)
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async for message in socket:
        seen.messages.append(message.data)
        usage = {"promptTokenCount": 9, "responseTokenCount": 21, "totalTokenCount": 30}
        await socket.send_bytes(json.dumps({"setupComplete": {}, "usageMetadata": usage}).encode())
    seen.ended.set()
    return socket


def google() -> web.Application:
    return vendor(
        ("POST", "/{version}/models/{call}", google_generate),
        ("GET", "/ws/{service}", google_live),
        ("GET", "/", google_live),
    )


async def bytes_out(request: web.Request) -> web.StreamResponse:
    await noted(request)
    return web.Response(body=bytes(range(256)) * 4, headers={"Content-Type": "audio/mpeg", "character-cost": "11"})


async def json_out(request: web.Request) -> web.StreamResponse:
    await noted(request)
    return web.json_response({"ok": True})


async def echo(request: web.Request) -> web.StreamResponse:
    """Send every message back, and close with the code that arrived."""
    seen = note(request)
    offered = [p.strip() for p in request.headers.get("Sec-WebSocket-Protocol", "").split(",") if p]
    socket = web.WebSocketResponse(protocols=offered[:1], max_msg_size=0, autoclose=False, compress=False)
    await socket.prepare(request)
    while True:
        message = await socket.receive()
        if message.type is WSMsgType.TEXT:
            seen.messages.append(message.data)
            await socket.send_str(message.data)
        elif message.type is WSMsgType.BINARY:
            seen.messages.append(message.data)
            await socket.send_bytes(message.data)
        else:
            break
    seen.close_code = message.data if message.type is WSMsgType.CLOSE else 1006
    seen.messages.append(message.extra)
    seen.ended.set()
    await socket.close(code=seen.close_code if seen.close_code not in (0, None, 1006) else 1000)
    return socket


def cartesia() -> web.Application:
    return vendor(("POST", "/tts/bytes", bytes_out), ("GET", "/tts/websocket", echo), ("GET", "/", echo))


def elevenlabs() -> web.Application:
    return vendor(
        ("POST", "/v1/text-to-speech/{voice}", bytes_out), ("GET", "/v1/convai/conversation", echo),
        ("GET", "/v1/text-to-speech/{voice}/stream-input", echo), ("GET", "/", echo),
    )  # fmt: skip


def fal() -> web.Application:
    return vendor(("*", "/{path:.*}", _either))


async def _either(request: web.Request) -> web.StreamResponse:
    return await (echo if "Upgrade" in request.headers else json_out)(request)


APPS: dict[str, Callable[[], web.Application]] = {
    "openai": openai, "anthropic": anthropic, "google-ai-studio": google, "cartesia": cartesia,
    "elevenlabs": elevenlabs, "fal": fal,
}  # fmt: skip
