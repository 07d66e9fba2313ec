"""The demo's Realtime API: OpenAI's GA events over a WebSocket, in text, audio and function calls.

Owns one session: its settings, and which events answer an event of the client.
demo/conversation.py has the items, demo/realtime_response.py the events of a response, and
demo/audio.py the audio. Shapes of the beta are refused as OpenAI refuses them:
`response.modalities` is an unknown parameter (it is `output_modalities` now), and the beta header
or subprotocol ends the session at once.

https://platform.openai.com/docs/api-reference/realtime-client-events
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
from aiohttp import WSMessage, WSMsgType, web

from relay.core.fields import UNREADABLE
from relay.demo.audio import SAMPLE_RATE_HZ, InputAudio
from relay.demo.conversation import (
    Conversation,
    Refusal,
    checked_item,
    content_after,
    invalid,
    missing,
)
from relay.demo.realtime_response import Event, Response, ResponseSettings

_DELTA_PAUSE_S = 0.03
_SESSION_S = 3600
_SILENCE_MS = 500
_MIN_COMMIT_MS = 100
_MAX_DEPTH = 100
"""Events within it can be encoded again, by Python's encoder too, which has less stack."""

RESPONSE_FIELDS = {
    "audio", "conversation", "input", "instructions", "max_output_tokens", "metadata",
    "output_modalities", "parallel_tool_calls", "prompt", "reasoning", "tool_choice", "tools",
}  # fmt: skip
SESSION_FIELDS = {
    "type", "audio", "include", "instructions", "max_output_tokens", "model", "output_modalities",
    "parallel_tool_calls", "prompt", "reasoning", "tool_choice", "tools", "tracing", "truncation",
}  # fmt: skip
_NULLABLE = {"include", "noise_reduction", "prompt", "tracing", "transcription", "turn_detection"}


def openai_error(
    kind: type[web.HTTPError], message: str, param: str | None = None, code: str | None = None
) -> web.HTTPError:
    """An HTTP error in OpenAI's shape."""
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return kind(text=json.dumps({"error": error}), content_type="application/json")


async def realtime(request: web.Request) -> web.StreamResponse:
    """GET /v1/realtime?model=…, upgraded to a WebSocket."""
    if not request.query.get("model"):
        raise openai_error(web.HTTPBadRequest, "you must provide a model parameter", "model")
    socket = web.WebSocketResponse(protocols=("realtime",), max_msg_size=32 * 1024 * 1024)
    await socket.prepare(request)
    offered = request.headers.get("Sec-WebSocket-Protocol", "")
    session = _Session(socket, request.query["model"])
    if "OpenAI-Beta" in request.headers or "openai-beta." in offered:
        await session.refuse_beta()
    else:
        await session.serve()
    return socket


