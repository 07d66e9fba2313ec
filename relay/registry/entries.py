"""The schema of a provider in gateway.yaml: a pydantic model for each section, as in schema.py.

Owns the keys of a provider. The models hold the values as written; build.py interprets them.
"""

from __future__ import annotations

import datetime
import re
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError, PydanticKnownError

from relay.core.formats import Format
from relay.core.pricing import usd_of
from relay.core.provider import Strategy, Via
from relay.core.retry_policy import Backoff, FallbackCause
from relay.core.subprotocols import SubprotocolUse
from relay.registry.urls import DefaultHeader, Endpoint, HeaderName, QueryName, UrlPath, matching

_FIELD = re.compile(r"[A-Za-z0-9_.-]+\Z")


def _is_odd(value: Any) -> bool:
    """True for a text with underscores or the digits of other scripts, which Python accepts."""
    return isinstance(value, str) and ("_" in value or not value.isascii())


def _whole(value: Any) -> Any:
    if _is_odd(value):
        raise PydanticKnownError("int_parsing")
    return value


def _number(value: Any) -> Any:
    if _is_odd(value):
        raise PydanticKnownError("float_parsing")
    return value


WHOLE, NUMBER = BeforeValidator(_whole), BeforeValidator(_number)
"""Mark a number, which may be written as text: then with plain digits."""
Seconds = Annotated[float, Field(gt=0, le=366 * 86400), NUMBER]
KeepaliveSeconds = Annotated[float, Field(ge=1, le=300), NUMBER]
Bytes = Annotated[int, Field(ge=0, le=1 << 50), WHOLE]


def one_or_list(kind: Any) -> BeforeValidator:
    """Accept a single value in place of a list with one item."""
    return BeforeValidator(
        lambda value: [value] if isinstance(value, str) else value,
        json_schema_input_type=kind | list[kind],
    )


ONE_OR_LIST = one_or_list(str)


