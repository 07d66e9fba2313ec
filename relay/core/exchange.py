"""The Exchange: the state of one call or session, from its first byte to its record.

Owns the data of a call while it runs, in parts whose docstrings name their writers; its state; and
its outcome (`fail`, `finish`). It reads no clock: times are passed in, in seconds of the gateway's
monotonic clock.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

import msgspec

from relay.core.access import Client, ClientKey, TicketTerms
from relay.core.budgets import BudgetUse
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
Surface = Literal["native", "unified"]
"""The form of the URL that the client called (surfaces/)."""
OutcomeName = Literal["relayed", "cached", "refused", "failed", "client_gone"]
WaitingFor = Literal["nothing", "request_body", "first_byte", "upstream", "upload", "client"]
Unknown = Literal["", "key", "management", "other"]
"""What is no client's key: an unknown `key` of the relay's form, a token of `management`, or any
`other` text, such as a provider's key."""
_NO_METADATA: Mapping[str, str | int | float | bool] = MappingProxyType({})


def uuid7(unix_ns: int, random_bits: Callable[[int], int]) -> str:
    """Return the UUIDv7 (RFC 9562 5.7) of a time, lower-case; `random_bits(n)` returns n bits.
    Within a millisecond too ids are in the order of their times: 12 bits are its fraction (6.2).
    """
    unix_ms, rest_ns = divmod(unix_ns, 1_000_000)
    return "%08x-%04x-%04x-%04x-%012x" % (  # noqa: UP031 (half the time of an f-string)
        unix_ms >> 16,
        unix_ms & 0xFFFF,
        0x7000 | rest_ns * 4096 // 1_000_000,
        0x8000 | random_bits(14),
        random_bits(48),
    )


def min_id_at(unix_s: float) -> str:
    """Return a lower bound for the ids that are made at or after this time."""
    return uuid7(int(unix_s * 1000) * 1_000_000, lambda _: 0)


class Metering(Protocol):
    """A meter as an Exchange uses it (core/meters/): it observes a response and reports usage."""

    @property
    def model(self) -> str | None:
        """The model that answered, if the response names it."""

    @property
    def parts(self) -> Parts:
        """The usage so far, by model; empty if nothing is known."""

    @property
    def has_error(self) -> bool:
        """True if the response is an error, whatever its status."""

    @property
    def ignored(self) -> int:
        """Number of unreadable fields that may have had usage."""


class Caller(msgspec.Struct, frozen=True):
    """The client of a call, identified once, before the body is read (gate/identify.py)."""

    client: str
    """The identity that limits and the ledger count: the client's name, without a record its
    address."""
    peer: str = ""
    """The peer address of the connection: the client's, or that of a proxy."""
    scheme: str = "http"
    """`https` if the client's connection is encrypted."""
    address: str = ""
    """The client's address."""
    record: Client | None = None
    """The record of the client: that of its key or ticket, or of `access.anonymous`. None while
    access is open, and for a caller that is refused."""
    key: ClientKey | None = None
    """The key by which the client was recognized."""
    unknown: Unknown = ""
    """What it sent in the place of a key, if that is none."""
    ticket: str = ""
    """The ticket of a WebSocket handshake, until it is redeemed."""
    terms: TicketTerms | None = None
    """The terms of the redeemed ticket."""

    @property
    def key_id(self) -> str:
        """The id of the key; empty without one."""
        return self.key.id if self.key is not None else ""

    @property
    def metadata(self) -> Mapping[str, str | int | float | bool]:
        """The client's own metadata, which replaces what the call brings."""
        return self.record.rights.metadata if self.record is not None else _NO_METADATA

    def __repr__(self) -> str:
        return f"<Caller {self.client}>"


class Attempt(msgspec.Struct, frozen=True, omit_defaults=True):
    """An attempt at one target: the `status` of its response, or the code of the failure."""

    provider: str
    via: str
    key: str
    """The variable of the credential."""
    status: int
    error: str
    duration_s: float
    maybe_billed: bool = False
    """True if the provider may have executed the call, and another target was called afterwards."""
    affinity: Literal["", "broken"] = ""
    """`broken`: with another key than that of the call's session (core/affinity.py)."""


