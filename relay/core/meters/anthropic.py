"""Read usage in the wire format of Anthropic's Messages API.

Owns the merge of the usage in `message_start` and in each `message_delta`, and of batches.
Anthropic's `input_tokens` exclude tokens that were read from or written to a cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from relay.core.meters.documents import Document, Wanted
from relay.core.meters.format_reader import FormatReader
from relay.core.meters.inner_errors import ERROR_PLACES
from relay.core.meters.sent_call import SentCall
from relay.core.meters.tolerant_json import Count, IgnoredFields, Reader, text_of
from relay.core.usage import Part, Usage, clamped

_BESIDE_THE_WHOLE = frozenset({"compaction", "advisor_message"})
"""Iterations whose tokens are not included in the counts at the top."""


class _CacheCreation(msgspec.Struct):
    ephemeral_1h_input_tokens: Count | None = None


class _ServerTools(msgspec.Struct):
    web_search_requests: Count | None = None
    code_execution_requests: Count | None = None


class _Thinking(msgspec.Struct):
    thinking_tokens: Count | None = None


class _Tokens(msgspec.Struct):
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    cache_creation_input_tokens: Count | None = None
    cache_read_input_tokens: Count | None = None
    cache_creation: _CacheCreation | None = None


class _Iteration(_Tokens):
    type: str | None = None
    model: str | None = None


class _Usage(_Tokens):
    server_tool_use: _ServerTools | None = None
    output_tokens_details: _Thinking | None = None
    service_tier: str | None = None
    speed: str | None = None
    inference_geo: str | None = None
    iterations: list[_Iteration] | None = None


_usage = Reader(_Usage)
_INPUTS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


class Anthropic(FormatReader):
    """Reads one response: later documents replace earlier ones. Each line of a batch's results is a
    response of its own.
    """

    wanted = Wanted(
        "type", "id", "model", "usage", "stop_reason", "processing_status", "message.model",
        "message.usage", "delta.stop_reason", "result.message.model", "result.message.usage",
        "result.message.stop_reason", *ERROR_PLACES,
    )  # fmt: skip
    texts = (b'"text":', b'"thinking":', b'"partial_json":', b'"content":')
    thoughts, seals = (b'"thinking":',), (b'"signature":',)

    def __init__(self, sent: SentCall, ignored_fields: IgnoredFields) -> None:
        super().__init__(sent, ignored_fields)
        self._usage_fields: _Usage | None = None
        self._refused = False
        self._results: dict[tuple[str | None, str, bool], Usage] = {}
        """Usage of a batch, by model, service tier and completeness."""

    def read(self, document: Document) -> None:
        if "result.message.usage" in document:
            self._read_message(document, "result.message.")
            self._add_result()
        elif "processing_status" in document:
            self.is_final = False  # a batch: its results report the usage
            self.object_id = text_of(document.get("id")) or ""
        else:
            starts = "message.usage" in document or "message.model" in document
            self._read_message(document, "message." if starts else "")

    def _read_message(self, document: Document, within: str) -> None:
        self.model = text_of(document.get(f"{within}model")) or self.model
        stopped = document.get("delta.stop_reason") or document.get(f"{within}stop_reason")
        if stopped is not None:
            self._refused = stopped == b'"refusal"'
        raw = document.get(f"{within}usage")
        if raw is None or raw == b"null":
            return
        fields = _usage(raw, self._ignored_fields)
        starts = text_of(document.get("type")) == "message_start"
        self.lacks_output = starts
        self._usage_fields = (
            fields if self._usage_fields is None or starts else _merged(self._usage_fields, fields)
        )
        for each in fields.iterations or ():
            if each.type == "fallback_message" and each.model:
                self.model = each.model

    def _add_result(self) -> None:
        for part in self._message_parts():
            used = part.usage
            key = part.model, used.service_tier, used.incomplete
            before = self._results.get(key)
            self._results[key] = used if before is None else before + used
        self._usage_fields, self._refused = None, False

    def parts(self) -> Iterator[Part]:
        for (model, _, _), used in self._results.items():
            yield Part(model, used)
        yield from self._message_parts()

    def _message_parts(self) -> Iterator[Part]:
        fields = self._usage_fields
        if fields is None:
            return
        terms = _terms(fields)
        own = _usage_of(fields)
        others: list[Part] = []
        for each in fields.iterations or ():
            if each.type not in _BESIDE_THE_WHOLE:
                continue
            beside = _counted(each)
            if each.model and each.model != self.model:
                others.append(Part(each.model, msgspec.structs.replace(beside, **terms)))
            else:
                own = own + beside
        if own.tokens:
            if self._refused and not own.output_tokens:
                terms["billed_nano_usd"] = 0  # a refusal without output is free
            yield Part(self.model, msgspec.structs.replace(own, **terms))
        yield from others


def _merged(before: _Usage, now: _Usage) -> _Usage:
    """Replace the fields that `now` has, except input counts of 0, which some vendors send last."""
    named = {name: getattr(now, name) for name in _Usage.__struct_fields__}
    changed = {name: value for name, value in named.items() if value is not None}
    if not any(changed.get(name) for name in _INPUTS):
        for name in _INPUTS:
            changed.pop(name, None)
    return msgspec.structs.replace(before, **changed)


def _usage_of(fields: _Usage) -> Usage:
    thinking, tools = fields.output_tokens_details, fields.server_tool_use
    usage = msgspec.structs.replace(
        _counted(fields),
        reasoning_tokens=(thinking.thinking_tokens or 0) if thinking is not None else 0,
        web_searches=(tools.web_search_requests or 0) if tools is not None else 0,
    )
    return clamped(usage)


def _counted(fields: _Tokens) -> Usage:
    read, wrote = fields.cache_read_input_tokens or 0, fields.cache_creation_input_tokens or 0
    split = fields.cache_creation
    for_an_hour = (split.ephemeral_1h_input_tokens or 0) if split is not None else 0
    return clamped(
        Usage(
            (fields.input_tokens or 0) + read + wrote,
            fields.output_tokens or 0,
            read,
            wrote,
            for_an_hour,
        )
    )


def _terms(fields: _Usage) -> dict[str, object]:
    """Return the fields of Usage that change the price."""
    tier = fields.service_tier if fields.service_tier not in (None, "standard") else ""
    if fields.speed == "fast":
        tier = "fast" if not tier else f"{tier}+fast"
    executed = fields.server_tool_use.code_execution_requests if fields.server_tool_use else None
    in_us = fields.inference_geo == "us"  # costs more, by a factor that no price list has
    return {"service_tier": tier, "incomplete": bool(executed) or in_us}