class Section(BaseModel):
    """Base of all sections. An unknown key is an error; an instance is immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Auth(Section):
    header: HeaderName | None = Field(None, description="Header that carries the credential.")
    query: QueryName | None = Field(
        None, description="Query parameter that carries the credential."
    )
    subprotocol: HeaderName | None = Field(
        None,
        description="Prefix of the subprotocol that carries the credential, such as `xi-api-key.`.",
    )
    value: Annotated[
        list[str],
        ONE_OR_LIST,
    ] = Field(
        [],
        repr=False,
        description="Template such as `Bearer ${OPENAI_API_KEY}`; a list is a key pool.",
    )
    pool: Strategy = Field(
        "round_robin",
        description="How the next key of a pool is selected: round_robin, least_busy or weight.",
    )
    weights: list[Annotated[float, Field(gt=0)]] = Field(
        [], description="With `pool: weight`: a weight for each value."
    )
    affinity: bool = Field(
        True, description="Calls of one session use one key of the pool while it is available."
    )


class ProviderCache(Section):
    ttl_s: Annotated[int, Field(ge=0, le=30 * 86400)] | None = Field(
        None, description="How long responses are cached; none: only if a call asks for it."
    )
    scope: Literal["client", "shared"] = Field(
        "client",
        description="client: a cache for each client; shared: one cache for all clients.",
    )
    coalesce: bool = Field(
        False, description="Identical concurrent calls in a process share one upstream call."
    )


class CloudflareWebSocket(Section):
    slug: UrlPath = Field(description="The provider's name on Cloudflare's sockets.")
    path: UrlPath | None = Field(
        None,
        description="Path that replaces the default path there; none: the default path itself.",
    )
    auth: Auth | None = Field(
        None,
        description="Where Cloudflare's socket expects the provider's credential; none: where the provider does.",
    )


class CloudflareSlug(Section):
    slug: UrlPath = Field(description="The provider's name in Cloudflare's URLs.")
    path: UrlPath = Field("", description="Path between the slug and the endpoint.")
    websocket: CloudflareWebSocket | None = Field(
        None, description="How sockets go through Cloudflare; none: they go direct."
    )


class ProviderWebSocket(Section):
    default_path: Endpoint = Field(description="Endpoint of a client that names none.")
    paths: list[str] = Field(
        [],
        description="Patterns of the paths that accept WebSockets (`*` matches anything); on others a handshake gets 426; empty: all paths.",
    )
    default_query: dict[str, str] = Field(
        {},
        description="Query that is added on the default path only, if the client sends no model, intent, call_id or agent_id, and none of these parameters.",
    )
    header_queries: dict[HeaderName, QueryName] = Field(
        {},
        description="Header to the equivalent query parameter: no default is added for a value that the client sends in the other form.",
    )
    base_url: str | None = Field(
        None, description="Base URL of sockets; none: the provider's base_url."
    )
    subprotocols: dict[str, SubprotocolUse] = Field(
        {},
        description="Name, or prefix that ends in a dot, to its use: pass, drop, credential, credential_next.",
    )
    auth: Auth | None = Field(
        None, description="Where the credential of sockets goes; none: where that of REST goes."
    )
    max_message_bytes: Bytes | None = Field(
        None, description="Replaces websocket.max_message_bytes."
    )
    idle_timeout_s: Seconds | None = Field(None, description="Replaces websocket.idle_timeout_s.")
    max_session_s: Seconds | None = Field(None, description="Replaces websocket.max_session_s.")


Ways = Annotated[
    list[Via],
    one_or_list(Via),
    Field(min_length=1, max_length=2),
]
"""One way, or two in order: the second is used if the first fails."""


class ViaEach(Section):
    rest: Ways | None = Field(None, description="The way of REST calls; a list is tried in order.")
    websocket: Ways | None = Field(
        None, description="The way of WebSockets; a list is tried in order."
    )


def _same_for_both(value: Any) -> Any:
    """Expand `via: direct`, which is short for both transports."""
    return {"rest": value, "websocket": value} if isinstance(value, str | list) else value


class Retries(Section):
    max_attempts: int = Field(
        2, ge=1, le=10, description="Attempts at one target, the first included; 1: no retry."
    )
    backoff: Backoff = Field(
        "exponential",
        description="How the delay grows: constant, linear or exponential; each delay is random, from 0 to the computed value (full jitter).",
    )
    delay_s: Seconds = Field(0.25, description="Upper bound of the first delay.")
    max_delay_s: Seconds = Field(
        5,
        description="Upper bound of a delay. After a longer Retry-After the same target is not retried.",
    )
    deadline_s: Seconds = Field(
        60,
        description="No retry begins at the same target after this time; the next target is still called.",
    )
    statuses: list[Annotated[int, Field(ge=400, le=599)]] = Field(
        [429, 503, 529],
        description="Statuses that say that the provider did not execute the call, so that a POST may be sent again.",
    )


class Fallback(Section):
    provider: str = Field(description="Name of a provider; it may be the same one.")
    model: str | None = Field(
        None,
        description="Replaces the model of the call, in the body, path, query or form field that names it.",
    )
    endpoint: Endpoint | None = Field(None, description="Replaces the endpoint of the call.")
    weight: float = Field(1, gt=0, description="With `order: weight`: its weight.")


class Rewrite(Section):
    headers: list[HeaderName] = Field([], description="Response headers that contain a URL.")
    fields: dict[
        str, list[Annotated[str, matching(_FIELD, "should be a plain JSON field name")]]
    ] = Field(
        {}, description="Endpoint prefix to the JSON fields of its responses that contain a URL."
    )


def _decimal(value: Any) -> Any:
    """Check the text of an amount: Decimal would accept underscores and digits of any script."""
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if not is_number and (not isinstance(value, str) or usd_of(value) is None):
        raise PydanticCustomError("decimal", "should be a number such as 20 or 0.5")
    return value


DECIMAL = BeforeValidator(_decimal)
"""Marks a Decimal."""
Usd = Annotated[Decimal, Field(ge=0, le=1_000_000, allow_inf_nan=False), DECIMAL]


class Pricing(Section):
    models: list[str] = Field(
        [], description="Models that these prices are for, `*` is allowed; empty: all."
    )
    since: datetime.date | None = Field(None, description="First day, UTC; none: always.")
    until: datetime.date | None = Field(
        None, description="First day on which the prices no longer apply, UTC; none: never."
    )
    service_tier: str = Field(
        "",
        description="Service tier of the calls, such as flex, priority or batch; empty: standard.",
    )
    input_per_mtok: Usd | None = Field(None, description="US dollars per million input tokens.")
    output_per_mtok: Usd | None = Field(None, description="US dollars per million output tokens.")
    cache_read_per_mtok: Usd | None = Field(
        None,
        description="US dollars per million input tokens read from the provider's cache; none: as input.",
    )
    cache_write_per_mtok: Usd | None = Field(
        None,
        description="US dollars per million input tokens written to the provider's cache; none: as input.",
    )
    cache_write_1h_per_mtok: Usd | None = Field(
        None,
        description="US dollars per million of those that are kept for an hour; none: as cache_write_per_mtok.",
    )
    reasoning_per_mtok: Usd | None = Field(
        None, description="US dollars per million reasoning tokens; none: as output."
    )
    input_audio_per_mtok: Usd | None = Field(
        None, description="US dollars per million audio input tokens."
    )
    output_audio_per_mtok: Usd | None = Field(
        None, description="US dollars per million audio output tokens."
    )
    cache_audio_read_per_mtok: Usd | None = Field(
        None, description="US dollars per million audio tokens read from the provider's cache."
    )
    input_image_per_mtok: Usd | None = Field(
        None, description="US dollars per million image input tokens; none: as input."
    )
    output_image_per_mtok: Usd | None = Field(
        None, description="US dollars per million image output tokens; none: as output."
    )
    cache_image_read_per_mtok: Usd | None = Field(
        None, description="US dollars per million image tokens read from the provider's cache."
    )
    characters_per_million: Usd | None = Field(
        None, description="US dollars per million characters of text turned into speech."
    )
    audio_per_hour: Usd | None = Field(None, description="US dollars per hour of audio.")
    per_unit: Usd | None = Field(
        None, description="US dollars for one of the provider's own units, such as fal's."
    )
    per_image: Usd | None = Field(
        None, description="US dollars for an image whose tokens are not reported."
    )
    per_web_search: Usd | None = Field(
        None, description="US dollars for a web search by the model."
    )
    per_page: Usd | None = Field(
        None, description="US dollars for a page of a document that was read."
    )
    per_call: Usd | None = Field(
        None, description="US dollars for every call, in addition to the rest."
    )
    max_output_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = Field(
        None,
        description="The most output tokens of a call that sets no maximum, for budgets; none: budgets.default_output_tokens.",
    )


class ProviderEntry(Section):
    base_url: str = Field(
        description="Base URL of the provider's API, with the version path if all endpoints share one."
    )
    auth: Auth | None = Field(
        None, description="The credential and where it goes; none: the provider needs none."
    )
    cloudflare: CloudflareSlug | None = Field(
        None, description="How Cloudflare AI Gateway reaches the provider."
    )
    via: Annotated[
        ViaEach, BeforeValidator(_same_for_both, json_schema_input_type=Via | list[Via] | ViaEach)
    ] = Field(
        ViaEach(),
        description="direct or cloudflare, or a list of both; none: cloudflare if account_id and slug are set, otherwise direct.",
    )
    fallback: list[Fallback] = Field(
        [],
        description="Where a failed call goes next: calls that generate something, and sockets. The failed provider may have executed the call, and may bill it.",
    )
    fallback_on: Annotated[list[FallbackCause], Field(min_length=1)] | None = Field(
        None,
        description="Failures that trigger a fallback, any of connect, disconnect, timeout, refused_key, not_executed (429, 498, 503, 521 to 523, 529), 5xx, first_event_error; none: all of them.",
    )
    fallback_after_s: Seconds | None = Field(
        None,
        description="Timeout of the first byte while a fallback remains; none: 60 for streamed calls, first_byte_timeout_s for others.",
    )
    order: Literal["listed", "weight"] = Field(
        "listed",
        description="listed: fallbacks are tried in order; weight: the provider and its fallbacks are chosen at random, by weight.",
    )
    weight: float = Field(1, gt=0, description="With `order: weight`: the provider's own weight.")
    retries: Retries | None = Field(None, description="Replaces the section `retries`.")
    cache: ProviderCache | None = Field(
        None, description="Replaces the same keys of the section `cache`."
    )
    pricing: list[Pricing] = Field([], description="Prices that precede the public price list.")
    priced_as: str | None = Field(
        None,
        description="The provider's name in the public price list (genai-prices); none: its own name.",
    )
    on_disconnect: Literal["cancel", "drain"] = Field(
        "cancel",
        description="What happens to a stream whose client left. cancel: it is cancelled; drain: it is read to its end, so that its usage is known.",
    )
    drain_s: Seconds = Field(
        30, description="With `on_disconnect: drain`: the maximum time of that."
    )
    inject_usage: bool | None = Field(
        None,
        description="Request the usage of streamed completions (`stream_options.include_usage`), and remove the event that reports it; none: only as a fallback of a provider with `true`.",
    )
    idempotency_header: HeaderName | None = Field(
        None,
        description="Header that carries one idempotency key for all attempts of a call, which makes every call repeatable.",
    )
    stored_at_cloudflare: bool = Field(
        False, description="Cloudflare stores the provider's key: the relay sends none."
    )
    client_credentials: Literal["deny", "allow"] = Field(
        "deny",
        description="deny: a client's own credential is replaced by the relay's; allow: it is forwarded,"
        " unchanged in Authorization and in the header of `auth`.",
    )
    query_credentials: list[str] = Field(
        [], description="Query parameters in which its SDKs send a key; removed from every call."
    )
    headers: dict[DefaultHeader, str] = Field(
        {}, description="Headers that are added if the client does not send them."
    )
    paths: dict[str, str] = Field(
        {},
        description="Endpoint prefix to another path (/x), or to another host of the provider (https://…).",
    )
    versions: dict[str, UrlPath] = Field(
        {},
        description='Endpoint pattern (`*` matches anything) to the version that is added to an endpoint that matches and has none, such as {"messages*": v1}; the first match counts, an empty version adds nothing.',
    )
    rewrite: Rewrite | None = Field(
        None,
        description="Where URLs of the provider's own hosts are replaced by URLs of the relay.",
    )
    target_header: HeaderName | None = Field(
        None,
        description="Header in which its SDK sends the target URL of a call to the endpoint `proxy`.",
    )
    check: Endpoint | None = Field(
        None, description="Endpoint of a GET without cost, for `relay doctor`."
    )
    websocket: ProviderWebSocket | None = Field(
        None, description="Its WebSockets; none: it has none."
    )
    unified: dict[Endpoint, Annotated[str, Field(max_length=200)]] | None = Field(
        None,
        description="Endpoints of /v1 that it has: pattern to path, empty for the same path; not set: those of its wire format.",
    )
    format: Format = Field(
        "openai",
        description="Wire format, for reading usage and for the relay's own errors.",
    )
    formats: dict[str, Format] = Field(
        {},
        description="Pattern of endpoints (`*` matches anything) to their wire format, where it differs.",
    )
    allow_http: bool = Field(
        False, description="Allow a credential over plain http:// beyond loopback."
    )
    connect_timeout_s: Seconds | None = Field(
        None, description="Replaces upstream.connect_timeout_s."
    )
    first_byte_timeout_s: Seconds | None = Field(
        None, description="Replaces upstream.first_byte_timeout_s."
    )
    idle_timeout_s: Seconds | None = Field(None, description="Replaces upstream.idle_timeout_s.")
    keepalive_s: KeepaliveSeconds | None = Field(None, description="Replaces upstream.keepalive_s.")
