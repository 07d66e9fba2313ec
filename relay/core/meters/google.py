"""Read usage in Google's wire formats: Gemini's generateContent and related calls, and the
Interactions API.

Owns the fields `usageMetadata` and the interactions' `usage`. Each is cumulative: the last counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import msgspec

from relay.core.meters.documents import Document, Wanted
from relay.core.meters.format_reader import FormatReader
from relay.core.meters.inner_errors import ERROR_PLACES
from relay.core.meters.sent_call import SentCall
from relay.core.meters.tolerant_json import Count, IgnoredFields, Reader, text_of
from relay.core.usage import Part, Usage, clamped

TIER_HEADER = "x-gemini-service-tier"
_STILL_TO_COME = frozenset({"in_progress", "queued"})
_STANDARD_TIERS = frozenset({"standard", "unspecified"})
_GENERATED = frozenset({"usageMetadata", "modelVersion"})
_GENERATED_WANTED = Wanted(*_GENERATED, *ERROR_PLACES)
_has_count = re.compile(rb'TokenCount"\s*:\s*[^0\s]').search
"""Finds a count that is not 0."""
_MAX_TIER = 32


class Modality(msgspec.Struct):
    """Tokens of one modality, in Gemini's format or that of interactions."""

    modality: str | None = None
    tokenCount: Count | None = None
    tokens: Count | None = None


class Metadata(msgspec.Struct):
    """`usageMetadata`. The Live API has response* fields in place of candidates*."""

    promptTokenCount: Count | None = None
    candidatesTokenCount: Count | None = None
    responseTokenCount: Count | None = None
    thoughtsTokenCount: Count | None = None
    toolUsePromptTokenCount: Count | None = None
    cachedContentTokenCount: Count | None = None
    promptTokensDetails: list[Modality] | None = None
    promptTokenDetails: list[Modality] | None = None  # of embeddings
    candidatesTokensDetails: list[Modality] | None = None
    responseTokensDetails: list[Modality] | None = None
    cacheTokensDetails: list[Modality] | None = None
    serviceTier: str | None = None


class _Tool(msgspec.Struct):
    type: str | None = None
    count: Count | None = None


class _Interaction(msgspec.Struct):
    """The Interactions API's `usage`."""

    total_input_tokens: Count | None = None
    total_output_tokens: Count | None = None
    total_thought_tokens: Count | None = None
    total_cached_tokens: Count | None = None
    total_tool_use_tokens: Count | None = None
    input_tokens_by_modality: list[Modality] | None = None
    output_tokens_by_modality: list[Modality] | None = None
    cached_tokens_by_modality: list[Modality] | None = None
    grounding_tool_count: list[_Tool] | None = None


_metadata = Reader(Metadata)
_interaction = Reader(_Interaction)


def usage_of(raw: bytes, ignored_fields: IgnoredFields) -> Usage | None:
    """Read `usageMetadata`; None if it has no counts."""
    fields = _metadata(raw, ignored_fields)
    thoughts = fields.thoughtsTokenCount or 0
    return _usage(
        (fields.promptTokenCount or 0) + (fields.toolUsePromptTokenCount or 0),
        (fields.candidatesTokenCount or fields.responseTokenCount or 0) + thoughts,
        (fields.cachedContentTokenCount or 0, thoughts),
        fields.promptTokensDetails or fields.promptTokenDetails or (),
        fields.candidatesTokensDetails or fields.responseTokensDetails or (),
        fields.cacheTokensDetails or (),
        tier(fields.serviceTier),
    )


def interaction_of(raw: bytes, ignored_fields: IgnoredFields) -> Usage | None:
    """Read the `usage` of an interaction; None if it has no counts."""
    fields = _interaction(raw, ignored_fields)
    thoughts = fields.total_thought_tokens or 0
    usage = _usage(
        (fields.total_input_tokens or 0) + (fields.total_tool_use_tokens or 0),
        (fields.total_output_tokens or 0) + thoughts,
        (fields.total_cached_tokens or 0, thoughts),
        fields.input_tokens_by_modality or (),
        fields.output_tokens_by_modality or (),
        fields.cached_tokens_by_modality or (),
        "",
    )
    if usage is not None and any(tool.count for tool in fields.grounding_tool_count or ()):
        return msgspec.structs.replace(usage, incomplete=True)
    return usage


