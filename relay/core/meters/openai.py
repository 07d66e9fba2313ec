"""The OpenAI wire format, and what its many followers made of it: chat and text completions,
responses, embeddings, images, speech, transcriptions, batches.

Owns: where usage stands there. How it is spelled is spellings.py's.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from relay.core.fields import UNREADABLE
from relay.core.meters.documents import MAX_FIELD_BYTES, Document, Wanted
from relay.core.meters.inner_errors import ERROR_PLACES
from relay.core.meters.reader import FormatReader
from relay.core.meters.sent import Sent
from relay.core.meters.spellings import STANDARD_TIERS, Spelled, told_by
from relay.core.meters.spellings import tier_of as tier_of
from relay.core.meters.spellings import usage_of as usage_of
from relay.core.meters.typed import (
    Count,
    Odd,
    Reader,
    count_of,
    is_name,
    milliseconds,
    text_of,
)
from relay.core.usage import Part, Usage, clamped

_STILL_TO_COME = frozenset(
    {
        "queued", "in_progress", "pending", "created", "validating", "validating_files",
        "finalizing", "cancelling", "running", "requires_action", "cancellation_requested",
        "processing",
    }
)  # fmt: skip
"""What OpenAI, Mistral, Perplexity and xAI call an object that has not ended, in lower case."""


class _SvgUsage(msgspec.Struct):
    model: str | None = None
    input_tokens: Count | None = None
    output_tokens: Count | None = None


class _Searches(msgspec.Struct):
    num_requests: Count | None = None


class _Tokens(msgspec.Struct):
    input_tokens: Count | None = None
    output_tokens: Count | None = None


class _ToolUsage(msgspec.Struct):
    web_search: _Searches | None = None
    image_gen: _Tokens | None = None


class _UsageInfo(msgspec.Struct):
    pages_processed: Count | None = None


class _ModelUsage(msgspec.Struct):
    """Of one model, within an eval's run."""

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


class OpenAI(FormatReader):
    """Reads the documents of one answer; what comes last holds."""

    wanted = Wanted(
        "id", "type", "object", "model", "status", "background", "service_tier", "usage",
        "duration", "usage_info", "document_annotation", "x_groq.usage", "svg_usage", "tool_usage",
        "trained_tokens", "per_model_usage", "request_id", "response.id", "response.model",
        "response.status", "response.background", "response.service_tier", "response.usage",
        "response.tool_usage", *ERROR_PLACES,
    )  # fmt: skip
    texts = (
        b'"content":', b'"reasoning_content":', b'"reasoning":', b'"arguments":', b'"text":',
        b'"delta":',
    )  # fmt: skip

    def __init__(self, sent: Sent, odd: Odd) -> None:
        super().__init__(sent, odd)
        self._told: Usage | None = None
        self._heard_ms: int | None = None
        self._tier = ""
        self._fee = False
        self._searches = 0
        self._beside: tuple[Part, ...] = ()
        """What other models used."""

    def read(self, document: Document) -> None:
        """Take what a document tells."""
        get = document.get
        if (kind := get("object")) == _STEP:
            return  # of a run, which tells the same
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
                within = "response."  # the answer within an object that waited for it: Perplexity's
            elif "request_id" in document and "id" not in document:
                self.is_final = False  # xAI's name of what can be read later
        if (model := text_of(get(f"{within}model"))) is not None:
            self.model = model
        if (raw := get(f"{within}service_tier")) is not None:
            self._tier = tier_of(raw)
        if (raw := get(f"{within}tool_usage")) is not None:
            self._read_tools(raw)
        for place in (f"{within}usage", "x_groq.usage"):
            raw = get(place, b"null")
            if raw != b"null" and (told := usage_of(raw, self._odd)) is not None:
                self._read_usage(told, event)
                break
        if not document.keys().isdisjoint(_RARE):
            self._read_rare(document)

    def _read_usage(self, told: Usage, event: str) -> None:
        if told.audio_ms and self._sent.kind == "transcription":
            # Mistral tells tokens too, which it bills not.
            told = Usage(audio_ms=told.audio_ms, billed_nano_usd=told.billed_nano_usd)
        if event in _IMAGE_MADE and self._told is not None:
            # Of several images, whether each event tells its own or all is not documented.
            told = msgspec.structs.replace(self._told + told, incomplete=True)
        self._told = told

    def _read_rare(self, document: Document) -> None:
        """What only few answers have."""
        get = document.get
        if (raw := get("duration")) is not None and self._sent.kind == "transcription":
            self._heard_ms = milliseconds(raw, self._odd)
        if (raw := get("usage_info")) is not None:
            self._read_pages(raw, get("document_annotation"))
        if (raw := get("svg_usage")) is not None:
            self._read_svg(raw)
        if (raw := get("trained_tokens")) is not None:
            trained = count_of(raw, self._odd)
            # What training costs, no list tells.
            self._told = Usage(trained, incomplete=True) if trained else None
        if (raw := get("per_model_usage")) is not None:
            run = _run(b'{"per_model_usage":%b}' % raw, self._odd)
            self._beside = tuple(map(_evaluated, run.per_model_usage or ()))

    def _read_tools(self, raw: bytes) -> None:
        said = _tool_usage(raw, self._odd)
        if said.web_search is not None:
            self._searches = said.web_search.num_requests or 0
        drawn = said.image_gen
        self._fee = drawn is not None and bool(drawn.input_tokens or drawn.output_tokens)

    def _read_pages(self, raw: bytes, annotation: bytes | None) -> None:
        pages = _usage_info(raw, self._odd).pages_processed
        if pages:
            # Annotated pages cost more, which Usage does not tell apart.
            annotated = annotation is not None and annotation != b"null"
            self._told = Usage(pages=pages, incomplete=annotated)

    def _read_svg(self, raw: bytes) -> None:
        said = _svg_usage(raw, self._odd)
        if said.input_tokens or said.output_tokens:
            used = Usage(said.input_tokens or 0, said.output_tokens or 0)
            self._beside = (Part(said.model, used),)

    def parts(self) -> Iterator[Part]:
        """What it came to, by model."""
        told = self._told
        if told is None and self._heard_ms is not None:
            told = Usage(audio_ms=self._heard_ms)
        if told is not None:
            if self._sent.kind == "image" and not told.output_image_tokens:
                # What images are made of, where the answer has no details.
                told = msgspec.structs.replace(told, output_image_tokens=told.output_tokens)
            if self._tier or self._searches or self._fee:
                told = msgspec.structs.replace(
                    told,
                    service_tier=self._tier,
                    web_searches=told.web_searches or self._searches,
                    incomplete=told.incomplete or self._fee,
                )
            yield Part(self.model, told)
        yield from self._beside