@dataclass(eq=False, repr=False, slots=True)
class Capture:
    """The request and response bodies of a call, captured while they pass, and not yet redacted."""

    request: bytes
    request_coding: str
    """Content-Encoding of the request; empty if it is not compressed."""
    max_bytes: int
    """Maximum size of each stored body."""
    captured_bytes: int
    """Maximum size of each captured body, from which the stored one is made."""
    credentials: tuple[str, ...] = ()
    """The client's credentials, to be redacted."""
    response: bytearray = field(default_factory=bytearray)
    response_coding: str = ""


State = Literal["reading", "sending", "committed", "ended"]
"""`reading`: the request is read, routed and admitted. `sending`: attempts are made. `committed`:
the first byte went downstream, so the response is fixed. `ended`: the call is over."""
_MOVES: Mapping[State, tuple[State, ...]] = {
    "reading": ("sending", "committed", "ended"),
    "sending": ("committed", "ended"),
    "committed": ("ended",),
    "ended": (),
}


@dataclass(eq=False, repr=False, slots=True)
class Request:
    """The client's request. Written by gateway.begin, the request path and calls/body.py."""

    transport: Transport
    method: str
    caller: Caller
    started_s: float
    headers: Mapping[str, str] = field(default_factory=dict)
    provider: str = ""
    endpoint: str = ""
    surface: Surface = "native"
    surface_format: str | None = None
    """Wire format of errors of this surface; None: that of the provider."""
    kind: str = "other"
    model: str | None = None
    requested_model: str | None = None
    """The alias, or `PROVIDER/MODEL`, that a call to the unified surface names instead of it."""
    stream: bool | None = None
    user: str | None = None
    """The end user that the body names."""
    body_bytes: int = 0
    held_bytes: int = 0
    """Bytes of the body that are buffered."""
    billable_input: bytes = b""
    """The fields of the body that are billed: text for speech, `n` of images."""
    input_estimate: int | None = None
    """Estimated tokens of the body; None: by its length."""
    trace: Trace | None = None

    @property
    def request_id(self) -> str:
        """The client's X-Request-Id, or empty."""
        return self.headers.get("X-Request-Id", "")


_NO_KEYS = Keys()


@dataclass(eq=False, repr=False, slots=True)
class Routing:
    """Where the call goes. Written by the request path (the first route), upstream/attempts.py, the
    attempts, calls/send.py and calls/caching.py. A shared call and its leader have one object.
    """

    route: Route | None = None
    attempts: tuple[Attempt, ...] = ()
    """Empty if the first attempt succeeded, unless it broke the affinity of a session."""
    step: int | None = None
    """Index of the target that answered, from 0; None if the route has one target."""
    sent_s: float = 0.0
    """Time of the first attempt; 0 if nothing was sent."""
    cloudflare_log_id: str | None = None
    keys: Keys = _NO_KEYS
    """The credentials of the last attempt."""


@dataclass(eq=False, repr=False, slots=True)
class Response:
    """The response downstream. Written by calls/ and websocket.py; gateway.release drops the
    observer.
    """

    status: int = 0
    body_bytes: int = 0
    first_byte_s: float = 0.0
    """Time of the first byte from the provider."""
    overhead_s: float = 0.0
    """Time that the relay added, until the head went downstream."""
    meter_observer: MeterObserver | None = None


class MeterObserver(Protocol):
    """Passes the chunks of a response to its meter."""

    def see(self, chunk: bytes) -> None:
        """Meter a chunk."""

    def see_past(self, chunk: bytes) -> None:
        """Meter a chunk of whole events that are known to have no usage."""


class UnreadResponse(NamedTuple):
    """A complete response whose meter is made when the usage is settled."""

    body: bytes
    headers: Mapping[str, str]


