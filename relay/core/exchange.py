"""One call, from its first byte in to its last byte out. The only mutable noun of the relay.

Owns: what is known of a call while it runs, in parts of which each says who writes it; its state;
and its outcome (`fail`, `finish`).
Reads no clock: times are given, in seconds of one monotonic clock.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import msgspec

from relay.core.caching import CachePlan
from relay.core.errors import (
    ClientGone,
    ClientStalled,
    InternalError,
    RelayError,
    UpstreamErrorInAnswer,
)
from relay.core.limits import Admission, LimitState
from relay.core.meters.turns import Turns
from relay.core.provider import Keys, Route
from relay.core.traces import Trace
from relay.core.usage import Parts, Usage

Transport = Literal["rest", "websocket"]
Surface = Literal["native"]
"""The form of the URL that the client called (surfaces/)."""
OutcomeName = Literal["relayed", "cached", "refused", "failed", "client_gone"]
WaitingFor = Literal["nothing", "request_body", "first_byte", "upstream", "upload", "client"]


def uuid7(unix_ms: int, random_bits: Callable[[int], int]) -> str:
    """The UUIDv7 (RFC 9562 5.7) of a time, lower-case; `random_bits(n)` gives n bits."""
    return "%08x-%04x-%04x-%04x-%012x" % (  # noqa: UP031 (half the time of an f-string)
        unix_ms >> 16,
        unix_ms & 0xFFFF,
        0x7000 | random_bits(12),
        0x8000 | random_bits(14),
        random_bits(48),
    )


def min_id_at(unix_s: float) -> str:
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
    def has_error(self) -> bool:
        """True if the answer is an error, whatever its status."""

    @property
    def ignored(self) -> int:
        """How many fields were not read though they may tell usage."""


class Caller(msgspec.Struct, frozen=True):
    """One client of the relay, identified once, before the body is read (gate/identify.py)."""

    client: str
    """What `per: client` means: its address, until clients have keys."""
    peer: str = ""
    """The address at the other end of its connection: its own, or that of a proxy."""
    scheme: str = "http"
    """`https` where that connection is encrypted."""


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
    max_bytes: int
    """So much of each may be stored."""
    captured_bytes: int
    """So much is collected for that."""
    credentials: tuple[str, ...] = ()
    """The client's own."""
    response: bytearray = field(default_factory=bytearray)
    response_coding: str = ""


State = Literal["reading", "sending", "committed", "ended"]
"""`reading`: the request is read, matched and admitted. `sending`: attempts are made. `committed`:
the first byte went downstream, so nothing else can be answered. `ended`: recorded next."""
_MOVES: Mapping[State, tuple[State, ...]] = {
    "reading": ("sending", "committed", "ended"),
    "sending": ("committed", "ended"),
    "committed": ("ended",),
    "ended": (),
}


@dataclass(eq=False, repr=False, slots=True)
class Request:
    """What the client asked for. Written by gateway.begin, the request path and calls/body.py."""

    transport: Transport
    method: str
    caller: Caller
    started_s: float
    headers: Mapping[str, str] = field(default_factory=dict)
    provider: str = ""
    endpoint: str = ""
    surface: Surface = "native"
    surface_format: str | None = None
    """The wire format that the surface has for errors; None: the provider's."""
    kind: str = "other"
    model: str | None = None
    stream: bool | None = None
    user: str | None = None
    """The end user, as the body names it."""
    body_bytes: int = 0
    held_bytes: int = 0
    """Of its body, in memory."""
    billable_input: bytes = b""
    """The fields of the body that are paid for: text made speech, images asked for."""
    input_estimate: int | None = None
    """Tokens of the body, where they cannot be estimated from its length."""
    trace: Trace | None = None

    @property
    def request_id(self) -> str:
        """The client's own name for the call."""
        return self.headers.get("X-Request-Id", "")


_NO_KEYS = Keys()


@dataclass(eq=False, repr=False, slots=True)
class Routing:
    """Where the call goes. Written by the request path (the first route), upstream/attempts.py, the
    attempts, calls/send.py and calls/caching.py; a shared call has it in common with its leader.
    """

    route: Route | None = None
    attempts: tuple[Attempt, ...] = ()
    """Empty where the first one was good."""
    step: int | None = None
    """Which of the route's targets answered, the first being 0; None where there is one."""
    sent_s: float = 0.0
    """When it was first sent; 0 if it never was."""
    cloudflare_log_id: str | None = None
    keys: Keys = _NO_KEYS
    """The credentials of the last attempt."""


