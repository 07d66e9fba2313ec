"""Turns of a spoken session: how long somebody who stopped talking, or asked, waited for the first
sound or word, and who interrupted whom.

Owns: the marks by which each vendor's messages tell it. Only the beginning of a message is looked
at, where these marks stand; nothing is parsed. Reads no clock: times are given.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec

MOST_TURNS = 200
_LOOKED_AT_BYTES = 256


class Turn(msgspec.Struct, frozen=True, omit_defaults=True):
    """One answer. Milliseconds."""

    at_ms: float
    """When the speech ended, or the request came, since the session began."""
    wait_ms: float
    """From then to the first sound or word."""
    own_ms: float
    """How long the relay held that first message."""
    first: str
    """What came first: `audio` or `text`."""
    interrupted: bool = False


class _Marks:
    """Patterns by what they mean, and a `hint` that stands in all of them: most messages have
    none of it, and a pattern that begins with a letter of its own is looked for ten times as fast.
    """

    __slots__ = ("_hint", "_pattern")

    def __init__(self, hint: str, **patterns: str) -> None:
        named = "|".join(f"(?P<{kind}>{pattern})" for kind, pattern in patterns.items())
        self._hint = re.compile(hint.encode()).search
        self._pattern = re.compile(named.encode()).search

    def of(self, data: bytes) -> str | None:
        """What the beginning of this message means; None if nothing."""
        if self._hint(data, 0, _LOOKED_AT_BYTES) is None:
            return None
        found = self._pattern(data, 0, _LOOKED_AT_BYTES)
        return found.lastgroup if found is not None else None


def _typed(*names: str) -> str:
    """A JSON message of one of these types."""
    return rf'"(?:type|message_type)"\s*:\s*"(?:{"|".join(names)})"'


_JSON_BEGINS = (b"{", b" ", b"\n", b"\r", b"\t")
_NEVER = _Marks(r"(?!)", none=r"(?!)")
_SOUND_AS_IT_IS = frozenset({"cartesia", "deepgram", "fal"})
"""These send sound in binary frames, as it is."""

# Of a client's messages: `asks`, `cuts`. Of a provider's: `asks` (it heard the speech end), `began`
# (it heard somebody begin to speak), `audio`, `text`, `ends`, `cuts`.
_SENT: dict[str, _Marks] = {
    "openai": _Marks(
        r"\.c",
        asks=_typed(r"input_audio_buffer\.commit", r"response\.create"),
        cuts=_typed(r"response\.cancel"),
    ),
    "google": _Marks(
        r'"(?:a|client)', asks=r'"(?:activityEnd|audioStreamEnd|clientContent|client_content)"\s*:'
    ),
    "elevenlabs": _Marks(
        r'"(?:user_message|text)"', asks=r'"type"\s*:\s*"user_message"|"text"\s*:\s*"[^"]*[^"\s]'
    ),
    "cartesia": _Marks(
        r'"(?:transcript|cancel)"',
        asks=r'"transcript"\s*:\s*"[^"]',
        cuts=r'"cancel"\s*:\s*true',
    ),
    "deepgram": _Marks(
        r'"(?:Speak|InjectUserMessage|Clear)"',
        asks=_typed("Speak", "InjectUserMessage"),
        cuts=_typed("Clear"),
    ),
    "fal": _Marks(r"\A", asks=r"\A"),
}
_RECEIVED: dict[str, _Marks] = {
    "openai": _Marks(
        r"\.(?:speech_st|(?:(?<=audio\.)|(?<=text\.))delta"
        r"|(?<=response\.)(?:done|completed|incomplete|failed))",
        asks=_typed(r"input_audio_buffer\.speech_stopped"),
        began=_typed(r"input_audio_buffer\.speech_started"),
        audio=_typed(r"response\.(?:output_)?audio\.delta"),
        text=_typed(r"response\.(?:output_)?text\.delta"),
        ends=_typed(r"response\.(?:done|completed|incomplete|failed)"),
    ),
    "google": _Marks(
        r'"(?:interrupted|inlineData|modelTurn|turnComplete|inputTranscription)"',
        cuts=r'"interrupted"\s*:\s*true',
        audio=r'"inlineData"\s*:',
        text=r'"modelTurn"\s*:(?!.*"inlineData")',
        ends=r'"turnComplete"\s*:\s*true',
        asks=r'"inputTranscription"\s*:',
    ),
    "elevenlabs": _Marks(
        r'"(?:audio|user_transcript|interruption|agent_response|isFinal)',
        asks=_typed("user_transcript"),
        cuts=_typed("interruption"),
        audio=_typed("audio") + r'|"audio"\s*:\s*"[^"]',
        text=_typed("agent_response"),
        ends=r'"isFinal"\s*:\s*true|' + _typed("agent_response_complete"),
    ),
    "cartesia": _Marks(r'"(?:chunk|done)"', audio=_typed("chunk"), ends=_typed("done")),
    "deepgram": _Marks(
        r'"(?:ConversationText|\w+StartedSpeaking|AgentAudioDone|Flushed)"',
        asks=r'"type"\s*:\s*"ConversationText".*"role"\s*:\s*"user"|'
        r'"role"\s*:\s*"user".*"type"\s*:\s*"ConversationText"',
        began=_typed("UserStartedSpeaking"),
        audio=_typed("AgentStartedSpeaking"),
        ends=_typed("AgentAudioDone", "Flushed"),
    ),
    "fal": _Marks(r"\A", audio=r"\A"),
}


class Turns:
    """Sees the messages of a session, both ways. Times are of one clock, in seconds."""

    __slots__ = (
        "_as_it_is", "_asked_s", "_began_s", "_received", "_sent", "_speaking", "found",
        "interruptions",
    )  # fmt: skip

    def __init__(self, meter: str, began_s: float) -> None:
        self._sent = _SENT.get(meter, _NEVER)
        self._received = _RECEIVED.get(meter, _NEVER)
        self._as_it_is = meter in _SOUND_AS_IT_IS
        self._began_s = began_s
        self._asked_s: float | None = None
        self._speaking = False
        self.found: list[Turn] = []
        self.interruptions = 0

    def sent(self, data: bytes, at_s: float) -> None:
        """A message of the client's."""
        kind = self._sent.of(data)
        if kind is None:
            return
        if kind == "cuts":
            self._cut()
        elif self._asked_s is None:
            self._asked_s = at_s

    def received(self, data: bytes, came_s: float, clock: Callable[[], float]) -> None:
        """A message of the provider's: when it came; `clock` tells when it has gone down."""
        if self._as_it_is and data[:1] not in _JSON_BEGINS:
            kind: str | None = "audio"
        else:
            kind = self._received.of(data)
        if kind is None:
            return
        if kind == "audio" or kind == "text":
            if self._asked_s is not None:
                self._answered(kind, came_s, clock())
            self._speaking = True
        elif kind == "asks":
            if self._asked_s is None and not self._speaking:
                self._asked_s = came_s
        elif kind == "ends":
            self._speaking = False
        else:
            self._asked_s = None
            self._cut()

    def _answered(self, first: str, came_s: float, passed_s: float) -> None:
        asked_s = self._asked_s
        assert asked_s is not None
        self._asked_s = None
        if len(self.found) < MOST_TURNS:
            self.found.append(
                Turn(
                    round((asked_s - self._began_s) * 1e3, 2),
                    round((came_s - asked_s) * 1e3, 2),
                    round((passed_s - came_s) * 1e3, 3),
                    first,
                )
            )

    def _cut(self) -> None:
        """Somebody began to speak, or the client cancelled: an interruption, if it was answered."""
        if not self._speaking:
            return
        self._speaking = False
        self.interruptions += 1
        if self.found:
            self.found[-1] = msgspec.structs.replace(self.found[-1], interrupted=True)
