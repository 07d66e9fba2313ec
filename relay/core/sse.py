"""Parse server-sent events (WHATWG HTML, 9.2).

Owns the event boundaries, which the relay needs, and EventParser, which its Python client uses.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

KEEPALIVE = b": keepalive\n\n"
"""A comment and an empty line, which parsers ignore between two events."""
KEEPALIVE_WITH_ID = b": keepalive\n"
"""For a stream with `id:` lines. After an id, the Python SDKs of OpenAI and Groq make an event of
an empty line, and fail to decode its empty data."""
KEEPALIVE_OF_FORMAT = {"google": b"\n"}
"""For other wire formats: google-genai for Python takes a comment for JSON, and fails."""
_BOUNDARIES = (b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n", b"\r\n\n")
_LINE_END = re.compile(r"\r\n|\n|\r")


def at_boundary(tail: bytes) -> bool:
    """True if a stream whose last bytes are `tail` (4 are enough) is between two events.

    An empty tail, before the first byte, is a boundary too.
    """
    return not tail or tail.endswith(_BOUNDARIES)


def has_id(chunk: bytes) -> bool:
    """True if a line of `chunk` begins with `id:`."""
    return b"\nid:" in chunk or chunk.startswith(b"id:")


@dataclass(frozen=True, slots=True)
class Event:
    """One event: `data` are its lines, joined; `event` is its name, `message` if it has none."""

    data: str
    event: str = "message"
    id: str = ""

    def json(self) -> Any:
        """Decode `data` as JSON. Raises ValueError, for example for OpenAI's `[DONE]`."""
        return json.loads(self.data)


@dataclass(slots=True)
class EventParser:
    """Parses a stream in chunks into complete events. An incomplete event at the end is dropped."""

    _held: bytearray = field(default_factory=bytearray)
    _data: list[str] = field(default_factory=list)
    _event: str = ""
    _id: str = ""

    def feed(self, chunk: bytes) -> list[Event]:
        """Return the events that `chunk` completes."""
        fresh = bytes(self._held[-1:]) + chunk
        self._held += chunk
        # A CR at the end may be half of a CRLF: wait for the next chunk.
        end = max(fresh.rfind(b"\n"), fresh.rfind(b"\r", 0, -1)) + 1
        if not end:
            return []
        end += len(self._held) - len(fresh)
        whole = self._held[:end].decode("utf-8", "replace")
        del self._held[:end]
        lines = _LINE_END.split(whole)[:-1]
        return [event for line in lines if (event := self._line(line.removeprefix("\ufeff")))]

    def _line(self, line: str) -> Event | None:
        if not line:
            done = Event("\n".join(self._data), self._event or "message", self._id)
            has_data, self._data, self._event = bool(self._data), [], ""
            return done if has_data else None
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id":
            self._id = value
        return None
