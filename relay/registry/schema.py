"""The schema of gateway.yaml without its providers (entries.py): a pydantic model for each section,
a field for each key, with its default and description.

`relay schema`, the checks at start and the test of docs/gateway-yaml.md read these models. They
hold the values as written; build.py makes the objects of core/provider.py from them.
"""

from __future__ import annotations

import ipaddress
import re
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from relay.core.addresses import address_of, host_name
from relay.core.numbers import unix_time_s
from relay.core.peek import ENDPOINT_KINDS
from relay.core.provider import Who
from relay.core.text import clean
from relay.registry.entries import (
    DECIMAL,
    ONE_OR_LIST,
    WHOLE,
    Bytes,
    KeepaliveSeconds,
    ProviderCache,
    ProviderEntry,
    Retries,
    Seconds,
    Section,
)
from relay.registry.problems import hint_at_nearest
from relay.registry.urls import (
    HeaderName,
    HttpUrl,
    UrlPath,
    is_service_url,
    matching,
    optional_url,
)

_CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")
_A_CLIENT_NAME = (
    "should be a name of 1 to 64 of the characters A-Z a-z 0-9 _ . -, and not an address"
)
_CLIENT_KEY = re.compile(r"(?!(?:ek_)?rt_)[\x21-\x7e]{16,512}\Z")
_A_CLIENT_KEY = (
    "should have 16 to 512 visible ASCII characters and not begin with rt_: make one with"
    " `openssl rand -hex 24`"
)
_ADVICE = ": make one with `openssl rand -hex 24`"
_NOT_FIT = "should have 16 to 512 visible ASCII characters and not begin with rk_ or rt_" + _ADVICE
_MIN_DIFFERENT_CHARS = 8
_SHA256 = re.compile(r"[0-9a-fA-F]{64}\Z")
_AN_ORIGIN = (
    "should be an origin such as https://app.example.com, https://*.example.com or"
    " http://localhost:5173"
)
_ORIGIN = re.compile(r"(?:\*|https?://(?:\*\.)?[A-Za-z0-9.-]+(?::\d+)?)\Z")


def _network(value: str) -> str:
    try:
        ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise PydanticCustomError(
            "network", "should be an address or network such as 127.0.0.1 or 10.0.0.0/8"
        ) from None
    return value


def _host(value: str) -> str:
    if value != "*" and host_name(value) != value.lower() and address_of(value) is None:
        raise PydanticCustomError(
            "host_name",
            "should be a host name or an address, without scheme and port, such as ai.example.com",
        )
    return value


class Server(Section):
    host: str = Field(
        "127.0.0.1",
        description="Listen address; other than loopback only with access.mode: required, or with --open.",
    )
    port: int = Field(8787, ge=0, le=65535, description="Listen port; 0 takes a free one.")
    admin_host: str = Field(
        "127.0.0.1",
        description="Listen address of admin_port; other than loopback only with a token of management.",
    )
    admin_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Listen port of management, which the other ports then do not answer; none: they do; 0 takes a free one.",
    )
    workers: int = Field(
        1, ge=1, le=64, description="Processes. More than one run under a supervisor."
    )
    hosts: list[Annotated[str, AfterValidator(_host)]] = Field(
        [],
        description="Host names, besides loopback, that clients may use in URLs of the relay while access is open.",
    )
    public_url: Annotated[str | None, optional_url("https://ai.example.com")] = Field(
        None,
        description="Base URL that clients use, such as https://ai.example.com; none: the URL of each request.",
    )
    trusted_proxies: list[Annotated[str, AfterValidator(_network)]] = Field(
        [],
        description="Addresses or networks of the proxies in front of the relay, whose X-Forwarded-* headers it trusts.",
    )
    drain_timeout_s: Seconds = Field(
        30, description="How long running calls may continue after SIGTERM."
    )
    keepalive_timeout_s: Seconds = Field(
        75,
        description="How long an idle client connection stays open, and an incomplete request head is waited for.",
    )
    body_idle_timeout_s: Seconds = Field(
        60, description="How long a client may pause while it sends a request body."
    )
    min_body_bytes_per_s: int = Field(
        512,
        ge=0,
        description="Minimum rate of a request body: one that falls body_idle_timeout_s behind it is refused; 0: no limit.",
    )
    write_timeout_s: Seconds = Field(
        300, description="How long a client may stall while receiving a response."
    )
    buffer_bytes: Bytes = Field(
        1024 * 1024,
        description="Request bodies up to this size are buffered before they are sent; larger ones stream.",
    )
    json_buffer_bytes: Bytes = Field(
        32 * 1024 * 1024,
        description="The same for JSON bodies, and for compressed bodies, by their decompressed size.",
    )
    buffer_total_bytes: Bytes = Field(
        256 * 1024 * 1024,
        description="Limit of all buffered bodies of a process; above it, bodies stream.",
    )


