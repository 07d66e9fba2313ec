"""The built-in provider `demo`: OpenAI's API on loopback, so that the first call needs no key and
no network.

Owns chat completions (JSON, and SSE with usage), Responses, embeddings, models, and speech as raw
PCM. The Realtime API is in demo/realtime.py. The demo gives everyone the same answer, counts words
as tokens, and refuses unknown or outdated fields with OpenAI's errors, so that a call that works
here has the right shape for OpenAI.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import math
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Set
from typing import Any, NoReturn

from aiohttp import web

from relay.demo.audio import tone
from relay.demo.realtime import openai_error, realtime
from relay.demo.texts import REPLY, pieces

WORDS_PER_S = 25.0
MODELS = ("demo-chat", "demo-embedding", "demo-speech", "demo-realtime")

_CHAT_FIELDS = {
    "audio", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs",
    "max_completion_tokens", "max_tokens", "messages", "metadata", "modalities", "model", "n",
    "parallel_tool_calls", "prediction", "presence_penalty", "prompt_cache_key",
    "reasoning_effort", "response_format", "safety_identifier", "seed", "service_tier", "stop",
    "store", "stream", "stream_options", "temperature", "tool_choice", "tools", "top_logprobs",
    "top_p", "user", "verbosity", "web_search_options",
}  # fmt: skip
_RESPONSES_FIELDS = {
    "background", "conversation", "include", "input", "instructions", "max_output_tokens",
    "max_tool_calls", "metadata", "model", "parallel_tool_calls", "previous_response_id", "prompt",
    "prompt_cache_key", "reasoning", "safety_identifier", "service_tier", "store", "stream",
    "stream_options", "temperature", "text", "tool_choice", "tools", "top_logprobs", "top_p",
    "truncation", "user",
}  # fmt: skip
_EMBEDDINGS_FIELDS = {"dimensions", "encoding_format", "input", "model", "user"}
_SPEECH_FIELDS = {
    "input",
    "instructions",
    "model",
    "response_format",
    "speed",
    "stream_format",
    "voice",
}


class Demo:
    """The demo's server: `bind` takes a loopback port, `running` serves requests on it."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}/v1"

    @classmethod
    def bind(cls) -> Demo:
        """Take a free port on loopback; nothing is served yet."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.bind(("127.0.0.1", 0))
        return cls(sock)

    @contextlib.asynccontextmanager
    async def running(self, _app: web.Application | None = None) -> AsyncIterator[None]:
        """Serve while the context lasts; a cleanup context for an aiohttp application."""
        runner = web.AppRunner(
            application(), access_log=None, handler_cancellation=True, shutdown_timeout=0.2
        )
        await runner.setup()
        try:
            await web.SockSite(runner, self.socket).start()
            yield
        finally:
            await runner.cleanup()


def application() -> web.Application:
    """The demo as an aiohttp application, under /v1."""
    app = web.Application(client_max_size=32 * 1024 * 1024)
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_post("/v1/responses", responses)
    app.router.add_post("/v1/embeddings", embeddings)
    app.router.add_post("/v1/audio/speech", speech)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/v1/realtime", realtime)
    app.router.add_route("*", "/{path:.*}", _no_such_path)
    return app


async def chat(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions."""
    fields = await _fields(request, _CHAT_FIELDS, "messages")
    options = fields.get("stream_options") or {}
    if not isinstance(options, dict):
        refusal = "Invalid type for 'stream_options': expected an object."
        raise openai_error(web.HTTPBadRequest, refusal, "stream_options", "invalid_type")
    head = {
        "id": f"chatcmpl-demo{time.time_ns():x}",
        "created": int(time.time()),
        "model": fields["model"],
    }
    usage = _chat_usage(fields["messages"])
    if not fields.get("stream"):
        message = {"role": "assistant", "content": REPLY, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        return web.json_response(
            head | {"object": "chat.completion", "choices": [choice], "usage": usage}
        )
    stream = await _open_sse(request)
    with_usage = options.get("include_usage")
    extra = {"usage": None} if with_usage else {}
    head["object"] = "chat.completion.chunk"
    for delta, finish in _deltas():
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        await _data(stream, head | {"choices": [choice]} | extra)
        await asyncio.sleep(1 / WORDS_PER_S)
    if with_usage:
        await _data(stream, head | {"choices": [], "usage": usage})
    await stream.write(b"data: [DONE]\n\n")
    return stream


def _deltas() -> Iterator[tuple[dict[str, str], str | None]]:
    yield {"role": "assistant", "content": ""}, None
    for word in pieces(REPLY):
        yield {"content": word}, None
    yield {}, "stop"


def _chat_usage(messages: object) -> dict[str, Any]:
    prompt, answer = len(json.dumps(messages).split()), len(pieces(REPLY))
    return {
        "prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }  # fmt: skip


async def responses(request: web.Request) -> web.StreamResponse:
    """POST /v1/responses."""
    fields = await _fields(request, _RESPONSES_FIELDS, "input")
    prompt, answer = len(json.dumps(fields["input"]).split()), len(pieces(REPLY))
    part = {"type": "output_text", "text": REPLY, "annotations": [], "logprobs": []}
    item = {
        "id": "msg_demo",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [part],
    }
    whole: dict[str, Any] = {
        "id": f"resp_demo{time.time_ns():x}", "object": "response", "created_at": int(time.time()),
        "status": "completed", "model": fields["model"], "output": [item], "error": None,
        "incomplete_details": None, "instructions": fields.get("instructions"), "metadata": {},
        "parallel_tool_calls": True, "temperature": 1.0, "tool_choice": "auto", "tools": [], "top_p": 1.0,
        "usage": {
            "input_tokens": prompt, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": answer,
            "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": prompt + answer,
        },
    }  # fmt: skip
    if not fields.get("stream"):
        return web.json_response(whole)
    stream = await _open_sse(request)
    for number, event in enumerate(_response_events(whole, item, part)):
        body = json.dumps(event | {"sequence_number": number})
        await stream.write(f"event: {event['type']}\ndata: {body}\n\n".encode())
        await asyncio.sleep(1 / WORDS_PER_S)
    return stream


def _response_events(
    whole: dict[str, Any], item: dict[str, Any], part: dict[str, Any]
) -> list[dict[str, Any]]:
    started = whole | {"status": "in_progress", "output": [], "usage": None}
    at = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    return [
        {"type": "response.created", "response": started},
        {"type": "response.in_progress", "response": started},
        {"type": "response.output_item.added", "output_index": 0,
         "item": item | {"status": "in_progress", "content": []}},
        {"type": "response.content_part.added", "part": part | {"text": ""}, **at},
        *({"type": "response.output_text.delta", "delta": piece, "logprobs": [], **at} for piece in pieces(REPLY)),
        {"type": "response.output_text.done", "text": REPLY, "logprobs": [], **at},
        {"type": "response.content_part.done", "part": part, **at},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": whole},
    ]  # fmt: skip


async def embeddings(request: web.Request) -> web.StreamResponse:
    """POST /v1/embeddings: eight numbers, which depend on the text alone."""
    fields = await _fields(request, _EMBEDDINGS_FIELDS, "input")
    texts = fields["input"] if isinstance(fields["input"], list) else [fields["input"]]
    data = [
        {"object": "embedding", "index": at, "embedding": _embedding(str(text), fields)}
        for at, text in enumerate(texts)
    ]
    tokens = sum(len(str(text).split()) for text in texts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return web.json_response(
        {"object": "list", "data": data, "model": fields["model"], "usage": usage}
    )


def _embedding(text: str, fields: Mapping[str, Any]) -> list[float] | str:
    seed = sum(text.encode(errors="replace")) or 1
    numbers = [math.sin(seed * (at + 1)) / math.sqrt(8) for at in range(8)]
    if fields.get("encoding_format") != "base64":
        return numbers
    return base64.b64encode(struct.pack("<8f", *numbers)).decode()


async def speech(request: web.Request) -> web.StreamResponse:
    """POST /v1/audio/speech: a tone as raw 16-bit PCM, a tenth of a second at a time."""
    fields = await _fields(request, _SPEECH_FIELDS, "input")
    stream = web.StreamResponse(headers={"Content-Type": "audio/pcm"})
    await stream.prepare(request)
    for tenth in range(max(5, len(str(fields["input"]).split()) * 3)):
        await stream.write(tone(tenth))
        await asyncio.sleep(0.02)
    return stream


async def models(_request: web.Request) -> web.Response:
    """GET /v1/models."""
    data = [{"id": name, "object": "model", "created": 0, "owned_by": "relay"} for name in MODELS]
    return web.json_response({"object": "list", "data": data})


async def _no_such_path(request: web.Request) -> NoReturn:
    raise openai_error(web.HTTPNotFound, f"Invalid URL ({request.method} {request.path})")


async def _fields(request: web.Request, known: Set[str], required: str) -> dict[str, Any]:
    """The JSON object in the request body. Raises OpenAI's HTTP error for a bad one."""
    try:
        fields = await request.json()
    except (ValueError, RecursionError):
        raise openai_error(
            web.HTTPBadRequest, "We could not parse the JSON body of your request."
        ) from None
    if not isinstance(fields, dict):
        raise openai_error(web.HTTPBadRequest, "The JSON body should be an object.")
    if not fields.get("model"):
        raise openai_error(web.HTTPBadRequest, "you must provide a model parameter", "model")
    if unknown := sorted(set(fields) - known):
        message = f"Unknown parameter: '{unknown[0]}'."
        raise openai_error(web.HTTPBadRequest, message, unknown[0], "unknown_parameter")
    if required not in fields:
        message = f"Missing required parameter: '{required}'."
        raise openai_error(web.HTTPBadRequest, message, required, "missing_required_parameter")
    return fields


async def _open_sse(request: web.Request) -> web.StreamResponse:
    headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
    stream = web.StreamResponse(headers=headers)
    await stream.prepare(request)
    return stream


async def _data(stream: web.StreamResponse, event: Mapping[str, Any]) -> None:
    await stream.write(b"data: " + json.dumps(event).encode() + b"\n\n")