_IMAGE_MADE = frozenset({"image_generation.completed", "image_edit.completed"})
_RARE = frozenset({"duration", "usage_info", "svg_usage", "trained_tokens", "per_model_usage"})
_BATCH, _STEP = b'"batch"', b'"thread.run.step"'


def _evaluated(said: _ModelUsage) -> Part:
    read = said.cached_tokens or 0
    used = Usage(said.prompt_tokens or 0, said.completion_tokens or 0, read)
    return Part(said.model_name or said.run_model_name, clamped(used))


_OTHERS = sorted(set(OpenAI.wanted.tree) - {"usage", "model", "object", "service_tier", "id"})
_NONE_OF_THEM = (msgspec.Raw(),) * len(_OTHERS)
_plain = msgspec.json.Decoder(
    msgspec.defstruct(
        "Plain",
        [
            ("usage", Spelled),
            ("model", str),
            ("object", str | None, None),
            ("service_tier", str | None, None),
            *((name, msgspec.Raw, _NONE_OF_THEM[0]) for name in _OTHERS),
        ],
    )
).decode
_PLAIN_OBJECTS = frozenset({"chat.completion", "text_completion", "list", None})


def plain(answer: bytes) -> Part | None:
    """What an answer tells that has a model and a usage and nothing else that is wanted, as most
    have; None of any other, which OpenAI reads.
    """
    if len(answer) > MAX_FIELD_BYTES:
        return None
    try:
        said = _plain(answer)
    except UNREADABLE:
        return None
    values = msgspec.structs.astuple(said)
    usage, model, kind, tier = values[:4]
    if values[4:] != _NONE_OF_THEM or kind not in _PLAIN_OBJECTS or not is_name(model):
        return None
    told = told_by(usage)
    if told is not None and tier is not None and tier not in STANDARD_TIERS and is_name(tier):
        told = msgspec.structs.replace(told, service_tier=tier)
    return Part(model, told) if told is not None else None