class Tls(Section):
    certificate: str | None = Field(
        None, description="PEM file with the certificate chain; none: no TLS."
    )
    key: str | None = Field(None, description="PEM file with the private key.")
    host: str | None = Field(None, description="Listen address; none: server.host.")
    port: int = Field(8443, ge=0, le=65535, description="Listen port, beside server.port.")


class Upstream(Section):
    connect_timeout_s: Seconds = Field(10, description="DNS, TCP and TLS together.")
    first_byte_timeout_s: Seconds = Field(
        600, description="From the end of the request to the head of the response."
    )
    idle_timeout_s: Seconds = Field(300, description="Silence within a response or an upload.")
    keepalive_s: KeepaliveSeconds | None = Field(
        None,
        description="Silence within an SSE stream after which the client gets a comment, so that no proxy closes the connection as idle: 1 to 300; none: it gets none.",
    )


class WebSockets(Section):
    handshake_timeout_s: Seconds = Field(
        10, description="How long the provider may take to answer the handshake."
    )
    send_timeout_s: Seconds = Field(
        20, description="A side that accepts no message for this long is closed with 1013."
    )
    ping_after_s: Seconds = Field(
        30,
        description="A side that is silent for this long is pinged; if it stays silent for as long again, its connection is lost.",
    )
    close_timeout_s: Seconds = Field(
        1,
        description="How long a side may take to answer a close frame before its connection is cut.",
    )
    idle_timeout_s: Seconds | None = Field(
        None, description="A session without messages for this long ends with 4408; none: no limit."
    )
    max_session_s: Seconds | None = Field(
        None, description="A session that lasts this long ends with 4409; none: no limit."
    )
    max_message_bytes: Bytes = Field(
        32 * 1024 * 1024, description="A larger message ends the session with 1009."
    )
    max_messages_per_s: int = Field(
        0,
        ge=0,
        description="A client that sends more messages in a second ends with 1008; 0: no limit.",
    )
    max_bytes_per_s: int = Field(0, ge=0, description="The same for the bytes of its messages.")
    max_sessions_per_client: int = Field(
        0, ge=0, description="Concurrent sessions of one client address; 0: no limit."
    )


class Cors(Section):
    origins: list[Annotated[str, matching(_ORIGIN, _AN_ORIGIN)]] = Field(
        [],
        description="Origins whose web pages may call the relay: exact ones, or https://*.example.com for all subdomains.",
    )
    max_age_s: int = Field(
        600, ge=0, description="How long a browser may cache a preflight response."
    )


class Log(Section):
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Minimum level of the lines that are written."
    )
    format: Literal["auto", "pretty", "json"] = Field(
        "auto", description="auto: pretty on a terminal, otherwise JSON."
    )


class Demo(Section):
    enabled: bool = Field(
        True,
        description="Offer the built-in provider `demo`. Its prices are invented and never charged.",
    )


def _redis_url(value: str | None) -> str | None:
    value = (value or "").strip()
    schemes = ("redis://", "rediss://", "unix://")
    if value and not (value.startswith(schemes) and is_service_url(value)):
        raise PydanticCustomError("redis_url", "should be a redis://, rediss:// or unix:// URL")
    return value or None


