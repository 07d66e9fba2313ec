"""What may stand in gateway.yaml, providers aside (entries.py): one pydantic model a section, one field a key, with default and meaning.

The models are the source of `relay schema`, of the checks at start, and of docs/gateway-yaml.md's test.
They hold what was written; `build.py` turns providers into the frozen nouns of `core/provider.py`.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from relay.registry.controls import (
    Cache,
    Delegation,
    Ledger,
    Limit,
    Metrics,
    Redis,
    RetryBudget,
    Tracing,
    listed_delegation,
)
from relay.registry.entries import Bytes, ProviderEntry, Retries, Seconds, Section
from relay.registry.urls import BadUrl, HttpUrl, UrlPath, is_service_url, read_url

_ORIGIN = re.compile(r"(?:\*|https?://(?:\*\.)?[A-Za-z0-9.-]+(?::\d+)?)\Z")


def _public_url(given: str | None) -> str | None:
    given = (given or "").strip().rstrip("/")
    if not given:
        return None
    try:
        return str(read_url(given)).rstrip("/")
    except BadUrl as error:
        words = f"{error} (such as https://ai.example.com)"
        raise PydanticCustomError("public_url", "{words}", {"words": words}) from None


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
    public_url: Annotated[str | None, AfterValidator(_public_url)] = Field(
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


def _origin(given: str) -> str:
    if not _ORIGIN.match(given):
        raise PydanticCustomError(
            "origin",
            "should be an origin such as https://app.example.com, https://*.example.com or http://localhost:5173",
        )
    return given


class Cors(Section):
    origins: list[Annotated[str, AfterValidator(_origin)]] = Field(
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
            listed_delegation,
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
