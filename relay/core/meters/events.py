"""The JSON documents of server-sent events, found while their bytes stream.

Owns: where an event begins and ends, and which are worth reading. What documents hold is
documents.py's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from relay.core.fields import BYTE_ORDER_MARK
from relay.core.meters.documents import Document, Scanner, Wanted

MAX_WHOLE_BYTES = 64 * 1024
"""An event that is longer, and not here whole, is scanned as it comes instead of held."""
_READ_AT_FIRST = 8
"""So many events are read at the start, until one has named the model."""
_EVENT_END = re.compile(rb"(?:\r\n|\n|\r(?!\n)){2}")
_EVENT_ENDS = (b"\n\n", b"\n\r\n", b"\r\r")
_DATA_LINE = re.compile(rb"(?:\A|[\r\n])data: ?")
_ENDS = (b"\n\n", b"\r\n\r\n")
DONE = b"[DONE]"
"""OpenAI's data of the event that ends a stream."""


class Events:
    """The documents of server-sent events (WHATWG HTML 9.2).

    Only events with an object behind a key that begins with `needle` are read, and the first few,
    which name the model. An event that is long and comes in pieces is scanned up to the end of its
    first data line, not held.
    """

    __slots__ = (
        "_at_first", "_held", "_held_bytes", "_line_ended", "_needle", "_scanned", "_scanner",
        "_tail", "_wanted", "_worth", "gave_up",
    )  # fmt: skip

    def __init__(self, wanted: Wanted, needle: bytes) -> None:
        self._wanted, self._needle = wanted, needle
        self._worth = re.compile(re.escape(needle) + rb'[^"]*"\s*:\s*\{').search
        self._at_first = _READ_AT_FIRST
        self._held: list[bytes] = []
        """The beginning of an event whose end is not here yet."""
        self._held_bytes = 0
        self._tail = b""
        """The last bytes that came of it: its end may be cut in two."""
        self._scanner: Scanner | None = None
        """Reads an event that is too long to be held."""
        self._scanned: list[Document] = []
        self._line_ended = False
        self.gave_up = False
        """An event took too many steps to read."""

    @property
    def began(self) -> bool:
        """True once there was an event with data."""
        return self._at_first < _READ_AT_FIRST

    @property
    def rest(self) -> bytes:
        """What is here of an event that has not ended and is not too long."""
        return b"".join(self._held)

    @property
    def seeks_usage_alone(self) -> bool:
        """True between two events, once the model is known."""
        return self._at_first == 0 and not self._held_bytes

    def named(self) -> None:
        """The model is known: from now on only the needle matters."""
        self._at_first = 0

    def feed(self, chunk: bytes) -> Sequence[Document]:
        """The documents of the events that this chunk completes."""
        if not self._held_bytes:
            if chunk.endswith(_ENDS):
                if self._at_first == 0 and self._needle not in chunk:
                    return ()
                return self._read(chunk)
            return self._begin(chunk)
        probe = self._tail + chunk
        end = first_end(probe) - len(self._tail)
        if end < 0:
            self._hold(chunk)
            return ()
        documents = self._finish(chunk[:end])
        return [*documents, *self.feed(chunk[end:])] if end < len(chunk) else documents

    def _begin(self, chunk: bytes) -> Sequence[Document]:
        """A chunk that begins with an event and ends within one."""
        end = last_end(chunk)
        documents = self._read(chunk[:end]) if end else ()
        self._hold(chunk[end:])
        return documents

    def _hold(self, part: bytes) -> None:
        self._tail = (self._tail + part)[-3:]
        self._held_bytes += len(part)
        if self._scanner is not None:
            self._scan(part)
            return
        self._held.append(part)
        if self._held_bytes > MAX_WHOLE_BYTES:
            self._at_first = max(0, self._at_first - 1)
            self._scanner, begun = Scanner(self._wanted), b"".join(self._held)
            self._held = []
            data = _DATA_LINE.search(begun)
            self._scan(begun[data.end() :] if data is not None else b"\n")

    def _scan(self, part: bytes) -> None:
        """Scan what belongs to the data line; what follows it in this event is passed over."""
        if self._line_ended:
            return
        assert self._scanner is not None
        ends = [at for end in (b"\n", b"\r") if (at := part.find(end)) >= 0]
        self._scanned += self._scanner.feed(part[: min(ends)] if ends else part)
        self._line_ended = bool(ends)

    def _finish(self, part: bytes) -> Sequence[Document]:
        """The rest of the event that is under way."""
        if self._scanner is None:
            event = b"".join([*self._held, part])
            documents = self._read(event)
            if not documents and b"error" in event:
                documents = [self._wanted.of(data_of(event))]  # it may be one, however long
        else:
            self._scan(part)
            self.gave_up = self.gave_up or self._scanner.gave_up
            documents = self._scanned
        self._held, self._held_bytes, self._tail = [], 0, b""
        self._scanner, self._scanned, self._line_ended = None, [], False
        return documents

    def _read(self, events: bytes) -> Sequence[Document]:
        """The documents of whole events."""
        if self._at_first == 0 and self._worth(events) is None:
            return ()
        if (data := _only_data(events)) is not None:
            self._at_first = max(0, self._at_first - 1)
            found = self._wanted.of(data)
            return (found,) if found else ()
        documents: list[Document] = []
        each = [event for event in split_events(events) if event]
        for event in each:
            if self._at_first == 0 and len(each) > 1 and self._worth(event) is None:
                continue
            if not (data := data_of(event)):
                continue  # a comment
            self._at_first = max(0, self._at_first - 1)
            if found := self._wanted.of(data):
                documents.append(found)
        return documents


def first_end(text: bytes) -> int:
    """Behind the first event that ends in `text`; -1 if none does."""
    ends = [at + len(end) for end in _EVENT_ENDS if (at := text.find(end)) >= 0]
    return min(ends) if ends else -1


def last_end(text: bytes, start: int = 0, stop: int | None = None) -> int:
    """Behind the last event that ends there; `start` if none does."""
    behind = start
    for end in _EVENT_ENDS:
        at = text.rfind(end, max(start, behind - 2), stop)
        behind = max(behind, at + len(end)) if at >= 0 else behind
    return behind


def split_events(events: bytes) -> list[bytes]:
    """Whole events, one by one."""
    if b"\r" not in events:
        return events.split(b"\n\n")
    return _EVENT_END.split(events)


def _only_data(events: bytes) -> bytes | None:
    """The data of a single event of a single line, which most chunks are; None of any other."""
    if not events.startswith(b"data: "):
        return None
    line_end, carriage = events.find(b"\n"), events.find(b"\r")
    if carriage < 0:
        return events[6:line_end] if line_end == len(events) - 2 else None
    whole = line_end == carriage + 1 == len(events) - 3
    return events[6:carriage] if whole and events.endswith(b"\r\n\r\n") else None


def data_of(event: bytes) -> bytes:
    """The data of one event, its lines joined."""
    lines = event.removeprefix(BYTE_ORDER_MARK).splitlines()
    data = [line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:")]
    return data[0] if len(data) == 1 else b"\n".join(data)
