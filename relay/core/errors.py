"""Every failure that a client can get, as a class with data and a stable code.

Owns the codes, statuses, close codes and messages, which docs/errors.md lists. error_bodies.py
encodes an error in the format of an SDK, and surfaces/errors.py sends it.

`status` is the HTTP status before the first byte, `close_code` the WebSocket close code after it.
`retryable = False` tells SDKs not to retry: the response has `x-should-retry: false`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any, ClassVar, Literal

from multidict import MultiMapping

from relay.core.budgets import utc_text
from relay.core.text import clean, quoted

Side = Literal["client", "relay", "upstream"]


class OperatorError(Exception):
    """A command failed; the text says why, and what the operator can do.

    Only the command line raises it, prints `report` and exits with `exit_code`.
    """

    exit_code: ClassVar[int] = 1

    @property
    def report(self) -> str:
        """The text that the command line prints."""
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
    """A failure with a stable code. A base class: raise one of its subclasses."""

    code: ClassVar[str]
    side: ClassVar[Side] = "client"
    status: int = 400
    close_code: ClassVar[int] = 1008
    retryable: ClassVar[bool] = False
    retry_after_s: float | None = None
    """Seconds after which a retry may succeed; None if unknown."""
    template: ClassVar[str]
    """The message, with `{name}` for each field of that name."""

    def __init_subclass__(cls, **facts: Any) -> None:
        """`class X(RelayError, code=…, side=…, status=…, close_code=…, retryable=…)`."""
        super().__init_subclass__()
        for name, value in facts.items():
            setattr(cls, name, value)
        if "code" in facts:
            _with_code.append(cls)

    @property
    def message(self) -> str:
        """The text for the client, without file paths, query strings and keys."""
        return self.template.format_map(vars(self))

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


@dataclass(eq=False)
class BadPath(RelayError, code="bad_path", close_code=1002):
    """The request target must not be relayed (RFC 9112 3.2). The relay repairs no target."""

    reason: str

    template = "The path cannot be relayed: {reason}."


@dataclass(eq=False)
class BadRequest(RelayError, code="bad_request", close_code=1002):
    """The request is not well-formed HTTP, or has a header that cannot be forwarded."""

    reason: str

    template = "The request is malformed: {reason}."


class BadFraming(BadRequest):
    """The end of the request is unknown, so its connection cannot carry another one."""


@dataclass(eq=False)
class UnknownRoute(RelayError, code="unknown_route", status=404, close_code=1002):
    """No surface of the relay answers at this path or method."""

    method: str
    root: str = "/api/v1/ai-gateway/providers/"
    """The URL before a provider's name."""
    provider: str = ""
    """The provider that the client probably means; empty: unknown."""
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
    """The relay forwards no TRACE, which would echo its credentials, and no CONNECT, which would
    make it a tunnel (RFC 9110 9.3).
    """

    method: str
    allowed: ClassVar[tuple[str, ...]] = (
        "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS",
    )  # fmt: skip

    template = "The relay does not forward {method}."


@dataclass(eq=False)
class UnknownProvider(RelayError, code="unknown_provider", status=404):
    """gateway.yaml has no provider of this name. `nearest` is the most similar name, or empty."""

    name: str
    nearest: str = ""
    names: Sequence[str] = ()
    """All names in gateway.yaml."""

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
class ModelNotFound(RelayError, code="model_not_found", status=404):
    """No alias, prefix or list of the unified surface has this model."""

    model: str
    nearest: Sequence[str] = ()

    @property
    def message(self) -> str:
        near = ", ".join(f"'{each}'" for each in self.nearest)
        hint = f" Did you mean {near}?" if near else " GET /v1/models lists the models."
        return f"There is no model '{quoted(self.model)}'.{hint}"


@dataclass(eq=False)
class ObjectNotFound(RelayError, code="object_not_found", status=404):
    """The path names an object that this client has not made through the unified surface."""

    object_id: str

    @property
    def message(self) -> str:
        return f"There is no '{quoted(self.object_id)}' that this client has made through /v1."