class RetryBudget(Section):
    percent: float = Field(
        20, ge=0, le=100, description="Attempts beyond the first, as a share of all calls."
    )
    per_s: float = Field(
        10, ge=0, description="Attempts beyond the first, per second, in addition to that share."
    )


_PER = re.compile(r"(?:all|client|team|provider|model|address|user|metadata\.[^|]{1,100})\Z")


Count = Annotated[int, Field(ge=1, le=1 << 40), WHOLE]


class Limit(Section):
    requests: Count | None = Field(None, description="REST calls that may start in a window.")
    tokens: Count | None = Field(None, description="Tokens that calls may use in a window.")
    handshakes: Count | None = Field(
        None, description="WebSocket sessions that may start in a window."
    )
    calls_at_once: Count | None = Field(None, description="Concurrent REST calls.")
    sessions_at_once: Count | None = Field(None, description="Concurrent WebSocket sessions.")
    window_s: int = Field(
        60, ge=1, le=366 * 86400, description="Length of the window, in whole seconds."
    )
    answer_tokens: Count = Field(
        1000,
        description="With `tokens`: reserved for the response to a call that sets no maximum.",
    )
    technique: Literal["fixed", "sliding"] = Field(
        "fixed",
        description="fixed: a window starts with its first call; sliding: the window is always the last window_s.",
    )
    per: Annotated[
        list[
            Annotated[
                str,
                matching(
                    _PER,
                    "should be all, client, team, provider, model, address, user or metadata.NAME",
                ),
            ]
        ],
        ONE_OR_LIST,
    ] = Field(
        ["all"],
        description="A counter for all calls, or for each client, team, provider, model, address, user or metadata.NAME; a list: for each combination.",
    )
    providers: list[str] = Field(
        [], description="Count calls to these providers only; empty: to all."
    )
    models: list[str] = Field([], description="Count calls of these models only; empty: of all.")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9 _.:/-]{1,64}$")] | None = Field(
        None,
        description="Name of the rule in `ratelimit` headers; none: derived from the other keys.",
    )


_MIN_USD = Decimal("0.000000001")


def _whole_nano(value: Decimal) -> Decimal:
    if value * 10**9 % 1:
        raise PydanticCustomError("usd", "should have at most nine decimal places")
    return value


BudgetUsd = Annotated[
    Decimal,
    Field(ge=_MIN_USD, le=10**9, allow_inf_nan=False),
    AfterValidator(_whole_nano),
    DECIMAL,
]
BudgetPer = Annotated[
    list[Literal["all", "client", "team", "user"]], ONE_OR_LIST, Field(max_length=3)
]


class ClientBudget(Section):
    """A budget of one client."""

    usd: BudgetUsd = Field(description="US dollars that may be spent in a period.")
    period: Literal["day", "week", "month", "total"] = Field(
        description="day, week (from Monday) or month, in UTC; total: once and for all."
    )
    per: BudgetPer = Field(
        ["all"],
        description="A budget for all calls, or for each client, team or user; a list: for each combination.",
    )
    mode: Literal["hard", "warn"] = Field(
        "hard", description="hard: calls beyond it are refused; warn: they are only reported."
    )
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9 _.:/-]{1,64}$")] | None = Field(
        None, description="Name of the budget in errors and reports; none: derived."
    )


class BudgetEntry(ClientBudget):
    """A rule of `budgets`."""

    clients: Annotated[list[str], ONE_OR_LIST] = Field(
        [], description="Count calls of these clients only; empty: of all."
    )


class UnpricedCharge(Section):
    usd: Annotated[
        Decimal, Field(ge=0, le=10_000, allow_inf_nan=False), AfterValidator(_whole_nano), DECIMAL
    ] = Field(description="What a call of unknown price is charged.")


_Unpriced = Literal["allow", "refuse"] | UnpricedCharge


