"""Turns of a spoken session: how long somebody who stopped talking, or asked, waited for the first
sound or word, and who interrupted whom.

Owns: the marks by which each vendor's messages tell it. Only the beginning of a message is looked
at, where these marks stand; nothing is parsed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

import msgspec

from relay.core.meters.socket_meter import compile_prefilter

MAX_TURNS = 200
HEAD_BYTES = 256
"""The beginning of a message."""


class Turn(msgspec.Struct, frozen=True, omit_defaults=True):
    """One answer. Milliseconds."""

    at_ms: float
    """When the speech ended, or the request came, since the session began."""
    wait_ms: float
    """From then to the first sound or word."""
    overhead_ms: float
    """How long the relay held that first message."""
    first: str
    """What came first: `audio` or `text`."""
    interrupted: bool = False


class _Marks:
    """Patterns by what they mean. A `prefilter` finds all of them: most messages have none of it,
    and a pattern that begins with a letter of its own is looked for ten times as fast. `between`
    is the prefilter while an answer is under way, when its pieces mean nothing; "" if nothing does.
    """

    __slots__ = ("_pattern", "between", "prefilter")

    def __init__(self, first: str, between: str | None = None, **patterns: str) -> None:
        named = "|".join(f"(?P<{kind}>{pattern})" for kind, pattern in patterns.items())
        self._pattern = re.compile(named.encode()).search
        self.prefilter = compile_prefilter(first)
        self.between = self.prefilter if between is None else compile_prefilter(between)

    def of(self, data: bytes) -> str | None:
        """What the beginning of this message means; None if nothing."""
        found = self._pattern(data, 0, HEAD_BYTES)
        return found.lastgroup if found is not None else None


def _typed(*names: str) -> str:
    """A JSON message of one of these types."""
    return rf'"(?:type|message_type)"\s*:\s*"(?:{"|".join(names)})"'


_NOTHING = _Marks("", none=r"(?!)")
_AS_IT_IS = r"\A[^{ \t\r\n]"
"""Sound in a binary frame, which may begin with any byte: but not as JSON does."""

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
        rf'{_AS_IT_IS}|"(?:chunk|done)"',
        between=r'"done"',
        audio=rf"{_AS_IT_IS}|" + _typed("chunk"),
        ends=_typed("done"),
    ),
    "deepgram": _Marks(
        rf'{_AS_IT_IS}|"(?:ConversationText|\w+StartedSpeaking|AgentAudioDone|Flushed)"',
        between=r'"(?:UserStartedSpeaking|AgentAudioDone|Flushed)"',
        asks=r'"type"\s*:\s*"ConversationText".*"role"\s*:\s*"user"|'
        r'"role"\s*:\s*"user".*"type"\s*:\s*"ConversationText"',
        began=_typed("UserStartedSpeaking"),
        audio=rf"{_AS_IT_IS}|" + _typed("AgentStartedSpeaking"),
        ends=_typed("AgentAudioDone", "Flushed"),
    ),
    "fal": _Marks(r"\A", between="", audio=r"\A"),
}


class Stamped(Protocol):
    """A side of a session."""

    message_s: float
    """When its last message came."""


class Turns:
    """Sees the messages of a session, both ways, after they have passed: those in whose first
    HEAD_BYTES its prefilter finds something. Times are of one clock, in seconds.
    """

    __slots__ = (
        "_asked_s", "_began_s", "_client", "_clock", "_provider", "_received", "_sent", "_speaking",
        "found", "interruptions", "received_filter", "sent_filter", "under_way",
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
        self._asked_s: float | None = None
        self._speaking = False
        self.under_way = False
        """An answer is, that nobody waits for any more."""
        self.found: list[Turn] = []
        self.interruptions = 0

    def sent(self, data: bytes) -> None:
        """A message of the client's."""
        kind = self._sent.of(data)
        if kind is None:
            return
        if kind == "cuts":
            self._cut()
        elif self._asked_s is None:
            self._asked_s = self._client.message_s
        self._choose_filter()

    def received(self, data: bytes) -> None:
        """A message of the provider's."""
        kind = self._received.of(data)
        if kind is None:
            return
        if kind == "audio" or kind == "text":
            if self._asked_s is not None:
                self._answered(kind)
            self._speaking = True
        elif kind == "asks":
            if self._asked_s is None and not self._speaking:
                self._asked_s = self._provider.message_s
        elif kind == "ends":
            self._speaking = False
        else:
            self._asked_s = None
            self._cut()
        self._choose_filter()

    def _choose_filter(self) -> None:
        self.under_way = self._speaking and self._asked_s is None
        self.received_filter = (
            self._received.between if self.under_way else self._received.prefilter
        )

    def _answered(self, first: str) -> None:
        asked_s, came_s, passed_s = self._asked_s, self._provider.message_s, self._clock()
        assert asked_s is not None
        self._asked_s = None
        if len(self.found) < MAX_TURNS:
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
