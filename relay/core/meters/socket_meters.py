"""Choose the meter of a WebSocket session.

Owns the table of meters by wire format and endpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from relay.core.meters.google_live import GoogleLive
from relay.core.meters.openai_live import Live
from relay.core.meters.openai_realtime import Realtime
from relay.core.meters.openai_responses_socket import Responses
from relay.core.meters.socket_meter import OpenedSession, SocketMeter, TimedSession, UnknownUsage
from relay.core.meters.speech_sockets import Characters, Dialogue, FluxSpeech
from relay.core.meters.transcription_sockets import (
    AssemblyAI,
    Closing,
    DeepgramListen,
    FluxListen,
    HeardAudio,
    Scribe,
    Segments,
    Translations,
)

_READERS: dict[str, tuple[tuple[str, Callable[[OpenedSession], SocketMeter]], ...]] = {
    "openai": (
        (r"(?:^|/)responses$", Responses),
        (r"live/sessions", Live),
        (r"realtime/translations$", Translations),
        # xAI
        (r"(?:^|/)stt$", lambda opened: Closing(opened, "transcript.done", "duration")),
        (r"(?:^|/)tts$", partial(Characters, field_="delta", type_="text.delta")),
        ("", Realtime),
    ),
    "google": ((r"BidiGenerateMusic$", TimedSession), ("", GoogleLive)),
    "elevenlabs": (
        (r"text-to-speech/", partial(Characters, field_="text")),
        (r"text-to-dialogue/", Dialogue),
        (r"speech-to-text/realtime|translation/realtime", Scribe),
        (r"convai/conversation$", TimedSession),
        ("", UnknownUsage),
    ),
    "cartesia": (
        (r"stt/turns", HeardAudio),
        (r"stt", Segments),
        (r"tts", partial(Characters, field_="transcript")),
        ("", UnknownUsage),
    ),
    "deepgram": (
        (r"v2/speak", FluxSpeech),
        (r"speak", partial(Characters, field_="text", type_="Speak")),
        (r"v2/listen", FluxListen),
        (r"listen", DeepgramListen),
        (r"agent", TimedSession),
        ("", UnknownUsage),
    ),
    "assemblyai": (("", AssemblyAI),),
    "fal": (("", UnknownUsage),),
}
"""The first meter whose pattern matches the endpoint is used."""
_COMPILED = {
    name: [(re.compile(pattern), reader) for pattern, reader in readers]
    for name, readers in _READERS.items()
}


def socket_meter(format_: str, opened: OpenedSession) -> SocketMeter | None:
    """Return the meter of a session; None for a format without meters."""
    endpoint = opened.endpoint.rstrip("/")
    for pattern, reader in _COMPILED.get(format_, ()):
        if pattern.search(endpoint) is not None:
            return reader(opened)
    return None
