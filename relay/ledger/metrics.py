"""Prometheus metrics: what calls come to, and how the relay itself is.

Owns: their names, labels and buckets, and that they cost a call nothing: they are fed from batches
that were added up already, a few steps for each group of like calls. Labels are bounded: providers
are the registry's, and of models only those are told apart that the configuration names, and the
first so many that a provider has answered for: a name that a client made up is `other`.

With several workers each writes to files in PROMETHEUS_MULTIPROC_DIR, which the supervisor sets
before they start; whichever is asked answers for all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from relay.core.histogram import BUCKETS, bound_ms, bucket_counts
from relay.core.record import Record
from relay.ledger.rollups import Key, Sums

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_OTHER = "other"
_CALL = ("provider", "model", "transport", "outcome")
_BOUNDS = [bound_ms(number) / 1000 for number in range(4, BUCKETS, 2)]
"""Every second bucket of the ledger's, in seconds: 0.25 ms, 0.5 ms, … 524 s."""
_MODEL = ("provider", "model")
_TIMED = ("provider", "transport")
COUNTERS: Mapping[str, tuple[str, Sequence[str]]] = {
    "relay_requests_total": ("Finished requests and sessions.", _CALL),
    "relay_errors_total": ("Failed requests and sessions.", _MODEL),
    "relay_tokens_total": (
        "Tokens by kind; input and output include the other kinds.", (*_MODEL, "kind"),
    ),
    "relay_units_total": (
        "Usage that is not counted in tokens, by unit: characters, seconds, …", (*_MODEL, "unit"),
    ),
    "relay_cost_usd_total": ("Cost in US dollars.", _MODEL),
    "relay_saved_usd_total": ("Cost in US dollars that cache hits avoided.", _MODEL),
    "relay_unpriced_total": ("Requests with usage that has no known price.", _MODEL),
    "relay_cache_hits_total": ("Responses served from the cache.", ("provider",)),
    "relay_voice_interruptions_total": (
        "Spoken responses that the user interrupted.", ("provider",),
    ),
}  # fmt: skip
HISTOGRAMS: Mapping[str, tuple[str, Sequence[str]]] = {
    "relay_request_duration_seconds": ("Duration of REST requests until their end.", _TIMED),
    "relay_first_byte_seconds": (
        "Time until the first byte of the response, or the handshake.", _TIMED,
    ),
    "relay_overhead_seconds": (
        "Time spent in the relay itself until the response head was sent.", _TIMED,
    ),
    "relay_voice_turn_seconds": (
        "Time from the end of speech to the first sound or word of the reply.",
        ("provider", "first"),
    ),
}  # fmt: skip
_TIMES = {
    "duration": "relay_request_duration_seconds",
    "first_byte": "relay_first_byte_seconds",
    "overhead": "relay_overhead_seconds",
}
_TOKENS = {
    "input_tokens": "input", "output_tokens": "output", "cache_read_tokens": "cache_read",
    "cache_write_tokens": "cache_write", "reasoning_tokens": "reasoning",
    "input_audio_tokens": "input_audio", "output_audio_tokens": "output_audio",
    "input_image_tokens": "input_image", "output_image_tokens": "output_image",
}  # fmt: skip
GAUGES = {
    "relay_requests_in_flight": "REST requests and WebSocket sessions in flight.",
    "relay_sessions": "Open WebSocket sessions.",
    "relay_ledger_rows_waiting": "Ledger rows waiting to be written.",
    "relay_request_bodies_held_bytes": "Memory held by buffered request bodies.",
}
LOSSES = {
    "relay_ledger_failures_total": "Failures of the ledger's database.",
    "relay_ledger_rows_dropped_total": "Ledger rows dropped unwritten.",
    "relay_ledger_bodies_dropped_total": "Stored bodies dropped unwritten.",
    "relay_meter_failures_total": "Usage readers that failed and were dropped.",
    "relay_usage_fields_ignored_total": (
        "Usage fields ignored because of their type, and usage that was not read."
    ),
    "relay_log_lines_lost_total": (
        "Log lines dropped: their reader was too slow, or the disk was full."
    ),
    "relay_background_dropped_total": (
        "Background work dropped because its queue was full: token refunds, cache writes."
    ),
    "relay_requests_shed_total": "Requests refused with 503 by load shedding.",
    "relay_redis_failures_total": "Redis errors and timeouts.",
    "relay_redis_foreign_values_total": "Redis keys with values that the relay did not write.",
}

_LOSSES: Mapping[str, tuple[str, Sequence[str]]] = {n: (help, ()) for n, help in LOSSES.items()}


