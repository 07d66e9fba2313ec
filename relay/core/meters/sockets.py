"""Meters of WebSocket sessions: each is shown the messages in which its hint finds something, by
`sent` or `received`, and tells what the session used.

Owns: which messages can carry usage, found by a byte search; only those are parsed. Everything is
added up over the session: a cancelled response costs what it used until then.
"""

from __future__ import annotations

from collections.abc import Callable

from relay.core.fields import ABSENT, Text, field, text, value
from relay.core.meters import formats
from relay.core.meters.hints import Hint, hint
from relay.core.meters.scan import end_of_object
from relay.core.text import clean
from relay.core.usage import Parts, Usage, total

_MAX_PARSED_BYTES = 256 * 1024


_MOST_MODELS = 50


class SocketMeter:
    """Sees nothing by itself."""

    __slots__ = ("_aside", "_sum", "model", "pieces", "received_hint", "sent_hint")

    searched_bytes = _MAX_PARSED_BYTES
    """So much of the beginning of a message is searched for a hint."""

    def __init__(self, model: str | None = None) -> None:
        self.sent_hint: Hint | None = None
        self.received_hint: Hint | None = None
        self.pieces: tuple[bytes, ...] = ()
        """How messages begin that are pieces of an answer and tell nothing else."""
        self._sum: Usage | None = None
        self._aside: dict[str, Usage] = {}
        self.model = model

    def sent(self, data: bytes) -> None:
        """A message of the client's."""

    def received(self, data: bytes) -> None:
        """A message of the provider's."""

    @property
    def usage(self) -> Usage | None:
        """What it came to so far."""
        return total(self.parts)

    @property
    def parts(self) -> Parts:
        """The same, by model: what another one than the session's did has its own price."""
        own = ((self.model, self._sum),) if self._sum is not None else ()
        return (*own, *self._aside.items())

    def add(self, usage: Usage | None, model: str | None = None) -> None:
        """One more; `model` is named where it is not the session's."""
        if usage is None:
            return
        if model is not None:
            # A client may name one after another.
            many = len(self._aside) >= _MOST_MODELS and model not in self._aside
            model = _TRANSCRIBER if many else clean(model)
            before = self._aside.get(model)
            self._aside[model] = usage if before is None else before + usage
        else:
            self._sum = usage if self._sum is None else self._sum + usage


_PIECES = tuple(
    f'{{"type":{space}"response.{name}.delta"'.encode()
    for space in ("", " ")
    for name in (
        "output_audio",
        "audio",
        "output_audio_transcript",
        "audio_transcript",
        "output_text",
        "text",
        "function_call_arguments",
    )
)
"""As OpenAI writes them, and Python. One that begins in another way is looked at like the rest."""


class OpenAI(SocketMeter):
    """Realtime: every `response.done` and transcription of the input; the Responses socket: every
    `response.completed`, or how else it ended. The model stands in the URL, or in `session.*`, and
    so does the one that transcribes.
    """

    __slots__ = ("_transcriber",)

    def __init__(self, model: str | None = None) -> None:
        super().__init__(model)
        self.received_hint = hint('"(?:usage"|session\\.)')
        self.pieces = _PIECES
        self._transcriber: str | None = None

    def received(self, data: bytes) -> None:
        """See SocketMeter."""
        if b'"usage"' in data and len(data) <= _MAX_PARSED_BYTES:
            kind = value(field(data, "type"))
            if isinstance(kind, str) and kind in _ENDS:
                at = data.rfind(b'"usage"')
                heard = kind == _TRANSCRIBED
                self.add(
                    formats.openai(_object_behind(data, at)),
                    (self._transcriber or _TRANSCRIBER) if heard else None,
                )
        elif b'"session.' in data and len(data) <= _MAX_PARSED_BYTES:
            session = field(data, "session")
            if session is ABSENT:
                return
            self.model = _name(session, "model") or self.model
            # In `audio.input`, or at the top in the older API.
            self._transcriber = (
                _name(session, "audio", "input", "transcription", "model")
                or _name(session, "input_audio_transcription", "model")
                or self._transcriber
            )


def _name(within: Text, *path: str) -> str | None:
    """The text behind these names, if there is one."""
    found = value(field(within, *path))
    return found if isinstance(found, str) else None