def _unpriced(value: Any) -> Any:
    """Check which of the forms this is, so that an error names all of them or is about one."""
    is_charge = isinstance(value, dict) and value.get("usd") is not None
    if not is_charge and value not in ("allow", "refuse"):
        raise PydanticCustomError("unpriced", "should be allow, refuse or {usd: AMOUNT}")
    return value


def _form_of_unpriced(value: Any) -> str:
    return "[word]" if isinstance(value, str) else "[mapping]"


class Budgets(Section):
    default_output_tokens: Count = Field(
        8192,
        description="Output that is reserved for a call that sets no maximum, of a model without max_output_tokens in `pricing`.",
    )
    unpriced: Annotated[
        Annotated[
            Annotated[Literal["allow", "refuse"], Tag("[word]")]
            | Annotated[UnpricedCharge, Tag("[mapping]")],
            Discriminator(_form_of_unpriced),
        ],
        BeforeValidator(_unpriced, json_schema_input_type=_Unpriced),
    ] = Field(
        "allow",
        description="What happens to a call under a budget whose price is unknown: allow: it is not charged; refuse: 403; {usd: 0.01}: it is charged so much.",
    )
    rules: list[BudgetEntry] = Field(
        [],
        max_length=100,
        description="Budgets in US dollars; every one that applies must suffice.",
    )


def _kind(value: str) -> str:
    if value not in ENDPOINT_KINDS:
        hint = hint_at_nearest(value, ENDPOINT_KINDS)
        raise PydanticCustomError("kind", "is not a kind of endpoint{hint}", {"hint": hint})
    return value


def client_name(value: str) -> str:
    """Check the name of a client, which limits count beside addresses: it must not be one."""
    if not _CLIENT_NAME.match(value) or address_of(value) is not None:
        raise PydanticCustomError("client_name", _A_CLIENT_NAME)
    return value


def _scalars(value: dict[str, Any]) -> dict[str, Any]:
    for entry in value.values():
        if not isinstance(entry, str | bool | int | float):
            raise PydanticCustomError("metadata", "values should be text, numbers or booleans")
    return {name: clean(v) if isinstance(v, str) else v for name, v in value.items()}


def _time_s(value: str) -> str:
    if unix_time_s(value, 0) is None:
        raise PydanticCustomError(
            "time", "should be a date or time such as 2027-01-31 or 2027-01-31T12:00:00Z"
        )
    return value


class ClientRecord(Section):
    """What a client may do, in gateway.yaml and in the database."""

    providers: Annotated[list[str], ONE_OR_LIST] = Field(
        [], description="Providers that the client may call; empty: all."
    )
    models: Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], ONE_OR_LIST] = (
        Field(
            [],
            max_length=100,
            description="Models that it may use, with `*` and `?` as wildcards; empty: all.",
        )
    )
    endpoints: Annotated[list[Annotated[str, AfterValidator(_kind)]], ONE_OR_LIST] = Field(
        [],
        description="Kinds of endpoints that it may call, such as chat; empty: all, and with `models` those whose model the relay reads.",
    )
    origins: Annotated[list[Annotated[str, matching(_ORIGIN, _AN_ORIGIN)]], ONE_OR_LIST] = Field(
        [],
        max_length=100,
        description="Origins of web pages that may use its keys and tickets; empty: those of cors.origins.",
    )
    addresses: Annotated[list[Annotated[str, AfterValidator(_network)]], ONE_OR_LIST] = Field(
        [],
        max_length=100,
        description="Addresses or networks from which it may call; empty: any.",
    )
    limits: list[Limit] = Field(
        [], max_length=20, description="Limits of this client, as in `limits`; each of its own."
    )
    budgets: list[ClientBudget] = Field(
        [], max_length=20, description="Budgets of this client, as in `budgets.rules`."
    )
    metadata: Annotated[
        dict[Annotated[str, Field(min_length=1, max_length=100)], Any],
        AfterValidator(_scalars),
    ] = Field(
        {},
        max_length=10,
        description="Metadata of all its calls, such as team and user; it replaces what a call sends.",
    )