@dataclass(eq=False)
class ModelMissing(RelayError, code="model_missing"):
    """The unified surface chooses the provider by the model, and the call names none, or more than
    one.
    """

    reason: str = "it contains no `model`"

    template = "The provider is chosen by the model of the request body, and {reason}."


@dataclass(eq=False)
class EndpointNotSupported(RelayError, code="endpoint_not_supported"):
    """The provider of the model does not have this endpoint. Nothing is translated."""

    provider: str
    model: str
    endpoint: str
    instead: Sequence[str] = ()

    @property
    def message(self) -> str:
        refused = f"{self.provider} does not have /v1/{quoted(self.endpoint)}"
        if not self.instead:
            return f"{refused}, which '{quoted(self.model)}' was sent to."
        return f"{refused}. Send '{quoted(self.model)}' to {' or '.join(self.instead)}."


class WrongBody(RelayError, code="wrong_body"):
    """A body of the Responses API at chat/completions."""

    message = (
        "This is a body of the Responses API: it has `input` and no `messages`. Send it to"
        " /v1/responses."
    )


@dataclass(eq=False)
class TargetAmbiguous(RelayError, code="target_ambiguous"):
    """A socket of the unified surface names no model, and several providers could answer it."""

    kind: str
    names: Sequence[str] = ()

    @property
    def message(self) -> str:
        which = ", ".join(self.names) or "none"
        return (
            f"The provider of this WebSocket is not known (possible: {which}). Add ?model=MODEL to"
            f" its URL, or set unified.sockets.{self.kind} in gateway.yaml."
        )


@dataclass(eq=False)
class ModelNotInSession(RelayError, code="model_not_in_session"):
    """A message of a socket of the unified surface names a model of another provider."""

    model: str
    provider: str

    @property
    def message(self) -> str:
        return (
            f"This session is connected to {self.provider}, which '{quoted(self.model)}' does not"
            " belong to. Open another session for it."
        )


@dataclass(eq=False)
class HostNotAllowed(RelayError, code="host_not_allowed", status=403):
    """While access is open, Host must be loopback or listed, which prevents DNS rebinding."""

    host: str

    @property
    def message(self) -> str:
        return (
            f"Access is open, so the host name '{quoted(self.host)}' must be listed in gateway.yaml"
            " under server.hosts, or be that of server.public_url."
        )


@dataclass(eq=False)
class OriginNotAllowed(RelayError, code="origin_not_allowed", status=403):
    """Web pages of this origin may not use the relay's keys, or those of this client."""

    origin: str

    client: str = ""
    """The client whose record lists other origins; empty: `cors.origins` decides."""

    @property
    def message(self) -> str:
        where = f"clients.{self.client}.origins" if self.client else "cors.origins"
        return (
            f"Web pages of the origin '{quoted(self.origin)}' may not use this relay."
            f" To allow them, list the origin in gateway.yaml under {where}."
        )


