"""Export OpenTelemetry data: a span for each sampled call, and metrics once a minute, by OTLP over
HTTP.

Owns the attributes: those of the GenAI conventions
(github.com/open-telemetry/semantic-conventions-genai), and the relay's own. Spans are made from the
records of finished calls, many at a time, and sent by a thread of the OpenTelemetry SDK: no call
waits for them, and spans that an unavailable collector does not take are dropped.
"""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from relay.core.errors import PackageMissing
from relay.core.provider import Provider
from relay.core.record import Record, is_failure
from relay.core.usage import Usage
from relay.ledger.rollups import Key, Sums
from relay.registry.schema import Tracing

_OPERATIONS = {
    "chat": "chat", "messages": "chat", "responses": "chat", "completion": "text_completion",
    "generate": "generate_content", "embeddings": "embeddings",
}  # fmt: skip
"""Operation names of the conventions by kind of call; other kinds keep the relay's name."""
_PROVIDERS = {
    "google-ai-studio": "gcp.gemini", "mistral": "mistral_ai", "grok": "x_ai",
    "azure-openai": "azure.ai.openai",
}  # fmt: skip
_NAMES = (
    "gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model",
    "gen_ai.response.model",
)  # fmt: skip
_COUNTS = {
    "gen_ai.usage.input_tokens": "input_tokens",
    "gen_ai.usage.output_tokens": "output_tokens",
    "gen_ai.usage.cache_read.input_tokens": "cache_read_tokens",
    "gen_ai.usage.cache_creation.input_tokens": "cache_write_tokens",
    "gen_ai.usage.reasoning.output_tokens": "reasoning_tokens",
}
_CALLER = {
    "relay.client": "client", "relay.key_id": "key_id", "relay.user": "user",
    "user_agent.original": "user_agent", "relay.agent_session": "agent_session",
    "relay.agent_parent": "agent_parent",
}  # fmt: skip
_SECONDS = [0.01 * 2**at for at in range(14)]
"""The histogram bounds that the conventions advise."""
_USAGE = "gen_ai.client.inference.usage"
COUNTERS = (
    f"{_USAGE}.input_tokens", f"{_USAGE}.output_tokens", f"{_USAGE}.cache_read.input_tokens",
    f"{_USAGE}.cache_write.input_tokens", f"{_USAGE}.reasoning.output_tokens",
)  # fmt: skip
HISTOGRAMS = ("gen_ai.client.operation.duration", "gen_ai.client.operation.time_to_first_chunk")


