"""Meter WebSockets that turn speech into text: Deepgram, ElevenLabs, Cartesia, AssemblyAI, xAI, and
OpenAI's translations.

Owns the messages that report seconds, and the estimates if there are none: the length of the audio
that the client sent, by its declared format, or otherwise the duration of the session.
"""

from __future__ import annotations

import re

import msgspec

from relay.core.fields import UNREADABLE
from relay.core.meters.documents import Document, Wanted
from relay.core.meters.socket_meter import (
    OpenedSession,
    TimedSession,
    bytes_a_second,
    compile_prefilter,
    has_ascii_escape,
    of_base64,
)
from relay.core.meters.tolerant_json import milliseconds, text_of
from relay.core.usage import Part, Parts, Usage


class HeardAudio(TimedSession):
    """The base of transcription meters. If the provider reports no seconds, they are estimated by
    the audio that the client sent. `audio` is the field with audio in base64; empty if the messages
    are audio.
    """

    __slots__ = ("_audio_key", "_bytes_a_s", "_characters", "reported_ms")

    def __init__(self, opened: OpenedSession, audio: str = "") -> None:
        super().__init__(opened)
        self.reported_ms: int | None = None
        """The length of the audio that the provider reported."""
        self._bytes_a_s = bytes_a_second(
            opened.parameter("encoding") or opened.parameter("audio_format"),
            opened.parameter("sample_rate"),
        )
        self._characters = 0
        """The base64 that the client has sent."""
        self._audio_key = re.compile(rb'"%b"\s*:\s*"' % audio.encode()) if audio else None
        self.sent_filter = compile_prefilter(f'"{audio}"' if audio else "")

    def sent(self, data: bytes) -> None:
        """Count the base64 in a message. Nothing is decoded: base64 has no quotes."""
        if self._audio_key is None:
            return
        found = self._audio_key.search(data)
        if found is None:
            self._characters += len(data) if has_ascii_escape(data) else 0
            return
        start = found.end()
        end = data.find(b'"', start)
        around = data[: found.start()], data[end:]
        if end < 0 or any(
            self._audio_key.search(part) or has_ascii_escape(part) for part in around
        ):
            # The field is repeated. Which value the provider takes is unknown.
            self._characters += len(data)
        else:
            self._characters += end - start

    @property
    def parts(self) -> Parts:
        if self.reported_ms is not None:
            return (Part(self.model, Usage(audio_ms=self.reported_ms)),)
        if not self.opened.client.bytes:
            return ()
        return (Part(self.model, Usage(audio_ms=self.sent_ms, estimated=True)),)

    @property
    def sent_ms(self) -> int:
        """The length of the audio that the client has sent."""
        if self._bytes_a_s is None:
            return self.lasted_ms
        sent_bytes = self.opened.client.bytes
        if self._audio_key is not None:
            sent_bytes = of_base64(self._characters)
        return sent_bytes * 1000 // self._bytes_a_s


class Segments(HeardAudio):
    """Cartesia: adds the durations of all final results."""

    __slots__ = ()
    final = "is_final"
    wanted = Wanted("type", "is_final", "duration")

    def __init__(self, opened: OpenedSession) -> None:
        super().__init__(opened)
        self.received_filter = compile_prefilter("duration")

    def received(self, data: bytes) -> None:
        message = self.wanted.of(data)
        if message.get("is_final") == b"true":
            self._add_segment(message)

    def _add_segment(self, message: Document) -> None:
        if (segment_ms := milliseconds(message.get("duration"), self.ignored_fields)) is not None:
            self.reported_ms = (self.reported_ms or 0) + segment_ms


