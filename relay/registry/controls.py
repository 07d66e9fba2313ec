"""What may stand in gateway.yaml about control: limits, cache, delegation, Redis. As in schema.py, one
field a key.

Owns: those sections. It holds what was written; limits.py makes rules of it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from relay.core.provider import Who
from relay.core.text import clean
from relay.registry.entries import ONE_OR_LIST, Bytes, ProviderCache, Seconds, Section
from relay.registry.urls import BadUrl, HeaderName, is_service_url, read_url


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


def _per(given: str) -> str:
    if not _PER.match(given):
        raise PydanticCustomError(
            "per", "should be all, client, provider, model, address, user or metadata.NAME"
        )
    return given


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
        list[Annotated[str, AfterValidator(_per)]],
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


def listed_delegation(given: Any) -> Any:
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
        description="Keep what REST calls said and were told: never; where a call asks for it (cf-aig-collect-log-payload: true); or unless it forbids it.",
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


def _otlp(given: str | None) -> str | None:
    given = (given or "").strip()
    if not given:
        return None
    try:
        return str(read_url(given))
    except BadUrl as error:
        words = f"{error} (such as http://localhost:4318)"
        raise PydanticCustomError("otlp", "{words}", {"words": words}) from None


class Tracing(Section):
    endpoint: Annotated[str | None, AfterValidator(_otlp)] = Field(
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
