"""Every way a call can fail, as classes with data. Text for people is made in `surfaces/errors.py`,
and docs/errors.md lists them all.

`status` is the HTTP status before the first byte, `close_code` the WebSocket close code after it.
An error that an SDK must not retry says so by `retryable = False`; it is answered with
`x-should-retry: false`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any, ClassVar, Literal

from multidict import MultiMapping

from relay.core.text import clean, quoted

Side = Literal["client", "relay", "upstream"]


class OperatorError(Exception):
    """A command cannot do what the operator asked for; the text says why, and what to do.

    No call sees one: the command line prints its report and ends with its exit code.
    """

    exit_code: ClassVar[int] = 1

    @property
    def report(self) -> str:
        """What the command line prints."""
        return f"relay: {self}"


class PackageMissing(OperatorError):
    """A setting needs a package that was not installed with the relay."""

    def __init__(self, setting: str, package: str) -> None:
        lock = f"requirements/py{sys.version_info.major}.{sys.version_info.minor}-full.txt"
        super().__init__(
            f"{setting} needs the package {package}, which is not installed; {lock} has it, and"
            " docs/deployment.md says how to install that"
        )


_MAX_SHOWN = 30
_with_code: list[type[RelayError]] = []


class RelayError(Exception):
    """A failure with a stable code. Base class only: raise one of its children."""

    code: ClassVar[str]
    side: ClassVar[Side] = "client"
    status: int = 400
    close_code: ClassVar[int] = 1008
    retryable: ClassVar[bool] = False
    retry_after_s: float | None = None
    """When another try may be luckier."""
    template: ClassVar[str]
    """The message; `{name}` stands for a field."""

    def __init_subclass__(cls, **facts: Any) -> None:
        """`class X(RelayError, code=…, side=…, status=…, close_code=…, retryable=…)`."""
        super().__init_subclass__()
        for name, value in facts.items():
            setattr(cls, name, value)
        if "code" in facts:
            _with_code.append(cls)

    @property
    def message(self) -> str:
        """One sentence for the caller: no path of ours, no URL with a query, no key."""
        return self.template.format_map(vars(self))

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


@dataclass(eq=False)
class BadPath(RelayError, code="bad_path", close_code=1002):
    """The request target is not one that may be relayed (RFC 9112 3.2): nothing is repaired."""

    reason: str

    template = "The path cannot be relayed: {reason}."


@dataclass(eq=False)
class BadRequest(RelayError, code="bad_request", close_code=1002):
    """The request is not well-formed HTTP, or carries a header that cannot be passed on."""

    reason: str

    template = "The request is malformed: {reason}."


class BadFraming(BadRequest):
    """Nobody knows where the request ends: it is the last one of its connection."""


@dataclass(eq=False)
class UnknownRoute(RelayError, code="unknown_route", status=404, close_code=1002):
    """No surface of the relay answers at this path or method."""

    method: str
    root: str = "/api/v1/ai-gateway/providers/"
    """The URL that a provider's name follows."""
    provider: str = ""
    """The provider that the client seems to mean; empty: unknown."""
    format: str = "openai"
    """The wire format of the client's SDK."""

    @property
    def message(self) -> str:
        nothing, root = f"Nothing answers {quoted(self.method)} here.", clean(self.root)
        if not self.provider:
            return f"{nothing} Providers are at {root}{{provider}}/{{endpoint}}."
        return (
            f"{nothing} Set the base URL of your SDK to {root}{self.provider}"
            f" (for another provider, replace '{self.provider}' with its name)."
        )


@dataclass(eq=False)
class MethodNotAllowed(RelayError, code="method_not_allowed", status=405, close_code=1002):
    """TRACE would echo the relay's credentials, CONNECT would make it a tunnel (RFC 9110 9.3)."""

    method: str
    allowed: ClassVar[tuple[str, ...]] = (
        "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS",
    )  # fmt: skip

    template = "The relay does not forward {method}."


@dataclass(eq=False)
class UnknownProvider(RelayError, code="unknown_provider", status=404):
    """gateway.yaml has no provider of this name; `nearest` is the closest one it has, or empty."""

    name: str
    nearest: str = ""
    names: Sequence[str] = ()
    """All that it has."""

    @property
    def message(self) -> str:
        hint = ""
        if self.nearest:
            hint = f" Did you mean '{self.nearest}'?"
        elif self.names:
            more = ", …" if len(self.names) > _MAX_SHOWN else ""
            hint = f" It has {', '.join(self.names[:_MAX_SHOWN])}{more}."
        return f"There is no provider named '{quoted(self.name)}' in gateway.yaml.{hint}"


@dataclass(eq=False)
class HostNotAllowed(RelayError, code="host_not_allowed", status=403):
    """While access is open, Host must be loopback or listed: this stops DNS rebinding."""

    host: str

    @property
    def message(self) -> str:
        return (
            f"Access is open, so the host name '{quoted(self.host)}' must be listed in gateway.yaml"
            " under server.hosts."
        )