@dataclass(eq=False, repr=False, slots=True)
class Response:
    """What goes downstream. Written by calls/ and websocket.py; gateway.release drops the
    observer.
    """

    status: int = 0
    body_bytes: int = 0
    first_byte_s: float = 0.0
    """When the provider answered."""
    overhead_s: float = 0.0
    """The relay's own time, until the head went downstream."""
    meter_observer: MeterObserver | None = None


class MeterObserver(Protocol):
    """Shows the chunks of a response to its meter."""

    def see(self, chunk: bytes) -> None:
        """Meter a chunk."""

    def see_past(self, chunk: bytes) -> None:
        """The same, of whole events in which no usage was found."""


class UnreadResponse(NamedTuple):
    """A whole response, of which the meter is made when the usage is settled."""

    body: bytes
    headers: Mapping[str, str]


@dataclass(eq=False, repr=False, slots=True)
class UsageAndCost:
    """Written by who attaches the meter, by calls/caching.py (what was saved), then by
    ledger.settle; shared calls have one in common.
    """

    meter: Metering | None = None
    unread: UnreadResponse | None = None
    settled: bool = False
    """What the call used and cost is known, as far as it will be."""
    parts: Parts = ()
    """What is counted with this call, by model."""
    used: Usage | None = None
    """The total of `parts`."""
    cost_nano_usd: int | None = None
    saved_nano_usd: int | None = None
    """What a response from the cache cost when it was made."""


@dataclass(eq=False, repr=False, slots=True)
class Waiting:
    """What the call waits for. Written by who waits; `expired` by `Exchange.expire`, the limit of
    the first byte by upstream/attempts.py.
    """

    for_: WaitingFor = "nothing"
    since_s: float = 0.0
    first_byte_limit_s: float | None = None
    """Instead of the provider's: the client's own, or shorter since another target can answer."""
    body_behind_s: float = 0.0
    """How far the request's body lags behind the least rate that it may have."""
    expired: RelayError | None = None
    """The error for which the task was cancelled."""
    client_left: Callable[[], bool] | None = None
    """Where a server does not cancel its handlers: tells whether the client is gone."""


@dataclass(eq=False, repr=False, slots=True)
class Outcome:
    """How the call ended. Written by Exchange.fail and finish, calls/caching.py, websocket.py, and
    gateway.close.
    """

    name: OutcomeName | None = None
    """None until that is known."""
    error: RelayError | None = None
    cause: BaseException | None = None
    ended_s: float = 0.0


@dataclass(eq=False, repr=False, slots=True)
class CacheUse:
    """What the cache does for the call. Written by calls/caching.py; `leads` by Exchange.fork and
    gateway.end_lead.
    """

    plan: CachePlan
    is_hit: bool = False
    """Answered without a call of its own."""
    leads: bool = False
    """A call that others share runs on its behalf: its outcome is still to come."""

    @property
    def status(self) -> str:
        """HIT, MISS or BYPASS."""
        return "HIT" if self.is_hit else "MISS" if self.plan.reads else "BYPASS"


class SessionSummary(NamedTuple):
    """What a WebSocket session came to. Written by websocket.py when it ends."""

    messages_up: int = 0
    messages_down: int = 0
    close_code: int | None = None
    closed_by: str | None = None
    """`client`, `provider` or `relay`."""
    turns: Turns | None = None


