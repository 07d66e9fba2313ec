"""The base of the meters of WebSocket sessions.

Owns SocketMeter, which collects the reported usage, and the estimates by bytes and time for
providers that report none. socket_meters.py chooses the meter of a session.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import msgspec

from relay.core import paths
from relay.core.fields import pairs
from relay.core.meters.tolerant_json import IgnoredFields, text_of
from relay.core.usage import CallBound, Part, Parts, Usage

MAX_PARTS = 1000
"""Maximum number of objects of a session that are counted separately; further ones are summed."""


Prefilter = Callable[..., re.Match[bytes] | None]
"""A search in C that finds out whether a message matters to a meter: calling the meter for every
message would cost five times as much, with cold CPU caches. Called with bytes, and optionally with
start and end.
"""


def compile_prefilter(pattern: str) -> Prefilter | None:
    """Return a search for a pattern; None for an empty one, if no message matters."""
    return re.compile(pattern.encode()).search if pattern else None


class SideCounts(Protocol):
    """The number of messages and bytes that one side of a session has sent so far."""

    messages: int
    bytes: int


@dataclass(frozen=True, slots=True)
class OpenedSession:
    """An open session, and its two sides. `clock` returns seconds."""

    endpoint: str
    query: str
    """The raw query of the URL."""
    model: str | None
    """The model in the URL."""
    client: SideCounts
    provider: SideCounts
    clock: Callable[[], float]

    def parameter(self, name: str) -> str:
        """Return a parameter of the URL, or empty."""
        return paths.query_value(self.query, name)


_BACKSLASH, _ESCAPE = b"\\", b"\\u00"


def has_escape(data: bytes) -> bool:
    """True if a message of the client may write the names that a prefilter searches in another way:
    it is read without the prefilter. To search apart for one byte, which most messages do not have,
    is ten times as fast as a prefilter with this alternative.
    """
    return _BACKSLASH in data and _ESCAPE in data


_ascii_escape = re.compile(rb"\\u00[2-7]").search


def has_ascii_escape(data: bytes) -> bool:
    """True if a name may be written with escapes. Other letters than those of names are often
    written with escapes, in texts.
    """
    return _BACKSLASH in data and _ascii_escape(data) is not None


class Readings:
    """All values of the fields of a message: parsers differ in which value of a repeated name they
    take. For messages that order something: it takes longer than reading single fields.
    """

    __slots__ = ("_values",)

    def __init__(self, data: bytes) -> None:
        self._values: dict[str, list[msgspec.Raw]] = {}
        for name, raw in pairs(data) or ():
            self._values.setdefault(name, []).append(raw)

    def of(self, name: str) -> list[msgspec.Raw]:
        """Return the values of a field."""
        return self._values.get(name, [])

    def texts(self, name: str) -> list[str | None]:
        """Return the values of a field with a short string; None for anything else."""
        return [text_of(bytes(raw)) for raw in self.of(name)]

    @property
    def names(self) -> set[str]:
        """The names of the fields; none if the message is no readable object."""
        return set(self._values)

    @property
    def types(self) -> set[str | None]:
        """The types that the message may have; None stands for no type."""
        return set(self.texts("type")) or {None}


class ResponseCounts(NamedTuple):
    """How many responses a session has begun, how many of them run, and how many orders of the
    client the provider has refused."""

    begun: int
    running: int
    refused: int = 0


NO_RESPONSES = ResponseCounts(0, 0)


class Order(NamedTuple):
    """A message of the client that makes the provider work at once, and what that may use."""

    bound: CallBound
    models: tuple[str | None, ...] = ()
    """The models that the message may name. None, or no model: any of the `next_models`."""
    is_response: bool = False
    """True if a response follows, whose usage is known at its end."""


class SocketMeter:
    """Reads the messages that match its prefilters: `sent` those of the client, also if
    `has_escape`, and `received` those of the provider. sessions/observers.py calls both.

    For budgets, a meter also bounds what a session may use next: `order_of` before a message of the
    client is relayed, if `order_filter` matches it or it `has_escape`, and `next_response` at any
    time.
    """

    has_error = False
    """Always False: a session may continue after an error."""
    is_blind = False
    """True if no message says what the session uses."""
    searched_bytes = 256 * 1024
    """Larger messages are read without the prefilter, which would take longer than reading them."""
    __slots__ = (
        "_by_key",
        "_sums",
        "first_model",
        "ignored_fields",
        "made",
        "model",
        "opened",
        "order_filter",
        "output_limit",
        "pieces",
        "received_filter",
        "requested_model",
        "sent_filter",
    )  # fmt: skip

    def __init__(self, opened: OpenedSession) -> None:
        self.opened = opened
        self.sent_filter: Prefilter | None = None
        self.received_filter: Prefilter | None = None
        self.order_filter: Prefilter | None = None
        self.output_limit: int | None = None
        """The most output tokens of a response, as the session says; None: unknown."""
        self.pieces: tuple[bytes, ...] = ()
        """Beginnings of messages that are only deltas of a response."""
        self.made: Callable[[str], None] | None = None
        """Called with the id of each new object of the provider that can be read again."""
        self.requested_model: str | None = None
        """The first model in the client's messages."""
        self.model = opened.model
        """The model that answers."""
        self.first_model: str | None = None
        """What the provider calls the model of the URL, before the client changes anything."""
        self.ignored_fields = IgnoredFields()
        self._by_key: dict[str, Part] = {}
        self._sums: dict[tuple[object, ...], Part] = {}

    def sent(self, data: bytes) -> None:
        """Read a message of the client."""

    def received(self, data: bytes) -> None:
        """Read a message of the provider."""

    def order_of(self, data: bytes) -> Order | None:
        """Return what a message of the client orders; None if it orders nothing."""
        return None

    @property
    def next_response(self) -> CallBound | None:
        """What the next response may use at most; None for a session without responses."""
        return None

    @property
    def next_models(self) -> tuple[str, ...]:
        """The models that may make the next response, beside that of the URL."""
        return (self.model,) if self.model else ()

    @property
    def responses(self) -> ResponseCounts:
        """The responses that have begun so far, and those that have not ended."""
        return NO_RESPONSES

    @property
    def ignored(self) -> int:
        """Number of unreadable fields that may have had usage."""
        return self.ignored_fields.count

    @property
    def parts(self) -> Parts:
        """The usage so far, by model, tier and object, whose prices differ."""
        reported = (*self._by_key.values(), *self._sums.values())
        return tuple(part if part.model else part._replace(model=self.model) for part in reported)

    def add(self, part: Part, key: str = "") -> None:
        """Add usage. A part without a model is that of the session's model. A part with a `key`
        replaces the earlier part with the same key.
        """
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
        """Record a model from the client's messages; the first one is kept."""
        if self.requested_model is None and model is not None:
            self.requested_model = model


