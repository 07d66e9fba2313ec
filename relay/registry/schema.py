"""What may stand in gateway.yaml: one pydantic model a section, one field a key, with default and meaning.

The models are the source of `relay schema`, of the checks at start, and of docs/gateway-yaml.md's test.
They hold what was written; `registry.py` turns providers into the frozen nouns of `core/provider.py`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

_ORIGIN = re.compile(r"(?:\*|https?://(?:\*\.)?[A-Za-z0-9.-]+(?::\d+)?)\Z")
Seconds = Annotated[float, Field(gt=0)]
Bytes = Annotated[int, Field(ge=0)]
Via = Literal["direct", "cloudflare"]
Verdict = Literal["pass", "drop", "credential", "credential_next"]
ErrorShape = Literal[
    "openai", "anthropic", "google", "elevenlabs", "cartesia", "fal", "deepgram", "assemblyai"
]


class Section(BaseModel):
    """Unknown keys are errors; nothing changes after the start."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
    drain_timeout_s: Seconds = Field(
        30, description="How long running calls may go on after SIGTERM."
    )
    keepalive_timeout_s: Seconds = Field(
        75, description="How long an idle client connection is kept; also bounds a half-sent head."
    )
    body_idle_timeout_s: Seconds = Field(
        60, description="How long a client may pause while it sends a request body."
    )
    write_timeout_s: Seconds = Field(
        300, description="How long a client may take nothing of its answer."
    )
    buffer_bytes: Bytes = Field(
        1024 * 1024,
        description="Request bodies up to this size are read whole before they are sent.",
    )
    json_buffer_bytes: Bytes = Field(32 * 1024 * 1024, description="The same for JSON bodies.")
    buffer_total_bytes: Bytes = Field(
        256 * 1024 * 1024,
        description="Memory that all bodies held whole may take in a process; past it they stream.",
    )


class Upstream(Section):
    connect_timeout_s: Seconds = Field(10, description="DNS, TCP and TLS together.")
    first_byte_timeout_s: Seconds = Field(
        300, description="From the request sent to the answer's head."
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
    enabled: bool = Field(True, description="Offer the built-in provider `demo`.")


class Cloudflare(Section):
    account_id: str = Field(
        "", description="Set: providers with a slug go through Cloudflare AI Gateway."
    )
    gateway_id: str = Field("default", description="The gateway's name; empty is `default`.")
    api_key: str = Field(
        "", repr=False, description="Sent as cf-aig-authorization; empty sends none."
    )
    base_url: str = Field(
        "https://gateway.ai.cloudflare.com/v1", description="For private gateways and tests."
    )


class Auth(Section):
    header: str | None = Field(None, description="Header that takes the credential.")
    query: str | None = Field(None, description="Query parameter that takes it.")
    subprotocol: str | None = Field(
        None, description="Subprotocol prefix that takes it, such as `xi-api-key.`."
    )
    value: Annotated[
        list[str],
        BeforeValidator(
            lambda given: [given] if isinstance(given, str) else given,
            json_schema_input_type=str | list[str],
        ),
    ] = Field(
        [],
        repr=False,
        description="Template such as `Bearer ${OPENAI_API_KEY}`; a list is a pool used in turn.",
    )


class CloudflareWebSocket(Section):
    slug: str = Field(description="The provider's name on Cloudflare's sockets.")
    path: str | None = Field(
        None, description="What the default path becomes there; none: it is sent as it is."
    )
    auth: Auth | None = Field(
        None,
        description="Where Cloudflare's socket takes the provider's credential; none: as the provider does.",
    )


class CloudflareSlug(Section):
    slug: str = Field(description="The provider's name in Cloudflare's URLs.")
    path: str = Field("", description="Put between the slug and the endpoint.")
    websocket: CloudflareWebSocket | None = Field(
        None, description="How sockets go through Cloudflare; none: they go direct."
    )


class ProviderWebSocket(Section):
    default_path: str = Field(description="Opened when the client names no endpoint.")
    default_query: dict[str, str] = Field(
        {},
        description="Added when the client names no model, intent, call_id or agent_id, nor any of these.",
    )
    base_url: str | None = Field(None, description="Another host for sockets; none: base_url.")
    subprotocols: dict[str, Verdict] = Field(
        {},
        description="Name, or prefix ending in a dot, to: pass, drop, credential, credential_next.",
    )
    auth: Auth | None = Field(
        None, description="Where sockets take the credential; none: as REST does."
    )
    max_message_bytes: Bytes | None = Field(
        None, description="Instead of websocket.max_message_bytes."
    )
    idle_timeout_s: Seconds | None = Field(None, description="Instead of websocket.idle_timeout_s.")
    max_session_s: Seconds | None = Field(None, description="Instead of websocket.max_session_s.")


class ViaEach(Section):
    rest: Via | None = Field(None, description="For REST.")
    websocket: Via | None = Field(None, description="For WebSockets.")


def _same_for_both(given: Any) -> Any:
    """`via: direct` is short for both."""
    return {"rest": given, "websocket": given} if isinstance(given, str) else given


class ProviderEntry(Section):
    base_url: str = Field(
        description="Where the provider lives, version path included if all its endpoints share one."
    )
    auth: Auth | None = Field(
        None, description="Where the credential goes; none: the provider needs none."
    )
    cloudflare: CloudflareSlug | None = Field(
        None, description="How it is reached through Cloudflare AI Gateway."
    )
    via: Annotated[
        ViaEach, BeforeValidator(_same_for_both, json_schema_input_type=Via | ViaEach)
    ] = Field(
        ViaEach(),
        description="Which way it is reached; none: Cloudflare if account and slug are set.",
    )
    stored_at_cloudflare: bool = Field(
        False, description="The provider's key lies at Cloudflare: send none."
    )
    client_credentials: Literal["deny", "allow"] = Field(
        "deny", description="allow: a client's own key goes to the provider instead of the relay's."
    )
    query_credentials: list[str] = Field(
        [], description="Query names in which its SDKs send a key: cut from every call."
    )
    headers: dict[str, str] = Field({}, description="Sent when the client sends none of that name.")
    paths: dict[str, str] = Field(
        {},
        description="Endpoint prefix to another path (/x) or another host of the provider's (https://…).",
    )
    websocket: ProviderWebSocket | None = Field(
        None, description="How its WebSockets are opened; none: it has none."
    )
    meter: ErrorShape = Field(
        "openai",
        description="Whose wire format it speaks: how usage is read, and the shape of the relay's own errors.",
    )
    allow_http: bool = Field(False, description="Allow http:// with a credential beyond loopback.")
    connect_timeout_s: Seconds | None = Field(
        None, description="Instead of upstream.connect_timeout_s."
    )
    first_byte_timeout_s: Seconds | None = Field(
        None, description="Instead of upstream.first_byte_timeout_s."
    )
    idle_timeout_s: Seconds | None = Field(None, description="Instead of upstream.idle_timeout_s.")


class GatewayFile(Section):
    """The whole of gateway.yaml."""

    server: Server = Server()
    upstream: Upstream = Upstream()
    websocket: WebSockets = WebSockets()
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