class ClientEntry(ClientRecord):
    """A client of gateway.yaml."""

    key: Annotated[
        list[Annotated[str, matching(_CLIENT_KEY, _A_CLIENT_KEY)]],
        ONE_OR_LIST,
        Field(max_length=20),
    ] = Field([], repr=False, description="Its key, such as `${WEB_KEY}`; a list: any of them.")
    key_sha256: Annotated[
        list[Annotated[str, matching(_SHA256, "should be a SHA-256 in 64 hexadecimal digits")]],
        ONE_OR_LIST,
        Field(max_length=20),
    ] = Field([], description="SHA-256 of its key, in place of the key itself; a list: of each.")
    expires: Annotated[str, AfterValidator(_time_s)] | None = Field(
        None, description="When its keys cease to be valid: a date or time, UTC; none: never."
    )


def _management_token(value: str) -> str:
    if value and (not _CLIENT_KEY.match(value) or value.startswith("rk_")):
        raise PydanticCustomError("management_token", _NOT_FIT)
    if value and len(set(value)) < _MIN_DIFFERENT_CHARS:
        raise PydanticCustomError("management_token", "is too easy to guess" + _ADVICE)
    return value


class Access(Section):
    mode: Literal["open", "required"] = Field(
        "open",
        description="open: calls from this machine or listed hosts need no key; required: every call needs a client's key or ticket.",
    )
    anonymous: str | None = Field(
        None, description="Client of `clients` whose record holds for calls without a key."
    )
    admin_token: Annotated[str, AfterValidator(_management_token)] = Field(
        "",
        repr=False,
        description="Token that may read and change everything under management; empty: none, and management is for local callers.",
    )
    read_token: Annotated[str, AfterValidator(_management_token)] = Field(
        "", repr=False, description="Token that may only read there; empty: none."
    )


class Delegation(Section):
    retries: Who = Field(
        "relay",
        description="Who retries calls through Cloudflare; the cf-aig-* headers for retries go only there.",
    )
    limits: Who = Field(
        "relay",
        description="Who counts requests, tokens and handshakes of calls through Cloudflare.",
    )
    cache: Who = Field(
        "relay",
        description="Who caches their responses; the cf-aig-* headers for the cache go only there.",
    )


def _listed_delegation(value: Any) -> Any:
    """`delegate: [cache, limits]` is short for a mapping of these to `cloudflare`."""
    listed = isinstance(value, list) and all(isinstance(each, str) for each in value)
    return dict.fromkeys(value, "cloudflare") if listed else value


class Cache(ProviderCache):
    store: Literal["memory", "redis"] = Field(
        "memory", description="memory: of each process; redis: shared by all workers and machines."
    )
    memory_bytes: Bytes = Field(
        64 * 1024 * 1024,
        description="Maximum size in memory; the least recently used responses are evicted first.",
    )
    max_answer_bytes: Bytes = Field(8 * 1024 * 1024, description="Larger responses are not cached.")
    stall_timeout_s: Seconds = Field(
        4,
        description="How long a stalled client may delay the other clients of a shared call; then it is cut off.",
    )


_GROUP = re.compile(r"(?!metadata\.|cf\.)[^,\x00-\x1f\x7f]{1,100}\Z")


def _group_by(value: list[str]) -> list[str]:
    if bad := [name for name in value if not _GROUP.match(name)]:
        raise PydanticCustomError(
            "group_by",
            "should list names in cf-aig-metadata as clients send them, such as team; not '{name}'",
            {"name": clean(bad[0], 40)},
        )
    if len(set(value)) < len(value):
        raise PydanticCustomError("group_by", "should list each name once")
    return value