_MAX_SUMS = 50
_OTHERS = "(others)"
"""Replaces the names of further models, in a session with too many. It has no price."""


class TimedSession(SocketMeter):
    """A session that is billed by its duration, which the provider does not report."""

    __slots__ = ("_began_s",)

    def __init__(self, opened: OpenedSession) -> None:
        super().__init__(opened)
        self._began_s = opened.clock()

    @property
    def parts(self) -> Parts:
        return (Part(self.model, Usage(audio_ms=self.lasted_ms, estimated=True)),)

    @property
    def lasted_ms(self) -> int:
        """The duration until now."""
        return round((self.opened.clock() - self._began_s) * 1000)


class UnknownUsage(SocketMeter):
    """A session whose billed usage is not reported: its cost is unknown."""

    is_blind = True
    __slots__ = ()

    @property
    def parts(self) -> Parts:
        used = self.opened.client.messages and self.opened.provider.messages
        return (Part(self.model, Usage(incomplete=True)),) if used else ()


class Payload:
    """Estimates the bytes that one side has sent in one field of its messages, from the numbers of
    messages and bytes. One message is sampled for the number of bytes around the field.
    """

    __slots__ = ("_around", "_bytes", "_messages", "_side")

    def __init__(self, side: SideCounts) -> None:
        self._side = side
        self._around: int | None = None
        self.begin()

    def begin(self) -> None:
        """Start to count from now on."""
        self._bytes, self._messages = self._side.bytes, self._side.messages

    def sample(self, message: bytes, field_bytes: int) -> None:
        """Measure the bytes around the field in a message."""
        self._around = max(0, len(message) - field_bytes)

    def leave_out(self, message: bytes) -> None:
        """Subtract a message that has no such field."""
        self._bytes += len(message)
        self._messages += 1

    @property
    def bytes(self) -> int:
        """The estimated bytes of the field; 0 before a message was sampled."""
        if self._around is None:
            return 0
        messages = self._side.messages - self._messages
        return max(0, self._side.bytes - self._bytes - messages * self._around)


def of_base64(characters: int) -> int:
    """Return the number of bytes that `characters` of base64 encode."""
    return characters * 3 // 4


_SAMPLE_BYTES = {
    "linear16": 2, "linear32": 4, "mulaw": 1, "alaw": 1, "ulaw": 1,
    "pcm": 2, "pcm16": 2, "pcmu": 1, "pcma": 1,
    "pcm_s16le": 2, "pcm_s32le": 4, "pcm_f16le": 2, "pcm_f32le": 4, "pcm_mulaw": 1, "pcm_alaw": 1,
    "g711_ulaw": 1, "g711_alaw": 1,
}  # fmt: skip
_WITH_RATE = re.compile(r"(pcm|ulaw|alaw)_(\d{4,6})\Z")
"""ElevenLabs' names of formats."""
_TELEPHONE_HZ = 8000
_RATES_HZ = range(4000, 400_000)
_RATE = re.compile(r"\d{4,6}\Z")


def bytes_a_second(encoding: str, sample_rate: str) -> int | None:
    """Return the bytes per second of one channel of audio; None if unknown, as for compressed
    encodings.
    """
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
