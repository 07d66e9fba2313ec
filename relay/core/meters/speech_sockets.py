"""Meter WebSockets that turn text into speech: ElevenLabs, Cartesia, Deepgram, xAI.

Owns the client's messages with text for speech, and the provider's messages with billed characters.
"""

from __future__ import annotations

import msgspec

from relay.core.fields import MAX_FIELD_BYTES, MAX_TEXT_BYTES, UNREADABLE, field, items, text
from relay.core.meters.documents import Wanted
from relay.core.meters.socket_meter import (
    MAX_PARTS,
    OpenedSession,
    Order,
    Readings,
    SocketMeter,
    compile_prefilter,
    has_ascii_escape,
    has_escape,
)
from relay.core.meters.tolerant_json import count_of, text_of
from relay.core.usage import CallBound, Part, Parts, Usage


class Characters(SocketMeter):
    """Counts the characters of one field in the client's messages, of those with `type_` if set."""

    __slots__ = ("_field", "_key", "_type")

    def __init__(self, opened: OpenedSession, field_: str, type_: str = "") -> None:
        super().__init__(opened)
        self._field, self._type = field_, type_
        self._key = f'"{field_}"'.encode()
        self.sent_filter = self.order_filter = compile_prefilter(f'"{field_}"')

    def sent(self, data: bytes) -> None:
        message = _TEXT.of(data)
        is_ambiguous = _is_ambiguous(data, b'"type"')
        kinds = Readings(data).types if is_ambiguous else {text_of(message.get("type"))}
        if self._type and self._type not in kinds:
            return
        model = text_of(message.get("model_id"))
        self.named(model)
        self.model = self.model or model
        if (characters := self._characters(data)) is None:
            self.add(Part(model, Usage(incomplete=True)))
        elif characters:
            self.add(Part(model, Usage(characters=characters)))

    def order_of(self, data: bytes) -> Order | None:
        # No text has more characters than bytes.
        characters = self._characters(data) if len(data) <= MAX_TEXT_BYTES else None
        if characters is None or has_escape(data):
            characters = len(data)
        if not characters:
            return None
        models = Readings(data).texts("model_id")
        return Order(CallBound(characters=characters, units=1), tuple(models))

    def _characters(self, data: bytes) -> int | None:
        """Return the number of characters for speech; None if the text is too long to count."""
        if not _is_ambiguous(data, self._key):
            return self._spoken(field(data, self._field))
        counts = [self._spoken(raw) for raw in Readings(data).of(self._field)]
        return None if None in counts else max(filter(None, counts), default=0)

    def _spoken(self, raw: msgspec.Raw) -> int | None:
        """Do the same for a value of the field."""
        if memoryview(raw).nbytes > MAX_TEXT_BYTES:
            return None
        spoken = text(raw)
        # ElevenLabs' sessions start with a single space, and end with an empty text.
        return len(spoken) if spoken is not None and spoken.strip() else 0


_TEXT = Wanted("type", "model_id")


def _is_ambiguous(data: bytes, key: bytes) -> bool:
    """True if a message may have several fields with this name."""
    return data.count(key) > 1 or has_ascii_escape(data)


class _Line(msgspec.Struct):
    text: str = ""


_lines = msgspec.json.Decoder(list[_Line]).decode


class Dialogue(Characters):
    """Counts the texts of all `inputs` of ElevenLabs' dialogues."""

    __slots__ = ()

    def __init__(self, opened: OpenedSession) -> None:
        super().__init__(opened, "inputs")

    def _spoken(self, raw: msgspec.Raw) -> int | None:
        if memoryview(raw).nbytes > MAX_FIELD_BYTES:
            return None
        written = bytes(raw)
        try:
            lines = _lines(written)
        except UNREADABLE:
            return 0
        if written.count(b'"text"') > len(lines) or has_ascii_escape(written):
            return sum(_longest_text(written[start:end]) for start, end in items(written))
        return sum(len(line.text) for line in lines)


def _longest_text(line: bytes) -> int:
    return max((len(text(raw) or "") for raw in Readings(line).of("text")), default=0)


class FluxSpeech(Characters):
    """Reads the billed characters that Deepgram's v2/speak reports for each turn and for the
    session. The current turn is estimated by the texts sent.
    """

    __slots__ = ("_total", "_turns")

    def __init__(self, opened: OpenedSession) -> None:
        super().__init__(opened, "text", "Speak")
        self.received_filter = compile_prefilter('billable_character_count"')
        self._turns: dict[str, int] = {}
        self._total = 0

    def received(self, data: bytes) -> None:
        message = _FLUX_SPEECH.of(data)
        kind = text_of(message.get("type"))
        if kind == "SessionMetadata":
            total = message.get("total_billable_character_count")
            self._total = count_of(total, self.ignored_fields) or self._total
        elif kind in ("SpeechMetadata", "SpeechInterrupted"):
            within = "metadata." if kind == "SpeechInterrupted" else ""
            reported = message.get(f"{within}billable_character_count")
            characters = count_of(reported, self.ignored_fields)
            if characters is not None and len(self._turns) < MAX_PARTS:
                named = text_of(message.get(f"{within}speech_id")) or str(len(self._turns))
                self._turns[named] = characters
                self._sums.clear()

    @property
    def parts(self) -> Parts:
        reported = max(self._total, sum(self._turns.values()))
        current_turn = tuple(
            part._replace(usage=msgspec.structs.replace(part.usage, estimated=True))
            for part in super().parts
        )
        if not reported:
            return current_turn
        return (Part(self.model, Usage(characters=reported)), *current_turn)


_FLUX_SPEECH = Wanted(
    "type", "total_billable_character_count", "billable_character_count", "speech_id",
    "metadata.billable_character_count", "metadata.speech_id",
)  # fmt: skip
