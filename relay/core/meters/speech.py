"""Read usage of speech and transcription from the vendors that bill seconds or characters:
Deepgram, AssemblyAI, ElevenLabs, Cartesia.

Owns the fields of responses with the length of audio, and the fields of requests with text for
speech.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import msgspec

from relay.core.fields import UNREADABLE
from relay.core.meters.documents import Document, Wanted
from relay.core.meters.format_reader import FormatReader
from relay.core.meters.inner_errors import ERROR_PLACES
from relay.core.meters.sent_call import SentCall
from relay.core.meters.tolerant_json import IgnoredFields, milliseconds, text_of
from relay.core.usage import Part, Usage

MAX_SPOKEN_BYTES = 1024 * 1024
SPOKEN = {"openai": "input", "elevenlabs": "text", "cartesia": "transcript", "deepgram": "text"}
"""The field of a request with text for speech, by wire format."""


class HeardAudio(FormatReader):
    """Reads seconds of audio from a response; the last number counts. A base class."""

    needle = b'"'
    places: ClassVar[tuple[str, ...]]

    def __init__(self, sent: SentCall, ignored_fields: IgnoredFields) -> None:
        super().__init__(sent, ignored_fields)
        self._heard_ms: int | None = None

    def read(self, document: Document) -> None:
        for place in self.places:
            heard_ms = milliseconds(document.get(place), self._ignored_fields)
            if heard_ms is not None:
                self._heard_ms = heard_ms

    def parts(self) -> Iterator[Part]:
        if self._heard_ms is not None:
            yield Part(self.model, Usage(audio_ms=self._heard_ms))


class Cartesia(HeardAudio):
    """Reads `duration`."""

    wanted, places = Wanted("duration", *ERROR_PLACES), ("duration",)


class ElevenLabs(HeardAudio):
    """Reads `audio_duration_secs`, the sum of all channels."""

    wanted = Wanted("audio_duration_secs", "transcription_id", "request_id", *ERROR_PLACES)
    places = ("audio_duration_secs",)

    def read(self, document: Document) -> None:
        """Read a transcript, or the acknowledgement of one that will be sent to a webhook."""
        super().read(document)
        self.object_id = text_of(document.get("transcription_id")) or ""
        self.is_final = self._heard_ms is not None or "request_id" not in document


class AssemblyAI(HeardAudio):
    """Reads `audio_duration` of a finished transcript."""

    wanted = Wanted("id", "status", "audio_duration", *ERROR_PLACES)
    places = ("audio_duration",)

    def read(self, document: Document) -> None:
        super().read(document)
        self.object_id = text_of(document.get("id")) or ""
        status = text_of(document.get("status"))
        self.is_final = status not in ("queued", "processing")


class Deepgram(HeardAudio):
    """Reads `metadata.duration`."""

    wanted, places = Wanted("metadata.duration", *ERROR_PLACES), ("metadata.duration",)


def characters(format_: str, sent: SentCall) -> int | None:
    """Return the number of characters of text for speech in a request; None if unknown."""
    name = SPOKEN.get(format_)
    if name is None or len(sent.body) > MAX_SPOKEN_BYTES:
        return None
    try:
        text: str | None = _FIELDS[name].decode(sent.body).text
    except UNREADABLE:
        return None
    return None if text is None else len(text)


def _field(name: str) -> msgspec.json.Decoder[Any]:
    fields = [("text", str | None, None)]
    return msgspec.json.Decoder(msgspec.defstruct("Spoken", fields, rename={"text": name}))


_FIELDS = {name: _field(name) for name in set(SPOKEN.values())}
