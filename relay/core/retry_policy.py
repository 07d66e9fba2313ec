"""Decide which calls are retried or sent to a fallback, and when, for upstream/attempts.py.

Owns whether another attempt may follow, the delay before it, and the cooldown of a failed key or
target. A call that a provider may have executed is sent again only to another target of the
operator's `fallback:`, and only if it generates something (core/peek.py); never to the same target,
nor to the same provider by another way. It reads no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from relay.core.errors import (
    BadRequest,
    HandshakeRefused,
    RelayError,
    UpstreamDisconnected,
    UpstreamProtocolError,
    UpstreamTimeout,
    UpstreamTlsFailed,
    UpstreamUnreachable,
)
from relay.core.key_refusals import DEAD_KEY_STATUSES, read_key_refusal
from relay.core.numbers import header_number
from relay.core.retry_after import Header, reset_headers_s, retry_after_s

Backoff = Literal["constant", "linear", "exponential"]
FallbackCause = Literal[
    "connect", "disconnect", "timeout", "refused_key", "not_executed", "5xx", "first_event_error",
]  # fmt: skip
"""Why an attempt failed, as `fallback_on` names it."""
FALLBACK_CAUSES: frozenset[FallbackCause] = frozenset(get_args(FallbackCause))
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that can be repeated safely (RFC 9110 9.2.1). PUT and DELETE are not, for they may be
billed."""
_FAULTS = range(500, 600)
_NOT_EXECUTED = frozenset({429, 498, 503, 521, 522, 523, 529})
"""Statuses that mean that the provider, or the CDN in front of it, did not execute the call: 498 is
from Groq, 529 from Anthropic, 521 to 523 are from Cloudflare."""
_CAUSE_OF_FAILURE: tuple[tuple[type[RelayError], FallbackCause], ...] = (
    (UpstreamUnreachable, "connect"),
    (UpstreamTlsFailed, "connect"),
    (UpstreamTimeout, "timeout"),
    (UpstreamDisconnected, "disconnect"),
    (UpstreamProtocolError, "disconnect"),
)
FALLBACK_AFTER_S = 60.0
"""Timeout of the first byte of a streamed call while a fallback remains."""

REFUSED_COOLDOWN_S = 300.0
RATE_LIMITED_COOLDOWN_S = 20.0
FAULT_COOLDOWN_S, MAX_FAULT_COOLDOWN_S = 1.0, 60.0
MAX_COOLDOWN_S = 3600.0


@dataclass(frozen=True, slots=True)
class RetryRules:
    """How a provider's calls are retried."""

    max_attempts: int = 1
    """Attempts at one target, the first included."""
    backoff: Backoff = "exponential"
    delay_s: float = 0.25
    """Upper bound of the first delay."""
    max_delay_s: float = 5.0
    """Upper bound of a delay. After a longer Retry-After the target is not retried."""
    deadline_s: float = 60.0
    """No retry begins at the same target after this time."""
    statuses: frozenset[int] = frozenset({429, 503, 529})
    """Statuses that mean that the call was not executed, so that any method may be repeated."""


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """How an attempt ended: the status of a response, or a failure without one."""

    status: int = 0
    failure: RelayError | None = None
    retry_after_s: float | None = None
    """How long the provider asks to wait."""
    dead_key: str = ""
    """The code or status by which the provider refuses the key (core/key_refusals.py)."""
    final: bool = False
    """The provider sent `x-should-retry: false`."""
    note: str = ""
    """The code of an attempt whose response the client does not get: the provider refused what the
    relay added to the body, and the client's own body is sent next."""
    first_event_status: int | None = None
    """For a 200 whose stream is empty or begins with an error: the status that corresponds to the
    error, 0 if unknown. None for any other response."""
    wrong_key: str = ""
    """The code by which the provider does not know, with this key, an id or encrypted content that
    another key may have made. Such a call was not executed."""

    @property
    def is_good(self) -> bool:
        """True for a response that is not an error."""
        return 0 < self.status < 400 and self.first_event_status is None

    @property
    def error(self) -> str:
        """The code of the failure in addition to the status; empty if there is none."""
        if self.first_event_status is not None:
            return "first_event_error"
        return self.failure.code if self.failure is not None else self.note or self.wrong_key

    @property
    def effective_status(self) -> int:
        """The status of the response, or the status that its first event's error corresponds to."""
        return self.status if self.first_event_status is None else self.first_event_status

    @property
    def is_unsent(self) -> bool:
        """True if provably nothing was sent to the provider."""
        return isinstance(self.failure, UpstreamUnreachable | UpstreamTlsFailed)

    @property
    def is_key_refused(self) -> bool:
        """True if the provider refused the key."""
        return self.effective_status in DEAD_KEY_STATUSES or self.dead_key != ""

    @property
    def needs_another_key(self) -> bool:
        """True if this key is refused or rate-limited, so that another one may succeed."""
        return self.is_key_refused or self.effective_status == 429


