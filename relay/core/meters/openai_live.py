"""Meter GPT-Live, OpenAI's spoken sessions.

Owns the messages that report a session's seconds, and the usage of delegated responses and
decisions. openai_responses_socket.py reads the usage of a response.
"""

from __future__ import annotations

import re

from relay.core.meters import openai
from relay.core.meters.documents import Document, Wanted
from relay.core.meters.openai_responses_socket import ENDS, parts_of
from relay.core.meters.socket_meter import OpenedSession, SocketMeter, compile_prefilter
from relay.core.meters.tolerant_json import text_of
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
    """The meter of a GPT-Live session: its seconds, of which the last count is valid, and the usage
    of each delegated response and decision, under its own model. All clients that are attached to a
    session get the same messages.
    """

    __slots__ = ("_began_s", "_closed", "_reported_ms", "_session_id")

    def __init__(self, opened: OpenedSession) -> None:
        super().__init__(opened)
        self.received_filter = compile_prefilter(
            '"(?:usage"|session\\.(?:started|updated|closed)")'
        )
        self.sent_filter = compile_prefilter(r'"session\.start"')
        attached = _SESSION_ID.search(opened.endpoint)
        self._session_id = attached[1] if attached is not None else ""
        self._began_s: float | None = None
        self._reported_ms: int | None = None
        self._closed = False

    def sent(self, data: bytes) -> None:
        message = _START.of(data)
        if text_of(message.get("type")) == "session.start":
            self.named(text_of(message.get("session.model")))
            self.sent_filter = None

    def received(self, data: bytes) -> None:
        message = _MESSAGE.of(data)
        kind = text_of(message.get("type")) or ""
        if kind == "response.event":
            self._delegated(message)
        elif kind == "decision.event":
            self._decided(message)
        elif kind.startswith("session."):
            self._session(kind, message)

    def _session(self, kind: str, message: Document) -> None:
        self.model = text_of(message.get("session.model")) or self.model
        self._session_id = text_of(message.get("session.id")) or self._session_id
        if self._began_s is None:
            self._began_s = self.opened.clock()
        reported = openai.usage_of(message.get("usage"), self.ignored_fields)
        if reported is not None:
            self._reported_ms = max(reported.audio_ms, self._reported_ms or 0)
        self._closed = self._closed or kind == "session.closed"

    def _delegated(self, message: Document) -> None:
        event = {
            place.removeprefix("event."): raw
            for place, raw in message.items()
            if place.startswith("event.")
        }
        if text_of(event.get("type")) in ENDS:
            for part in parts_of(event, self.ignored_fields):
                self.add(part, f"{part.object_id} {part.model}" if part.object_id else "")

    def _decided(self, message: Document) -> None:
        usage = openai.usage_of(message.get("event.decision.usage"), self.ignored_fields)
        if usage is not None:
            by = text_of(message.get("trigger_id")) or text_of(message.get("event_id"))
            named = f"{self._session_id} {by}" if by is not None else ""
            self.add(
                Part(text_of(message.get("event.decision.model")), usage, object_id=named), named
            )

    @property
    def parts(self) -> Parts:
        audio_ms = self._reported_ms
        if audio_ms is None and self._began_s is not None:
            audio_ms = round((self.opened.clock() - self._began_s) * 1000)
        if audio_ms is None:
            return super().parts
        usage = Usage(audio_ms=audio_ms, estimated=not self._closed)
        session = Part(self.model, usage, object_id=self._session_id, booking="so_far")
        return (session, *super().parts)