class Traces:
    """The exporter of spans and metrics of a process."""

    def __init__(self, rules: Tracing, provider: Callable[[str], Provider | None]) -> None:
        """`provider` returns the provider of a name. Raises PackageMissing."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import export
        except ImportError:
            raise PackageMissing("tracing.endpoint", "opentelemetry-sdk") from None
        endpoint = f"{(rules.endpoint or '').rstrip('/')}/v1/traces"
        exporter = OTLPSpanExporter(endpoint=endpoint, headers=dict(rules.headers))
        self._processor = export.BatchSpanProcessor(exporter)
        self._resource = Resource.create({"service.name": rules.service_name})
        self._provider = provider
        self._metrics = GenAiMetrics(rules, self._resource)

    def count(self, records: Sequence[Record], _batch: Mapping[Key, Sums]) -> None:
        """Export a batch of finished calls."""
        for record in records:
            attributes = self._attributes(record)
            self._metrics.count(record, {name: attributes.get(name, "") for name in _NAMES})
            if record.span_id is not None and record.sampled:
                self._processor.on_end(self._span(record, attributes))

    def _span(self, record: Record, attributes: dict[str, Any]) -> Any:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

        assert record.trace_id is not None and record.span_id is not None
        sampled = TraceFlags(TraceFlags.SAMPLED)
        trace_id = int(record.trace_id, 16)
        parent = record.parent_id
        is_failed = is_failure(record.status, record.outcome)
        ended_ns = _unix_ns(record.timestamp)
        named = (attributes["gen_ai.operation.name"], attributes.get("gen_ai.request.model"))
        return ReadableSpan(
            name=" ".join(filter(None, named)),
            context=SpanContext(trace_id, int(record.span_id, 16), False, sampled),
            parent=SpanContext(trace_id, int(parent, 16), True, sampled) if parent else None,
            resource=self._resource,
            attributes=attributes,
            kind=SpanKind.CLIENT,
            status=Status(StatusCode.ERROR if is_failed else StatusCode.UNSET),
            start_time=ended_ns - int(record.duration_ms * 1e6),
            end_time=ended_ns,
        )

    def _attributes(self, record: Record) -> dict[str, Any]:
        name = record.answered_by or record.provider
        provider = self._provider(name)
        found: dict[str, Any] = {
            "gen_ai.operation.name": _OPERATIONS.get(record.kind, record.kind),
            "gen_ai.provider.name": _PROVIDERS.get(name, name),
            "gen_ai.request.model": record.model,
            "gen_ai.response.model": record.model_answered or record.model,
            "http.response.status_code": record.status,
            "relay.log_id": record.id,
            "relay.outcome": record.outcome,
            "relay.overhead_ms": record.overhead_ms,
            "relay.first_byte_ms": record.first_byte_ms,
            "relay.cache": record.cache,
            "relay.attempts": len(record.attempts) if record.attempts else None,
        }
        if provider is not None:
            target = provider.websocket if record.transport == "websocket" else provider.rest
            found |= {"server.address": target.host, "server.port": target.port}
        if record.usage is not None:
            found |= {attr: getattr(record.usage, field) for attr, field in _COUNTS.items()}
        if record.cost_nano_usd is not None:
            found["relay.cost_usd"] = record.cost_nano_usd / 1e9
        if record.error is not None or record.status >= 400:
            found["error.type"] = record.error or str(record.status)
        found |= {attr: getattr(record, field) for attr, field in _CALLER.items()}
        for entry, value in (record.metadata or {}).items():
            found[f"relay.metadata.{entry}"] = value
        return {name: value for name, value in found.items() if value is not None}

    async def stop(self) -> None:
        """Send the queued spans and metrics, within a few seconds."""
        await asyncio.to_thread(self._processor.shutdown)
        await self._metrics.stop()


class GenAiMetrics:
    """The metrics of the conventions. One per process; needs the OpenTelemetry SDK."""

    def __init__(self, rules: Tracing, resource: Any) -> None:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

        endpoint = f"{(rules.endpoint or '').rstrip('/')}/v1/metrics"
        exporter = OTLPMetricExporter(endpoint=endpoint, headers=dict(rules.headers))
        self._provider = MeterProvider([PeriodicExportingMetricReader(exporter)], resource)
        meter = self._provider.get_meter("ai-gateway-relay")
        self._counters = {name: meter.create_counter(name, "{token}") for name in COUNTERS}
        self._times = {
            name: meter.create_histogram(name, "s", explicit_bucket_boundaries_advisory=_SECONDS)
            for name in HISTOGRAMS
        }

    def count(self, record: Record, names: Mapping[str, Any]) -> None:
        """Count a finished call; `names` are the attributes of its span that are dimensions too."""
        failed = is_failure(record.status, record.outcome)
        error = {"error.type": record.error or str(record.status)} if failed else {}
        duration, first = (self._times[name] for name in HISTOGRAMS)
        duration.record(record.duration_ms / 1000, {**names, **error})
        if record.first_byte_ms is not None and not failed:
            first.record(record.first_byte_ms / 1000, names)
        if record.usage is not None:
            for name, modality, count in _tokens(record.usage):
                self._counters[name].add(count, {**names, "gen_ai.token.modality": modality})

    async def stop(self) -> None:
        """Send the metrics, within a few seconds."""
        await asyncio.to_thread(self._provider.shutdown, 5000)


def _tokens(used: Usage) -> Iterator[tuple[str, str, int]]:
    """Yield (counter, modality, tokens) for each count that is not 0."""
    input_audio, input_images = used.input_audio_tokens, used.input_image_tokens
    output_audio, output_images = used.output_audio_tokens, used.output_image_tokens
    cached = used.cache_audio_read_tokens, used.cache_image_read_tokens
    input_, output, cache_read, cache_write, reasoning = COUNTERS
    for name, modality, count in (
        (input_, "text", used.input_tokens - input_audio - input_images),
        (input_, "audio", input_audio),
        (input_, "image", input_images),
        (output, "text", used.output_tokens - output_audio - output_images),
        (output, "audio", output_audio),
        (output, "image", output_images),
        (cache_read, "text", used.cache_read_tokens - sum(cached)),
        (cache_read, "audio", cached[0]),
        (cache_read, "image", cached[1]),
        (cache_write, "unknown", used.cache_write_tokens),
        (reasoning, "unknown", used.reasoning_tokens),
    ):
        if count > 0:
            yield name, modality, count


def _unix_ns(stamp: str) -> int:
    try:
        return int(datetime.datetime.fromisoformat(stamp).timestamp() * 1e9)
    except ValueError:
        return time.time_ns()
