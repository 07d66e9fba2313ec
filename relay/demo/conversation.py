"""The conversation of a session of the demo's Realtime API.

Owns the items: which a client may create, how many are kept, and what the demo says after the last
of them. demo/realtime.py sends the events.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from relay.demo.realtime_response import FunctionCall, example_call
from relay.demo.texts import SPOKEN

_MAX_ITEMS = 256
_MAX_ITEMS_BYTES = 8 * 1024 * 1024
_MAX_TOOLS = 128
_READ_CHARS = 4096
_SHOWN_CHARS = 400
_CONTENT_TYPES = {
    "user": {"input_text", "input_audio", "input_image"},
    "assistant": {"output_text", "output_audio"},
    "system": {"input_text"},
}


class Refusal(Exception):
    """A client's event that is answered by an `error` event."""

    def __init__(self, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.fields = {
            "type": "invalid_request_error", "code": code, "message": message, "param": param,
        }  # fmt: skip


def missing(param: str) -> Refusal:
    """The refusal of an event without a required field."""
    message = f"Missing required parameter: '{param}'."
    return Refusal(message, "missing_required_parameter", param)


def invalid(param: str, expected: str) -> Refusal:
    """The refusal of an event with a field of another type than expected."""
    message = f"Invalid value for '{param}': expected {expected}."
    return Refusal(message, "invalid_value", param)


class Conversation:
    """The items of a conversation, in order. The oldest are forgotten once there are too many."""

    def __init__(self) -> None:
        self._items: dict[str, tuple[dict[str, Any], int]] = {}
        self._bytes = 0

    @property
    def last_id(self) -> str | None:
        """The id of the last item; None: there is none."""
        return next(reversed(self._items), None)

    @property
    def last(self) -> dict[str, Any]:
        """The last item; empty: there is none."""
        return self._items[self.last_id][0] if self.last_id is not None else {}

    def add(self, item: dict[str, Any]) -> None:
        """Add an item at the end, or replace the item of the same id."""
        self._drop(item["id"])
        size = len(msgspec.json.encode(item))
        self._items[item["id"]] = item, size
        self._bytes += size
        while len(self._items) > _MAX_ITEMS or self._bytes > _MAX_ITEMS_BYTES:
            self._drop(next(iter(self._items)))

    def find(self, item_id: Any) -> dict[str, Any]:
        """The item of this id. Raises Refusal."""
        if not isinstance(item_id, str) or item_id not in self._items:
            raise Refusal("The conversation has no item of this id.", "item_not_found", "item_id")
        return self._items[item_id][0]

    def delete(self, item_id: Any) -> str:
        """Delete an item; its id. Raises Refusal."""
        found: str = self.find(item_id)["id"]
        self._drop(found)
        return found

    def _drop(self, item_id: str) -> None:
        if item_id in self._items:
            self._bytes -= self._items.pop(item_id)[1]


def checked_item(item: dict[str, Any]) -> dict[str, Any]:
    """An item that a client may create. Raises Refusal. Audio in it is dropped."""
    kind = item.get("type")
    if kind in ("function_call", "function_call_output"):
        names = ("name", "arguments") if kind == "function_call" else ("call_id", "output")
        for name in names:
            if not isinstance(item.get(name), str):
                raise missing(f"item.{name}")
        return dict(item)
    if kind != "message":
        raise invalid("item.type", "message, function_call or function_call_output")
    types = _CONTENT_TYPES.get(str(item.get("role")))
    if types is None:
        raise invalid("item.role", "user, assistant or system")
    content = item.get("content")
    if not isinstance(content, list):
        raise missing("item.content")
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in types:
            raise invalid("item.content", f"parts of type {', '.join(sorted(types))}")
    parts = [{k: v for k, v in part.items() if k != "audio"} for part in content]
    return item | {"content": parts}


def content_after(last: Mapping[str, Any], tools: Any, choice: Any) -> str | FunctionCall:
    """What the demo says after `last`: a function call that the choice of tools or the words of
    the user ask for, the output of a function that was called, or always the same.
    """
    if last.get("type") == "function_call_output":
        shown = str(last["output"])[:_SHOWN_CHARS].split()
        return " ".join(["The function returned:", *shown])
    functions = [
        tool for tool in (tools[:_MAX_TOOLS] if isinstance(tools, list) else ())
        if isinstance(tool, dict) and tool.get("type") == "function"
    ]  # fmt: skip
    if isinstance(choice, dict) and "name" in choice:
        functions = [tool for tool in functions if tool.get("name") == choice["name"]]
    elif choice == "auto":
        functions = [tool for tool in functions if _is_meant(str(tool.get("name")), last)]
    if functions and choice != "none":
        return example_call(functions[0])
    return SPOKEN


def _is_meant(name: str, last: Mapping[str, Any]) -> bool:
    """True if the user's text contains a word of a function's name, such as `weather` of
    `get_weather`.
    """
    if last.get("type") != "message" or last["role"] != "user":
        return False
    texts = [str(part["text"])[:_READ_CHARS].lower() for part in last["content"] if "text" in part]
    words = [word for word in name.lower().split("_") if len(word) > 3]
    return any(word in text for word in words for text in texts)
