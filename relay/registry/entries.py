"""What may stand under a provider's name: one pydantic model a section, as in schema.py.

Owns: the keys of a provider. It holds what was written; build.py gives it its meaning.
"""

from __future__ import annotations

import datetime
import re
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from relay.core.formats import Format
from relay.core.provider import Strategy, Via
from relay.core.retry_policy import Backoff, FallbackCause
from relay.core.subprotocols import SubprotocolUse
from relay.registry.urls import DefaultHeader, Endpoint, HeaderName, QueryName, UrlPath, matching

_FIELD = re.compile(r"[A-Za-z0-9_.-]+\Z")
Seconds = Annotated[float, Field(gt=0, le=366 * 86400)]
Bytes = Annotated[int, Field(ge=0, le=1 << 50)]


def one_or_list(kind: Any) -> BeforeValidator:
    """Takes one value for a list of one."""
    return BeforeValidator(
        lambda given: [given] if isinstance(given, str) else given,
        json_schema_input_type=kind | list[kind],
    )


ONE_OR_LIST = one_or_list(str)


class Section(BaseModel):
    """Unknown keys are errors; nothing changes after the start."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Auth(Section):
    header: HeaderName | None = Field(None, description="Header that takes the credential.")
    query: QueryName | None = Field(None, description="Query parameter that takes it.")
    subprotocol: HeaderName | None = Field(
        None, description="Subprotocol prefix that takes it, such as `xi-api-key.`."
    )
    value: Annotated[
        list[str],
        ONE_OR_LIST,
    ] = Field(
        [],
        repr=False,
        description="Template such as `Bearer ${OPENAI_API_KEY}`; a list is a pool.",
    )
    pool: Strategy = Field(
        "round_robin", description="How the next of a pool is chosen."
    )
    weights: list[Annotated[float, Field(gt=0)]] = Field(
        [], description="One for each value, with `pool: weight`."
    )


class ProviderCache(Section):
    ttl_s: Annotated[int, Field(ge=0, le=30 * 86400)] | None = Field(
        None, description="Answers are kept for so long; none: only where a call asks for it."
    )
    scope: Literal["client", "shared"] = Field(
        "client",
        description="client: each client has answers of its own; shared: all have the same.",
    )
    coalesce: bool = Field(
        False, description="Identical calls that run at once in a process share one upstream call."
    )


class CloudflareWebSocket(Section):
    slug: UrlPath = Field(description="The provider's name on Cloudflare's sockets.")
    path: UrlPath | None = Field(
        None, description="What the default path becomes there; none: it is sent as it is."
    )
    auth: Auth | None = Field(
        None,
        description="Where Cloudflare's socket takes the provider's credential; none: as the provider does.",
    )


class CloudflareSlug(Section):
    slug: UrlPath = Field(description="The provider's name in Cloudflare's URLs.")
    path: UrlPath = Field("", description="Put between the slug and the endpoint.")
    websocket: CloudflareWebSocket | None = Field(
        None, description="How sockets go through Cloudflare; none: they go direct."
    )


class ProviderWebSocket(Section):
    default_path: Endpoint = Field(description="Opened when the client names no endpoint.")
    paths: list[str] = Field(
        [], description="Patterns of the paths that have WebSockets (`*` is anything), where not all do; elsewhere a handshake gets 426."
    )
    default_query: dict[str, str] = Field(
        {},
        description="Added on the default path alone, when the client names no model, intent, call_id or agent_id, nor any of these.",
    )
    header_queries: dict[HeaderName, QueryName] = Field(
        {},
        description="Header to the query parameter that means the same: a default of either is left out where the other goes up.",
    )
    base_url: str | None = Field(None, description="Another host for sockets; none: base_url.")
    subprotocols: dict[str, SubprotocolUse] = Field(
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


Ways = Annotated[
    list[Via],
    one_or_list(Via),
    Field(min_length=1, max_length=2),
]
"""One way, or two in order: the second when the first fails."""


class ViaEach(Section):
    rest: Ways | None = Field(None, description="For REST; a list is tried in order.")
    websocket: Ways | None = Field(None, description="For WebSockets; the same.")


def _same_for_both(given: Any) -> Any:
    """`via: direct` is short for both."""
    return {"rest": given, "websocket": given} if isinstance(given, str | list) else given


class Retries(Section):
    max_attempts: int = Field(
        2, ge=1, le=10, description="At one target, the first included; 1 is no retry."
    )
    backoff: Backoff = Field(
        "exponential", description="How the wait grows; it is random up to that (full jitter)."
    )
    delay_s: Seconds = Field(0.25, description="The first wait at most.")
    max_delay_s: Seconds = Field(
        5,
        description="The longest wait before a retry. A provider that asks for more by Retry-After is not retried.",
    )
    deadline_s: Seconds = Field(
        60,
        description="After this no retry begins at the same target; the next target is called all the same.",
    )
    statuses: list[Annotated[int, Field(ge=400, le=599)]] = Field(
        [429, 503, 529],
        description="By which a provider says that it did not execute a call, so that a POST may be sent again.",
    )


class Fallback(Section):
    provider: str = Field(description="A provider of this file; it may be the same one.")
    model: str | None = Field(None, description="Replaces the call's, in the body, path, query or form field that names it.")
    endpoint: Endpoint | None = Field(None, description="Called instead of the call's.")
    weight: float = Field(1, gt=0, description="Its share, with `order: weight`.")


class Rewrite(Section):
    headers: list[HeaderName] = Field([], description="Response headers that hold one URL.")
    fields: dict[str, list[Annotated[str, matching(_FIELD, "should be a plain JSON field name")]]] = Field(
        {}, description="Endpoint prefix to the JSON fields of its answers that hold a URL."
    )


Usd = Annotated[Decimal, Field(ge=0, le=1_000_000, allow_inf_nan=False)]


class Pricing(Section):
    models: list[str] = Field([], description="Of these models, `*` is allowed; empty is all.")
    since: datetime.date | None = Field(None, description="From this day on, UTC.")
    until: datetime.date | None = Field(None, description="Until this day, which is not in it.")
    service_tier: str = Field(
        "", description="Of calls served in this tier, such as flex, priority or batch; empty: standard."
    )
    input_per_mtok: Usd | None = Field(None, description="US dollars a million tokens of input.")
    output_per_mtok: Usd | None = Field(None, description="The same of output.")
    cache_read_per_mtok: Usd | None = Field(
        None, description="Of input read from the provider's cache; none: as input."
    )
    cache_write_per_mtok: Usd | None = Field(None, description="Of input written to it.")
    cache_write_1h_per_mtok: Usd | None = Field(None, description="Of that, kept for an hour.")
    reasoning_per_mtok: Usd | None = Field(None, description="Of reasoning; none: as output.")
    input_audio_per_mtok: Usd | None = Field(None, description="Of audio heard.")
    output_audio_per_mtok: Usd | None = Field(None, description="Of audio made.")
    cache_audio_read_per_mtok: Usd | None = Field(None, description="Of audio from its cache.")
    input_image_per_mtok: Usd | None = Field(None, description="Of images seen.")
    output_image_per_mtok: Usd | None = Field(None, description="Of images made.")
    cache_image_read_per_mtok: Usd | None = Field(None, description="Of images from its cache.")
    characters_per_million: Usd | None = Field(
        None, description="US dollars a million characters made speech."
    )
    audio_per_hour: Usd | None = Field(None, description="US dollars an hour of audio.")
    per_unit: Usd | None = Field(None, description="Of the provider's own unit, such as fal's.")
    per_image: Usd | None = Field(None, description="Of an image, where no tokens are told.")
    per_web_search: Usd | None = Field(None, description="Of a web search that the model made.")
    per_page: Usd | None = Field(None, description="Of a page of a document read.")
    per_call: Usd | None = Field(None, description="Of every call, beside the rest.")


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
        ViaEach, BeforeValidator(_same_for_both, json_schema_input_type=Via | list[Via] | ViaEach)
    ] = Field(
        ViaEach(),
        description="Which way it is reached; none: Cloudflare if account and slug are set.",
    )
    fallback: list[Fallback] = Field(
        [],
        description="What is called when it fails, for calls that generate something and for sockets; a call that it may have executed too, and may bill.",
    )
    fallback_on: Annotated[list[FallbackCause], Field(min_length=1)] | None = Field(
        None,
        description="Which failures reach `fallback`, of connect, disconnect, timeout, refused_key, not_executed (429, 498, 503, 521 to 523, 529), 5xx, first_event_error; none: all of them.",
    )
    fallback_after_s: Seconds | None = Field(
        None,
        description="How long the first byte may take while a fallback can still answer; none: 60 for streamed calls, first_byte_timeout_s for any other.",
    )
    order: Literal["listed", "weight"] = Field(
        "listed", description="weight: it and its fallbacks are drawn by weight."
    )
    weight: float = Field(1, gt=0, description="Its own share, with `order: weight`.")
    retries: Retries | None = Field(None, description="Instead of the section `retries`.")
    cache: ProviderCache | None = Field(None, description="Instead of the same keys of `cache`.")
    pricing: list[Pricing] = Field(
        [], description="What its calls cost, before the public list is asked."
    )
    priced_as: str | None = Field(
        None, description="Its name in the public list of prices (genai-prices); none: its own."
    )
    on_disconnect: Literal["cancel", "drain"] = Field(
        "cancel",
        description="When a client leaves a stream: cancel it, or drain it, unseen, to learn its exact usage.",
    )
    drain_s: Seconds = Field(30, description="For how long at most, with `on_disconnect: drain`.")
    inject_usage: bool | None = Field(
        None,
        description="Ask for the usage of streamed completions (`stream_options.include_usage`), and remove the event that tells it; none: only as a fallback of a provider with `true`.",
    )
    idempotency_header: HeaderName | None = Field(
        None,
        description="Header in which it takes one key for all attempts of a call, which makes any call repeatable.",
    )
    stored_at_cloudflare: bool = Field(
        False, description="Cloudflare stores the provider's key: the relay sends none."
    )
    client_credentials: Literal["deny", "allow"] = Field(
        "deny",
        description="allow: a client's own credential goes to the provider instead of the relay's;"
        " Authorization and the header of `auth` as they came.",
    )
    query_credentials: list[str] = Field(
        [], description="Query names in which its SDKs send a key: cut from every call."
    )
    headers: dict[DefaultHeader, str] = Field(
        {}, description="Sent when the client sends none of that name."
    )
    paths: dict[str, str] = Field(
        {},
        description="Endpoint prefix to another path (/x) or another host of the provider's (https://…).",
    )
    versions: dict[str, UrlPath] = Field(
        {},
        description="Endpoint pattern (`*` is anything) to the version put before an endpoint that matches it and begins with none, such as {\"messages*\": v1}; the first that matches counts, an empty version puts in nothing.",
    )
    rewrite: Rewrite | None = Field(
        None,
        description="Where absolute URLs of the provider's own hosts come back as the relay's.",
    )
    target_header: HeaderName | None = Field(
        None,
        description="Header in which its SDK names the URL it wants when it calls the endpoint `proxy`.",
    )
    check: Endpoint | None = Field(
        None, description="Endpoint of a GET that costs nothing, for `relay doctor`."
    )
    websocket: ProviderWebSocket | None = Field(
        None, description="How its WebSockets are opened; none: it has none."
    )
    format: Format = Field(
        "openai",
        description="The wire format that it speaks: how usage is read, and the shape of the relay's own errors.",
    )
    formats: dict[str, Format] = Field(
        {},
        description="The wire format of endpoints that match a pattern (`*` is anything), where it is another.",
    )
    allow_http: bool = Field(False, description="Allow http:// with a credential beyond loopback.")
    connect_timeout_s: Seconds | None = Field(
        None, description="Instead of upstream.connect_timeout_s."
    )
    first_byte_timeout_s: Seconds | None = Field(
        None, description="Instead of upstream.first_byte_timeout_s."
    )
    idle_timeout_s: Seconds | None = Field(None, description="Instead of upstream.idle_timeout_s.")