@dataclass(eq=False, repr=False, slots=True)
class UsageAndCost:
    """The usage of the call and its cost. Written by whoever attaches the meter, by
    calls/caching.py (`saved_nano_usd`), then by ledger.settle. A shared call and its leader have
    one object.
    """

    meter: Metering | None = None
    unread: UnreadResponse | None = None
    settled: bool = False
    """True when usage and cost are final."""
    parts: Parts = ()
    """The usage that is counted with this call, by model."""
    used: Usage | None = None
    """The total of `parts`."""
    cost_nano_usd: int | None = None
    """Billionths of a US dollar; None if unknown."""
    least_nano_usd: int = 0
    """What a call of unknown cost has cost at least: the price of what is known of its usage."""
    saved_nano_usd: int | None = None
    """Original cost of a response from the cache."""


@dataclass(eq=False, repr=False, slots=True)
class Waiting:
    """What the call waits for, which timeouts.py checks. Written by the code that waits; `expired`
    by `Exchange.expire`, `first_byte_limit_s` by upstream/attempts.py.
    """

    for_: WaitingFor = "nothing"
    since_s: float = 0.0
    first_byte_limit_s: float | None = None
    """Replaces the provider's timeout: by the client's, or by a shorter one before a fallback."""
    body_behind_s: float = 0.0
    """How far the request body is behind the minimum rate."""
    expired: RelayError | None = None
    """The error that the task was cancelled for."""
    client_left: Callable[[], bool] | None = None
    """True if the client has left; set for servers that do not cancel their handlers."""


@dataclass(eq=False, repr=False, slots=True)
class Outcome:
    """How the call ended. Written by Exchange.fail and finish, calls/caching.py, websocket.py, and
    gateway.close.
    """

    name: OutcomeName | None = None
    """None while the call runs."""
    error: RelayError | None = None
    cause: BaseException | None = None
    ended_s: float = 0.0


@dataclass(eq=False, repr=False, slots=True)
class CacheUse:
    """The part of the cache in the call. Written by calls/caching.py; `leads` by Exchange.fork and
    gateway.end_lead.
    """

    plan: CachePlan
    is_hit: bool = False
    """True if the response came from the cache, or from another call in flight."""
    leads: bool = False
    """True while a shared call runs for this exchange, whose outcome will be that of the call."""

    @property
    def status(self) -> str:
        """HIT, MISS or BYPASS."""
        return "HIT" if self.is_hit else "MISS" if self.plan.reads else "BYPASS"


class SessionSummary(NamedTuple):
    """The totals of a WebSocket session. Written by websocket.py when the session ends."""

    messages_up: int = 0
    messages_down: int = 0
    close_code: int | None = None
    closed_by: str | None = None
    """`client`, `provider` or `relay`."""
    turns: Turns | None = None


