"""What may stand in gateway.yaml, providers aside (entries.py): one pydantic model a section, one field a key, with default and meaning.

The models are the source of `relay schema`, of the checks at start, and of docs/gateway-yaml.md's test.
They hold what was written; `build.py` turns providers into the frozen nouns of `core/provider.py`.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from relay.core.provider import Who
from relay.core.text import clean
from relay.registry.entries import (
    ONE_OR_LIST,
    Bytes,
    ProviderCache,
    ProviderEntry,
    Retries,
    Seconds,
    Section,
)
from relay.registry.urls import (
    HeaderName,
    HttpUrl,
    UrlPath,
    is_service_url,
    matching,
    optional_url,
)

_ORIGIN = re.compile(r"(?:\*|https?://(?:\*\.)?[A-Za-z0-9.-]+(?::\d+)?)\Z")


def _network(given: str) -> str:
    try:
        ipaddress.ip_network(given, strict=False)
    except ValueError:
        raise PydanticCustomError(
            "network", "should be an address or network such as 127.0.0.1 or 10.0.0.0/8"
        ) from None
    return given


class Server(Section):
    host: str = Field(
        "127.0.0.1",
        description="Address to listen on. Not beyond loopback while access is open, unless --open.",
    )
    port: int = Field(8787, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    workers: int = Field(
        1, ge=1, le=64, description="Processes. More than one are run by a supervisor."
    )
    hosts: list[str] = Field(
        [],
        description="Host names, besides loopback, by which clients may call the relay while access is open.",
    )
    public_url: Annotated[str | None, optional_url("https://ai.example.com")] = Field(
        None,
        description="What clients call the relay by, such as https://ai.example.com; none: as they called.",
    )
    trusted_proxies: list[Annotated[str, AfterValidator(_network)]] = Field(
        [],
        description="Addresses or networks of proxies in front whose X-Forwarded-* headers are believed.",
    )
    drain_timeout_s: Seconds = Field(
        30, description="How long running calls may go on after SIGTERM."
    )
    keepalive_timeout_s: Seconds = Field(
        75, description="How long an idle client connection is kept; also bounds a half-sent head."
    )
    body_idle_timeout_s: Seconds = Field(
        60, description="How long a client may pause while it sends a request body."
    )
    min_body_bytes_per_s: int = Field(
        512,
        ge=0,
        description="A request body that falls body_idle_timeout_s behind this rate is refused; 0 is no limit.",
    )
    write_timeout_s: Seconds = Field(
        300, description="How long a client may take nothing of its answer."
    )
    buffer_bytes: Bytes = Field(
        1024 * 1024,
        description="Request bodies up to this size are read whole before they are sent.",
    )
    json_buffer_bytes: Bytes = Field(32 * 1024 * 1024, description="The same for JSON bodies, and for what compressed bodies unpack to.")
    buffer_total_bytes: Bytes = Field(
        256 * 1024 * 1024,
        description="Memory that all bodies held whole may take in a process; past it they stream.",
    )


class Tls(Section):
    certificate: str | None = Field(
        None, description="PEM file with the certificate and its chain; none: no TLS."
    )
    key: str | None = Field(None, description="PEM file with the certificate's private key.")
    host: str | None = Field(None, description="Address to listen on; none: server.host.")
    port: int = Field(8443, ge=0, le=65535, description="Its own port, beside server.port.")


class Upstream(Section):
    connect_timeout_s: Seconds = Field(10, description="DNS, TCP and TLS together.")
    first_byte_timeout_s: Seconds = Field(
        600, description="From the request sent to the answer's head."
    )
    idle_timeout_s: Seconds = Field(300, description="Silence within an answer or an upload.")


class WebSockets(Section):
    handshake_timeout_s: Seconds = Field(
        10, description="For the provider to answer the handshake."
    )
    send_timeout_s: Seconds = Field(
        20, description="A side that takes no message for this long is closed with 1013."
    )
    ping_after_s: Seconds = Field(
        30,
        description="Silence after which a side is pinged; silent for as long again, it is lost.",
    )
    close_timeout_s: Seconds = Field(
        1, description="What a side gets to answer a close frame before its connection is cut."
    )
    idle_timeout_s: Seconds | None = Field(
        None, description="A session without a message for this long ends with 4408."
    )
    max_session_s: Seconds | None = Field(
        None, description="A session ends with 4409 after this long."
    )
    max_message_bytes: Bytes = Field(
        32 * 1024 * 1024, description="A larger message ends the session with 1009."
    )
    max_messages_per_s: int = Field(
        0,
        ge=0,
        description="A client that sends more, second by second, ends with 1008; 0 is no limit.",
    )
    max_bytes_per_s: int = Field(0, ge=0, description="The same for the bytes of its messages.")
    max_sessions_per_client: int = Field(
        0, ge=0, description="Sessions at once for one client address; 0 is no limit."
    )


class Cors(Section):
    origins: list[
        Annotated[
            str,
            matching(
                _ORIGIN,
                "should be an origin such as https://app.example.com, https://*.example.com or http://localhost:5173",
            ),
        ]
    ] = Field(
        [],
        description="Exact origins, or https://*.example.com for any subdomain, whose pages may call the relay.",
    )
    max_age_s: int = Field(600, ge=0, description="How long a browser may remember a preflight.")


class Log(Section):
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least level that is written."
    )
    format: Literal["auto", "pretty", "json"] = Field(
        "auto", description="auto: pretty on a terminal, JSON otherwise."
    )


class Demo(Section):
    enabled: bool = Field(
        True,
        description="Offer the built-in provider `demo`. Its prices are invented: nobody pays them.",
    )


def _redis_url(given: str | None) -> str | None:
    given = (given or "").strip()
    schemes = ("redis://", "rediss://", "unix://")
    if given and not (given.startswith(schemes) and is_service_url(given)):
        raise PydanticCustomError("redis_url", "should be a redis://, rediss:// or unix:// URL")
    return given or None


class RetryBudget(Section):
    percent: float = Field(
        20, ge=0, le=100, description="Tries beyond the first, as a share of all calls."
    )
    per_s: float = Field(10, ge=0, description="And so many a second besides.")


_PER = re.compile(r"(?:all|client|provider|model|address|user|metadata\.[^|]{1,100})\Z")


Count = Annotated[int, Field(ge=1, le=1 << 40)]


class Limit(Section):
    requests: Count | None = Field(None, description="REST calls that may begin in a window.")
    tokens: Count | None = Field(None, description="Tokens that calls may use in a window.")
    handshakes: Count | None = Field(
        None, description="WebSocket sessions that may begin in a window."
    )
    calls_at_once: Count | None = Field(None, description="REST calls that may run at once.")
    sessions_at_once: Count | None = Field(
        None, description="WebSocket sessions that may be open at once."
    )
    window_s: int = Field(60, ge=1, le=366 * 86400, description="The window, in whole seconds.")
    answer_tokens: Count = Field(
        1000,
        description="With `tokens`: set aside for the answer of a call that names no bound of its own.",
    )
    technique: Literal["fixed", "sliding"] = Field(
        "fixed",
        description="fixed: a window begins with its first call; sliding: the last seconds, always.",
    )
    per: Annotated[
        list[Annotated[
                str,
                matching(
                    _PER, "should be all, client, provider, model, address, user or metadata.NAME"
                ),
            ]],
        ONE_OR_LIST,
    ] = Field(
        ["all"],
        description="Counted together (all), or for each client, provider, model, address, user, metadata.NAME; a list counts each combination.",
    )
    providers: list[str] = Field([], description="Of these providers only; empty is all.")
    models: list[str] = Field([], description="Of these models only; empty is all.")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9 _.:/-]{1,64}$")] | None = Field(
        None, description="What `ratelimit` headers call it; none: made from the rest."
    )


class Delegation(Section):
    retries: Who = Field(
        "relay",
        description="Who retries what goes through Cloudflare; its cf-aig-* headers go to that one only.",
    )
    limits: Who = Field(
        "relay", description="Who counts requests, tokens and handshakes of what goes through it."
    )
    cache: Who = Field(
        "relay", description="Who caches it; the cf-aig-* headers go to that one only."
    )


def _listed_delegation(given: Any) -> Any:
    """`delegate: [cache, limits]` is short for a mapping of these to `cloudflare`."""
    listed = isinstance(given, list) and all(isinstance(each, str) for each in given)
    return dict.fromkeys(given, "cloudflare") if listed else given


class Cache(ProviderCache):
    store: Literal["memory", "redis"] = Field(
        "memory", description="Memory of each process; or redis, for all workers and machines."
    )
    memory_bytes: Bytes = Field(
        64 * 1024 * 1024, description="What memory may hold; the least recently used goes first."
    )
    max_answer_bytes: Bytes = Field(8 * 1024 * 1024, description="A larger answer is not kept.")
    stall_timeout_s: Seconds = Field(
        4,
        description="How long a client may keep the others of a shared call waiting; then it is cut off.",
    )


_GROUP = re.compile(r"(?!metadata\.|cf\.)[^,\x00-\x1f\x7f]{1,100}\Z")


def _group_by(given: list[str]) -> list[str]:
    if bad := [name for name in given if not _GROUP.match(name)]:
        raise PydanticCustomError(
            "group_by",
            "should name entries of cf-aig-metadata as clients send them, such as team: not '{name}'",
            {"name": clean(bad[0], 40)},
        )
    if len(set(given)) < len(given):
        raise PydanticCustomError("group_by", "should name each entry once")
    return given


class Ledger(Section):
    retention_days: float = Field(
        30, gt=0, le=36500, description="How long the row of a call is kept."
    )
    bodies: Literal["off", "asked", "on"] = Field(
        "off",
        description="Store the request and response bodies of REST calls: never; where a call asks for it (cf-aig-collect-log-payload: true); or unless it forbids it.",
    )
    body_bytes: Annotated[int, Field(ge=0, le=16 * 1024 * 1024)] = Field(
        64 * 1024, description="Of each body at most; the rest is cut off."
    )
    body_retention_days: float = Field(
        7, gt=0, le=36500, description="How long bodies are kept; never longer than the row."
    )
    group_by: Annotated[
        list[str],
        ONE_OR_LIST,
        Field(max_length=4),
        AfterValidator(_group_by),
    ] = Field(
        [],
        description="Entries of cf-aig-metadata to add calls up by, at most four, such as team; by user they are always added up.",
    )
    group_retention_days: float = Field(
        60, gt=0, le=36500, description="How long the sums by user and by `group_by` are kept."
    )


class Metrics(Section):
    enabled: bool = Field(True, description="Serve Prometheus metrics at /metrics.")
    max_models: int = Field(
        200, ge=0, description="Models that get a label of their own, once a provider has answered for them; all others share the label `other`."
    )


class Tracing(Section):
    endpoint: Annotated[str | None, optional_url("http://localhost:4318")] = Field(
        None,
        description="OTLP endpoint (http/protobuf), such as http://localhost:4318; none: no traces.",
    )
    headers: dict[HeaderName, str] = Field(
        {}, repr=False, description="Sent with every export, such as a vendor's key."
    )
    sample: float = Field(
        1, ge=0, le=1, description="Share of the traces that begin here; others keep their choice."
    )
    service_name: str = Field("ai-gateway-relay", description="What traces call the relay.")


class Redis(Section):
    url: Annotated[str | None, AfterValidator(_redis_url)] = Field(
        None,
        repr=False,
        description="Such as redis://localhost:6379/0: limits and cache are shared by workers and machines.",
    )
    timeout_s: Seconds = Field(
        0.25, description="After this Redis counts as away for a second, and calls go on without."
    )


class Cloudflare(Section):
    account_id: UrlPath = Field(
        "", description="Set: providers with a slug go through Cloudflare AI Gateway."
    )
    gateway_id: UrlPath = Field("default", description="The gateway's name; empty is `default`.")
    api_key: str = Field(
        "", repr=False, description="Sent as cf-aig-authorization; empty sends none."
    )
    base_url: HttpUrl = Field(
        "https://gateway.ai.cloudflare.com/v1", description="For private gateways and tests."
    )
    delegate: Annotated[
        Delegation,
        BeforeValidator(
            _listed_delegation,
            json_schema_input_type=list[Literal["retries", "limits", "cache"]] | Delegation,
        ),
    ] = Field(
        Delegation(),
        description="What Cloudflare does instead of the relay: a list of retries, limits and cache, or who does each: relay, cloudflare, or off.",
    )


def _database(given: str | None) -> str | None:
    kind, colon, _ = (given or "").partition("://")
    if colon and (kind not in _DATABASES or not is_service_url(given or "")):
        raise PydanticCustomError(
            "database", "should be a path, sqlite:///PATH or postgresql+asyncpg://…"
        )
    return given or None


_DATABASES = ("sqlite", "sqlite+aiosqlite", "postgres", "postgresql", "postgresql+asyncpg")


class GatewayFile(Section):
    """The whole of gateway.yaml."""

    server: Server = Server()
    tls: Tls = Tls()
    upstream: Upstream = Upstream()
    websocket: WebSockets = WebSockets()
    retries: Retries = Retries()
    retry_budget: RetryBudget = RetryBudget()
    limits: list[Limit] = Field([], description="How often, how much, and what may run at once.")
    cache: Cache = Cache()
    inject_usage: bool = Field(
        True, description="false: `inject_usage` is off at every provider, whatever it says."
    )
    redis: Redis = Redis()
    database: Annotated[str | None, AfterValidator(_database)] = Field(
        "data/relay.db",
        repr=False,
        description="Where the ledger is kept: a SQLite file, or postgresql+asyncpg://USER:PASSWORD@HOST/NAME; empty: nowhere.",
    )
    ledger: Ledger = Ledger()
    metrics: Metrics = Metrics()
    tracing: Tracing = Tracing()
    cors: Cors = Cors()
    log: Log = Log()
    demo: Demo = Demo()
    cloudflare: Cloudflare = Cloudflare()
    include: list[str] = Field(
        [], description="More files with providers, relative to this one; * is allowed."
    )
    providers: dict[str, ProviderEntry] = Field({}, description="Name, as in URLs, to provider.")


class ProvidersFile(Section):
    """An included file: providers and nothing else."""

    providers: dict[str, ProviderEntry] = {}
