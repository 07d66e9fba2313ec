"""One call, from its first byte in to its last byte out. The only mutable noun of the relay.

Owns: what is known of a call while it runs, and the verdict on it (`fail`, `finish`).
Reads no clock: times are given, in seconds of one monotonic clock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec

from relay.core.caching import CachePlan
from relay.core.caller import Caller
from relay.core.errors import (
    ClientGone,
    ClientStalled,
    InternalError,
    RelayError,
    UpstreamErrorInAnswer,
)
from relay.core.limits import Admission, Standing
from relay.core.meters.turns import Turns
from relay.core.provider import Keys, Route
from relay.core.rewriting import Rewriter
from relay.core.traces import Trace
from relay.core.usage import Parts, Usage

Transport = Literal["rest", "websocket"]
Surface = Literal["native"]
"""The form of the URL that the client called (surfaces/)."""
Outcome = Literal["running", "relayed", "cached", "refused", "failed", "client_gone"]
WaitingFor = Literal["nothing", "request_body", "first_byte", "upstream", "upload", "client"]


def uuid7(unix_ms: int, random_bits: Callable[[int], int]) -> str:
    """A UUIDv7 (RFC 9562 5.7) of a time in ms, as lower-case text; `random_bits(n)` gives n
    bits.
    """
    return "%08x-%04x-%04x-%04x-%012x" % (  # noqa: UP031 (half the time of an f-string)
        unix_ms >> 16,
        unix_ms & 0xFFFF,
        0x7000 | random_bits(12),
        0x8000 | random_bits(14),
        random_bits(48),
    )


def least_id(unix_s: float) -> str:
    """What every id made from then on is not below."""
    return uuid7(int(unix_s * 1000), lambda _: 0)


class Metering(Protocol):
    """What an Exchange wants to know of its meter (core/meters/)."""

    @property
    def model(self) -> str | None:
        """The model that answered, where it is named."""

    @property
    def parts(self) -> Parts:
        """What was used so far, by model; none if nothing is known."""

    @property
    def tells_error(self) -> bool:
        """True if the answer is an error, whatever its status."""

    @property
    def ignored(self) -> int:
        """How many fields were not read though they may tell usage."""


class Attempt(msgspec.Struct, frozen=True, omit_defaults=True):
    """One try at one target: `status` of its answer, or the code of what came instead."""

    provider: str
    via: str
    key: str
    """Which credential: its variable's name."""
    status: int
    error: str
    duration_s: float
    maybe_billed: bool = False
    """The provider may have executed it, and another target was called after it."""


@dataclass(eq=False, repr=False, slots=True)
class Capture:
    """What was collected of a call's bodies, as they passed: not yet searched for keys."""

    request: bytes
    request_coding: str
    """Its Content-Encoding; empty if it is not compressed."""
    most_bytes: int
    """So much of each may be stored."""
    captured_bytes: int
    """So much is collected for that."""
    credentials: tuple[str, ...] = ()
    """The client's own."""
    response: bytearray = field(default_factory=bytearray)
    response_coding: str = ""