@dataclass(eq=False)
class CrossSiteRequest(RelayError, code="cross_site_request", status=403):
    """While access is open, a web page of another site may not use the relay's keys by an image, a
    script, a link or a no-cors call, which browsers send without Origin.
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
    """While access is open, only this machine may manage the relay."""

    reason: str

    template = "Management is available from this machine only, and {reason}."


@dataclass(eq=False)
class ManagementDenied(RelayError, code="management_denied", status=401):
    """Management needs a token, and the request has none, or a wrong one."""

    reason: str

    template = "{reason}"


class ManagementForbidden(ManagementDenied, status=403):
    """The request has a client's key in place of the token, or the token allows less; or a call has
    a token of management in place of a client's key.
    """


@dataclass(eq=False)
class TooManyAttempts(RelayError, code="too_many_attempts", status=429):
    """This address sent many wrong keys, tickets or tokens in the last minute."""

    retry_after_s: float

    @property
    def message(self) -> str:
        return (
            "Too many wrong keys or tokens came from this address, and this one is wrong too. Try"
            f" again in {ceil(self.retry_after_s)} s with a valid one."
        )


class ClientKeyMissing(RelayError, code="client_key_missing", status=401):
    """Access is required, and the call has no key of the relay."""

    message = (
        "This relay requires a client key. Send one in place of the provider's key, or in the"
        " header x-relay-key."
    )


class ClientKeyInvalid(RelayError, code="client_key_invalid", status=401):
    """The key is not known: it is mistyped, revoked, or of another relay."""

    message = (
        "The client key is not valid: it is unknown to this relay, or was revoked. Ask the"
        " relay's operator for a key."
    )


class ClientKeyExpired(RelayError, code="client_key_expired", status=401):
    """The key has passed its expiry."""

    message = "The client key has expired. Ask the relay's operator for another one."


@dataclass(eq=False)
class TicketInvalid(RelayError, code="ticket_invalid", status=401):
    """The ticket opens no session: it is unknown, used or expired, or cannot be used here."""

    reason: str

    template = "The ticket is not valid: {reason}."


class TicketForged(TicketInvalid):
    """No relay with this database has issued the ticket: a guess."""


@dataclass(eq=False)
class TicketMismatch(RelayError, code="ticket_mismatch", status=403):
    """The ticket was issued for something else than the session that it was used for."""

    field: str
    """Which of its terms does not match: `provider`, `endpoint`, `origin`."""
    allowed: str
    wanted: str

    @property
    def message(self) -> str:
        return (
            f"The ticket is for the {self.field} '{quoted(self.allowed)}', and was used for"
            f" '{quoted(self.wanted)}'. It cannot be used again: fetch another one."
        )


@dataclass(eq=False)
class AccessRevoked(RelayError, code="access_revoked", status=401, close_code=4401):
    """The client's key was revoked, or has expired, while the call or session was running."""

    why: str = "was revoked"
    """Or `has expired`."""

    template = "The client key {why}."


@dataclass(eq=False)
class _NotAllowed(RelayError, status=403):
    """The record of the client does not allow this. Base class only."""

    client: str
    wanted: str


class ProviderNotAllowed(_NotAllowed, code="provider_not_allowed"):
    """The client may not call this provider."""

    @property
    def message(self) -> str:
        return f"The client '{self.client}' may not call the provider '{quoted(self.wanted)}'."


class EndpointNotAllowed(_NotAllowed, code="endpoint_not_allowed"):
    """The client may not call endpoints of this kind."""

    @property
    def message(self) -> str:
        return (
            f"The client '{self.client}' may not call endpoints of the kind '{self.wanted}'. To"
            " allow them, list the kind under the client's `endpoints`."
        )


class ModelNotAllowed(_NotAllowed, code="model_not_allowed"):
    """The client may not use this model."""

    @property
    def message(self) -> str:
        return f"The client '{self.client}' may not use the model '{quoted(self.wanted)}'."


class AddressNotAllowed(_NotAllowed, code="address_not_allowed"):
    """The client may not call from this address."""

    @property
    def message(self) -> str:
        return f"The client '{self.client}' may not call from the address {quoted(self.wanted)}."


class OriginRequired(_NotAllowed, code="origin_required"):
    """The client's record or ticket is for web pages, and the request has no Origin."""

    @property
    def message(self) -> str:
        return (
            f"{self.wanted} is for web pages, and the request has no Origin header. Programs need"
            " a client key."
        )


@dataclass(eq=False)
class TargetNotAllowed(RelayError, code="target_not_allowed", status=403):
    """A client sent a target URL whose host is not the provider's (fal's proxy convention)."""

    provider: str
    header: str

    template = "{header} must be a URL of a host that '{provider}' has in gateway.yaml."


