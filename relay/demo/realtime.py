"""The demo's Realtime API: OpenAI's GA events over a WebSocket, text or audio, with usage in `response.done`.

Owns: one session's conversation. Outdated shapes are refused as OpenAI refuses them: `response.modalities` is
unknown (it is `output_modalities` now), and the beta header or subprotocol ends the session at once.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import math
import struct
from collections.abc import Iterator
from typing import Any

from aiohttp import WSMsgType, web

SPOKEN = "Hello from the demo provider, live through the relay."
SAMPLE_RATE_HZ = 24_000
_AUDIO_TENTHS = 10
_DELTA_PAUSE_S = 0.03

_RESPONSE_FIELDS = {
    "audio", "conversation", "input", "instructions", "max_output_tokens", "metadata",
    "output_modalities", "prompt", "tool_choice", "tools",
}  # fmt: skip
_SESSION_FIELDS = {
    "type", "audio", "include", "instructions", "max_output_tokens", "model", "output_modalities",
    "prompt", "tool_choice", "tools", "tracing", "truncation",
}  # fmt: skip
_ACCEPTED_QUIETLY = {"input_audio_buffer.append", "input_audio_buffer.clear", "response.cancel"}


def openai_error(
    kind: type[web.HTTPError], message: str, param: str | None = None, code: str | None = None
) -> web.HTTPError:
    """An error in OpenAI's shape."""
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return kind(text=json.dumps({"error": error}), content_type="application/json")


async def realtime(request: web.Request) -> web.StreamResponse:
    """GET /v1/realtime?model=…, upgraded."""
    if not request.query.get("model"):
        raise openai_error(web.HTTPBadRequest, "you must provide a model parameter", "model")
    socket = web.WebSocketResponse(protocols=("realtime",), max_msg_size=32 * 1024 * 1024)
    await socket.prepare(request)
    await _Conversation(socket, request.query["model"]).hold(request)
    return socket