@dataclass(eq=False, repr=False, slots=True)
class Exchange:
    """See the module. The `_s` stamps are of the gateway's clock."""

    id: str
    request: Request
    task: asyncio.Task[object] | None = None
    state: State = "reading"
    """Only `move_to` writes it."""
    routing: Routing = field(default_factory=Routing)
    response: Response = field(default_factory=Response)
    usage: UsageAndCost = field(default_factory=UsageAndCost)
    waiting: Waiting = field(default_factory=Waiting)
    outcome: Outcome = field(default_factory=Outcome)
    cache: CacheUse | None = None
    """None where the cache has nothing to do with it."""
    session: SessionSummary | None = None
    admission: Admission | None = None
    """None while there are no limits."""
    limit_states: tuple[LimitState, ...] = ()
    """How the client stands under the limits."""
    capture: Capture | None = None
    """Its bodies, where they are collected."""
    at_end: tuple[Callable[[], None], ...] = ()
    """Called once when the call is over, each whatever becomes of the others."""

    def fork(self) -> Exchange:
        """An exchange for a call that this one leads and others share: it asks for the same, and
        where it goes, what it uses and what that costs are this one's too.
        """
        request = copy.copy(self.request)
        self.request.held_bytes = 0
        cache = None
        if self.cache is not None:
            self.cache.leads = True
            cache = CacheUse(self.cache.plan)
        return Exchange(
            self.id,
            request,
            routing=self.routing,
            usage=self.usage,
            cache=cache,
            limit_states=self.limit_states,
            capture=self.capture,
        )

    def move_to(self, state: State) -> None:
        """Enter a state; there is no way back from any."""
        if state not in _MOVES[self.state]:
            raise RuntimeError(f"{self!r} cannot become {state}")
        self.state = state

    def wait(self, for_: WaitingFor, now_s: float) -> None:
        """Say what is awaited from now on; periodic.py ends an Exchange that waits for too long."""
        waiting = self.waiting
        waiting.for_ = for_
        waiting.since_s = now_s

    def expire(self, error: RelayError) -> None:
        """End the call with `error`, wherever its task waits. The first error counts."""
        if self.task is not None and self.waiting.expired is None:
            self.waiting.expired = error
            self.task.cancel()

    def take_expiry(self) -> RelayError | None:
        """The error for which `expire` cancelled the task, which goes on; None otherwise."""
        expired = self.waiting.expired
        if expired is None or isinstance(expired, ClientGone) or self.task is None:
            return None
        self.task.uncancel()
        self.waiting.expired = None
        return expired

    def failure_of(self, error: BaseException) -> RelayError:
        """The error for the caller: of a cancellation, the expired wait or the client's leaving."""
        if isinstance(error, RelayError):
            return error
        if isinstance(error, asyncio.CancelledError):
            # One that failed already is ended a second time only to be done with it.
            return self.waiting.expired or self.outcome.error or ClientGone()
        return ClientGone() if isinstance(error, ConnectionError) else InternalError()

    def fail(self, failure: RelayError, cause: BaseException | None = None) -> None:
        """Record why the call ends."""
        outcome = self.outcome
        outcome.error = failure
        if cause is None or cause is failure or isinstance(cause, asyncio.CancelledError):
            # Nobody prints it, and each of its frames may hold the exception: a cycle.
            (cause or failure).__traceback__ = None
        else:
            outcome.cause = cause
        if isinstance(failure, ClientGone | ClientStalled):
            outcome.name = "client_gone"
        else:
            outcome.name = "refused" if failure.side == "client" else "failed"

    def end_with(self, error: BaseException) -> BaseException:
        """Record why the call ends, and return what its handler is to raise.

        After the first byte nothing can be answered any more: the connection is all there is to
        end. A client's own leaving stays the cancellation that it was. Raise it `from None`: it may
        be `error` itself, and an exception that is its own cause keeps itself alive. So would one
        that is raised here, by the names that this frame has for it.
        """
        failure = self.failure_of(error)
        self.fail(failure, error)
        if isinstance(error, asyncio.CancelledError) and self.take_expiry() is None:
            return error
        if self.state == "committed" or isinstance(failure, ClientGone):
            return ConnectionResetError(failure.code)
        return failure

    def fail_if_answer_is_error(self) -> None:
        """Judge an answer that came to a clean end by what it holds, once that is read."""
        meter = self.usage.meter
        if self.outcome.name == "relayed" and meter is not None and meter.has_error:
            self.fail(UpstreamErrorInAnswer())

    def finish(self) -> None:
        """Record that the call came to a clean end, unless it has failed."""
        if self.outcome.name is None:
            is_hit = self.cache is not None and self.cache.is_hit
            self.outcome.name = "cached" if is_hit else "relayed"

    def let_go(self) -> None:
        """Let go of what leads back here, once the call is recorded: an exception's traceback holds
        the frames that it passed, turns and meter hold a session's legs, and these the exchange.
        Such a cycle of fifty objects would be freed by the garbage collector alone.
        """
        self.outcome.error = self.outcome.cause = self.waiting.expired = self.session = None
        if self.request.transport == "websocket":
            self.usage.meter = None

    @property
    def error_format(self) -> str:
        """The wire format in which the relay's own errors are written."""
        route = self.routing.route
        return self.request.surface_format or (route.format if route is not None else "openai")

    def __repr__(self) -> str:
        where = f"{self.request.provider}/{self.request.endpoint}".rstrip("/")
        state: str = self.outcome.name or self.state
        if self.response.status:
            state = f"{state} {self.response.status}"
        return f"<Exchange {self.id[:8]} {self.request.method} {where} {state}>"
