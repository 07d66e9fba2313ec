"""What every meter of a WebSocket session has: the parts it was told, and what the session has
carried, by which it estimates where the provider tells nothing.

Owns: SocketMeter, the base of all readers of sessions, and the estimate from counted bytes. Which
reader reads which session is socket_meters.py's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from relay.core import paths
from relay.core.meters.tolerant_json import IgnoredFields
from relay.core.usage import Part, Parts, Usage

MAX_PARTS = 1000
"""So many objects of a session are told apart; what follows is added up."""


Prefilter = Callable[..., re.Match[bytes] | None]
"""One search in C that says whether a message can matter: to call a meter for every message would
cost five times as much once other work has gone through the CPU's caches. Called with bytes, and
optionally with start and end.
"""


def compile_prefilter(pattern: str) -> Prefilter | None:
    """A search for a pattern; None for an empty one: nothing matters."""
    return re.compile(pattern.encode()).search if pattern else None


class SideCounts(Protocol):
    """One side of a session: what it has sent so far."""

    messages: int
    bytes: int


@dataclass(frozen=True, slots=True)
class OpenedSession:
    """A session that was opened, and its two sides; `clock` tells seconds."""

    endpoint: str
    query: str
    """Raw."""
    model: str | None
    """As the URL names it."""
    client: SideCounts
    provider: SideCounts
    clock: Callable[[], float]

    def parameter(self, name: str) -> str:
        """A parameter of the URL; empty if it is not there."""
        return paths.query_value(self.query, name)


class SocketMeter:
    """Sees nothing by itself. It is shown the messages in which its prefilter finds something:
    those that the client sent by `sent`, those of the provider by `received`.
    """

    has_error = False
    """Errors of a session are its client's to judge: it may go on after one."""
    searched_bytes = 256 * 1024
    """A larger message is read without the prefilter, which is slower than to read it."""
    __slots__ = (
        "_by_key",
        "_sums",
        "ignored_fields",
        "model",
        "opened",
        "pieces",
        "received_filter",
        "requested_model",
        "sent_filter",
    )  # fmt: skip

    def __init__(self, opened: OpenedSession) -> None:
        self.opened = opened
        self.sent_filter: Prefilter | None = None
        self.received_filter: Prefilter | None = None
        self.pieces: tuple[bytes, ...] = ()
        """How messages begin that are pieces of an answer and tell nothing else."""
        self.requested_model: str | None = None
        """The model that the client's messages named first."""
        self.model = opened.model
        """The model that answers."""
        self.ignored_fields = IgnoredFields()
        self._by_key: dict[str, Part] = {}
        self._sums: dict[tuple[object, ...], Part] = {}

    def sent(self, data: bytes) -> None:
        """A message of the client's."""

    def received(self, data: bytes) -> None:
        """A message of the provider's."""

    @property
    def ignored(self) -> int:
        """How many fields were not read though they may tell usage."""
        return self.ignored_fields.count

    @property
    def parts(self) -> Parts:
        """What it came to so far, by model, tier and object: each has its own price."""
        reported = (*self._by_key.values(), *self._sums.values())
        return tuple(part if part.model else part._replace(model=self.model) for part in reported)

    def add(self, part: Part, key: str = "") -> None:
        """Add a part, by default of the session's model; of one `key`, the last part counts."""
        if key and (key in self._by_key or len(self._by_key) < MAX_PARTS):
            self._by_key[key] = part
            return
        usage = part.usage
        like: tuple[object, ...] = (
            part.model, usage.service_tier, usage.billed_nano_usd is None, usage.incomplete,
            usage.estimated,
        )  # fmt: skip
        if like not in self._sums and len(self._sums) >= _MAX_SUMS:
            part, like = part._replace(model=_OTHERS), (_OTHERS,)
        before = self._sums.get(like)
        self._sums[like] = Part(part.model, usage if before is None else before.usage + usage)

    def named(self, model: str | None) -> None:
        """The client named a model."""
        if self.requested_model is None and model is not None:
            self.requested_model = model


_MAX_SUMS = 50
_OTHERS = "(others)"
"""Stands for the models of a session that names more than are told apart: it has no price."""


class TimedSession(SocketMeter):
    """A session that is paid by the time it lasts, which nothing tells."""

    __slots__ = ("_began_s",)

    def __init__(self, opened: OpenedSession) -> None:
        super().__init__(opened)
        self._began_s = opened.clock()

    @property
    def parts(self) -> Parts:
        return (Part(self.model, Usage(audio_ms=self.lasted_ms, estimated=True)),)

    @property
    def lasted_ms(self) -> int:
        """Until now."""
        return round((self.opened.clock() - self._began_s) * 1000)


class UnknownUsage(SocketMeter):
    """A session that is paid for by what nothing tells: its cost is unknown."""

    __slots__ = ()

    @property
    def parts(self) -> Parts:
        used = self.opened.client.messages and self.opened.provider.messages
        return (Part(self.model, Usage(incomplete=True)),) if used else ()


class Payload:
    """How many bytes one side has sent in one field of its messages since a moment, by the counts
    of its messages and bytes: one message is looked into for how many stand around that field.
    """

    __slots__ = ("_around", "_bytes", "_messages", "_side")

    def __init__(self, side: SideCounts) -> None:
        self._side = side
        self._around: int | None = None
        self.begin()

    def begin(self) -> None:
        """Count from now on."""
        self._bytes, self._messages = self._side.bytes, self._side.messages

    def sample(self, message: bytes, field_bytes: int) -> None:
        """A message and how long the field is in it."""
        self._around = max(0, len(message) - field_bytes)

    def leave_out(self, message: bytes) -> None:
        """A message that was counted and has no such field."""
        self._bytes += len(message)
        self._messages += 1

    @property
    def bytes(self) -> int:
        """So many; none before a message was looked into."""
        if self._around is None:
            return 0
        messages = self._side.messages - self._messages
        return max(0, self._side.bytes - self._bytes - messages * self._around)


def of_base64(characters: int) -> int:
    """The bytes that so many characters of base64 stand for."""
    return characters * 3 // 4


_SAMPLE_BYTES = {
    "linear16": 2, "linear32": 4, "mulaw": 1, "alaw": 1, "ulaw": 1,
    "pcm": 2, "pcm16": 2, "pcmu": 1, "pcma": 1,
    "pcm_s16le": 2, "pcm_s32le": 4, "pcm_f16le": 2, "pcm_f32le": 4, "pcm_mulaw": 1, "pcm_alaw": 1,
    "g711_ulaw": 1, "g711_alaw": 1,
}  # fmt: skip
_WITH_RATE = re.compile(r"(pcm|ulaw|alaw)_(\d{4,6})\Z")
"""As ElevenLabs names a format."""
_TELEPHONE_HZ = 8000
_RATES_HZ = range(4000, 400_000)
_RATE = re.compile(r"\d{4,6}\Z")


def bytes_a_second(encoding: str, sample_rate: str) -> int | None:
    """Of one channel of audio in an encoding; None if unknown, such as of a compressed one."""
    name = encoding.lower().removeprefix("audio/")
    if (both := _WITH_RATE.match(name)) is not None:
        name, sample_rate = both[1], both[2]
    sample_bytes = _SAMPLE_BYTES.get(name)
    if sample_bytes is None:
        return None
    if not _RATE.match(sample_rate):
        return _TELEPHONE_HZ if sample_bytes == 1 and not sample_rate else None
    rate_hz = int(sample_rate)
    return sample_bytes * rate_hz if rate_hz in _RATES_HZ else None