@dataclass(eq=False)
class WebSocketNotSupported(RelayError, code="websocket_not_supported", status=426):
    """The provider has no WebSocket at this path. After a 426, clients that can use both continue
    with plain HTTP.
    """

    provider: str
    """Empty: no provider has a socket at this endpoint of the unified surface."""
    endpoint: str = ""
    """The path that matches no pattern of `websocket.paths`; empty: the provider has no sockets."""

    @property
    def message(self) -> str:
        if not self.provider:
            return f"No provider takes WebSockets at /v1/{quoted(self.endpoint)}. Use plain HTTP."
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
    """A plain HTTP request to a WebSocket path."""

    message = "This path accepts WebSockets only: send Upgrade: websocket, version 13."


@dataclass(eq=False)
class BodyTimeout(RelayError, code="body_timeout", status=408):
    """The client stopped sending its request body."""

    after_s: float

    template = "No byte of the request body arrived for {after_s:g} s."


@dataclass(eq=False)
class BodyTooSlow(RelayError, code="body_too_slow", status=408):
    """The client sends its request body below the minimum rate."""

    bytes_per_s: int
    behind_s: float

    template = (
        "The request body fell {behind_s:g} s behind the minimum rate of {bytes_per_s} bytes per"
        " second."
    )


@dataclass(eq=False)
class ModelUnknown(RelayError, code="model_unknown", status=403):
    """A limit or the client's record depends on the model of the call, which is not known."""

    reason: str = ""
    """Why the models of a client's call cannot be checked; empty for a limit."""

    @property
    def message(self) -> str:
        if self.reason:
            return f"The client may use certain models only, and cannot be checked: {self.reason}."
        return (
            "A limit depends on the model, and the request body does not contain exactly one"
            " `model`."
        )


@dataclass(eq=False)
class LimitsUnknown(RelayError, code="limits_unknown", status=403):
    """A hard budget depends on the limits of the call's response, which the relay cannot read."""

    @property
    def message(self) -> str:
        return (
            "A budget depends on what the call asks for, and the relay cannot read its body: send"
            " JSON in UTF-8 with each field once."
        )


@dataclass(eq=False)
class _Limited(RelayError, close_code=1013, retryable=True):
    """A rule of `limits` is reached. Base class only."""

    rule: str
    """What the rule allows: `100 requests in 60 s`; empty: the concurrency limit of all calls."""
    retry_after_s: float = 1.0

    @property
    def message(self) -> str:
        limit = f"The limit of {self.rule}" if self.rule else "The relay's concurrency limit"
        return f"{limit} is reached. Try again in {ceil(self.retry_after_s)} s."


class TooManySessions(_Limited, code="too_many_sessions", status=429):
    """This client has reached its limit of concurrent WebSocket sessions."""


class RateLimited(_Limited, code="rate_limited", status=429, close_code=1008):
    """This client has reached its limit of requests, tokens, handshakes or concurrent calls."""


class Overloaded(_Limited, code="overloaded", side="relay", status=503):
    """The concurrency limit of all calls, or of the calls to a provider, is reached. The relay
    refuses the call instead of queueing it.
    """


@dataclass(eq=False)
class BudgetExhausted(RelayError, code="budget_exhausted", status=429, close_code=4402):
    """The money of a budget is spent, or too little is left for this call. Waiting does not help
    before the budget resets.
    """

    budget: str
    """The name of the rule."""
    limit: str
    """What the rule allows: `$5 per day`."""
    needed: str
    """What the call may cost, in US dollars."""
    left: str
    resets_s: int | None
    """When the budget resets, in seconds since 1970; None: never."""

    @property
    def message(self) -> str:
        when = "It does not reset by itself."
        if self.resets_s is not None:
            when = f"It resets at {utc_text(self.resets_s)}."
        return (
            f"The budget '{self.budget}' ({self.limit}) has ${self.left} left, and this call may"
            f" cost ${self.needed}. {when}"
        )


@dataclass(eq=False)
class BudgetBusy(
    RelayError,
    code="budget_busy",
    side="relay",
    status=503,
    close_code=1013,
    retryable=True,
):
    """What is left of a budget is reserved by calls that run, which may need less."""

    budget: str
    retry_after_s = 1.0

    template = (
        "What is left of the budget '{budget}' is reserved by calls that run. Try again in 1 s."
    )