class Metrics:
    """One per process."""

    def __init__(self, max_models: int) -> None:
        self._registry = registry = CollectorRegistry()
        self._multiprocess = DIRECTORY in os.environ
        self._max_models = max_models
        self._models: set[str] = set()
        """Those that a provider has answered for."""
        self.configured: frozenset[str] = frozenset()
        """Those that gateway.yaml names."""
        self._reported: dict[str, float] = {}

        self.counters = {
            name: Counter(name, help, labels, registry=registry)
            for name, (help, labels) in {**COUNTERS, **_LOSSES}.items()
        }
        self.times = {
            name: Histogram(name, help, labels, buckets=_BOUNDS, registry=registry)
            for name, (help, labels) in HISTOGRAMS.items()
        }
        self._gauges = {
            name: Gauge(name, help, multiprocess_mode="livesum", registry=registry)
            for name, help in GAUGES.items()
        }
        self._bound: dict[tuple[str, ...], _Children] = {}

    def count(self, records: Sequence[Record], batch: Mapping[Key, Sums]) -> None:
        """A batch of calls that ended."""
        for record in records:
            model = record.model_answered or record.model
            if model and model not in self._models and _proves(record):
                self._admit(model)
        for key, sums in batch.items():
            label = (key.provider or _OTHER, self._model(key.model), key.transport, key.outcome)
            children = self._bound.get(label)
            if children is None:
                children = self._bound[label] = _Children(self, *label)
            children.add(sums)
        for record in records:
            if record.turns is not None:
                provider = record.answered_by or record.provider
                waits = self.times["relay_voice_turn_seconds"]
                for turn in record.turns:
                    waits.labels(provider, turn.first).observe(turn.wait_ms / 1000)
                cut = self.counters["relay_voice_interruptions_total"]
                if record.interruptions:
                    cut.labels(provider).inc(record.interruptions)

    def _admit(self, model: str) -> None:
        if len(self._models) < self._max_models and model not in self.configured:
            self._models.add(model)

    def _model(self, model: str) -> str:
        known = not model or model in self._models or model in self.configured
        return model if known else _OTHER

    def text(self, gauges: Mapping[str, float], losses: Mapping[str, float]) -> bytes:
        """All of it, in Prometheus' text format; of all workers, once `tell` has told of each."""
        self.tell(gauges, losses)
        if not self._multiprocess:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    def tell(self, gauges: Mapping[str, float], losses: Mapping[str, float]) -> None:
        """How things stand now."""
        for name, value in gauges.items():
            self._gauges[name].set(value)
        for name, value in losses.items():
            self.counters[name].inc(max(0.0, value - self._reported.get(name, 0)))
            self._reported[name] = value


def _proves(record: Record) -> bool:
    """True if a provider, or a stored answer of its, shows that there is the model of this call."""
    answered = 200 <= record.status < 300 or record.status == 101
    return answered and (record.usage is not None or record.outcome == "cached")


class _Children:
    """The counters of one group of like calls, bound once: to find them costs as much as to use
    them.
    """

    def __init__(
        self, metrics: Metrics, provider: str, model: str, transport: str, outcome: str
    ) -> None:
        self._counters, self._provider, self._model = metrics.counters, provider, model
        requests = metrics.counters["relay_requests_total"]
        self._requests = requests.labels(provider, model, transport, outcome)
        self._times = {
            measure: metrics.times[name].labels(provider, transport)
            for measure, name in _TIMES.items()
        }

    def _add(self, name: str, value: float, *more: str) -> None:
        if value:
            self._counters[name].labels(self._provider, self._model, *more).inc(value)

    def add(self, sums: Sums) -> None:
        """What they came to."""
        self._requests.inc(sums.requests)
        self._add("relay_errors_total", sums.errors)
        self._add("relay_cost_usd_total", sums.cost / 1e9)
        self._add("relay_saved_usd_total", sums.saved / 1e9)
        self._add("relay_unpriced_total", sums.unpriced)
        if sums.cache_hits:
            self._counters["relay_cache_hits_total"].labels(self._provider).inc(sums.cache_hits)
        for name, kind in _TOKENS.items():
            self._add("relay_tokens_total", sums.count(name), kind)
        for name, unit, part in (
            ("characters", "characters", 1), ("audio_ms", "audio_seconds", 1000),
            ("units_milli", "units", 1000), ("images", "images", 1),
            ("web_searches", "web_searches", 1), ("pages", "pages", 1),
        ):  # fmt: skip
            self._add("relay_units_total", sums.count(name) / part, unit)
        for measure, counts in bucket_counts(sums.histogram).items():
            _observe_all(self._times[measure], counts)


def _observe_all(child: Histogram, counts: Sequence[int]) -> None:
    """What `observe` does, for many at once. A time is taken to lie in the middle of its bucket.

    It uses private parts, for there are no public ones: tests/ledger/test_metrics.py holds it
    against `observe`.
    """
    total = 0.0
    for number, count in enumerate(counts):
        if count:
            below = bound_ms(number - 1) if number else 0.0
            total += (below + bound_ms(number)) / 2000 * count
            child._buckets[min(max(0, (number - 3) // 2), len(child._buckets) - 1)].inc(count)
    if total:
        child._sum.inc(total)