def _usage(  # noqa: PLR0913 (the same seven in both formats)
    input_tokens: int,
    output_tokens: int,
    cached_and_thoughts: tuple[int, int],
    input_: Sequence[Modality],
    output: Sequence[Modality],
    cached: Sequence[Modality],
    tier: str,
) -> Usage | None:
    if not (input_tokens or output_tokens):
        return None
    cached_tokens, thoughts = cached_and_thoughts
    return clamped(
        Usage(
            input_tokens,
            output_tokens,
            cached_tokens,
            reasoning_tokens=thoughts,
            input_audio_tokens=_of(input_, "AUDIO"),
            output_audio_tokens=_of(output, "AUDIO"),
            cache_audio_read_tokens=_of(cached, "AUDIO"),
            input_image_tokens=_of(input_, "IMAGE"),
            output_image_tokens=_of(output, "IMAGE"),
            cache_image_read_tokens=_of(cached, "IMAGE"),
            service_tier=tier,
        )
    )


def _of(listed: Sequence[Modality], kind: str) -> int:
    return sum(
        each.tokenCount or each.tokens or 0
        for each in listed
        if each.modality is not None and each.modality.upper() == kind
    )


def tier(given: str | None) -> str:
    """Normalize a service tier; the standard one is empty."""
    name = (given or "").lower().removeprefix("service_tier_")[:_MAX_TIER]
    return "" if name in _STANDARD_TIERS else name


class Google(FormatReader):
    """Reads the documents of one response."""

    wanted = Wanted(
        "usageMetadata", "modelVersion", "model", "id", "status", "usage", "service_tier",
        "background", "event_type", "interaction.id", "interaction.model", "interaction.status",
        "interaction.usage", "interaction.service_tier", "interaction.background",
        "name", "done", *ERROR_PLACES,
    )  # fmt: skip
    texts = (b'"text":', b'"code":', b'"stringValue":', b'"arguments":')
    seals = (b'"signature":',)
    reports_input_first = True
    media_characters = 2560  # a second: 48,000 bytes of PCM, 25 tokens
    mark = b'"webSearchQueries"'
    """Marks responses with web searches, which are billed in addition to tokens."""

    def __init__(self, sent: SentCall, ignored_fields: IgnoredFields) -> None:
        super().__init__(sent, ignored_fields)
        if sent.kind == "generate":
            self.wanted = _GENERATED_WANTED
        self._reported: Usage | None = None
        self._metadata = self._version = b""
        """The last `usageMetadata` with counts, and the last `modelVersion`."""
        self._tier = ""

    def read(self, document: Document) -> None:
        get = document.get
        # Every chunk of a stream has cumulative usage: only the last is decoded.
        if (raw := get("usageMetadata")) is not None and _has_count(raw) is not None:
            self._metadata = raw
        if (raw := get("modelVersion")) is not None and raw != self._version:
            self._version, self.model = raw, text_of(raw) or self.model
        if not document.keys() <= _GENERATED:
            self._read_object(document)

    def _read_object(self, document: Document) -> None:
        """Read an interaction, a decision, a batch or a long-running operation."""
        get = document.get
        if "name" in document:
            self._read_job(document)
        within = "interaction." if "event_type" in document else ""
        if (given := text_of(get(f"{within}id"))) is not None:
            self.object_id = given
        if (model := text_of(get(f"{within}model"))) is not None:
            self.model = model
        if (status := text_of(get(f"{within}status"))) is not None:
            self.is_final = status not in _STILL_TO_COME
        if (raw := get(f"{within}background")) is not None:
            self.in_background = raw == b"true"
        if (raw := get(f"{within}usage")) is not None:
            self._reported = interaction_of(raw, self._ignored_fields) or self._reported
        if (given := text_of(get(f"{within}service_tier"))) is not None:
            self._tier = tier(given)

    def _read_job(self, document: Document) -> None:
        """Read a batch or a long-running operation (a video), which report no usage."""
        name = text_of(document.get("name")) or ""
        if name.startswith("batches/") or "operations/" in name:
            self.object_id = name
            self.is_final = document.get("done") == b"true"
            self.is_paid_job = self.is_final and document.get("error", b"null") == b"null"

    def parts(self) -> Iterator[Part]:
        if self._metadata:
            self._reported = usage_of(self._metadata, self._ignored_fields) or self._reported
            self._metadata = b""
        reported = self._reported
        if reported is None:
            return
        if self._tier and not reported.service_tier:
            reported = msgspec.structs.replace(reported, service_tier=self._tier)
        yield Part(self.model, reported)
