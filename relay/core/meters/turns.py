"""Measure the turns of a spoken session: the time from the end of the user's speech, or a request,
to the first audio or text, and interruptions.

Owns the patterns of each vendor's messages for this. Only the beginning of a message is searched,
and nothing is parsed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

import msgspec

from relay.core.meters.socket_meter import compile_prefilter

MAX_TURNS = 200
HEAD_BYTES = 256
"""The part of a message that is searched."""


class Turn(msgspec.Struct, frozen=True, omit_defaults=True):
    """One answer of the model. Times are in milliseconds."""

    at_ms: float
    """End of the user's speech, or time of the request, since the start of the session."""
    wait_ms: float
    """Time from then to the first audio or text."""
    overhead_ms: float
    """Time that the relay added to that first message."""
    first: str
    """What came first: `audio` or `text`."""
    interrupted: bool = False


class _Marks:
    """Patterns by their meaning. `first` is a prefilter that finds a superset of them: most
    messages match nothing, and a pattern with a distinctive start is found ten times as fast.
    `between` is the prefilter during an answer, when its deltas mean nothing; "" matches nothing.
    """

    __slots__ = ("_pattern", "between", "prefilter")

    def __init__(self, first: str, between: str | None = None, **patterns: str) -> None:
        named = "|".join(f"(?P<{kind}>{pattern})" for kind, pattern in patterns.items())
        self._pattern = re.compile(named.encode()).search
        self.prefilter = compile_prefilter(first)
        self.between = self.prefilter if between is None else compile_prefilter(between)

    def of(self, data: bytes) -> str | None:
        """Return the meaning of the beginning of a message; None if it has none."""
        found = self._pattern(data, 0, HEAD_BYTES)
        return found.lastgroup if found is not None else None


def _typed(*names: str) -> str:
    """Return a pattern for JSON messages of these types."""
    return rf'"(?:type|message_type)"\s*:\s*"(?:{"|".join(names)})"'


_NOTHING = _Marks("", none=r"(?!)")
_RAW_AUDIO = r"\A[^{ \t\r\n]"
"""Audio in a binary frame, which may begin with any byte but those that JSON begins with."""

# Meanings of the client's messages: `asks`, `cuts`. Meanings of the provider's messages: `asks`
# (the user's speech ended), `began` (the user's speech began), `audio`, `text`, `ends`, `cuts`.
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
        r'\.(?:delta"|speech_st|done"|completed"|incomplete"|failed")',
        between=r'\.(?:speech_st|done"|completed"|incomplete"|failed")',
        asks=_typed(r"input_audio_buffer\.speech_stopped"),
        began=_typed(r"input_audio_buffer\.speech_started"),
        audio=_typed(r"response\.(?:output_)?audio\.delta"),
        text=_typed(r"response\.(?:output_)?text\.delta"),
        ends=_typed(r"response\.(?:done|completed|incomplete|failed)"),
    ),
    "google": _Marks(
        r'"(?:interrupted|inlineData|modelTurn|turnComplete|inputTranscription)"',
        between=r'"(?:interrupted|turnComplete)"',
        cuts=r'"interrupted"\s*:\s*true',
        audio=r'"inlineData"\s*:',
        text=r'"modelTurn"\s*:(?!.*"inlineData")',
        ends=r'"turnComplete"\s*:\s*true',
        asks=r'"inputTranscription"\s*:',
    ),
    "elevenlabs": _Marks(
        r'"(?:audio|user_transcript|interruption|agent_response|isFinal)',
        between=r'"(?:interruption|agent_response_complete|isFinal)',
        asks=_typed("user_transcript"),
        cuts=_typed("interruption"),
        audio=_typed("audio") + r'|"audio"\s*:\s*"[^"]',
        text=_typed("agent_response"),
        ends=r'"isFinal"\s*:\s*true|' + _typed("agent_response_complete"),
    ),
    "cartesia": _Marks(
        rf'{_RAW_AUDIO}|"(?:chunk|done)"',
        between=r'"done"',
        audio=rf"{_RAW_AUDIO}|" + _typed("chunk"),
        ends=_typed("done"),
    ),
    "deepgram": _Marks(
        rf'{_RAW_AUDIO}|"(?:ConversationText|\w+StartedSpeaking|AgentAudioDone|Flushed)"',
        between=r'"(?:UserStartedSpeaking|AgentAudioDone|Flushed)"',
        asks=r'"type"\s*:\s*"ConversationText".*"role"\s*:\s*"user"|'
        r'"role"\s*:\s*"user".*"type"\s*:\s*"ConversationText"',
        began=_typed("UserStartedSpeaking"),
        audio=rf"{_RAW_AUDIO}|" + _typed("AgentStartedSpeaking"),
        ends=_typed("AgentAudioDone", "Flushed"),
    ),
    "fal": _Marks(r"\A", between="", audio=r"\A"),
}