@dataclass(eq=False, repr=False, slots=True)
class Exchange:
    """See the module. The `_s` stamps are of the gateway's clock."""

    id: str
    transport: Transport
    method: str
    caller: Caller
    started_s: float
    task: asyncio.Task[object] | None = None
    request_id: str = ""
    headers: Mapping[str, str] | None = None
    """The request's."""
    provider: str = ""
    endpoint: str = ""
    surface_format: str | None = None
    """The wire format that the surface has for errors; None: the provider's."""
    surface: Surface = "native"
    kind: str = field(init=False, default="other")
    model: str | None = field(init=False, default=None)
    stream: bool | None = field(init=False, default=None)
    user: str | None = field(init=False, default=None)
    """The end user, as the body names it."""
    route: Route | None = field(init=False, default=None)
    keys: Keys = field(init=False, default=Keys())
    """The credentials that went up last."""
    rewriter: Rewriter | None = field(init=False, default=None)
    """Where URLs in the answer come back as the relay's."""

    waiting_for: WaitingFor = field(init=False, default="nothing")
    waiting_since_s: float = field(init=False, default=0.0)
    body_behind_s: float = field(init=False, default=0.0)
    """How far the request's body lags behind the least rate that it may have."""
    expired: RelayError | None = field(init=False, default=None)
    """What the janitor ended the call for."""
    client_left: Callable[[], bool] | None = field(init=False, default=None)
    """Where a server does not cancel its handlers: tells whether the client is gone."""

    attempts: tuple[Attempt, ...] = field(init=False, default=())
    """Empty where the first one was good."""
    at_end: tuple[Callable[[], None], ...] = field(init=False, default=())
    """What is given back when the call is over."""
    admission: Admission | None = field(init=False, default=None)
    """None while there are no limits."""
    standings: tuple[Standing, ...] = field(init=False, default=())
    """How the client stands under them."""
    spoken: bytes = field(init=False, default=b"")
    """What the request's body tells of what is paid for: text made speech, images asked for."""
    input_estimate: int | None = field(init=False, default=None)
    """Tokens of the request, where they cannot be told from its length."""
    asks_usage: bool = field(init=False, default=False)
    """Its usage was asked for on its client's behalf: the event that tells it is removed."""
    begun: bytes = field(init=False, default=b"")
    """What an attempt has read already of the body of the answer."""
    looks_at_first_event: bool = field(init=False, default=False)
    """Something else can be tried if the stream of the attempt that runs begins with an error."""
    look: Callable[[bytes], None] | None = field(init=False, default=None)
    """Shows the meter a chunk."""
    look_past: Callable[[bytes], None] | None = field(init=False, default=None)
    """The same, of whole events in which no usage was found."""
    meter: Metering | None = field(init=False, default=None)
    """Sees what passes, and tells what it used."""
    answer: bytes = field(init=False, default=b"")
    """A whole one, of which its meter is made when the call is settled."""
    answer_headers: Mapping[str, str] | None = field(init=False, default=None)
    settled: bool = field(init=False, default=False)
    """What it used and cost is known, as far as it will be."""
    parts: Parts = field(init=False, default=())
    """What the meter told when the call ended, by model, and is counted with this call."""
    used: Usage | None = field(init=False, default=None)
    """What the meter told when the call ended."""
    cost_nano_usd: int | None = field(init=False, default=None)
    saved_nano_usd: int | None = field(init=False, default=None)
    """What a kept answer cost when it was made."""
    turns: Turns | None = field(init=False, default=None)
    capture: Capture | None = field(init=False, default=None)
    """Its bodies, where they are collected."""
    trace: Trace | None = field(init=False, default=None)
    cloudflare_log_id: str | None = field(init=False, default=None)
    cache_plan: CachePlan | None = field(init=False, default=None)
    """What the cache does for it."""
    leads: bool = field(init=False, default=False)
    """A call that others share runs on its behalf: what that comes to is still to be told."""
    cache_status: str = field(init=False, default="")
    """HIT, MISS or BYPASS; empty where the cache has nothing to do with it."""
    cached: bool = field(init=False, default=False)
    """Answered without a call of its own."""
    step: int = field(init=False, default=0)
    """Which of the route's targets answered, the first being 0."""
    steps: int = field(init=False, default=1)
    first_byte_limit_s: float | None = field(init=False, default=None)
    """Of the attempt that runs, instead of its provider's: the client's own limit, or a shorter one
    because another target can answer."""

    sent_s: float = field(init=False, default=0.0)
    ended_s: float = field(init=False, default=0.0)
    first_byte_s: float = field(init=False, default=0.0)
    overhead_s: float = field(init=False, default=0.0)
    """The relay's own time, until the head of the answer went down."""
    status: int = field(init=False, default=0)
    committed: bool = field(init=False, default=False)
    held_bytes: int = field(init=False, default=0)
    request_bytes: int = field(init=False, default=0)
    response_bytes: int = field(init=False, default=0)
    messages_up: int = field(init=False, default=0)
    messages_down: int = field(init=False, default=0)
    close_code: int | None = field(init=False, default=None)
    closed_by: str | None = field(init=False, default=None)
    """Who ended a session: `client`, `provider` or `relay`."""
    outcome: Outcome = field(init=False, default="running")
    error: RelayError | None = field(init=False, default=None)
    cause: BaseException | None = field(init=False, default=None)

    def wait(self, for_: WaitingFor, now_s: float) -> None:
        """Say what is awaited from now on; the janitor ends an Exchange that waits for too long."""
        self.waiting_for = for_
        self.waiting_since_s = now_s

    def revived(self) -> RelayError | None:
        """Where the janitor's cut is what cancelled the task: the error that it stands for, the
        task going on. None if the client left, or somebody else cancelled.
        """
        cut = self.expired
        if cut is None or isinstance(cut, ClientGone) or self.task is None:
            return None
        self.task.uncancel()
        self.expired = None
        return cut

    def verdict(self, error: BaseException) -> BaseException:
        """Record why the call ends, and return what to raise for it.

        After the first byte nothing can be answered any more: the connection is all there is to
        end. A client's own leaving stays the cancellation that it was. Raise it `from None`: it may
        be `error` itself, and an exception that is its own cause keeps itself alive.
        """
        failure = self.fail(error)
        if isinstance(error, asyncio.CancelledError) and self.revived() is None:
            return error
        if self.committed or isinstance(failure, ClientGone):
            return ConnectionResetError(failure.code)
        return failure

    def fail(self, error: BaseException) -> RelayError:
        """Record why the call ends, and return it as the error that the caller is to see.

        A cancellation is what made it one: a wait that the janitor ended, or a client that left.
        """
        failure = self._failure(error)
        self.error = failure
        if failure is not error and not isinstance(error, asyncio.CancelledError):
            self.cause = error
        else:
            # Nobody prints it, and each of its frames may hold the exception: a cycle.
            error.__traceback__ = None
        if isinstance(failure, ClientGone | ClientStalled):
            self.outcome = "client_gone"
        else:
            self.outcome = "refused" if failure.side == "client" else "failed"
        return failure

    def _failure(self, error: BaseException) -> RelayError:
        if isinstance(error, RelayError):
            return error
        if isinstance(error, asyncio.CancelledError):
            # One that failed already is ended a second time only to be done with it.
            return self.expired or self.error or ClientGone()
        return ClientGone() if isinstance(error, ConnectionError) else InternalError()

    def fail_if_answer_tells_error(self) -> None:
        """Judge an answer that came to a clean end by what it holds, once that is read."""
        if self.outcome == "relayed" and self.meter is not None and self.meter.tells_error:
            self.fail(UpstreamErrorInAnswer())

    def finish(self) -> None:
        """The call came to a clean end."""
        if self.outcome == "running":
            self.outcome = "cached" if self.cached else "relayed"

    def let_go(self) -> None:
        """Let go of what leads back here, once the call is recorded: an exception's traceback holds
        the frames that it passed, turns and meter hold a session's legs, and these the exchange.
        Such a cycle of fifty objects would be freed by the garbage collector alone.
        """
        self.error = self.cause = self.expired = self.turns = None
        if self.transport == "websocket":
            self.meter = None

    @property
    def error_format(self) -> str:
        """The wire format in which the relay's own errors are written."""
        return self.surface_format or (self.route.format if self.route else "openai")

    def __repr__(self) -> str:
        where = f"{self.provider}/{self.endpoint}".rstrip("/")
        state = f"{self.outcome} {self.status}" if self.status else self.outcome
        return f"<Exchange {self.id[:8]} {self.method} {where} {state}>"