class DeepgramListen(Segments):
    """Deepgram's v1/listen: adds the segments, or uses the total duration at the end. Each channel
    has segments of its own and is billed; the total is the duration of one channel.
    """

    __slots__ = ("_channels", "_whole_ms")
    wanted = Wanted("type", "is_final", "duration", "channel_index")

    def __init__(self, opened: OpenedSession) -> None:
        super().__init__(opened)
        self._channels = 1
        self._whole_ms: int | None = None
        if (channels := opened.parameter("channels")).isdecimal() and self._bytes_a_s is not None:
            several = opened.parameter("multichannel") == "true"
            self._bytes_a_s *= 1 if several else min(max(int(channels[:3]), 1), 64)

    def received(self, data: bytes) -> None:
        message = self.wanted.of(data)
        if text_of(message.get("type")) == "Metadata":
            whole_ms = milliseconds(message.get("duration"), self.ignored_fields)
            self._whole_ms = whole_ms if whole_ms is not None else self._whole_ms
        elif message.get("is_final") == b"true":
            self._channels = max(self._channels, _channels(message.get("channel_index")))
            self._add_segment(message)

    @property
    def parts(self) -> Parts:
        if self._whole_ms is None:
            return super().parts
        return (Part(self.model, Usage(audio_ms=self._whole_ms * self._channels)),)


_channel_index = msgspec.json.Decoder(tuple[int, int]).decode


def _channels(raw: bytes | None) -> int:
    """Return the number of channels from `[index, number of channels]`."""
    try:
        return min(max(_channel_index(raw or b"")[1], 1), 64)
    except UNREADABLE:
        return 1


class FluxListen(HeardAudio):
    """Deepgram's v2/listen: reports the end of its results; the client may have sent more audio."""

    __slots__ = ("_until_ms",)

    def __init__(self, opened: OpenedSession) -> None:
        super().__init__(opened)
        self.received_filter = compile_prefilter('"audio_window_end"')
        self._until_ms = 0

    def received(self, data: bytes) -> None:
        until_ms = milliseconds(_WINDOW.of(data).get("audio_window_end"), self.ignored_fields)
        self._until_ms = max(self._until_ms, until_ms or 0)

    @property
    def sent_ms(self) -> int:
        if self._bytes_a_s is None and self._until_ms:
            return self._until_ms
        return max(super().sent_ms, self._until_ms)


_WINDOW = Wanted("audio_window_end")


class Scribe(HeardAudio):
    """ElevenLabs' transcription and translation of live speech: reports the audio format."""

    __slots__ = ()

    def __init__(self, opened: OpenedSession) -> None:
        super().__init__(opened, "audio_base_64")
        self.received_filter = compile_prefilter('"session_started"')

    def received(self, data: bytes) -> None:
        message = _STARTED.of(data)
        encoding = text_of(message.get("config.audio_format")) or ""
        rate = (message.get("config.sample_rate") or b"").decode("ascii", "replace")
        self._bytes_a_s = bytes_a_second(encoding, rate) or self._bytes_a_s
        self.model = self.model or text_of(message.get("config.model_id"))
        self.received_filter = None


_STARTED = Wanted("config.audio_format", "config.sample_rate", "config.model_id")


class Translations(HeardAudio):
    """OpenAI's realtime translations, whose audio is always 24 kHz PCM."""

    __slots__ = ()

    def __init__(self, opened: OpenedSession) -> None:
        super().__init__(opened, "audio")
        self._bytes_a_s = bytes_a_second("pcm16", "24000")


class Closing(HeardAudio):
    """A session that reports the total in one message at its end. `fields` are the fields with the
    seconds; the first one that is present counts.
    """

    __slots__ = ("_fields", "_type", "_wanted")

    def __init__(self, opened: OpenedSession, type_: str, *fields: str) -> None:
        super().__init__(opened)
        self.received_filter = compile_prefilter(f'"{type_}"')
        self._type, self._fields = type_, fields
        self._wanted = Wanted("type", *fields)

    def received(self, data: bytes) -> None:
        message = self._wanted.of(data)
        if text_of(message.get("type")) != self._type:
            return
        for name in self._fields:
            if (reported_ms := milliseconds(message.get(name), self.ignored_fields)) is not None:
                self.reported_ms = reported_ms
                return


class AssemblyAI(Closing):
    """AssemblyAI: bills the duration of a session, and reports it if the client ends it."""

    __slots__ = ()

    def __init__(self, opened: OpenedSession) -> None:
        super().__init__(
            opened, "Termination", "session_duration_seconds", "audio_duration_seconds"
        )

    @property
    def sent_ms(self) -> int:
        return self.lasted_ms