_TRANSCRIBED = "conversation.item.input_audio_transcription.completed"
_TRANSCRIBER = "input-transcription"
"""Stands for a transcribing model that the session has not named: it has no price."""
_ENDS = frozenset(
    {
        "response.done",
        "response.completed",
        "response.incomplete",
        "response.failed",
        _TRANSCRIBED,
    }
)


class Google(SocketMeter):
    """Gemini Live: every `usageMetadata`; its messages are JSON in binary frames."""

    __slots__ = ()

    searched_bytes = 1 << 62  # usage comes behind sound; a plain text is quickly found

    def __init__(self, model: str | None = None) -> None:
        super().__init__(model)
        self.sent_hint = hint('"setup"' if model is None else "")
        self.received_hint = hint('"usageMetadata"')

    def received(self, data: bytes) -> None:
        """See SocketMeter."""
        at = data.find(b'"usageMetadata"')
        if at >= 0:
            self.add(formats.google(_object_behind(data, at)))

    def sent(self, data: bytes) -> None:
        """The first message names the model."""
        if len(data) <= _MAX_PARSED_BYTES:
            model = _name(data, "setup", "model")
            if model is not None:
                self.model = model.removeprefix("models/")
                self.sent_hint = None


class Characters(SocketMeter):
    """Speech from text that a client sends: the characters of one field."""

    __slots__ = ("_field",)

    def __init__(self, field: str, model: str | None = None) -> None:
        super().__init__(model)
        self._field = field
        self.sent_hint = hint(f'"{field}"')

    def sent(self, data: bytes) -> None:
        """See SocketMeter."""
        if len(data) <= _MAX_PARSED_BYTES:
            spoken = text(field(data, self._field))
            if self.model is None:
                self.model = _name(data, "model_id")
            # A lone space opens a session of ElevenLabs, and an empty text closes it.
            if spoken is not None and spoken.strip():
                self.add(Usage(characters=len(spoken)))


class Seconds(SocketMeter):
    """Text from speech: the seconds that the provider says it heard. A total, where it comes at the
    end, stands for all the parts before it.
    """

    __slots__ = ("_final", "_part", "_total")

    def __init__(self, part: str, total: tuple[str, str], final: str) -> None:
        super().__init__()
        self.received_hint = hint("duration")
        self._part, self._total, self._final = part, total, final

    def received(self, data: bytes) -> None:
        """See SocketMeter."""
        if len(data) > _MAX_PARSED_BYTES:
            return
        kind, name = self._total
        if value(field(data, "type")) == kind:
            if (usage := _heard(value(field(data, name)))) is not None:
                self._sum = usage
        elif value(field(data, self._final)) is True:
            self.add(_heard(value(field(data, self._part))))


class Lasting(SocketMeter):
    """A spoken session that is paid by the time it lasts; `clock` tells seconds."""

    __slots__ = ("_began_s", "_clock")

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock, self._began_s = clock, clock()

    @property
    def parts(self) -> Parts:
        """Until now."""
        return ((None, Usage(audio_ms=round((self._clock() - self._began_s) * 1000))),)


def _heard(seconds: object) -> Usage | None:
    if isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds < 1e7:
        return Usage(audio_ms=round(seconds * 1000))
    return None


def _object_behind(data: bytes, at: int) -> bytes:
    start = data.find(b"{", at)
    end = end_of_object(data, start) if start >= 0 else -1
    return data[start:end] if end >= 0 else b""


def socket_meter(
    meter: str, endpoint: str, model: str | None, clock: Callable[[], float]
) -> SocketMeter | None:
    """What sees the messages of a session; None if nothing does."""
    if meter == "openai":
        return OpenAI(model)
    if meter == "google":
        return Google(model)
    if meter == "elevenlabs":
        if "convai" in endpoint:
            return Lasting(clock)
        return Characters("text", model) if "text-to-speech" in endpoint else None
    if meter == "cartesia":
        return _cartesia(endpoint, model)
    if meter == "deepgram":
        if "speak" in endpoint:
            return Characters("text", model)
        return Seconds("duration", ("Metadata", "duration"), "is_final")
    if meter == "assemblyai":
        return Seconds("", ("Termination", "audio_duration_seconds"), "")
    return None


def _cartesia(endpoint: str, model: str | None) -> SocketMeter:
    if "stt" in endpoint:
        return Seconds("duration", ("done", "duration"), "is_final")
    return Characters("transcript", model)
