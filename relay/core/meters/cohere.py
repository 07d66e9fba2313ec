"""Read usage in Cohere's wire format: chat, embeddings and rerank, in both versions.

Owns the fields `usage` and `meta`, which report used and billed counts separately.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec

from relay.core.meters.documents import Document, Wanted
from relay.core.meters.format_reader import FormatReader
from relay.core.meters.inner_errors import ERROR_PLACES
from relay.core.meters.sent_call import SentCall
from relay.core.meters.tolerant_json import IgnoredFields, Reader
from relay.core.usage import Part, Usage, clamped

Count = Annotated[float, msgspec.Meta(ge=0, le=1 << 40)]
"""Cohere writes its counts with a decimal point."""


class _Counts(msgspec.Struct):
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    search_units: Count | None = None
    classifications: Count | None = None
    images: Count | None = None
    image_tokens: Count | None = None


class _Usage(msgspec.Struct):
    billed_units: _Counts | None = None
    tokens: _Counts | None = None
    cached_tokens: Count | None = None


_usage = Reader(_Usage)
_NONE = _Counts()


class Cohere(FormatReader):
    """Reads the documents of one response; the last usage counts."""

    wanted = Wanted("usage", "meta", "delta.usage", "response.meta", *ERROR_PLACES)
    texts = (b'"text":', b'"thinking":', b'"tool_plan":', b'"arguments":', b'"parameters":')

    def __init__(self, sent: SentCall, ignored_fields: IgnoredFields) -> None:
        super().__init__(sent, ignored_fields)
        self._reported: tuple[Usage, Usage] | None = None

    def read(self, document: Document) -> None:
        for place in ("usage", "meta", "delta.usage", "response.meta"):
            if (raw := document.get(place)) is not None:
                self._reported = _usage_of(_usage(raw, self._ignored_fields)) or self._reported

    def parts(self) -> Iterator[Part]:
        if self._reported is not None:
            used, billed = self._reported
            yield Part(None, used, None if billed == used else billed)


def _usage_of(fields: _Usage) -> tuple[Usage, Usage] | None:
    """Return used and billed counts, which differ: for example, the prompt template is free."""
    cached = round(fields.cached_tokens or 0)
    used = _counted(fields.tokens or fields.billed_units or _NONE, cached)
    billed = _counted(fields.billed_units or fields.tokens or _NONE, cached)
    return (used, billed) if used != _NOTHING or billed != _NOTHING else None


def _counted(counts: _Counts, cached: int) -> Usage:
    units = (counts.search_units or 0) + (counts.classifications or 0)
    seen = round(counts.image_tokens or 0)
    return clamped(
        Usage(
            round(counts.input_tokens or 0) + seen,
            round(counts.output_tokens or 0),
            cached,
            input_image_tokens=seen,
            units_milli=round(units * 1000),
            images=0 if seen else round(counts.images or 0),
            incomplete=seen > 0,  # costs more than text, at a rate that no price list has
        )
    )


_NOTHING = Usage()
