"""GPT-Live, OpenAI's spoken sessions.

Owns: where they tell their seconds, and what they delegate. What a response means is
openai_sockets.py's.
"""

from __future__ import annotations

import re

from relay.core.meters import openai
from relay.core.meters.documents import Document, Wanted
from relay.core.meters.hints import hint
from relay.core.meters.openai_sockets import ENDS, parts_of
from relay.core.meters.sessions import Opened, SocketMeter
from relay.core.meters.typed import text_of
from relay.core.usage import Part, Parts, Usage

_MESSAGE = Wanted(
    "type", "usage", "event_id", "trigger_id", "session.id", "session.model",
    "event.type", "event.response.id", "event.response.model", "event.response.status",
    "event.response.service_tier", "event.response.usage", "event.response.tool_usage",
    "event.decision.model", "event.decision.usage",
)  # fmt: skip
_START = Wanted("type", "session.model")
_SESSION_ID = re.compile(r"live/sessions/([^/]{1,256})")


class Live(SocketMeter):
    """GPT-Live: seconds of the session, of which the last count holds; beside them what it
    delegated, each response and decision under its own model. Whoever attaches to a session sees
    the same.
    """

    __slots__ = ("_began_s", "_closed", "_session_id", "_told_ms")

    def __init__(self, opened: Opened) -> None:
        super().__init__(opened)
        self.received_hint = hint('"(?:usage"|session\\.(?:started|updated|closed)")')
        self.sent_hint = hint(r'"session\.start"')
        attached = _SESSION_ID.search(opened.endpoint)
        self._session_id = attached[1] if attached is not None else ""
        self._began_s: float | None = None
        self._told_ms: int | None = None
        self._closed = False

    def sent(self, data: bytes) -> None:
        """See SocketMeter."""
        said = _START.of(data)
        if text_of(said.get("type")) == "session.start":
            self.named(text_of(said.get("session.model")))
            self.sent_hint = None

    def received(self, data: bytes) -> None:
        """See SocketMeter."""
        said = _MESSAGE.of(data)
        kind = text_of(said.get("type")) or ""
        if kind == "response.event":
            self._delegated(said)
        elif kind == "decision.event":
            self._decided(said)
        elif kind.startswith("session."):
            self._session(kind, said)

    def _session(self, kind: str, said: Document) -> None:
        self.model = text_of(said.get("session.model")) or self.model
        self._session_id = text_of(said.get("session.id")) or self._session_id
        if self._began_s is None:
            self._began_s = self.opened.clock()
        told = openai.usage_of(said["usage"], self.odd) if "usage" in said else None
        if told is not None:
            self._told_ms = max(told.audio_ms, self._told_ms or 0)
        self._closed = self._closed or kind == "session.closed"

    def _delegated(self, said: Document) -> None:
        event = {
            place.removeprefix("event."): raw
            for place, raw in said.items()
            if place.startswith("event.")
        }
        if text_of(event.get("type")) in ENDS:
            for part in parts_of(event, self.odd):
                self.add(part, f"{part.object_id} {part.model}" if part.object_id else "")

    def _decided(self, said: Document) -> None:
        told = said.get("event.decision.usage")
        usage = openai.usage_of(told, self.odd) if told is not None else None
        if usage is not None:
            by = text_of(said.get("trigger_id")) or text_of(said.get("event_id"))
            named = f"{self._session_id} {by}" if by is not None else ""
            self.add(Part(text_of(said.get("event.decision.model")), usage, object_id=named), named)

    @property
    def parts(self) -> Parts:
        """See SocketMeter."""
        heard_ms = self._told_ms
        if heard_ms is None and self._began_s is not None:
            heard_ms = round((self.opened.clock() - self._began_s) * 1000)
        if heard_ms is None:
            return super().parts
        usage = Usage(audio_ms=heard_ms, estimated=not self._closed)
        lasted = Part(self.model, usage, object_id=self._session_id, booking="so_far")
        return (lasted, *super().parts)
