"""Read usage in OpenAI's wire format and its variants: chat and text completions, responses,
embeddings, images, speech, transcriptions, batches.

Owns the paths of usage, and every known field of a `usage` object. The comment of a field names its
vendor if that is not OpenAI.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec

from relay.core.fields import MAX_FIELD_BYTES, UNREADABLE
from relay.core.meters.documents import Document, Wanted
from relay.core.meters.format_reader import FormatReader
from relay.core.meters.inner_errors import ERROR_PLACES
from relay.core.meters.sent_call import SentCall
from relay.core.meters.tolerant_json import (
    Count,
    IgnoredFields,
    Money,
    Reader,
    Seconds,
    count_of,
    is_name,
    milliseconds,
    nano_usd,
    text_of,
)
from relay.core.usage import Part, Usage, clamped

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


class OpenAIUsage(msgspec.Struct):
    """`usage` with the fields of all vendors."""

    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    total_tokens: Count | None = None
    cached_tokens: Count | None = None  # Moonshot
    num_cached_tokens: Count | None = None  # Mistral
    prompt_cache_hit_tokens: Count | None = None  # DeepSeek
    reasoning_tokens: Count | None = None  # Azure, for models that are not from OpenAI
    seconds: Seconds | None = None
    prompt_audio_seconds: Seconds | None = None  # Mistral
    cost: Money | _Cost | None = None  # OpenRouter; Perplexity's is an object
    cost_details: _CostDetails | None = None  # OpenRouter
    is_byok: bool | None = None  # OpenRouter
    estimated_cost: Money | None = None  # DeepInfra
    cost_in_usd_ticks: Ticks | None = None  # xAI
    num_sources_used: Count | None = None  # xAI: a fee, included in the ticks only
    num_server_side_tools_used: Count | None = None  # xAI: a fee, included in the ticks only
    connectors: dict[str, Count] | None = None  # Mistral's agents: a fee for each call
    server_tool_use_details: _ToolUse | None = None  # OpenRouter
    prompt_tokens_details: _Details | None = None
    prompt_token_details: _Details | None = None  # Mistral
    input_tokens_details: _Details | None = None
    input_token_details: _Details | None = None  # realtime and transcriptions
    completion_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None
    output_token_details: _Details | None = None


_read_usage = Reader(OpenAIUsage)
_NO_DETAILS, _NOT_CACHED = _Details(), _Cached()


def usage_of(raw: bytes | None, ignored_fields: IgnoredFields) -> Usage | None:
    """Read a `usage` object of any vendor; None if it is missing or has no counts."""
    return usage_from(_read_usage(raw, ignored_fields)) if raw is not None else None


def usage_from(fields: OpenAIUsage) -> Usage | None:
    """Convert a `usage` object into a Usage; None if it has no counts."""
    input_tokens = fields.prompt_tokens or fields.input_tokens or 0
    output_tokens = fields.completion_tokens or fields.output_tokens or 0
    if input_tokens or output_tokens:
        return clamped(_token_usage(fields, input_tokens, output_tokens))
    billed, whole = _billed(fields), fields.total_tokens or 0
    seconds = fields.seconds if fields.seconds is not None else fields.prompt_audio_seconds
    if seconds is not None:
        return Usage(audio_ms=round(seconds * 1000), billed_nano_usd=billed)
    if whole:  # Voyage and Jina report only the total
        return clamped(_token_usage(fields, whole, 0))
    return Usage(billed_nano_usd=billed) if billed else None


def _token_usage(fields: OpenAIUsage, input_tokens: int, output_tokens: int) -> Usage:
    input_, output = _details(fields)
    reasoning = output.reasoning_tokens or 0
    if not reasoning and not isinstance(fields.cost, _Cost):  # Perplexity's output excludes them
        reasoning = fields.reasoning_tokens or 0
    audio_ms = round((fields.prompt_audio_seconds or 0) * 1000)
    if (excess := (fields.total_tokens or 0) - input_tokens - output_tokens) > 0 and not audio_ms:
        # In xAI's chat the output excludes reasoning; Google reports thoughts only in the total.
        output_tokens += excess
        reasoning = max(reasoning, excess)
    cached, searches = input_.cached_tokens_details or _NOT_CACHED, fields.server_tool_use_details
    billed = _billed(fields)
    return Usage(
        input_tokens,
        output_tokens,
        input_.cached_tokens or input_.cache_read_input_tokens or fields.cached_tokens
        or fields.num_cached_tokens or fields.prompt_cache_hit_tokens or 0,
        input_.cache_write_tokens or input_.cache_creation_input_tokens or 0,
        reasoning_tokens=reasoning,
        input_audio_tokens=input_.audio_tokens or 0,
        output_audio_tokens=output.audio_tokens or 0,
        cache_audio_read_tokens=cached.audio_tokens or 0,
        input_image_tokens=input_.image_tokens or 0,
        output_image_tokens=output.image_tokens or 0,
        cache_image_read_tokens=cached.image_tokens or 0,
        audio_ms=audio_ms,
        web_searches=(searches.web_search_requests or 0) if searches is not None else 0,
        billed_nano_usd=billed,
        incomplete=billed is None and _has_fees(fields),
    )  # fmt: skip


def _details(fields: OpenAIUsage) -> tuple[_Details, _Details]:
    """Return the details of input and output."""
    input_ = (
        fields.prompt_tokens_details
        or fields.input_tokens_details
        or fields.input_token_details
        or fields.prompt_token_details
    )
    output = (
        fields.completion_tokens_details
        or fields.output_tokens_details
        or fields.output_token_details
    )
    return input_ or _NO_DETAILS, output or _NO_DETAILS


def _has_fees(fields: OpenAIUsage) -> bool:
    """True if something was used that is billed in addition to tokens."""
    return bool(fields.num_sources_used or fields.num_server_side_tools_used or fields.connectors)


def tier_of(raw: bytes | None) -> str:
    """Read a `service_tier`; the standard one is empty."""
    tier = text_of(raw) or ""
    return "" if tier in STANDARD_TIERS else tier


def _billed(fields: OpenAIUsage) -> int | None:
    """Return the cost that the provider reports, in billionths of a US dollar."""
    if fields.cost is None and fields.cost_in_usd_ticks is None and fields.estimated_cost is None:
        return None
    if fields.cost_in_usd_ticks is not None:
        return (fields.cost_in_usd_ticks + _TICKS_A_NANO // 2) // _TICKS_A_NANO
    if isinstance(fields.cost, _Cost):
        return nano_usd(fields.cost.total_cost)
    if fields.cost is None:
        return nano_usd(fields.estimated_cost)
    cost, inner = nano_usd(fields.cost), fields.cost_details
    if cost is not None and fields.is_byok and inner is not None:
        # With the user's own key, `cost` is OpenRouter's fee, and the provider bills the rest.
        upstream = nano_usd(inner.upstream_inference_cost)
        return None if upstream is None else cost + upstream
    return cost


_STILL_TO_COME = frozenset(
    {
        "queued", "in_progress", "pending", "created", "validating", "validating_files",
        "finalizing", "cancelling", "running", "requires_action", "cancellation_requested",
        "processing",
    }
)  # fmt: skip
"""Statuses of OpenAI, Mistral, Perplexity and xAI for an unfinished object, in lower case."""


class _Searches(msgspec.Struct):
    num_requests: Count | None = None


class _Tokens(msgspec.Struct):
    input_tokens: Count | None = None
    output_tokens: Count | None = None


class _SvgUsage(_Tokens):
    model: str | None = None


class _ToolUsage(msgspec.Struct):
    web_search: _Searches | None = None
    image_gen: _Tokens | None = None


class _UsageInfo(msgspec.Struct):
    pages_processed: Count | None = None


class _ModelUsage(msgspec.Struct):
    """Usage of one model in the run of an eval."""

    model_name: str | None = None
    run_model_name: str | None = None
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    cached_tokens: Count | None = None


class _Run(msgspec.Struct):
    per_model_usage: list[_ModelUsage] | None = None


_run = Reader(_Run)
_svg_usage = Reader(_SvgUsage)
_tool_usage = Reader(_ToolUsage)
_usage_info = Reader(_UsageInfo)
_DELTAS = (b'"delta":',)


class OpenAI(FormatReader):
    """Reads the documents of one response; the last usage counts."""

    wanted = Wanted(
        "id", "type", "object", "model", "status", "background", "service_tier", "usage",
        "duration", "usage_info", "document_annotation", "x_groq.usage", "svg_usage", "tool_usage",
        "trained_tokens", "per_model_usage", "request_id", "response.id", "response.model",
        "response.status", "response.background", "response.service_tier", "response.usage",
        "response.tool_usage", *ERROR_PLACES,
    )  # fmt: skip
    texts = (
        b'"content":', b'"reasoning_content":', b'"reasoning":', b'"arguments":', b'"text":',
        b'"delta":', b'"refusal":', b'"transcript":',
    )  # fmt: skip
    media_characters = 3200  # a second: 48,000 bytes of PCM, 20 tokens

    def __init__(self, sent: SentCall, ignored_fields: IgnoredFields) -> None:
        super().__init__(sent, ignored_fields)
        if sent.kind == "responses":
            self.stream_texts = _DELTAS
        self._reported: Usage | None = None
        self._heard_ms: int | None = None
        self._tier = ""
        self._fee = False
        self._searches = 0
        self._beside: tuple[Part, ...] = ()
        """Usage of other models."""

    def read(self, document: Document) -> None:
        get = document.get
        if (kind := get("object")) == _STEP:
            return  # a step of a run, which reports the same usage
        if kind == _BATCH:
            self._tier = "batch"
        event = text_of(get("type")) or ""
        within = "response." if event.startswith("response.") else ""
        if (given := text_of(get(f"{within}id"))) is not None:
            self.object_id = given
        if (status := text_of(get(f"{within}status"))) is not None:
            self.is_final = status.lower() not in _STILL_TO_COME
            self.is_paid_job = self.is_final and status.lower() != "failed"
        if (raw := get(f"{within}background")) is not None:
            self.in_background = raw == b"true"
        if "usage" not in document and not within:
            if "response.usage" in document:
                within = "response."  # Perplexity's job, which contains its response
            elif "request_id" in document and "id" not in document:
                self.is_final = False  # xAI's job, whose response is read later
        if (model := text_of(get(f"{within}model"))) is not None:
            self.model = model
        if (raw := get(f"{within}service_tier")) is not None:
            self._tier = tier_of(raw)
        if (raw := get(f"{within}tool_usage")) is not None:
            self._read_tools(raw)
        for place in (f"{within}usage", "x_groq.usage"):
            raw = get(place, b"null")
            if raw != b"null" and (reported := usage_of(raw, self._ignored_fields)) is not None:
                self._read_usage(reported, event)
                break
        if not document.keys().isdisjoint(_RARE):
            self._read_rare(document)

    def _read_usage(self, reported: Usage, event: str) -> None:
        if reported.audio_ms and self._sent.kind == "transcription":
            # Mistral reports tokens too, but does not bill them.
            reported = Usage(audio_ms=reported.audio_ms, billed_nano_usd=reported.billed_nano_usd)
        if event in _IMAGE_MADE and self._reported is not None:
            # With several images, it is undocumented whether usage is cumulative.
            reported = msgspec.structs.replace(self._reported + reported, incomplete=True)
        self._reported = reported

    def _read_rare(self, document: Document) -> None:
        """Read fields that few responses have."""
        get = document.get
        if (raw := get("duration")) is not None and self._sent.kind == "transcription":
            self._heard_ms = milliseconds(raw, self._ignored_fields)
        if (raw := get("usage_info")) is not None:
            self._read_pages(raw, get("document_annotation"))
        if (raw := get("svg_usage")) is not None:
            self._read_svg(raw)
        if (raw := get("trained_tokens")) is not None:
            trained = count_of(raw, self._ignored_fields)
            # No price list has the price of training.
            self._reported = Usage(trained, incomplete=True) if trained else None
        if (raw := get("per_model_usage")) is not None:
            run = _run(b'{"per_model_usage":%b}' % raw, self._ignored_fields)
            self._beside = tuple(map(_evaluated, run.per_model_usage or ()))

    def _read_tools(self, raw: bytes) -> None:
        fields = _tool_usage(raw, self._ignored_fields)
        if fields.web_search is not None:
            self._searches = fields.web_search.num_requests or 0
        drawn = fields.image_gen
        self._fee = drawn is not None and bool(drawn.input_tokens or drawn.output_tokens)

    def _read_pages(self, raw: bytes, annotation: bytes | None) -> None:
        pages = _usage_info(raw, self._ignored_fields).pages_processed
        if pages:
            # Annotated pages cost more, and Usage does not distinguish them.
            annotated = annotation is not None and annotation != b"null"
            self._reported = Usage(pages=pages, incomplete=annotated)

    def _read_svg(self, raw: bytes) -> None:
        fields = _svg_usage(raw, self._ignored_fields)
        if fields.input_tokens or fields.output_tokens:
            used = Usage(fields.input_tokens or 0, fields.output_tokens or 0)
            self._beside = (Part(fields.model, used),)

    def parts(self) -> Iterator[Part]:
        reported = self._reported
        if reported is None and self._heard_ms is not None:
            reported = Usage(audio_ms=self._heard_ms)
        if reported is not None:
            if self._sent.kind == "image" and not reported.output_image_tokens:
                # Without details, all output tokens are image tokens.
                reported = msgspec.structs.replace(
                    reported, output_image_tokens=reported.output_tokens
                )
            if self._tier or self._searches or self._fee:
                reported = msgspec.structs.replace(
                    reported,
                    service_tier=self._tier,
                    web_searches=reported.web_searches or self._searches,
                    incomplete=reported.incomplete or self._fee,
                )
            yield Part(self.model, reported)
        yield from self._beside


_IMAGE_MADE = frozenset({"image_generation.completed", "image_edit.completed"})
_RARE = frozenset({"duration", "usage_info", "svg_usage", "trained_tokens", "per_model_usage"})
_BATCH, _STEP = b'"batch"', b'"thread.run.step"'


def _evaluated(fields: _ModelUsage) -> Part:
    read = fields.cached_tokens or 0
    used = Usage(fields.prompt_tokens or 0, fields.completion_tokens or 0, read)
    return Part(fields.model_name or fields.run_model_name, clamped(used))


_OTHERS = sorted(set(OpenAI.wanted.tree) - {"usage", "model", "object", "service_tier", "id"})
_NONE_OF_THEM = (msgspec.Raw(),) * len(_OTHERS)
_plain = msgspec.json.Decoder(
    msgspec.defstruct(
        "Plain",
        [
            ("usage", OpenAIUsage),
            ("model", str),
            ("object", str | None, None),
            ("service_tier", str | None, None),
            *((name, msgspec.Raw, _NONE_OF_THEM[0]) for name in _OTHERS),
        ],
    )
).decode
_PLAIN_OBJECTS = frozenset({"chat.completion", "text_completion", "list", None})


def plain(answer: bytes) -> Part | None:
    """Read a response that has no other wanted fields than model and usage, as most have. None if
    it has others.
    """
    if len(answer) > MAX_FIELD_BYTES:
        return None
    try:
        fields = _plain(answer)
    except UNREADABLE:
        return None
    values = msgspec.structs.astuple(fields)
    usage, model, kind, tier = values[:4]
    if values[4:] != _NONE_OF_THEM or kind not in _PLAIN_OBJECTS or not is_name(model):
        return None
    reported = usage_from(usage)
    if reported is not None and tier is not None and tier not in STANDARD_TIERS and is_name(tier):
        reported = msgspec.structs.replace(reported, service_tier=tier)
    return Part(model, reported) if reported is not None else None