def result_of_answer(
    status: int, header: Header, now_unix_s: float, body: bytes = b"",
    refusal: HandshakeRefused | None = None,
) -> AttemptResult:  # fmt: skip
    """Return the result of an attempt from the provider's response to a REST call, or from the
    `refusal` of a WebSocket handshake, which are treated alike. `body` is that of an error if it is
    complete and small, otherwise empty.
    """
    if status < 400:
        return AttemptResult(status, refusal)
    key_refusal = read_key_refusal(status, body, header("content-encoding") or "", now_unix_s)
    wait_s = retry_after_s(header, now_unix_s)
    if wait_s is None:
        wait_s = key_refusal.wait_s
    if wait_s is None and status == 429:
        wait_s = reset_headers_s(header, now_unix_s)
    final = (header("x-should-retry") or "").strip().lower() == "false"
    return AttemptResult(
        status, refusal, wait_s, key_refusal.dead, final, wrong_key=key_refusal.wrong_key
    )


def fallback_cause(ended: AttemptResult, rules: RetryRules) -> FallbackCause | None:
    """Return why an attempt failed; None if it succeeded, or failed because of the client."""
    if ended.first_event_status is not None:
        return "first_event_error"
    if ended.is_key_refused:
        return "refused_key"
    if ended.status in _NOT_EXECUTED or ended.status in rules.statuses:
        return "not_executed"
    if ended.status in _FAULTS:
        return "5xx"
    if ended.status:
        return None
    return next(
        (cause for kind, cause in _CAUSE_OF_FAILURE if isinstance(ended.failure, kind)), None
    )


def is_repeatable(ended: AttemptResult, rules: RetryRules, method: str) -> bool:
    """True if the call may be sent again anywhere: it was not executed, or is safe to repeat."""
    return (
        ended.is_unsent
        or ended.status in rules.statuses
        or ended.status == 429
        or ended.is_key_refused
        or method in SAFE_METHODS
    )


def may_be_executed(ended: AttemptResult, rules: RetryRules, method: str) -> bool:
    """True if the provider may have executed the call, and may bill it."""
    return ended.effective_status not in _NOT_EXECUTED and not is_repeatable(ended, rules, method)


def wait_s(
    rules: RetryRules, number: int, ended: AttemptResult, random: Callable[[], float]
) -> float | None:
    """Return the delay before attempt `number + 1`; None if the provider asks for a longer one than
    `max_delay_s`.

    Full jitter: random between 0 and the computed delay (AWS, "Exponential Backoff And Jitter").
    """
    if ended.retry_after_s is not None:
        return ended.retry_after_s if ended.retry_after_s <= rules.max_delay_s else None
    factors = {"constant": 1, "linear": number, "exponential": 1 << (number - 1)}
    factor = factors[rules.backoff]
    return random() * min(rules.max_delay_s, rules.delay_s * factor)


MAX_ATTEMPTS, MAX_DELAY_MS = 5, 5000
"""Upper bounds of the client's headers, the same as at Cloudflare."""


def requested_rules(header: Header, rules: RetryRules) -> RetryRules | None:
    """Return the provider's rules with the client's `cf-aig-max-attempts`, `cf-aig-retry-delay`
    (ms) and `cf-aig-backoff`; None if the client sent none of these. Raises BadRequest.
    """
    attempts, delay = header("cf-aig-max-attempts"), header("cf-aig-retry-delay")
    backoff = header("cf-aig-backoff")
    if attempts is None and delay is None and backoff is None:
        return None
    if backoff is not None and backoff not in ("constant", "linear", "exponential"):
        raise BadRequest("cf-aig-backoff must be constant, linear or exponential")
    delay_ms = header_number("cf-aig-retry-delay", delay, 0, MAX_DELAY_MS)
    return replace(
        rules,
        max_attempts=header_number("cf-aig-max-attempts", attempts, 1, MAX_ATTEMPTS)
        or rules.max_attempts,
        delay_s=rules.delay_s if delay_ms is None else delay_ms / 1000,
        backoff=backoff or rules.backoff,  # type: ignore[arg-type]
    )


def request_timeout_s(header: Header) -> float | None:
    """Return `cf-aig-request-timeout` (ms), the client's timeout of the first byte, in seconds.
    Raises BadRequest.
    """
    name = "cf-aig-request-timeout"
    given = header_number(name, header(name), 1, 3_600_000)
    return None if given is None else given / 1000


RETRY_HEADERS = (
    "cf-aig-max-attempts",
    "cf-aig-retry-delay",
    "cf-aig-backoff",
    "cf-aig-request-timeout",
)
"""Forwarded only to Cloudflare, and only if it retries instead of the relay."""


def key_cooldown_s(ended: AttemptResult, failures: int) -> float:
    """Return the cooldown of a key after `failures` failures in a row; 0 if the key is not the
    cause.
    """
    retry_after_s = ended.retry_after_s
    if ended.is_key_refused:
        return min(MAX_COOLDOWN_S, max(REFUSED_COOLDOWN_S, retry_after_s or 0.0))
    if ended.effective_status == 429:
        wait_s = RATE_LIMITED_COOLDOWN_S if retry_after_s is None else retry_after_s
        return min(MAX_COOLDOWN_S, wait_s)
    return target_cooldown_s(ended, failures)


def target_cooldown_s(ended: AttemptResult, failures: int) -> float:
    """Return the cooldown of a target; 0 unless the provider failed or did not answer."""
    silent = ended.failure is not None and ended.status == 0 and ended.failure.side == "upstream"
    if ended.effective_status in _FAULTS or ended.first_event_status == 0 or silent:
        return float(min(MAX_FAULT_COOLDOWN_S, FAULT_COOLDOWN_S * 2 ** min(failures - 1, 10)))
    return 0.0
