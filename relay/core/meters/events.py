"""Find the JSON documents of server-sent events while they stream.

Owns the start and end of events, and the choice of the events to read. documents.py finds the
fields of a document.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from relay.core.fields import BYTE_ORDER_MARK
from relay.core.meters.documents import Document, Scanner, Wanted

MAX_WHOLE_BYTES = 64 * 1024
"""A longer event that is incomplete is scanned chunk by chunk instead of buffered."""
_READ_AT_FIRST = 8
"""Number of first events that are read, until one names the model."""
_EVENT_END = re.compile(rb"(?:\r\n|\n|\r(?!\n)){2}")
_EVENT_ENDS = (b"\n\n", b"\n\r\n", b"\r\r")
_DATA_LINE = re.compile(rb"(?:\A|[\r\n])data: ?")
_ENDS = (b"\n\n", b"\r\n\r\n")
DONE = b"[DONE]"
"""The data of the event that ends OpenAI's streams."""


class Events:
    """Finds the documents of server-sent events (WHATWG HTML 9.2).

    It reads the first few events, which name the model, and after these only events with an object
    under a key that begins with `needle`. A long event in several chunks is scanned, up to the end
    of its first data line, instead of buffered.
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
        """The received part of an incomplete event."""
        self._held_bytes = 0
        self._tail = b""
        """The last bytes of that part: the end of the event may be split between chunks."""
        self._scanner: Scanner | None = None
        """Reads an event that is too long for buffering."""
        self._scanned: list[Document] = []
        self._line_ended = False
        self.gave_up = False
        """True if an event took too many steps to read."""

    @property
    def began(self) -> bool:
        """True after the first event with data."""
        return self._at_first < _READ_AT_FIRST

    @property
    def rest(self) -> bytes:
        """The received part of an incomplete event that is not too long."""
        return b"".join(self._held)

    @property
    def seeks_usage_alone(self) -> bool:
        """True between two events, if the model is known."""
        return self._at_first == 0 and not self._held_bytes

    def named(self) -> None:
        """Read only events with the needle from now on, because the model is known."""
        self._at_first = 0

    def feed(self, chunk: bytes) -> Sequence[Document]:
        """Return the documents of the events that this chunk completes."""
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
        """Read a chunk that starts at an event boundary and ends within an event."""
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
        """Scan the part of the data line; the rest of the event is skipped."""
        if self._line_ended:
            return
        assert self._scanner is not None
        ends = [at for end in (b"\n", b"\r") if (at := part.find(end)) >= 0]
        self._scanned += self._scanner.feed(part[: min(ends)] if ends else part)
        self._line_ended = bool(ends)

    def _finish(self, part: bytes) -> Sequence[Document]:
        """Read the rest of an incomplete event."""
        if self._scanner is None:
            event = b"".join([*self._held, part])
            documents = self._read(event)
            if not documents and b"error" in event:
                documents = [self._wanted.of(data_of(event))]  # it may be an error
        else:
            self._scan(part)
            self.gave_up = self.gave_up or self._scanner.gave_up
            documents = self._scanned
        self._held, self._held_bytes, self._tail = [], 0, b""
        self._scanner, self._scanned, self._line_ended = None, [], False
        return documents

    def _read(self, events: bytes) -> Sequence[Document]:
        """Read complete events."""
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
    """Return the position after the first event that ends in `text`; -1 if none does."""
    ends = [at + len(end) for end in _EVENT_ENDS if (at := text.find(end)) >= 0]
    return min(ends) if ends else -1


def last_end(text: bytes, start: int = 0, stop: int | None = None) -> int:
    """Return the position after the last event that ends in this range; `start` if none does."""
    behind = start
    for end in _EVENT_ENDS:
        at = text.rfind(end, max(start, behind - 2), stop)
        behind = max(behind, at + len(end)) if at >= 0 else behind
    return behind


def split_events(events: bytes) -> list[bytes]:
    """Split complete events."""
    if b"\r" not in events:
        return events.split(b"\n\n")
    return _EVENT_END.split(events)


def _only_data(events: bytes) -> bytes | None:
    """Return the data of a single event with a single line, as most chunks are; None for others."""
    if not events.startswith(b"data: "):
        return None
    line_end, carriage = events.find(b"\n"), events.find(b"\r")
    if carriage < 0:
        return events[6:line_end] if line_end == len(events) - 2 else None
    whole = line_end == carriage + 1 == len(events) - 3
    return events[6:carriage] if whole and events.endswith(b"\r\n\r\n") else None


def data_of(event: bytes) -> bytes:
    """Return the data of one event, with its lines joined."""
    lines = event.removeprefix(BYTE_ORDER_MARK).splitlines()
    data = [line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:")]
    return data[0] if len(data) == 1 else b"\n".join(data)
