"""Sockets that make text from speech: Deepgram, ElevenLabs, Cartesia, AssemblyAI, xAI, and OpenAI's
translations.

Owns: which of their messages tell seconds, and what stands in where none does: the length of the
audio that the client sent, by its declared format, or else how long the session lasted. Both are
estimates.
"""

from __future__ import annotations

import msgspec

from relay.core.fields import UNREADABLE, field
from relay.core.meters.documents import Document, Wanted
from relay.core.meters.socket_meter import (
    OpenedSession,
    Payload,
    TimedSession,
    bytes_a_second,
    compile_prefilter,
    of_base64,
)
from relay.core.meters.tolerant_json import milliseconds, text_of
from relay.core.usage import Part, Parts, Usage


class HeardAudio(TimedSession):
    """Text from speech. Without a word from the provider of how much it heard it is as long as the
    audio that was sent: `audio` names the field that has it in base64, none if the messages are it.
    """

    __slots__ = ("_audio", "_bytes_a_s", "_payload", "reported_ms")

    def __init__(self, opened: OpenedSession, audio: str = "") -> None:
        super().__init__(opened)
        self.reported_ms: int | None = None
        """As the provider says."""
        self._bytes_a_s = bytes_a_second(
            opened.parameter("encoding") or opened.parameter("audio_format"),
            opened.parameter("sample_rate"),
        )
        self._payload: Payload | None = None
        self._audio = audio
        if audio:
            self._payload = Payload(opened.client)
            self.sent_filter = compile_prefilter(f'"{audio}"')

    def sent(self, data: bytes) -> None:
        """One message tells how all are written."""
        raw = field(data, self._audio)
        if self._payload is not None and memoryview(raw).nbytes:
            self._payload.sample(data, memoryview(raw).nbytes - 2)
            self.sent_filter = None

    @property
    def parts(self) -> Parts:
        if self.reported_ms is not None:
            return (Part(self.model, Usage(audio_ms=self.reported_ms)),)
        if not self.opened.client.bytes:
            return ()
        return (Part(self.model, Usage(audio_ms=self.sent_ms, estimated=True)),)

    @property
    def sent_ms(self) -> int:
        """How long the audio is that the client has sent."""
        if self._bytes_a_s is None:
            return self.lasted_ms
        sent_bytes = self.opened.client.bytes
        if self._payload is not None:
            sent_bytes = of_base64(self._payload.bytes)
        return sent_bytes * 1000 // self._bytes_a_s


class Segments(HeardAudio):
    """Each final result tells how long its piece of audio is. Cartesia."""

    __slots__ = ()
    final = "is_final"
    wanted = Wanted("type", "is_final", "duration")

    def __init__(self, opened: OpenedSession) -> None:
        super().__init__(opened)
        self.received_filter = compile_prefilter("duration")

    def received(self, data: bytes) -> None:
        message = self.wanted.of(data)
        if message.get("is_final") == b"true":
            self._add_piece(message)

    def _add_piece(self, message: Document) -> None:
        if (heard_ms := milliseconds(message.get("duration"), self.ignored_fields)) is not None:
            self.reported_ms = (self.reported_ms or 0) + heard_ms


class DeepgramListen(Segments):
    """Deepgram's v1/listen: beside the segments the whole at the end. Each of several channels has
    segments of its own and is billed; the whole is as long as one of them.
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
            self._add_piece(message)

    @property
    def parts(self) -> Parts:
        if self._whole_ms is None:
            return super().parts
        return (Part(self.model, Usage(audio_ms=self._whole_ms * self._channels)),)


_channel_index = msgspec.json.Decoder(tuple[int, int]).decode


def _channels(raw: bytes | None) -> int:
    """How many there are, of `[which, of how many]`."""
    try:
        return min(max(_channel_index(raw or b"")[1], 1), 64)
    except UNREADABLE:
        return 1


class FluxListen(HeardAudio):
    """Deepgram's v2/listen tells where its results end; what was sent may reach further."""

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
    """ElevenLabs' transcription and translation of live speech: the session tells its format."""

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
    """OpenAI's realtime translations, of 24 kHz PCM alone."""

    __slots__ = ()

    def __init__(self, opened: OpenedSession) -> None:
        super().__init__(opened, "audio")
        self._bytes_a_s = bytes_a_second("pcm16", "24000")


class Closing(HeardAudio):
    """What tells the whole in one message at its end: the fields to look for, the best first."""

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
    """Billed by how long the session was open, which is told when the client ends it."""

    __slots__ = ()

    def __init__(self, opened: OpenedSession) -> None:
        super().__init__(
            opened, "Termination", "session_duration_seconds", "audio_duration_seconds"
        )

    @property
    def sent_ms(self) -> int:
        return self.lasted_ms
