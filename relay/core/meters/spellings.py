"""`usage` in all the spellings of the OpenAI wire format and its followers.

Owns: every known field of it, and what they come to. A field says in its comment whose it is.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from relay.core.meters.typed import Count, Money, Odd, Reader, Seconds, nano_usd, text_of
from relay.core.usage import Usage, clamped

STANDARD_TIERS = frozenset({"default", "standard", "auto", "on_demand"})
_TICKS_A_NANO = 10
"""xAI bills in ticks of 10^-10 US dollars."""
Ticks = Annotated[int, msgspec.Meta(ge=0, le=1 << 56)]


class _Cached(msgspec.Struct):
    audio_tokens: Count | None = None
    image_tokens: Count | None = None


class _Details(msgspec.Struct):
    cached_tokens: Count | None = None
    cache_read_input_tokens: Count | None = None  # Perplexity's responses
    cache_write_tokens: Count | None = None
    cache_creation_input_tokens: Count | None = None  # Perplexity's responses
    audio_tokens: Count | None = None
    image_tokens: Count | None = None
    reasoning_tokens: Count | None = None
    cached_tokens_details: _Cached | None = None


class _Cost(msgspec.Struct):
    total_cost: Money | None = None


class _CostDetails(msgspec.Struct):
    upstream_inference_cost: Money | None = None


class _ToolUse(msgspec.Struct):
    web_search_requests: Count | None = None


class Spelled(msgspec.Struct):
    """`usage` in all its spellings."""

    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    total_tokens: Count | None = None
    cached_tokens: Count | None = None  # Moonshot
    num_cached_tokens: Count | None = None  # Mistral
    prompt_cache_hit_tokens: Count | None = None  # DeepSeek
    reasoning_tokens: Count | None = None  # Azure, of the models that are not OpenAI's
    seconds: Seconds | None = None
    prompt_audio_seconds: Seconds | None = None  # Mistral
    cost: Money | _Cost | None = None  # OpenRouter; Perplexity's is an object
    cost_details: _CostDetails | None = None  # OpenRouter
    is_byok: bool | None = None  # OpenRouter
    estimated_cost: Money | None = None  # DeepInfra
    cost_in_usd_ticks: Ticks | None = None  # xAI
    num_sources_used: Count | None = None  # xAI: a fee, which only the ticks tell
    num_server_side_tools_used: Count | None = None  # xAI: likewise
    connectors: dict[str, Count] | None = None  # Mistral's agents: a fee for each call
    server_tool_use_details: _ToolUse | None = None  # OpenRouter
    prompt_tokens_details: _Details | None = None
    prompt_token_details: _Details | None = None  # Mistral
    input_tokens_details: _Details | None = None
    input_token_details: _Details | None = None  # realtime and transcriptions
    completion_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None
    output_token_details: _Details | None = None


_usage = Reader(Spelled)
_NONE, _NOT_CACHED = _Details(), _Cached()


def usage_of(raw: bytes, odd: Odd) -> Usage | None:
    """A `usage` object in any spelling; None if it tells nothing."""
    return told_by(_usage(raw, odd))


def told_by(said: Spelled) -> Usage | None:
    """What it comes to; None if it tells nothing."""
    given = said.prompt_tokens or said.input_tokens or 0
    made = said.completion_tokens or said.output_tokens or 0
    if given or made:
        return clamped(_tokens(said, given, made))
    billed, whole = _billed(said), said.total_tokens or 0
    seconds = said.seconds if said.seconds is not None else said.prompt_audio_seconds
    if seconds is not None:
        return Usage(audio_ms=round(seconds * 1000), billed_nano_usd=billed)
    if whole:  # Voyage and Jina tell the whole alone
        return clamped(_tokens(said, whole, 0))
    return Usage(billed_nano_usd=billed) if billed else None


def _tokens(said: Spelled, given: int, made: int) -> Usage:
    asked, gave = _details(said)
    reasoning = gave.reasoning_tokens or 0
    if not reasoning and not isinstance(said.cost, _Cost):  # Perplexity's stand beside the output
        reasoning = said.reasoning_tokens or 0
    heard_ms = round((said.prompt_audio_seconds or 0) * 1000)
    if (beside := (said.total_tokens or 0) - given - made) > 0 and not heard_ms:
        # xAI's chat counts reasoning beside the output, Google's counts thoughts nowhere else.
        made += beside
        reasoning = max(reasoning, beside)
    cached, searches = asked.cached_tokens_details or _NOT_CACHED, said.server_tool_use_details
    billed = _billed(said)
    return Usage(
        given,
        made,
        asked.cached_tokens or asked.cache_read_input_tokens or said.cached_tokens
        or said.num_cached_tokens or said.prompt_cache_hit_tokens or 0,
        asked.cache_write_tokens or asked.cache_creation_input_tokens or 0,
        reasoning_tokens=reasoning,
        input_audio_tokens=asked.audio_tokens or 0,
        output_audio_tokens=gave.audio_tokens or 0,
        cache_audio_read_tokens=cached.audio_tokens or 0,
        input_image_tokens=asked.image_tokens or 0,
        output_image_tokens=gave.image_tokens or 0,
        cache_image_read_tokens=cached.image_tokens or 0,
        audio_ms=heard_ms,
        web_searches=(searches.web_search_requests or 0) if searches is not None else 0,
        billed_nano_usd=billed,
        incomplete=billed is None and _has_fees(said),
    )  # fmt: skip


def _details(said: Spelled) -> tuple[_Details, _Details]:
    """Of the input, and of the output."""
    asked = (
        said.prompt_tokens_details
        or said.input_tokens_details
        or said.input_token_details
        or said.prompt_token_details
    )
    gave = said.completion_tokens_details or said.output_tokens_details or said.output_token_details
    return asked or _NONE, gave or _NONE


def _has_fees(said: Spelled) -> bool:
    """True if something was used that is paid for beside the tokens."""
    return bool(said.num_sources_used or said.num_server_side_tools_used or said.connectors)


def tier_of(raw: bytes | None) -> str:
    """A `service_tier`; empty of the standard one."""
    tier = text_of(raw) or ""
    return "" if tier in STANDARD_TIERS else tier


def _billed(said: Spelled) -> int | None:
    """What the provider itself says that the call costs."""
    if said.cost is None and said.cost_in_usd_ticks is None and said.estimated_cost is None:
        return None
    if said.cost_in_usd_ticks is not None:
        return (said.cost_in_usd_ticks + _TICKS_A_NANO // 2) // _TICKS_A_NANO
    if isinstance(said.cost, _Cost):
        return nano_usd(said.cost.total_cost)
    if said.cost is None:
        return nano_usd(said.estimated_cost)
    cost, inner = nano_usd(said.cost), said.cost_details
    if cost is not None and said.is_byok and inner is not None:
        # With a key of one's own the fee alone is OpenRouter's; the provider bills the rest.
        upstream = nano_usd(inner.upstream_inference_cost)
        return None if upstream is None else cost + upstream
    return cost