@dataclass(eq=False)
class PriceUnknown(RelayError, code="price_unknown", status=403):
    """The price of the call is unknown, and `budgets.unpriced` refuses such calls."""

    model: str

    @property
    def message(self) -> str:
        model = f"the model '{quoted(self.model)}'" if self.model else "this call"
        return (
            f"The price of {model} is unknown, and budgets.unpriced refuses such calls. Set the"
            " provider's `pricing`, or change budgets.unpriced."
        )


class StoreUnavailable(
    RelayError, code="store_unavailable", side="relay", status=503, retryable=True
):
    """Redis or the database is unavailable, and the request needs it."""

    message = "Redis or the database is unavailable; nothing was changed."


class KeysUnavailable(StoreUnavailable):
    """The database of client keys was unavailable for so long that a key may have been revoked."""

    retry_after_s = 1.0

    message = "The database of client keys is unavailable, so the key cannot be checked."


class LedgerBusy(RelayError, code="ledger_busy", side="relay", status=503, retryable=True):
    """The limit of running and waiting queries of the ledger is reached."""

    retry_after_s = 1.0

    message = "The ledger is busy with other queries. Try again in 1 s."


@dataclass(eq=False)
class QueryTimeout(RelayError, code="query_timeout", side="relay", status=503):
    """A query of the ledger was cancelled after its time limit."""

    after_s: float

    template = (
        "The query was cancelled after {after_s:g} s. Query a shorter time, fewer keys or a larger"
        " bucket."
    )


class LogNotFound(RelayError, code="log_not_found", status=404, close_code=1008):
    """The ledger has no call with this id, or its row was deleted."""

    message = "The ledger has no call with this id."


@dataclass(eq=False)
class ClientNotFound(RelayError, code="client_not_found", status=404):
    """Management named a client that neither gateway.yaml nor the database has."""

    name: str

    @property
    def message(self) -> str:
        return (
            f"There is no client '{quoted(self.name)}'. To create it, send its `record` with its"
            " first key ({} restricts nothing, or restores that of a revoked client), or PUT it."
        )


@dataclass(eq=False)
class ClientConflict(RelayError, code="client_conflict", status=409):
    """Management would change a client in a way that its place or state does not allow."""

    name: str
    reason: str

    @property
    def message(self) -> str:
        return f"The client '{quoted(self.name)}' {self.reason}."


@dataclass(eq=False)
class KeyNotFound(RelayError, code="key_not_found", status=404):
    """Management named a key that the database does not have."""

    id: str

    @property
    def message(self) -> str:
        return (
            f"The database has no key with the id '{quoted(self.id)}'. Keys of gateway.yaml are"
            " changed there."
        )


@dataclass(eq=False)
class BudgetNotFound(RelayError, code="budget_not_found", status=404):
    """Management named a budget under which there was no call in the current period."""

    key: str

    @property
    def message(self) -> str:
        return (
            f"There is no budget '{quoted(self.key)}' in the current period. Budgets come into"
            " being with their first call; their keys are in the list of budgets."
        )


@dataclass(eq=False)
class SessionNotFound(RelayError, code="session_not_found", status=404):
    """Management named a session that is not open any more, or never was."""

    message = "No open session has this id."


class SessionEnded(RelayError, code="session_ended", status=403, close_code=4403):
    """The relay's operator ended the session."""

    message = "The relay's operator ended this session."


@dataclass(eq=False)
class ConfigInvalid(RelayError, code="config_invalid", status=422):
    """A reload was refused, and the old configuration stays in force. `problems` are messages with
    file:line:column.
    """

    problems: Sequence[str]

    @property
    def message(self) -> str:
        problems = "\n".join(self.problems)
        return f"The new configuration was refused, and the old one stays in force:\n{problems}"