class _Conversation:
    """Answers one client's events in order."""

    def __init__(self, socket: web.WebSocketResponse, model: str) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._session: dict[str, Any] = {
            "type": "realtime", "object": "realtime.session", "id": "sess_demo", "model": model,
            "output_modalities": ["audio"], "instructions": "", "tools": [], "tool_choice": "auto",
        }  # fmt: skip

    async def hold(self, request: web.Request) -> None:
        """Answer until the client leaves."""
        offered = request.headers.get("Sec-WebSocket-Protocol", "")
        if "OpenAI-Beta" in request.headers or "openai-beta." in offered:
            message = "The Realtime Beta API is no longer supported. Please use the GA API."
            await self._error(message, "beta_api_shape_disabled", None)
            reason = b"invalid_request_error.beta_api_shape_disabled"
            await self._socket.close(code=4000, message=reason)
            return
        await self._send("session.created", session=self._session)
        async for frame in self._socket:
            if frame.type is not WSMsgType.TEXT:
                await self._error("Binary frames are not taken.", "invalid_event", None)
                continue
            try:
                event = json.loads(frame.data)
                kind = event["type"]
            except (ValueError, TypeError, KeyError):
                await self._error("The event is not JSON with a 'type'.", "invalid_json", None)
                continue
            await self._answer(kind, event)

    async def _answer(self, kind: str, event: dict[str, Any]) -> None:
        if kind == "session.update":
            await self._update(event)
        elif kind == "response.create":
            await self._respond(event)
        elif kind == "conversation.item.create":
            item = event.get("item", {})
            item = item | {"id": item.get("id") or self._id("item")}
            await self._send("conversation.item.added", item=item, previous_item_id=None)
            await self._send("conversation.item.done", item=item, previous_item_id=None)
        elif kind == "input_audio_buffer.commit":
            ids = {"item_id": self._id("item"), "previous_item_id": None}
            await self._send("input_audio_buffer.committed", **ids)
        elif kind not in _ACCEPTED_QUIETLY:
            await self._error(f"Invalid value: '{kind}'.", "invalid_value", "type", event)

    async def _update(self, event: dict[str, Any]) -> None:
        asked = event.get("session", {})
        if "type" not in asked:
            message = "Missing required parameter: 'session.type'."
            await self._error(message, "missing_required_parameter", "session.type", event)
        elif unknown := sorted(set(asked) - _SESSION_FIELDS):
            await self._unknown(f"session.{unknown[0]}", event)
        else:
            self._session |= asked
            await self._send("session.updated", session=self._session)

    async def _respond(self, event: dict[str, Any]) -> None:
        asked = event.get("response") or {}
        if unknown := sorted(set(asked) - _RESPONSE_FIELDS):
            await self._unknown(f"response.{unknown[0]}", event)
            return
        modalities = asked.get("output_modalities") or self._session["output_modalities"]
        response_id = self._id("resp")
        response = {"object": "realtime.response", "id": response_id, "output_modalities": modalities}
        item = {"id": self._id("item"), "type": "message", "role": "assistant"}
        begun = response | {"status": "in_progress", "output": []}
        await self._send("response.created", response=begun)
        at = {"response_id": response_id, "output_index": 0}
        await self._send("response.output_item.added", item=item, **at)
        is_text = "text" in modalities
        for kind, fields in _text() if is_text else _audio():
            await self._send(kind, **fields, **at, item_id=item["id"], content_index=0)
            await asyncio.sleep(_DELTA_PAUSE_S)
        await self._send("response.output_item.done", item=item, **at)
        done = response | {"status": "completed", "status_details": None, "output": [item]}
        usage = _usage(0 if is_text else _AUDIO_TENTHS)
        await self._send("response.done", response=done | {"usage": usage})

    async def _unknown(self, param: str, event: dict[str, Any]) -> None:
        await self._error(f"Unknown parameter: '{param}'.", "unknown_parameter", param, event)

    async def _error(
        self, message: str, code: str, param: str | None, event: dict[str, Any] | None = None
    ) -> None:
        error = {"type": "invalid_request_error", "code": code, "message": message, "param": param}
        await self._send("error", error=error | {"event_id": (event or {}).get("event_id")})

    async def _send(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, "event_id": self._id("event"), **fields}
        await self._socket.send_str(json.dumps(event))

    def _id(self, prefix: str) -> str:
        return f"{prefix}_demo{next(self._ids)}"


def _text() -> Iterator[tuple[str, dict[str, Any]]]:
    for piece in SPOKEN.split(" "):
        yield "response.output_text.delta", {"delta": f"{piece} "}
    yield "response.output_text.done", {"text": SPOKEN}


def _audio() -> Iterator[tuple[str, dict[str, Any]]]:
    for tenth, piece in zip(range(_AUDIO_TENTHS), SPOKEN.split(" "), strict=False):
        yield "response.output_audio_transcript.delta", {"delta": f"{piece} "}
        yield "response.output_audio.delta", {"delta": base64.b64encode(tone(tenth)).decode()}
    yield "response.output_audio.done", {}
    yield "response.output_audio_transcript.done", {"transcript": SPOKEN}


def tone(tenth: int) -> bytes:
    """The `tenth`th tenth of a second of a 440 Hz tone, 24 kHz, 16 bit, little-endian."""
    count = SAMPLE_RATE_HZ // 10
    step = 2 * math.pi * 440 / SAMPLE_RATE_HZ
    samples = (int(8000 * math.sin((tenth * count + at) * step)) for at in range(count))
    return struct.pack(f"<{count}h", *samples)


def _usage(audio: int) -> dict[str, Any]:
    words = len(SPOKEN.split(" "))
    return {
        "total_tokens": 12 + words + audio, "input_tokens": 12, "output_tokens": words + audio,
        "input_token_details": {
            "text_tokens": 12, "audio_tokens": 0, "image_tokens": 0, "cached_tokens": 0,
            "cached_tokens_details": {"text_tokens": 0, "audio_tokens": 0, "image_tokens": 0},
        },
        "output_token_details": {"text_tokens": words, "audio_tokens": audio},
    }  # fmt: skip
