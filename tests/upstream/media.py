"""The vendors' APIs as far as their SDKs use them: speech, transcription, queues, uploads.

OpenAI and Anthropic are those of vendors.py. Shapes follow the vendors' API references.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

from aiohttp import web

from tests.upstream.vendors import (
    GEMINI_USAGE,
    _sse,
    anthropic,
    google_generate,
    noted,
    openai,
    openai_chat,
    session,
    vendor,
)

AUDIO = bytes(range(256)) * 4
AUDIO_TEXT = base64.b64encode(AUDIO).decode()


async def _audio(request: web.Request) -> web.StreamResponse:
    """Send audio in pieces, with the header in which ElevenLabs reports the cost."""
    await noted(request)
    answer = web.StreamResponse(headers={"Content-Type": "audio/mpeg", "character-cost": "11", "request-id": "el-1"})
    await answer.prepare(request)
    for at in range(0, len(AUDIO), 128):
        await answer.write(AUDIO[at : at + 128])
    return answer


# ElevenLabs -------------------------------------------------------------------------------------


async def elevenlabs_stream_input(request: web.Request) -> web.StreamResponse:
    """Respond to text with audio; an empty text ends the session."""

    async def reply(socket: web.WebSocketResponse, sent: Any) -> None:
        if sent.get("text") == "":
            await socket.send_json({"audio": None, "isFinal": True, "alignment": None})
            await socket.close()
        elif sent.get("text", " ").strip():
            await socket.send_json({"audio": AUDIO_TEXT, "isFinal": None, "alignment": None})

    return await session(request, reply)


async def elevenlabs_scribe(request: web.Request) -> web.StreamResponse:
    async def reply(socket: web.WebSocketResponse, sent: Any) -> None:
        if sent.get("commit"):
            await socket.send_json({"message_type": "committed_transcript", "text": "hello world"})

    return await session(request, reply, {"message_type": "session_started", "session_id": "s1", "config": {}})


async def elevenlabs_signed_url(request: web.Request) -> web.StreamResponse:
    await noted(request)
    agent = request.query["agent_id"]
    url = f"ws://{request.host}/v1/convai/conversation?agent_id={agent}&conversation_signature=cvtkn_1"
    return web.json_response({"signed_url": url})


async def elevenlabs_convai(request: web.Request) -> web.StreamResponse:
    """An agent that speaks first, with the subprotocol `convai`."""

    async def reply(socket: web.WebSocketResponse, sent: Any) -> None:
        """Send no response."""

    meta = {"conversation_id": "conv_1", "agent_output_audio_format": "pcm_16000", "user_input_audio_format": "pcm_16000"}
    started = {"type": "conversation_initiation_metadata", "conversation_initiation_metadata_event": meta}
    greeting = {"type": "agent_response", "agent_response_event": {"agent_response": "Hello there."}}
    return await session(request, reply, started, greeting, protocols=("convai",))


def elevenlabs() -> web.Application:
    return vendor(
        ("POST", "/v1/text-to-speech/{voice}/stream", _audio),
        ("GET", "/v1/text-to-speech/{voice}/stream-input", elevenlabs_stream_input),
        ("GET", "/v1/speech-to-text/realtime", elevenlabs_scribe),
        ("GET", "/v1/convai/conversation/get-signed-url", elevenlabs_signed_url),
        ("GET", "/v1/convai/conversation", elevenlabs_convai),
    )


# Cartesia ---------------------------------------------------------------------------------------


async def cartesia_sse(request: web.Request) -> web.StreamResponse:
    await noted(request)
    common = {"context_id": "c1", "status_code": 206, "step_time": 12.5}
    chunk = common | {"type": "chunk", "data": AUDIO_TEXT, "done": False}
    return await _sse(request, [("chunk", chunk), ("done", common | {"type": "done", "done": True, "status_code": 200})])


async def cartesia_socket(request: web.Request) -> web.StreamResponse:
    async def reply(socket: web.WebSocketResponse, sent: Any) -> None:
        common = {"context_id": sent["context_id"], "status_code": 206, "step_time": 12.5}
        await socket.send_json(common | {"type": "chunk", "data": AUDIO_TEXT, "done": False})
        await socket.send_json(common | {"type": "done", "done": True, "status_code": 200})

    return await session(request, reply)


def cartesia() -> web.Application:
    return vendor(("POST", "/tts/bytes", _audio), ("POST", "/tts/sse", cartesia_sse), ("GET", "/tts/websocket", cartesia_socket))


# fal --------------------------------------------------------------------------------------------


async def fal_run(request: web.Request) -> web.StreamResponse:
    _, sent = await noted(request)
    if request.path.endswith("/stream"):
        return await _sse(request, [(None, {"images": [], "n": n}) for n in range(2)])
    return web.json_response({"images": [{"url": "https://v3.fal.media/files/x.png"}], "prompt": sent.get("prompt")})


async def fal_queue(request: web.Request) -> web.StreamResponse:
    """Serve submit, status, result and cancel, with absolute URLs of this host as fal does."""
    await noted(request)
    app, requests, tail = request.path.partition("/requests/")
    base = f"{request.url.origin()}{app}/requests/r1"
    urls = {"status_url": f"{base}/status", "response_url": base, "cancel_url": f"{base}/cancel"}
    if not requests:
        return web.json_response({"status": "IN_QUEUE", "request_id": "r1", "queue_position": 0} | urls)
    if tail.endswith("/status"):
        return web.json_response({"status": "COMPLETED", "request_id": "r1", "logs": None, "metrics": {"inference_time": 1.5}} | urls)
    return web.json_response({"images": [{"url": "https://v3.fal.media/files/q.png"}]}, headers={"x-fal-billable-units": "2"})


def fal() -> web.Application:
    return vendor(("*", "/{path:.*}", fal_run))


def fal_queue_host() -> web.Application:
    return vendor(("*", "/{path:.*}", fal_queue))


# Deepgram, Groq ---------------------------------------------------------------------------------

_TRANSCRIPT = {"channel": {"alternatives": [{"transcript": "hello world", "confidence": 0.99, "words": []}]}}


async def deepgram_listen(request: web.Request) -> web.StreamResponse:
    if "Upgrade" in request.headers:
        return await deepgram_live(request)
    await noted(request)
    meta = {"request_id": "d1", "created": "2026-11-24T00:00:00Z", "duration": 2.5, "channels": 1, "sha256": "x", "transaction_key": "t", "models": [], "model_info": {}}
    return web.json_response({"metadata": meta, "results": {"channels": [_TRANSCRIPT["channel"]]}})


async def deepgram_live(request: web.Request) -> web.StreamResponse:
    meta = {"request_id": "d1", "model_uuid": "m", "model_info": {"name": "nova", "version": "1", "arch": "nova"}}

    async def reply(socket: web.WebSocketResponse, sent: Any) -> None:
        if isinstance(sent, bytes):
            await socket.send_json({"type": "Results", "channel_index": [0, 1], "duration": 1.25, "start": 0.0, "is_final": True, "metadata": meta} | _TRANSCRIPT)
        elif sent["type"] == "CloseStream":
            await socket.send_json({"type": "Metadata", "transaction_key": "t", "request_id": "d1", "sha256": "x", "created": "2026-11-24T00:00:00Z", "duration": 1.25, "channels": 1})
            await socket.close()

    return await session(request, reply)


def deepgram() -> web.Application:
    return vendor(("*", "/v1/listen", deepgram_listen))


def groq() -> web.Application:
    return vendor(("POST", "/openai/v1/chat/completions", openai_chat))


# Google -----------------------------------------------------------------------------------------


async def google_upload(request: web.Request) -> web.StreamResponse:
    """Serve a resumable upload: the response to `start` names the URL for the bytes."""
    seen, _ = await noted(request)
    command = seen.header("X-Goog-Upload-Command") or ""
    if command == "start":
        url = f"{request.url.origin()}{request.path}?upload_id=up1&upload_protocol=resumable"
        return web.json_response({}, headers={"X-Goog-Upload-URL": url, "X-Goog-Upload-Status": "active", "X-Goog-Upload-Chunk-Granularity": "262144"})
    status = "final" if "finalize" in command else "active"
    file = {"name": "files/abc", "mimeType": "text/plain", "sizeBytes": str(len(seen.body)), "uri": "https://generativelanguage.googleapis.com/v1beta/files/abc", "state": "ACTIVE"}
    return web.json_response({"file": file} if status == "final" else {}, headers={"X-Goog-Upload-Status": status})


async def google_live(request: web.Request) -> web.StreamResponse:
    """Respond to the setup and to each turn, with JSON in binary frames."""

    async def reply(socket: web.WebSocketResponse, sent: Any) -> None:
        if "setup" in sent:
            await socket.send_bytes(b'{"setupComplete": {}}')
            return
        turn = {"modelTurn": {"role": "model", "parts": [{"text": "Hello from Gemini"}]}}
        await socket.send_bytes(json.dumps({"serverContent": turn}).encode())
        await socket.send_bytes(json.dumps({"serverContent": {"turnComplete": True}, "usageMetadata": GEMINI_USAGE}).encode())

    return await session(request, reply)


def google() -> web.Application:
    return vendor(
        ("POST", "/{version}/models/{call}", google_generate),
        ("POST", "/upload/{version}/files", google_upload),
        ("GET", "/ws/{service}", google_live),
    )


SDK_APPS: dict[str, Callable[[], web.Application]] = {
    "openai": openai, "anthropic": anthropic, "google-ai-studio": google, "cartesia": cartesia, "elevenlabs": elevenlabs,
    "fal": fal, "deepgram": deepgram, "groq": groq,
}  # fmt: skip
