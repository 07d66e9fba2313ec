"""Make the events of one response of the demo's Realtime API, in the order of OpenAI's API.

Owns the shapes of a response and of its one output item: a message in text or audio, or a function
call. When each event is sent, and what the response says, is decided in demo/realtime.py.

https://platform.openai.com/docs/api-reference/realtime-server-events
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from relay.demo.audio import tone
from relay.demo.texts import pieces

Event = tuple[str, dict[str, Any]]
"""The type of a server event, and its other fields."""
_INPUT_TOKENS = 12
_ARGUMENT_CHARS = 8


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A function that the client is asked to call, with its arguments as JSON."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ResponseSettings:
    """What a response takes from the session and from `response.create`."""

    modality: Literal["text", "audio"]
    in_conversation: bool
    """False: out of band (`conversation: none`)."""
    previous_item_id: str | None
    max_output_tokens: int | str
    audio_output: Mapping[str, Any]
    metadata: Any = None


class Response:
    """A response with one output item. `begin`, then each of `deltas`, then `end`."""

    def __init__(
        self, content: str | FunctionCall, settings: ResponseSettings, new_id: Callable[[str], str]
    ) -> None:
        self._settings = settings
        self.id = new_id("resp")
        self.item: dict[str, Any] = {
            "id": new_id("item"), "object": "realtime.item", "type": "message",
            "status": "in_progress", "role": "assistant", "content": [],
        }  # fmt: skip
        self._sent, self._audio_tenths = "", 0
        if isinstance(content, FunctionCall):
            del self.item["role"], self.item["content"]
            self._name = content.name
            self.item |= {
                "type": "function_call", "call_id": new_id("call"), "name": content.name,
                "arguments": "",
            }  # fmt: skip
            self.deltas = self._call_deltas(content.arguments)
        elif settings.modality == "text":
            self.deltas = self._text_deltas(content)
        else:
            self.deltas = self._audio_deltas(content)

    def begin(self) -> list[Event]:
        """The events before the first delta."""
        events: list[Event] = [
            ("response.created", {"response": self._object("in_progress", None)}),
            ("response.output_item.added", self._of_response() | {"item": self.item}),
        ]
        if self._settings.in_conversation:
            events.append(("conversation.item.added", self._in_conversation(self.item)))
        if self.item["type"] == "message":
            empty = self._part() | {self._text_field: ""}
            events.append(("response.content_part.added", self._of_part() | {"part": empty}))
        return events

    def end(self, reason: str | None = None) -> list[Event]:
        """The events after the last delta; with a `reason`, of a response that was cancelled."""
        events: list[Event] = []
        if self.item["type"] == "function_call":
            done = {"call_id": self.item["call_id"], "name": self._name, "arguments": self._sent}
            events.append(("response.function_call_arguments.done", self._of_item() | done))
            item = self.item | {"arguments": self._sent}
        else:
            if self._settings.modality == "text":
                fields = self._of_part() | {"text": self._sent}
                events.append(("response.output_text.done", fields))
            else:
                fields = self._of_part() | {"transcript": self._sent}
                events.append(("response.output_audio.done", self._of_part()))
                events.append(("response.output_audio_transcript.done", fields))
            part = self._part()
            events.append(("response.content_part.done", self._of_part() | {"part": part}))
            item = self.item | {"content": [part | {"type": f"output_{part['type']}"}]}
        self.item = item | {"status": "incomplete" if reason else "completed"}
        if self._settings.in_conversation:
            events.append(("conversation.item.done", self._in_conversation(self.item)))
        events.append(("response.output_item.done", self._of_response() | {"item": self.item}))
        status = "cancelled" if reason else "completed"
        done = {"response": self._object(status, reason) | {"output": [self.item]}}
        events.append(("response.done", done))
        return events

    def _text_deltas(self, text: str) -> Iterator[list[Event]]:
        for delta in pieces(text):
            self._sent += delta
            yield [("response.output_text.delta", self._of_part() | {"delta": delta})]

    def _audio_deltas(self, text: str) -> Iterator[list[Event]]:
        """A tenth of a second of audio for each word."""
        for delta in pieces(text):
            audio = base64.b64encode(tone(self._audio_tenths)).decode()
            self._sent += delta
            self._audio_tenths += 1
            yield [
                ("response.output_audio_transcript.delta", self._of_part() | {"delta": delta}),
                ("response.output_audio.delta", self._of_part() | {"delta": audio}),
            ]

    def _call_deltas(self, arguments: str) -> Iterator[list[Event]]:
        for start in range(0, len(arguments), _ARGUMENT_CHARS):
            delta = arguments[start : start + _ARGUMENT_CHARS]
            self._sent += delta
            fields = self._of_item() | {"call_id": self.item["call_id"], "delta": delta}
            yield [("response.function_call_arguments.delta", fields)]

    @property
    def _text_field(self) -> str:
        return "text" if self._settings.modality == "text" else "transcript"

    def _part(self) -> dict[str, Any]:
        return {"type": self._settings.modality, self._text_field: self._sent}

    def _of_response(self) -> dict[str, Any]:
        return {"response_id": self.id, "output_index": 0}

    def _of_item(self) -> dict[str, Any]:
        return self._of_response() | {"item_id": self.item["id"]}

    def _of_part(self) -> dict[str, Any]:
        return self._of_item() | {"content_index": 0}

    def _in_conversation(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"previous_item_id": self._settings.previous_item_id, "item": item}

    def _object(self, status: str, reason: str | None) -> dict[str, Any]:
        settings = self._settings
        is_over = status != "in_progress"
        return {
            "object": "realtime.response", "id": self.id, "status": status,
            "status_details": {"type": status, "reason": reason} if reason else None,
            "output": [], "output_modalities": [settings.modality],
            "conversation_id": "conv_demo" if settings.in_conversation else None,
            "max_output_tokens": settings.max_output_tokens,
            "audio": {"output": dict(settings.audio_output)}, "metadata": settings.metadata,
            "usage": self._usage() if is_over else None,
        }  # fmt: skip

    def _usage(self) -> dict[str, Any]:
        text, audio = len(self._sent.split()), self._audio_tenths
        return {
            "total_tokens": _INPUT_TOKENS + text + audio, "input_tokens": _INPUT_TOKENS,
            "output_tokens": text + audio,
            "input_token_details": {
                "text_tokens": _INPUT_TOKENS, "audio_tokens": 0, "image_tokens": 0,
                "cached_tokens": 0,
                "cached_tokens_details": {"text_tokens": 0, "audio_tokens": 0, "image_tokens": 0},
            },
            "output_token_details": {"text_tokens": text, "audio_tokens": audio},
        }  # fmt: skip


_MAX_DEPTH = 4
_EXAMPLES: dict[str, Any] = {
    "string": "demo", "integer": 1, "number": 1, "boolean": True, "array": [], "object": {},
}  # fmt: skip


def example_call(function: Mapping[str, Any]) -> FunctionCall:
    """A call of a function tool, with an example value for each of its required parameters."""
    arguments = _example(function.get("parameters"), 0)
    return FunctionCall(
        str(function.get("name")), json.dumps(arguments if isinstance(arguments, dict) else {})
    )


def _example(schema: Any, depth: int) -> Any:
    """An example of a value that JSON Schema `schema` describes; None where it is too deep."""
    if not isinstance(schema, dict):
        return None
    choices, kind = schema.get("enum"), schema.get("type")
    if isinstance(choices, list) and choices:
        return choices[0]
    if isinstance(kind, list) and kind:
        kind = kind[0]
    properties, required = schema.get("properties"), schema.get("required")
    if isinstance(properties, dict) and isinstance(required, list) and depth < _MAX_DEPTH:
        # A name that `required` repeats counts once, so the work does not exceed the schema's size.
        names = {name for name in required if isinstance(name, str)}
        return {k: _example(v, depth + 1) for k, v in properties.items() if k in names}
    return _EXAMPLES.get(kind) if isinstance(kind, str) else None