class Ledger(Section):
    retention_days: float = Field(
        30, gt=0, le=36500, description="How long the row of a call is kept."
    )
    bodies: Literal["off", "asked", "on"] = Field(
        "off",
        description="Which bodies of REST calls are stored. off: none; asked: those of calls with cf-aig-collect-log-payload: true; on: those of all calls but with cf-aig-collect-log-payload: false.",
    )
    body_bytes: Annotated[int, Field(ge=0, le=16 * 1024 * 1024)] = Field(
        64 * 1024, description="Maximum size of a stored body; the rest is truncated."
    )
    body_retention_days: float = Field(
        7, gt=0, le=36500, description="How long bodies are kept, but never longer than the row."
    )
    group_by: Annotated[
        list[str],
        ONE_OR_LIST,
        Field(max_length=4),
        AfterValidator(_group_by),
    ] = Field(
        [],
        description="Names in cf-aig-metadata to aggregate by, at most four, such as project; users and teams are always aggregated.",
    )
    group_retention_days: float = Field(
        60,
        gt=0,
        le=36500,
        description="How long aggregates by user, by team and by `group_by` are kept, and budgets whose period has ended.",
    )


class Metrics(Section):
    enabled: bool = Field(True, description="Serve Prometheus metrics at /metrics.")
    max_models: int = Field(
        200,
        ge=0,
        description="Number of models that get a label of their own, after a provider has answered for them; all others share the label `other`.",
    )
    max_clients: int = Field(
        100,
        ge=0,
        description="Number of clients of the database that get a label of their own; all others share the label `other`. Those of gateway.yaml have one.",
    )


class Tracing(Section):
    endpoint: Annotated[str | None, optional_url("http://localhost:4318")] = Field(
        None,
        description="OTLP endpoint (http/protobuf), such as http://localhost:4318; none: no traces.",
    )
    headers: dict[HeaderName, str] = Field(
        {}, repr=False, description="Headers of every export, such as a vendor's key."
    )
    sample: float = Field(
        1,
        ge=0,
        le=1,
        description="Sampled share of the traces that start at the relay; other traces keep the decision of their caller.",
    )
    service_name: str = Field("ai-gateway-relay", description="Name of the relay in traces.")


class Redis(Section):
    url: Annotated[str | None, AfterValidator(_redis_url)] = Field(
        None,
        repr=False,
        description="URL of the Redis that workers and machines share limits and cache by, such as redis://localhost:6379/0; none: no Redis.",
    )
    timeout_s: Seconds = Field(
        0.25,
        description="A command that takes longer fails; Redis counts as unavailable for a second, and calls continue without it.",
    )


class Cloudflare(Section):
    account_id: UrlPath = Field(
        "", description="If set, calls to providers with a slug go through Cloudflare AI Gateway."
    )
    gateway_id: UrlPath = Field("default", description="Name of the gateway; empty: `default`.")
    api_key: str = Field(
        "", repr=False, description="Sent as cf-aig-authorization; empty: not sent."
    )
    base_url: HttpUrl = Field(
        "https://gateway.ai.cloudflare.com/v1",
        description="Base URL of AI Gateway; another for private gateways and tests.",
    )
    delegate: Annotated[
        Delegation,
        BeforeValidator(
            _listed_delegation,
            json_schema_input_type=list[Literal["retries", "limits", "cache"]] | Delegation,
        ),
    ] = Field(
        Delegation(),
        description="Tasks of Cloudflare for the calls through it: a list of retries, limits and cache, or for each of them relay, cloudflare or off.",
    )


def _as_target(value: Any) -> Any:
    """Expand `openai/gpt-5`, which is short for its provider and model."""
    if not isinstance(value, str):
        return value
    provider, slash, model = value.partition("/")
    if not slash or not provider or not model:
        raise PydanticCustomError("target", "should be PROVIDER/MODEL, such as openai/gpt-5")
    return {"provider": provider, "model": model}


class ModelTarget(Section):
    provider: str = Field(description="Name of a provider.")
    model: str = Field(min_length=1, max_length=200, description="Its name of the model.")
    weight: float = Field(1, gt=0, description="With `order: weight`: its weight.")


_Target = Annotated[
    ModelTarget, BeforeValidator(_as_target, json_schema_input_type=str | ModelTarget)
]