class _Session:
    """One WebSocket: answers the client's events in order, and paces one response beside them."""

    def __init__(self, socket: web.WebSocketResponse, model: str) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._settings = _default_settings(model)
        self._conversation = Conversation()
        self._input = InputAudio()
        self._speech_item_id = ""
        self._response: Response | None = None
        self._next_delta_s = 0.0
        self._handlers: dict[str, Callable[[dict[str, Any]], Awaitable[None]]] = {
            "session.update": self._update_session,
            "conversation.item.create": self._create_item,
            "conversation.item.retrieve": self._retrieve_item,
            "conversation.item.truncate": self._truncate_item,
            "conversation.item.delete": self._delete_item,
            "input_audio_buffer.append": self._append_audio,
            "input_audio_buffer.commit": self._commit_audio,
            "input_audio_buffer.clear": self._clear_audio,
            "response.create": self._create_response,
            "response.cancel": self._cancel_response,
        }

    async def refuse_beta(self) -> None:
        """End the session of a client that asks for the beta."""
        message = "The Realtime Beta API is no longer supported. Please use the GA API."
        await self._send_error(Refusal(message, "beta_api_shape_disabled"), None)
        reason = b"invalid_request_error.beta_api_shape_disabled"
        await self._socket.close(code=4000, message=reason)

    async def serve(self) -> None:
        """Answer events until the client leaves."""
        await self._send("session.created", session=self._settings)
        while True:
            frame = await self._next_frame()
            if frame.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
                return
            event: dict[str, Any] = {}
            try:
                event = _parse(frame)
                kind = event["type"]
                if kind not in self._handlers:
                    raise Refusal(f"Invalid value: '{kind[:80]}'.", "invalid_value", "type")
                await self._handlers[kind](event)
            except Refusal as refusal:
                await self._send_error(refusal, event.get("event_id"))

    async def _next_frame(self) -> WSMessage:
        """The next frame of the client. Until it comes, the deltas of the response are sent."""
        loop = asyncio.get_running_loop()
        while True:
            if self._response is None:
                return await self._socket.receive()
            if loop.time() >= self._next_delta_s:
                await self._send_delta()
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._next_delta_s):
                    return await self._socket.receive()

    async def _update_session(self, event: dict[str, Any]) -> None:
        changes = _given(_object(event, "session"))
        if "type" not in changes:
            raise missing("session.type")
        _refuse_unknown(changes, SESSION_FIELDS, "session")
        if "output_modalities" in changes:
            _modality(changes["output_modalities"], "session.output_modalities")
        if "audio" in changes:
            changes["audio"] = _merged_audio(self._settings["audio"], changes["audio"])
        self._settings |= changes
        await self._send("session.updated", session=self._settings)

    async def _create_item(self, event: dict[str, Any]) -> None:
        item = checked_item(_object(event, "item"))
        item_id = item.get("id")
        item |= {
            "id": item_id if isinstance(item_id, str) and item_id else self._id("item"),
            "object": "realtime.item", "status": "completed",
        }  # fmt: skip
        await self._add_item(item)

    async def _retrieve_item(self, event: dict[str, Any]) -> None:
        item = self._conversation.find(event.get("item_id"))
        await self._send("conversation.item.retrieved", item=item)

    async def _delete_item(self, event: dict[str, Any]) -> None:
        item_id = self._conversation.delete(event.get("item_id"))
        await self._send("conversation.item.deleted", item_id=item_id)

    async def _truncate_item(self, event: dict[str, Any]) -> None:
        item = self._conversation.find(event.get("item_id"))
        end_ms, index = event.get("audio_end_ms"), event.get("content_index")
        if not isinstance(end_ms, int):
            raise missing("audio_end_ms")
        if not isinstance(index, int):
            raise missing("content_index")
        fields = {"item_id": item["id"], "content_index": index, "audio_end_ms": end_ms}
        await self._send("conversation.item.truncated", **fields)

    async def _append_audio(self, event: dict[str, Any]) -> None:
        try:
            pcm = base64.b64decode(event.get("audio", ""), validate=True)
        except (ValueError, TypeError):
            message = "Invalid 'audio'. Expected base64-encoded audio bytes."
            raise Refusal(message, "invalid_value", "audio") from None
        detection = self._settings["audio"]["input"]["turn_detection"]
        if detection is None:
            self._input.append(pcm)
            return
        silence_ms = detection.get("silence_duration_ms")
        if not isinstance(silence_ms, int):
            silence_ms = _SILENCE_MS
        for kind, at_ms in self._input.detect_speech(pcm, silence_ms):
            await asyncio.sleep(0)  # one append may have thousands of edges
            if kind == "started":
                self._speech_item_id = self._id("item")
                fields = {"audio_start_ms": at_ms, "item_id": self._speech_item_id}
                await self._send("input_audio_buffer.speech_started", **fields)
                if detection.get("interrupt_response") is not False:
                    await self._end_response("turn_detected")
            else:
                fields = {"audio_end_ms": at_ms, "item_id": self._speech_item_id}
                await self._send("input_audio_buffer.speech_stopped", **fields)
                await self._commit(self._speech_item_id)
                if detection.get("create_response") is not False and self._response is None:
                    await self._respond({})

    async def _commit_audio(self, _event: dict[str, Any]) -> None:
        if self._input.buffered_ms < _MIN_COMMIT_MS:
            message = (
                "Error committing input audio buffer: buffer too small. Expected at least"
                f" {_MIN_COMMIT_MS}ms of audio, but buffer only has {self._input.buffered_ms}ms."
            )
            raise Refusal(message, "input_audio_buffer_commit_empty")
        await self._commit(self._id("item"))

    async def _commit(self, item_id: str) -> None:
        seconds = self._input.buffered_ms / 1000
        self._input.clear()
        ids = {"item_id": item_id, "previous_item_id": self._conversation.last_id}
        await self._send("input_audio_buffer.committed", **ids)
        part = {"type": "input_audio", "transcript": None}
        item = {
            "id": item_id, "object": "realtime.item", "type": "message", "status": "completed",
            "role": "user", "content": [part],
        }  # fmt: skip
        await self._add_item(item)
        if self._settings["audio"]["input"]["transcription"] is not None:
            part["transcript"] = f"({seconds:.1f} s of audio)"
            await self._send(
                "conversation.item.input_audio_transcription.completed",
                item_id=item_id, content_index=0, transcript=part["transcript"],
                usage={"type": "duration", "seconds": seconds},
            )  # fmt: skip

    async def _clear_audio(self, _event: dict[str, Any]) -> None:
        self._input.clear()
        await self._send("input_audio_buffer.cleared")

    async def _create_response(self, event: dict[str, Any]) -> None:
        if self._response is not None:
            message = (
                "Conversation already has an active response in progress: "
                f"{self._response.id}. Wait until the response is finished before creating a new one."
            )
            raise Refusal(message, "conversation_already_has_active_response")
        options = {} if event.get("response") is None else _given(_object(event, "response"))
        _refuse_unknown(options, RESPONSE_FIELDS, "response")
        await self._respond(options)

    async def _respond(self, options: dict[str, Any]) -> None:
        settings = self._settings | options
        modality = _modality(settings["output_modalities"], "response.output_modalities")
        in_conversation = options.get("conversation") != "none"
        response_settings = ResponseSettings(
            modality, in_conversation, self._conversation.last_id, settings["max_output_tokens"],
            {key: self._settings["audio"]["output"][key] for key in ("format", "voice")},
            options.get("metadata"),
        )  # fmt: skip
        content = content_after(self._conversation.last, settings["tools"], settings["tool_choice"])
        self._response = Response(content, response_settings, self._id)
        if in_conversation:
            self._conversation.add(self._response.item)
        await self._send_all(self._response.begin())
        self._next_delta_s = asyncio.get_running_loop().time()

    async def _cancel_response(self, event: dict[str, Any]) -> None:
        wanted = event.get("response_id")
        if self._response is None or wanted not in (None, self._response.id):
            message = "Cancellation failed: no active response found"
            raise Refusal(message, "response_cancel_not_active")
        await self._end_response("client_cancelled")

    async def _send_delta(self) -> None:
        assert self._response is not None
        events = next(self._response.deltas, None)
        if events is None:
            await self._end_response(None)
            return
        await self._send_all(events)
        self._next_delta_s = asyncio.get_running_loop().time() + _DELTA_PAUSE_S

    async def _end_response(self, reason: str | None) -> None:
        """End the response that is in progress, if there is one; cancelled if there is a reason."""
        response, self._response = self._response, None
        if response is None:
            return
        events = response.end(reason)
        with contextlib.suppress(Refusal):  # out of band, or deleted meanwhile
            self._conversation.find(response.item["id"]).update(response.item)
        await self._send_all(events)

    async def _add_item(self, item: dict[str, Any]) -> None:
        fields = {"previous_item_id": self._conversation.last_id, "item": item}
        self._conversation.add(item)
        await self._send("conversation.item.added", **fields)
        await self._send("conversation.item.done", **fields)

    async def _send_error(self, refusal: Refusal, event_id: Any) -> None:
        known = event_id if isinstance(event_id, str) else None
        await self._send("error", error=refusal.fields | {"event_id": known})

    async def _send_all(self, events: Sequence[Event]) -> None:
        for kind, fields in events:
            await self._send(kind, **fields)

    async def _send(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, "event_id": self._id("event"), **fields}
        await self._socket.send_str(json.dumps(event))

    def _id(self, prefix: str) -> str:
        return f"{prefix}_demo{next(self._ids)}"


