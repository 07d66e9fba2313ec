"""OpenTelemetry's metrics of generative AI, by OTLP over HTTP, in the names of its conventions.

Owns: those metrics. They go where traces go, once a minute; Prometheus has the relay's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

from relay.core.record import Record, is_failure
from relay.core.usage import Usage
from relay.registry.schema import Tracing

_SECONDS = [0.01 * 2**at for at in range(14)]
"""The bounds that the conventions name."""
_USAGE = "gen_ai.client.inference.usage"
COUNTERS = (
    f"{_USAGE}.input_tokens", f"{_USAGE}.output_tokens", f"{_USAGE}.cache_read.input_tokens",
    f"{_USAGE}.cache_write.input_tokens", f"{_USAGE}.reasoning.output_tokens",
)  # fmt: skip
HISTOGRAMS = ("gen_ai.client.operation.duration", "gen_ai.client.operation.time_to_first_chunk")


class GenAiMetrics:
    """One per process; only where the SDK is installed."""

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
        """A call that ended; `names` are the attributes of its span that tell it apart."""
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
        """Send what is left, within a few seconds."""
        await asyncio.to_thread(self._provider.shutdown, 5000)


def _tokens(used: Usage) -> Iterator[tuple[str, str, int]]:
    """What to count: name, modality, how many."""
    input_audio, input_images = used.input_audio_tokens, used.input_image_tokens
    output_audio, output_images = used.output_audio_tokens, used.output_image_tokens
    cached = used.cache_audio_read_tokens, used.cache_image_read_tokens
    given, made, read, wrote, reasoned = COUNTERS
    for name, modality, count in (
        (given, "text", used.input_tokens - input_audio - input_images),
        (given, "audio", input_audio),
        (given, "image", input_images),
        (made, "text", used.output_tokens - output_audio - output_images),
        (made, "audio", output_audio),
        (made, "image", output_images),
        (read, "text", used.cache_read_tokens - sum(cached)),
        (read, "audio", cached[0]),
        (read, "image", cached[1]),
        (wrote, "unknown", used.cache_write_tokens),
        (reasoned, "unknown", used.reasoning_tokens),
    ):
        if count > 0:
            yield name, modality, count
