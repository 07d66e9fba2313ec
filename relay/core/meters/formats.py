"""The usage objects of the wire formats: one reader each, from an object's bytes to a Usage.

Owns: the field names (OpenAI's chat, responses, embeddings, images, transcription and realtime,
and what is like them; Anthropic's; Gemini's and Gemini Live's). A reader returns None for what
tells nothing, and never raises.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import msgspec

from relay.core.fields import ABSENT, value
from relay.core.pricing import MOST_USD
from relay.core.usage import Usage

Reader = Callable[[bytes], Usage | None]
_decode = msgspec.json.Decoder(dict[str, Any]).decode


def fields(text: bytes) -> dict[str, Any]:
    """The fields of a usage object, which is small; none of what cannot be read."""
    try:
        return _decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return {}


def count(holder: Any, *names: str) -> int:
    """The first of these fields that is a count; 0 if none is."""
    if isinstance(holder, dict):
        for name in names:
            value = holder.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                return value
    return 0


class _Cached(msgspec.Struct):
    audio_tokens: int | None = None
    image_tokens: int | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None
    audio_tokens: int | None = None
    image_tokens: int | None = None
    reasoning_tokens: int | None = None
    cached_tokens_details: _Cached | None = None


class _OpenAI(msgspec.Struct):
    """`usage` in all its spellings."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    total_tokens: int | None = None
    prompt_cache_hit_tokens: int | None = None
    seconds: float | None = None
    cost: Decimal | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    input_token_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None
    output_token_details: _Details | None = None


class _Answer(msgspec.Struct):
    """An answer that is all here."""

    model: msgspec.Raw = ABSENT
    usage: _OpenAI | None = None


_openai = msgspec.json.Decoder(_OpenAI).decode
_answer = msgspec.json.Decoder(_Answer).decode
_NONE = _Details()


def openai(text: bytes) -> Usage | None:
    """OpenAI's `usage` in all its spellings, with DeepSeek's cache and xAI's reasoning."""
    try:
        said = _openai(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    return _usage(said)


def openai_answer(text: bytes) -> tuple[Usage, str | None] | None:
    """The usage and model of a whole answer, read in one go; None where they are to be looked for:
    it is no JSON object, or tells no usage at its top.
    """
    try:
        answer = _answer(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    usage = _usage(answer.usage) if answer.usage is not None else None
    if usage is None:
        return None
    model = value(answer.model)
    return usage, model if isinstance(model, str) else None


def _usage(said: _OpenAI) -> Usage | None:
    if said.seconds is not None:
        return Usage(audio_ms=round(said.seconds * 1000))
    input_tokens = said.prompt_tokens or said.input_tokens or 0
    output_tokens = said.completion_tokens or said.output_tokens or 0
    asked = said.prompt_tokens_details or said.input_tokens_details or said.input_token_details
    gave = said.completion_tokens_details or said.output_tokens_details or said.output_token_details
    if said.cost is None and asked is None and gave is None and not said.prompt_cache_hit_tokens:
        return Usage(input_tokens, output_tokens) if input_tokens or output_tokens else None
    asked, gave = asked or _NONE, gave or _NONE
    cached, reasoning = asked.cached_tokens_details, gave.reasoning_tokens or 0
    if reasoning and said.total_tokens == input_tokens + output_tokens + reasoning:
        output_tokens += reasoning  # xAI counts reasoning beside the output, not in it
    if not (input_tokens or output_tokens):
        return None
    return Usage(
        input_tokens,
        output_tokens,
        asked.cached_tokens or said.prompt_cache_hit_tokens or 0,
        reasoning_tokens=reasoning,
        input_audio_tokens=asked.audio_tokens or 0,
        output_audio_tokens=gave.audio_tokens or 0,
        cache_audio_read_tokens=(cached.audio_tokens or 0) if cached is not None else 0,
        input_image_tokens=asked.image_tokens or 0,
        output_image_tokens=gave.image_tokens or 0,
        cache_image_read_tokens=(cached.image_tokens or 0) if cached is not None else 0,
        billed_nano_usd=_bill(said.cost),
    )


def _bill(usd: Decimal | None) -> int | None:
    """In billionths; None of what is no amount: then the prices say what it costs."""
    if usd is None or not usd.is_finite() or not 0 <= usd <= MOST_USD:
        return None
    return round(usd * 10**9)


ANTHROPIC = (
    "input_tokens",
    "output_tokens",
    "cache_read_input_tokens",
    "cache_creation_input_tokens",
    "cache_creation",
)
"""The fields that `anthropic` reads; a stream is not asked to remember others."""


def anthropic(said: dict[str, Any]) -> Usage | None:
    """Anthropic's fields, merged over a stream: its input is without what a cache did."""
    read = count(said, "cache_read_input_tokens")
    wrote = count(said, "cache_creation_input_tokens")
    usage = Usage(
        input_tokens=count(said, "input_tokens") + read + wrote,
        output_tokens=count(said, "output_tokens"),
        cache_read_tokens=read,
        cache_write_tokens=wrote,
        cache_write_1h_tokens=count(said.get("cache_creation"), "ephemeral_1h_input_tokens"),
    )
    return usage if usage.tokens else None


def google(text: bytes) -> Usage | None:
    """Gemini's `usageMetadata`, and that of its Live API, which calls the answer a response."""
    said = fields(text)
    asked = _modalities(said.get("promptTokensDetails"))
    gave = _modalities(said.get("candidatesTokensDetails") or said.get("responseTokensDetails"))
    cached = _modalities(said.get("cacheTokensDetails"))
    thoughts = count(said, "thoughtsTokenCount")
    usage = Usage(
        input_tokens=count(said, "promptTokenCount") + count(said, "toolUsePromptTokenCount"),
        output_tokens=count(said, "candidatesTokenCount", "responseTokenCount") + thoughts,
        cache_read_tokens=count(said, "cachedContentTokenCount"),
        reasoning_tokens=thoughts,
        input_audio_tokens=asked.get("AUDIO", 0),
        output_audio_tokens=gave.get("AUDIO", 0),
        cache_audio_read_tokens=cached.get("AUDIO", 0),
        input_image_tokens=asked.get("IMAGE", 0),
        output_image_tokens=gave.get("IMAGE", 0),
        cache_image_read_tokens=cached.get("IMAGE", 0),
    )
    return usage if usage.tokens else None


def _modalities(listed: Any) -> dict[str, int]:
    if not isinstance(listed, list):
        return {}
    return {
        str(item.get("modality")): count(item, "tokenCount")
        for item in listed
        if isinstance(item, dict)
    }