def _default_settings(model: str) -> dict[str, Any]:
    pcm = {"type": "audio/pcm", "rate": SAMPLE_RATE_HZ}
    detection = {
        "type": "server_vad", "threshold": 0.5, "prefix_padding_ms": 300,
        "silence_duration_ms": _SILENCE_MS, "idle_timeout_ms": None, "create_response": True,
        "interrupt_response": True,
    }  # fmt: skip
    return {
        "type": "realtime", "object": "realtime.session", "id": f"sess_demo{time.time_ns():x}",
        "expires_at": int(time.time()) + _SESSION_S, "model": model,
        "output_modalities": ["audio"], "instructions": "", "tools": [], "tool_choice": "auto",
        "max_output_tokens": "inf", "tracing": None, "truncation": "auto", "prompt": None,
        "include": None,
        "audio": {
            "input": {
                "format": pcm, "transcription": None, "noise_reduction": None,
                "turn_detection": detection,
            },
            "output": {"format": pcm, "voice": "marin", "speed": 1.0},
        },
    }  # fmt: skip


def _parse(frame: WSMessage) -> dict[str, Any]:
    """The event in a frame. Raises Refusal."""
    if frame.type is not WSMsgType.TEXT:
        raise Refusal("Binary frames are not supported.", "invalid_event")
    try:
        event: dict[str, Any] = msgspec.json.decode(frame.data, type=dict)
    except UNREADABLE:
        event = {}
    if not isinstance(event.get("type"), str):
        raise Refusal("The event is not a JSON object with a 'type'.", "invalid_json")
    if _is_deeper_than(_MAX_DEPTH, event):
        raise Refusal(f"The event is nested deeper than {_MAX_DEPTH} levels.", "invalid_json")
    return event