@dataclass(eq=False)
class OriginNotAllowed(RelayError, code="origin_not_allowed", status=403):
    """While access is open, a web page of another origin may not spend the relay's keys."""

    origin: str

    @property
    def message(self) -> str:
        return (
            f"Pages of the origin '{quoted(self.origin)}' may not use this relay."
            " List it in gateway.yaml under cors.origins to allow it."
        )


@dataclass(eq=False)
class CrossSiteRequest(RelayError, code="cross_site_request", status=403):
    """While access is open, a page of another site may not spend the relay's keys with an image,
    a script, a link or a no-cors call: browsers send no Origin with these.
    """

    site: str
    """The value of Sec-Fetch-Site."""

    @property
    def message(self) -> str:
        return (
            f"A web page of another origin made this request (Sec-Fetch-Site: {self.site[:40]})."
            " While access is open, such a page must call with fetch(), and its origin must be"
            " listed in gateway.yaml under cors.origins."
        )


@dataclass(eq=False)
class ManagementNotLocal(RelayError, code="management_not_local", status=403):
    """While access is open, management is for this machine alone."""

    reason: str

    template = "Management is available from this machine only, and {reason}."


@dataclass(eq=False)
class TargetNotAllowed(RelayError, code="target_not_allowed", status=403):
    """A client named a URL that lies on none of the provider's hosts (fal's proxy convention)."""

    provider: str
    header: str

    template = "{header} must name a URL on a host that '{provider}' has in gateway.yaml."


@dataclass(eq=False)
class WebSocketNotSupported(RelayError, code="websocket_not_supported", status=426):
    """No WebSocket there. 426 makes clients that speak both go on by plain HTTP."""

    provider: str
    endpoint: str = ""
    """The path that no pattern of `websocket.paths` matches; empty: it has no sockets at all."""

    @property
    def message(self) -> str:
        if self.endpoint:
            return (
                f"'{self.provider}' takes no WebSockets at '{quoted(self.endpoint)}': no pattern of"
                " its websocket.paths in gateway.yaml matches. Use plain HTTP."
            )
        return (
            f"'{self.provider}' has no 'websocket' section in gateway.yaml: it takes no WebSockets."
            " Use plain HTTP."
        )


@dataclass(eq=False)
class UpgradeRequired(RelayError, code="upgrade_required", status=426, close_code=1002):
    """A WebSocket path was asked for by plain HTTP."""

    message = "This path speaks WebSocket only: send Upgrade: websocket, version 13."


@dataclass(eq=False)
class BodyTimeout(RelayError, code="body_timeout", status=408):
    """The caller stopped sending its request body."""

    after_s: float

    template = "No byte of the request body came for {after_s:g} s."


@dataclass(eq=False)
class BodyTooSlow(RelayError, code="body_too_slow", status=408):
    """The caller sends its request body so slowly that it only holds a place."""

    bytes_per_s: int
    behind_s: float

    template = (
        "The request body fell {behind_s:g} s behind {bytes_per_s} bytes a second,"
        " the least that this relay takes."
    )


@dataclass(eq=False)
class ModelUnknown(RelayError, code="model_unknown", status=403):
    """A rule asks for the model of a call, and it cannot be told."""

    message = "A rule asks for the model of this call, and its body does not name it plainly."


@dataclass(eq=False)
class _Limited(RelayError, close_code=1013, retryable=True):
    """A rule of `limits` is reached: `100 requests in 60 s`. Base class only."""

    rule: str
    retry_after_s: float = 1.0

    @property
    def message(self) -> str:
        return f"The limit of {self.rule} is reached. Try again in {ceil(self.retry_after_s)} s."


class TooManySessions(_Limited, code="too_many_sessions", status=429):
    """This client already holds as many WebSocket sessions as it may."""


class RateLimited(_Limited, code="rate_limited", status=429, close_code=1008):
    """This client has called as often, or used as much, as it may; or has too much running."""


class Overloaded(_Limited, code="overloaded", side="relay", status=503):
    """As many calls run, of all or of a provider, as may: refused at once, rather than to wait."""


class StoreUnavailable(
    RelayError, code="store_unavailable", side="relay", status=503, retryable=True
):
    """Redis or the database is away, and what was asked cannot be done without it."""

    message = "Where this is kept (Redis or the database) does not answer: nothing was done."


class LedgerBusy(RelayError, code="ledger_busy", side="relay", status=503, retryable=True):
    """As many questions to the ledger run and wait as may."""

    retry_after_s = 1.0

    message = "The ledger answers as many queries as it can at once. Ask again in a second."


@dataclass(eq=False)
class QueryTimeout(RelayError, code="query_timeout", side="relay", status=503):
    """A question to the ledger took too long and was ended."""

    after_s: float

    template = (
        "The query was ended after {after_s:g} s: ask for less time, fewer keys or a larger bucket."
    )