@dataclass(eq=False)
class WorkersIncomplete(
    RelayError,
    code="workers_incomplete",
    side="relay",
    status=503,
    close_code=1011,
    retryable=True,
):
    """Some workers did not execute an order, such as a reload; `missing` has a line for each."""

    order: str
    missing: Sequence[str]

    @property
    def message(self) -> str:
        missing = "\n".join(self.missing)
        return f"Not every worker executed the {self.order}. Try again.\n{missing}"


@dataclass(eq=False)
class ClientGone(RelayError, code="client_gone", status=499, close_code=1011):
    """The client closed the connection before the end; neither relay nor provider failed."""

    message = "The client closed the connection."


@dataclass(eq=False)
class ClientStalled(RelayError, code="client_stalled", status=499, close_code=1013):
    """The client stalled while receiving a response."""

    after_s: float

    template = "The client read nothing for {after_s:g} s."


@dataclass(eq=False)
class ProviderNotConfigured(
    RelayError, code="provider_not_configured", side="relay", status=503, close_code=1011
):
    """Variables in the provider's `auth` are not set."""

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
    """A bug in the relay. The log has the traceback with the same request id."""

    message = "The relay failed. Its log has the cause with this request id."


class _Upstream(RelayError, side="upstream", status=502, close_code=1014):
    """A failure of the provider, or of the connection to it. Base class only."""


@dataclass(eq=False)
class UpstreamNotConnected(_Upstream):
    """No connection to the provider was established. Base class only."""

    provider: str
    address: str
    """Host and port."""
    reason: str


@dataclass(eq=False)
class UpstreamUnreachable(UpstreamNotConnected, code="upstream_unreachable", retryable=True):
    """No connection: DNS failed, refused, no route, or connect timeout. Nothing was sent."""

    template = "No connection to the provider '{provider}' at {address}: {reason}."


@dataclass(eq=False)
class UpstreamTlsFailed(UpstreamNotConnected, code="upstream_tls_failed"):
    """The TLS handshake with the provider failed. Nothing was sent."""

    template = "TLS with the provider '{provider}' at {address} failed: {reason}."


@dataclass(eq=False)
class UpstreamTimeout(_Upstream, code="upstream_timeout", status=504):
    """The provider was silent for too long. `phase` is what the relay waited for."""

    phase: str
    after_s: float

    template = "The provider was silent for {after_s:g} s ({phase})."


@dataclass(eq=False)
class UpstreamDisconnected(_Upstream, code="upstream_disconnected"):
    """The provider closed the connection before its response was complete."""

    phase: str

    template = "The provider closed the connection ({phase})."


@dataclass(eq=False)
class UpstreamProtocolError(_Upstream, code="upstream_protocol_error"):
    """The provider's response is not valid HTTP or WebSocket, or cannot be forwarded."""

    reason: str

    template = "The provider's response cannot be relayed: {reason}."


class UpstreamErrorInAnswer(_Upstream, code="upstream_error_in_answer"):
    """The provider's response has status 200, but is an error, ends with one, or is an empty
    stream. The client got it unchanged; only the log and the ledger show this error.
    """

    message = "The provider's response has a success status but contains an error."


@dataclass(eq=False)
class HandshakeRefused(_Upstream, code="handshake_refused"):
    """The provider answered a WebSocket handshake with another status than 101. The client gets
    its response.

    `status` is the provider's, 200 to 599, `headers` are the raw pairs, `body` at most 64 KiB.
    """

    status: int = field()  # else the class attribute of the base would become its default
    reason: str
    headers: MultiMapping[str] = field(repr=False)
    body: bytes = field(repr=False)

    template = "The provider refused the WebSocket handshake with {status}."


class RepeatedRefusal(RelayError):
    """An error that an earlier request got: the same code, status and message, without its data."""

    template = "{text}"

    def __init__(self, kind: type[RelayError], status: int, text: str) -> None:
        super().__init__(text)
        same = {"code": kind.code, "side": kind.side, "retryable": kind.retryable}
        vars(self).update(same, status=status, text=text)


CATALOGUE: tuple[type[RelayError], ...] = tuple(_with_code)
"""Every error with a code. The test of docs/errors.md reads this table."""