def _is_deeper_than(limit: int, event: dict[str, Any]) -> bool:
    level: list[Any] = [event]
    for _ in range(limit):
        values = (each.values() if isinstance(each, dict) else each for each in level)
        inner = itertools.chain.from_iterable(values)
        level = [each for each in inner if isinstance(each, dict | list)]
        if not level:
            return False
    return True


def _object(event: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A field that must be an object. Raises Refusal."""
    found = event.get(name)
    if found is None:
        raise missing(name)
    if not isinstance(found, dict):
        raise invalid(name, "an object")
    return found


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Without the fields whose null means "the default": clients that write every field send it."""
    return {k: v for k, v in fields.items() if v is not None or k in _NULLABLE}


def _refuse_unknown(fields: Mapping[str, Any], known: set[str], owner: str) -> None:
    if unknown := sorted(set(fields) - known):
        param = f"{owner}.{unknown[0][:80]}"
        raise Refusal(f"Unknown parameter: '{param}'.", "unknown_parameter", param)


def _modality(modalities: Any, param: str) -> Any:
    """`text` or `audio`: the API answers in one of them (audio has a transcript)."""
    if modalities not in (["text"], ["audio"]):
        raise invalid(param, '["text"] or ["audio"]')
    return modalities[0]


def _merged_audio(current: Mapping[str, Any], changes: Any) -> dict[str, Any]:
    """Settings of audio with changes of its two sides, input and output. Raises Refusal."""
    if not isinstance(changes, dict):
        raise invalid("session.audio", "an object")
    merged = dict(current)
    for side in ("input", "output"):
        changed = changes.get(side) or {}
        if not isinstance(changed, dict):
            raise invalid(f"session.audio.{side}", "an object")
        merged[side] = current[side] | _given(changed)
        format_ = merged[side]["format"]
        if not isinstance(format_, dict) or format_.get("type") != "audio/pcm":
            raise invalid(f"session.audio.{side}.format", "audio/pcm, the demo's only format")
    if not isinstance(merged["input"]["turn_detection"], dict | None):
        raise invalid("session.audio.input.turn_detection", "an object or null")
    return merged