class Stamped(Protocol):
    """One side of a session."""

    message_s: float
    """Time of its last message."""


class Turns:
    """Reads the messages of a session, in both directions, after they were forwarded: those whose
    first HEAD_BYTES match its prefilter. Times are in seconds of one clock.
    """

    __slots__ = (
        "_began_s", "_client", "_clock", "_provider", "_received", "_sent", "_speaking",
        "_waiting_since_s", "found", "interruptions", "received_filter", "sent_filter", "under_way",
    )  # fmt: skip

    def __init__(
        self,
        format_: str,
        began_s: float,
        client: Stamped,
        provider: Stamped,
        clock: Callable[[], float],
    ) -> None:
        self._sent = _SENT.get(format_, _NOTHING)
        self._received = _RECEIVED.get(format_, _NOTHING)
        self.sent_filter, self.received_filter = self._sent.prefilter, self._received.prefilter
        self._client, self._provider, self._clock = client, provider, clock
        self._began_s = began_s
        self._waiting_since_s: float | None = None
        self._speaking = False
        self.under_way = False
        """True during an answer whose beginning was measured."""
        self.found: list[Turn] = []
        self.interruptions = 0

    def sent(self, data: bytes) -> None:
        """Read a message of the client."""
        kind = self._sent.of(data)
        if kind is None:
            return
        if kind == "cuts":
            self._interrupt()
        elif self._waiting_since_s is None:
            self._waiting_since_s = self._client.message_s
        self._choose_filter()

    def received(self, data: bytes) -> None:
        """Read a message of the provider."""
        kind = self._received.of(data)
        if kind is None:
            return
        if kind == "audio" or kind == "text":
            if self._waiting_since_s is not None:
                self._record_turn(kind)
            self._speaking = True
        elif kind == "asks":
            if self._waiting_since_s is None and not self._speaking:
                self._waiting_since_s = self._provider.message_s
        elif kind == "ends":
            self._speaking = False
        else:
            self._waiting_since_s = None
            self._interrupt()
        self._choose_filter()

    def _choose_filter(self) -> None:
        self.under_way = self._speaking and self._waiting_since_s is None
        self.received_filter = (
            self._received.between if self.under_way else self._received.prefilter
        )

    def _record_turn(self, first: str) -> None:
        came_s, passed_s = self._provider.message_s, self._clock()
        waiting_since_s = self._waiting_since_s
        assert waiting_since_s is not None
        self._waiting_since_s = None
        if len(self.found) < MAX_TURNS:
            self.found.append(
                Turn(
                    round((waiting_since_s - self._began_s) * 1e3, 2),
                    round((came_s - waiting_since_s) * 1e3, 2),
                    round((passed_s - came_s) * 1e3, 3),
                    first,
                )
            )

    def _interrupt(self) -> None:
        """Count an interruption if the user spoke, or the client cancelled, during an answer."""
        if not self._speaking:
            return
        self._speaking = False
        self.interruptions += 1
        if self.found:
            self.found[-1] = msgspec.structs.replace(self.found[-1], interrupted=True)