@dataclass(eq=False, repr=False, slots=True)
class Exchange:
    """One call or session; see the module."""

    id: str
    request: Request
    task: asyncio.Task[object] | None = None
    state: State = "reading"
    """Written by `move_to` only."""
    routing: Routing = field(default_factory=Routing)
    response: Response = field(default_factory=Response)
    usage: UsageAndCost = field(default_factory=UsageAndCost)
    waiting: Waiting = field(default_factory=Waiting)
    outcome: Outcome = field(default_factory=Outcome)
    cache: CacheUse | None = None
    """None if the call does not use the cache."""
    session: SessionSummary | None = None
    admission: Admission | None = None
    """None if there are no limits."""
    limit_states: tuple[LimitState, ...] = ()
    """State of the client's limits."""
    budget: BudgetUse | None = None
    """What the call has reserved under budgets; None if no budget applies. Written by
    gate/budgets.py; a leader gets that of its shared call. The ledger settles it."""
    capture: Capture | None = None
    """None if the bodies are not stored."""
    at_end: tuple[Callable[[], None], ...] = ()
    """Functions that are called once when the call is over, even if one of them raises."""
    is_shared: bool = False
    """True for the exchange of a shared call, which has no client of its own."""

    def fork(self) -> Exchange:
        """Return an exchange for a shared call that this exchange leads. It has a copy of the
        request, and the same `routing` and `usage` objects.
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
            is_shared=True,
        )

    def move_to(self, state: State) -> None:
        """Enter a later state. Raises RuntimeError for an earlier one."""
        if state not in _MOVES[self.state]:
            raise RuntimeError(f"{self!r} cannot become {state}")
        self.state = state

    def wait(self, for_: WaitingFor, now_s: float) -> None:
        """Record what the call waits for from now on; timeouts.py ends calls that wait too long."""
        waiting = self.waiting
        waiting.for_ = for_
        waiting.since_s = now_s

    def expire(self, error: RelayError) -> None:
        """Cancel the task of the call, which then ends with `error`. The first error wins."""
        if self.task is not None and self.waiting.expired is None:
            self.waiting.expired = error
            self.task.cancel()

    def take_expiry(self) -> RelayError | None:
        """Return the error of `expire` and undo its cancellation, so that the task can continue.
        None if the task was not cancelled by `expire`, or the client has left.
        """
        expired = self.waiting.expired
        if expired is None or isinstance(expired, ClientGone) or self.task is None:
            return None
        self.task.uncancel()
        self.waiting.expired = None
        return expired

    def failure_of(self, error: BaseException) -> RelayError:
        """Return the error for the client. A cancellation stands for the error of `expire`, or for
        the client's disconnect.
        """
        if isinstance(error, RelayError):
            return error
        if isinstance(error, asyncio.CancelledError):
            # A call that has failed already keeps its first error.
            return self.waiting.expired or self.outcome.error or ClientGone()
        return ClientGone() if isinstance(error, ConnectionError) else InternalError()

    def fail(self, failure: RelayError, cause: BaseException | None = None) -> None:
        """Record why the call ends."""
        outcome = self.outcome
        outcome.error = failure
        if cause is None or cause is failure or isinstance(cause, asyncio.CancelledError):
            # The traceback is never printed, and its frames may refer to the exception: a cycle.
            (cause or failure).__traceback__ = None
        else:
            outcome.cause = cause
        if isinstance(failure, ClientGone | ClientStalled):
            outcome.name = "client_gone"
        else:
            outcome.name = "refused" if failure.side == "client" else "failed"

    def end_with(self, error: BaseException) -> BaseException:
        """Record why the call ends, and return the exception that its handler must raise.

        After the first byte no error response is possible, so the connection is reset. The
        cancellation by a client's disconnect stays a cancellation. Raise the result `from None`: it
        may be `error` itself, and an exception that is its own cause keeps itself alive. This
        function does not raise it, because its frame would keep it alive too.
        """
        failure = self.failure_of(error)
        self.fail(failure, error)
        if isinstance(error, asyncio.CancelledError) and self.take_expiry() is None:
            return error
        if self.state == "committed" or isinstance(failure, ClientGone):
            return ConnectionResetError(failure.code)
        return failure

    def fail_if_answer_is_error(self) -> None:
        """Record a failure if the meter has found an error in a response that ended cleanly."""
        meter = self.usage.meter
        if self.outcome.name == "relayed" and meter is not None and meter.has_error:
            self.fail(UpstreamErrorInAnswer())

    def finish(self) -> None:
        """Record that the call ended cleanly, unless it has failed."""
        if self.outcome.name is None:
            is_hit = self.cache is not None and self.cache.is_hit
            self.outcome.name = "cached" if is_hit else "relayed"

    def let_go(self) -> None:
        """Drop references that lead back to this exchange, after the call is recorded. Tracebacks
        refer to frames, turns and meter to the sides of a session, and these to the exchange: only
        the garbage collector would free such a cycle of fifty objects.
        """
        self.outcome.error = self.outcome.cause = self.waiting.expired = self.session = None
        if self.request.transport == "websocket":
            self.usage.meter = None

    @property
    def error_format(self) -> str:
        """The wire format of the relay's own errors for this call."""
        route = self.routing.route
        return self.request.surface_format or (route.format if route is not None else "openai")

    def __repr__(self) -> str:
        where = f"{self.request.provider}/{self.request.endpoint}".rstrip("/")
        state: str = self.outcome.name or self.state
        if self.response.status:
            state = f"{state} {self.response.status}"
        return f"<Exchange {self.id[:8]} {self.request.method} {where} {state}>"