class LogNotFound(RelayError, code="log_not_found", status=404, close_code=1008):
    """The ledger has no call of this id, or none any more."""

    message = "The ledger has no call of this id."


@dataclass(eq=False)
class ConfigInvalid(RelayError, code="config_invalid", status=422):
    """A reload was refused, the old registry stays. `problems` are file:line:column messages."""

    problems: Sequence[str]

    @property
    def message(self) -> str:
        problems = "\n".join(self.problems)
        return f"The new configuration was refused and the old one stays:\n{problems}"


@dataclass(eq=False)
class WorkersIncomplete(
    RelayError,
    code="workers_incomplete",
    side="relay",
    status=503,
    close_code=1011,
    retryable=True,
):
    """Of several workers not all did what was asked: `missing` names the others."""

    order: str
    missing: Sequence[str]

    @property
    def message(self) -> str:
        missing = "\n".join(self.missing)
        return f"Not every worker carried out the {self.order}. Ask again.\n{missing}"


@dataclass(eq=False)
class ClientGone(RelayError, code="client_gone", status=499, close_code=1011):
    """The caller left before the end: not our failure, not the provider's."""

    message = "The client closed the connection."


@dataclass(eq=False)
class ClientStalled(RelayError, code="client_stalled", status=499, close_code=1013):
    """The caller took nothing of its answer for too long."""

    after_s: float

    template = "The client read nothing for {after_s:g} s."


@dataclass(eq=False)
class ProviderNotConfigured(
    RelayError, code="provider_not_configured", side="relay", status=503, close_code=1011
):
    """The provider's `auth` names variables that are not set."""

    provider: str
    missing: Sequence[str]

    @property
    def message(self) -> str:
        names = ", ".join(self.missing)
        return (
            f"The provider '{self.provider}' is not configured:"
            f" set {names} (in .env) and restart or reload."
        )


@dataclass(eq=False)
class Draining(
    RelayError, code="draining", side="relay", status=503, close_code=1012, retryable=True
):
    """The relay is shutting down."""

    retry_after_s = 1.0

    message = "The relay is restarting. Connect again."


@dataclass(eq=False)
class InternalError(RelayError, code="internal_error", side="relay", status=500, close_code=1011):
    """A bug of the relay's; the log has it under the same request id."""

    message = "The relay failed. Its log has the cause under this request id."


class _Upstream(RelayError, side="upstream", status=502, close_code=1014):
    """A failure of the provider, or on the way to it. Base class only."""


@dataclass(eq=False)
class UpstreamNotConnected(_Upstream):
    """No connection that could carry a request. Base class only."""

    provider: str
    address: str
    """Host and port."""
    reason: str


@dataclass(eq=False)
class UpstreamUnreachable(UpstreamNotConnected, code="upstream_unreachable", retryable=True):
    """No connection came up: DNS, refused, no route, connect time-out. Nothing was sent."""

    template = "No connection to the provider '{provider}' at {address}: {reason}."


@dataclass(eq=False)
class UpstreamTlsFailed(UpstreamNotConnected, code="upstream_tls_failed"):
    """The TLS handshake with the provider failed. Nothing was sent."""

    template = "TLS with the provider '{provider}' at {address} failed: {reason}."


@dataclass(eq=False)
class UpstreamTimeout(_Upstream, code="upstream_timeout", status=504):
    """The provider was silent too long; `phase`: handshake, first byte, stream, upload."""

    phase: str
    after_s: float

    template = "The provider was silent for {after_s:g} s ({phase})."


@dataclass(eq=False)
class UpstreamDisconnected(_Upstream, code="upstream_disconnected"):
    """The provider closed the connection before its answer was whole."""

    phase: str

    template = "The provider closed the connection ({phase})."


@dataclass(eq=False)
class UpstreamProtocolError(_Upstream, code="upstream_protocol_error"):
    """What the provider sent is not valid HTTP or WebSocket, or cannot be passed on."""

    reason: str

    template = "The provider's answer cannot be relayed: {reason}."


class UpstreamErrorInAnswer(_Upstream, code="upstream_error_in_answer"):
    """The provider answered 200, and the answer is an error, ends with one, or is an empty stream.
    It has passed as it came: this is for the log and the ledger.
    """

    message = "The provider's answer has a status of success, and is an error."


@dataclass(eq=False)
class HandshakeRefused(_Upstream, code="handshake_refused"):
    """The provider answered a WebSocket handshake with something else than 101: passed on as it
    came.

    `status` is the provider's, 200 to 599, `headers` are the raw pairs, `body` at most 64 KiB.
    """

    status: int = field()  # without a default: the class has one, its base's
    reason: str
    headers: MultiMapping[str] = field(repr=False)
    body: bytes = field(repr=False)

    template = "The provider refused the WebSocket handshake with {status}."


CATALOGUE: tuple[type[RelayError], ...] = tuple(_with_code)
"""Every error there is: docs/errors.md and its test are held against this table."""