def _as_alias(value: Any) -> Any:
    """Expand a target or a list of targets, which is short for an alias with them."""
    if isinstance(value, str):
        return {"targets": [value]}
    return {"targets": value} if isinstance(value, list) else value


class ModelAlias(Section):
    targets: list[_Target] = Field(
        min_length=1, max_length=20, description="PROVIDER/MODEL, or {provider, model, weight}."
    )
    order: Literal["listed", "weight"] = Field(
        "listed",
        description="listed: the next one follows when one fails; weight: chosen at random by weight.",
    )


class UnifiedSockets(Section):
    realtime: str | None = Field(None, description="Provider of /v1/realtime without a model.")
    responses: str | None = Field(None, description="Provider of sockets at /v1/responses.")
    live: str | None = Field(None, description="Provider of /v1/live/sessions.")


class UnifiedApi(Section):
    order: list[str] = Field(
        [],
        description="Providers in which a model without a prefix is looked for; empty: all that have a key, in the order of the file.",
    )
    sockets: UnifiedSockets = Field(
        UnifiedSockets(), description="Who answers sockets that name no model."
    )


def _alias_name(value: str) -> str:
    if not value or len(value) > 200 or not value.isprintable() or value != value.strip():
        raise PydanticCustomError("alias", "should be a name of at most 200 characters")
    return value


def _database(value: str | None) -> str | None:
    kind, colon, rest = (value or "").partition("://")
    if value == ":memory:" or (colon and kind.startswith("sqlite") and rest in _WITHOUT_FILE):
        raise PydanticCustomError(
            "database", "should be a file: each connection to a database in memory has its own"
        )
    if colon and (kind not in _DATABASES or not is_service_url(value or "")):
        raise PydanticCustomError(
            "database", "should be a path, sqlite:///PATH or postgresql+asyncpg://…"
        )
    return value or None


_WITHOUT_FILE = ("", "/", "/:memory:")
_DATABASES = ("sqlite", "sqlite+aiosqlite", "postgres", "postgresql", "postgresql+asyncpg")


class GatewayFile(Section):
    """gateway.yaml."""

    server: Server = Server()
    tls: Tls = Tls()
    upstream: Upstream = Upstream()
    websocket: WebSockets = WebSockets()
    retries: Retries = Retries()
    retry_budget: RetryBudget = RetryBudget()
    limits: list[Limit] = Field([], description="Rate limits, token limits and concurrency limits.")
    budgets: Budgets = Budgets()
    cache: Cache = Cache()
    inject_usage: bool = Field(True, description="false: `inject_usage` is off for every provider.")
    redis: Redis = Redis()
    database: Annotated[str | None, AfterValidator(_database)] = Field(
        "data/relay.db",
        repr=False,
        description="Database of the ledger: a SQLite file, or postgresql+asyncpg://USER:PASSWORD@HOST/NAME; empty: no ledger.",
    )
    ledger: Ledger = Ledger()
    metrics: Metrics = Metrics()
    tracing: Tracing = Tracing()
    access: Access = Access()
    clients: dict[Annotated[str, AfterValidator(client_name)], ClientEntry] = Field(
        {}, description="Clients of the relay by name: who may call, and what."
    )
    models: dict[
        Annotated[str, AfterValidator(_alias_name)],
        Annotated[
            ModelAlias,
            BeforeValidator(
                _as_alias, json_schema_input_type=str | list[str | ModelTarget] | ModelAlias
            ),
        ],
    ] = Field({}, description="Aliases of models for /v1: name to PROVIDER/MODEL, or a list.")
    unified: UnifiedApi = UnifiedApi()
    cors: Cors = Cors()
    log: Log = Log()
    demo: Demo = Demo()
    cloudflare: Cloudflare = Cloudflare()
    include: list[str] = Field(
        [], description="More files with providers, relative to this one; `*` is allowed."
    )
    providers: dict[str, ProviderEntry] = Field(
        {}, description="Providers by name; the name is part of their URLs."
    )


class ProvidersFile(Section):
    """An included file, which has providers only."""

    providers: dict[str, ProviderEntry] = {}
