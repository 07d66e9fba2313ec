"""Export Prometheus metrics: usage and outcome of calls, and the state of the relay itself.

Owns the names, labels and buckets. A call pays nothing for its metrics: `count` takes batches of
finished calls with their sums, and `update` reads counters that other parts keep anyway. Labels are
bounded: a provider is one of the registry's; a model has a label of its own if the configuration
names it, or if it is one of the first `metrics.max_models` that a provider has answered for; a
limit is one of the first _MAX_RULES; a client has one if gateway.yaml has it, or if it is one of
the first `metrics.max_clients` of the database. Everything else is `other`. Calls of clients have
metrics of their own, so that the number of series is a sum of models and clients, not a product.

With several workers each process writes to files in PROMETHEUS_MULTIPROC_DIR, which the supervisor
sets before it starts them, and any worker answers for all of them.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Generic, Literal, NamedTuple, TypeVar

import aiohttp
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

import relay
from relay.core.addresses import address_of
from relay.core.histogram import BUCKETS, bound_ms, bucket_counts
from relay.core.memo import BoundedMemo
from relay.core.meters.turns import Turn
from relay.core.record import Record
from relay.ledger.metrics_multiprocess import WorkersCollector
from relay.ledger.rollups import Key, Sums, answered_by

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_OTHER = "other"
_MAX_CALLERS = 4096
_MAX_RULES = 100
"""Limits with a label of their own: reloads may bring any number of them."""
T = TypeVar("T", Counter, Gauge)
Sample = tuple[str, ...]
"""The name of a metric, then the values of its labels."""
_CALL = ("provider", "model", "transport", "outcome")
_BOUNDS = [bound_ms(number) / 1000 for number in range(4, BUCKETS, 2)]
"""Every second bucket of the ledger's histograms, in seconds: 0.25 ms, 0.5 ms, … 524 s."""
_MODEL = ("provider", "model")
_TIMED = ("provider", "transport")
COUNTERS: Mapping[str, tuple[str, Sequence[str]]] = {
    "relay_requests_total": ("Finished requests and sessions.", _CALL),
    "relay_errors_total": ("Failed requests and sessions.", _MODEL),
    "relay_responses_total": (
        "Finished requests and sessions by class of status: 2xx, 4xx, …; 1xx is an open session.",
        (*_TIMED, "status_class"),
    ),
    "relay_retries_total": (
        "Attempts at the same provider after a failed attempt.", ("provider",),
    ),
    "relay_fallbacks_total": (
        "Attempts at another provider after a failed attempt.",
        ("from_provider", "to_provider"),
    ),
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
    "relay_cache_misses_total": (
        "Cacheable requests that the cache could not answer.", ("provider",),
    ),
    "relay_voice_interruptions_total": (
        "Spoken responses that the user interrupted.", ("provider",),
    ),
    "relay_client_requests_total": (
        "Finished requests and sessions of clients.", ("client", "outcome"),
    ),
    "relay_client_tokens_total": (
        "Tokens of clients: input and output.", ("client", "kind"),
    ),
    "relay_client_cost_usd_total": ("Cost of clients in US dollars.", ("client",)),
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
    "relay_event_loop_lag_seconds": (
        "How late a timer of the event loop was, measured several times a second.", (),
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


_CLIENT_TOKENS = {"input_tokens": "input", "output_tokens": "output"}


class _GaugeSpec(NamedTuple):
    help: str
    labels: Sequence[str] = ()
    of_workers: Literal["livesum", "livemin", "livemax"] = "livesum"
    """How the values of several workers become one."""


GAUGES: Mapping[str, _GaugeSpec] = {
    "relay_requests_in_flight": _GaugeSpec("REST requests and WebSocket sessions in flight."),
    "relay_sessions": _GaugeSpec("Open WebSocket sessions."),
    "relay_ledger_rows_waiting": _GaugeSpec("Ledger rows waiting to be written."),
    "relay_request_bodies_held_bytes": _GaugeSpec("Memory held by buffered request bodies."),
    "relay_provider_keys": _GaugeSpec(
        "Configured keys of a provider, in each worker.", ("provider",)
    ),
    "relay_provider_keys_cooling_down": _GaugeSpec(
        "Keys in cooldown after a failure, in each worker.", ("provider",)
    ),
    "relay_provider_targets_cooling_down": _GaugeSpec(
        "Targets of a provider whose circuit breaker is open, in each worker.", ("provider",)
    ),
    "relay_store_up": _GaugeSpec(
        "1 if a configured store answers, 0 if it is unavailable to a worker: database, redis, or "
        "access, the client keys of the database.",
        ("store",),
        "livemin",
    ),
    "relay_workers": _GaugeSpec("Worker processes that accept connections."),
    "relay_build_info": _GaugeSpec(
        "1, with the versions of the relay, Python and aiohttp.",
        ("version", "python", "aiohttp"),
        "livemax",
    ),
}
PROCESS_COUNTERS: Mapping[str, tuple[str, Sequence[str]]] = {
    "relay_cooldowns_total": (
        "Cooldowns that began: of a key or of a target (scope), because it was refused, limited, "
        "or failed (reason).",
        ("provider", "scope", "reason"),
    ),
    "relay_limit_refusals_total": ("Requests and sessions refused by a limit.", ("rule",)),
    "relay_budget_refusals_total": ("Requests and sessions refused by a budget.", ("budget",)),
    "relay_budget_warnings_total": (
        "Budgets of which 75 or 95 % were spent, once for each budget and period.",
        ("budget", "percent"),
    ),
    "relay_budget_unaccounted_usd_total": (
        "US dollars of budgets that a process held when it died, and may have spent.", (),
    ),
    "relay_ledger_failures_total": ("Errors of the ledger's database.", ()),
    "relay_ledger_rows_dropped_total": ("Ledger rows dropped unwritten.", ()),
    "relay_ledger_bodies_dropped_total": ("Stored bodies dropped unwritten.", ()),
    "relay_meter_failures_total": ("Usage readers that failed and were dropped.", ()),
    "relay_usage_fields_ignored_total": (
        "Usage fields ignored because of their type, and usage that was not read.", (),
    ),
    "relay_log_lines_lost_total": (
        "Log lines dropped: their reader was too slow, or the disk was full.", (),
    ),
    "relay_background_dropped_total": (
        "Background work dropped because its queue was full: token refunds, cache writes.", (),
    ),
    "relay_requests_shed_total": ("Requests refused with 503 by load shedding.", ()),
    "relay_redis_failures_total": ("Redis errors and timeouts.", ()),
    "relay_redis_foreign_values_total": (
        "Redis keys with values that the relay did not write.", (),
    ),
}  # fmt: skip
"""Counted since the start of the process by the parts that they are about, not in batches."""
_CPU = "process_cpu_seconds_total"
_OF_RULES = {
    "relay_limit_refusals_total", "relay_budget_refusals_total", "relay_budget_warnings_total",
}  # fmt: skip
"""Counters whose first label is the name of a rule."""


class _Children(Generic[T]):
    """The metrics of samples, looked up once: the lookup costs as much as several updates."""

    def __init__(self, metrics: Mapping[str, T]) -> None:
        self._metrics: Mapping[str, T] = metrics
        self._found: dict[Sample, T] = {}

    def of(self, sample: Sample) -> T:
        """The metric that a sample updates."""
        child = self._found.get(sample)
        if child is None:
            name, *labels = sample
            child = self._metrics[name].labels(*labels) if labels else self._metrics[name]
            self._found[sample] = child
        return child


class Metrics:
    """One per process."""

    def __init__(self, max_models: int, max_clients: int) -> None:
        self._registry = registry = CollectorRegistry()
        self.is_multiprocess = DIRECTORY in os.environ
        """True in one of several workers: `update` must be called periodically."""
        self._max_models = max_models
        self._models: set[str] = set()
        """Models that a provider has answered for."""
        self._configured: Collection[str] = ()
        self._max_clients = max_clients
        self._clients: set[str] = set()
        """Clients of the database with a label of their own."""
        self._configured_clients: Collection[str] = ()
        self._client_labels = BoundedMemo(self._client_label, _MAX_CALLERS)
        self._rules: dict[str, set[str]] = {}
        """The names of rules with a label of their own, by counter."""
        self._counted: Mapping[Sample, float] = {}
        self._labelled: set[Sample] = set()
        """Gauges with labels that were set."""

        self.counters = {
            name: Counter(name, help, labels, registry=registry)
            for name, (help, labels) in {**COUNTERS, **PROCESS_COUNTERS}.items()
        }
        self.times = {
            name: Histogram(name, help, labels, buckets=_BOUNDS, registry=registry)
            for name, (help, labels) in HISTOGRAMS.items()
        }
        self._gauges = {
            name: Gauge(name, help, labels, multiprocess_mode=mode, registry=registry)
            for name, (help, labels, mode) in GAUGES.items()
        }
        build = relay.__version__, platform.python_version(), aiohttp.__version__
        self._gauges["relay_build_info"].labels(*build).set(1)
        if self.is_multiprocess:
            cpu_help = "Total user and system CPU time spent in seconds."
            self._cpu, self._cpu_s = Counter(_CPU, cpu_help, registry=registry), 0.0
        else:
            ProcessCollector(registry=registry)
        self._counter_children = _Children(self.counters)
        self._gauge_children = _Children(self._gauges)
        self._groups: dict[tuple[str, ...], _CallGroup] = {}

    def configure(self, models: Collection[str], clients: Collection[str]) -> None:
        """Set the models and clients that gateway.yaml names: these have labels of their own."""
        self._configured, self._configured_clients = models, clients
        self._client_labels.clear()

    def count(self, records: Sequence[Record], batch: Mapping[Key, Sums]) -> None:
        """Count a batch of finished calls, and the sums of the same calls."""
        for record in records:
            model = record.model_answered or record.model
            if model and model not in self._models and _proves_model(record):
                self._admit_model(model)
        for key, sums in batch.items():
            label = (key.provider or _OTHER, self._model(key.model), key.transport, key.outcome)
            group = self._groups.get(label)
            if group is None:
                group = self._groups[label] = _CallGroup(self, *label)
            group.add(sums)
            if client := self._client_labels[key.client]:
                self._count_client(client, key.outcome, sums)
        for sample, number in _tally(records).items():
            self._counter_children.of(sample).inc(number)
        for record in records:
            if record.turns is not None:
                self._count_turns(record, record.turns)

    def _count_turns(self, record: Record, turns: Sequence[Turn]) -> None:
        provider = record.answered_by or record.provider
        waits = self.times["relay_voice_turn_seconds"]
        for turn in turns:
            waits.labels(provider, turn.first).observe(turn.wait_ms / 1000)
        if record.interruptions:
            interruptions = self.counters["relay_voice_interruptions_total"]
            interruptions.labels(provider).inc(record.interruptions)

    def _count_client(self, client: str, outcome: str, sums: Sums) -> None:
        of = self._counter_children.of
        of(("relay_client_requests_total", client, outcome)).inc(sums.requests)
        for name, kind in _CLIENT_TOKENS.items():
            if number := sums.count(name):
                of(("relay_client_tokens_total", client, kind)).inc(number)
        if sums.cost:
            of(("relay_client_cost_usd_total", client)).inc(sums.cost / 1e9)

    def _client_label(self, client: str) -> str:
        """Return the label of a client; empty for a caller that is known by its address only."""
        if client in self._configured_clients or client in self._clients:
            return client
        if not client or address_of(client) is not None:
            return ""
        if len(self._clients) >= self._max_clients:
            return _OTHER
        self._clients.add(client)
        return client

    def _admit_model(self, model: str) -> None:
        if len(self._models) < self._max_models and model not in self._configured:
            self._models.add(model)

    def _model(self, model: str) -> str:
        known = not model or model in self._models or model in self._configured
        return model if known else _OTHER

    def render(self) -> bytes:
        """All metrics in Prometheus' text format, of all workers. It takes up to a second with many
        labels, and may run in a thread.
        """
        if not self.is_multiprocess:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        registry.register(WorkersCollector(os.environ[DIRECTORY]))
        return generate_latest(registry)

    def update(self, gauges: Mapping[Sample, float], counters: Mapping[Sample, float]) -> None:
        """Take the current values of gauges, and counters as they stand since the start of the
        process.
        """
        for sample, value in gauges.items():
            self._gauge_children.of(sample).set(value)
        for sample in self._labelled - gauges.keys():  # of a provider that a reload removed
            self._gauge_children.of(sample).set(0)
        self._labelled |= {sample for sample in gauges if len(sample) > 1}
        for sample, value in counters.items():
            counter = self._counter_children.of(self._bounded(sample))
            if (added := value - self._counted.get(sample, 0)) > 0:
                counter.inc(added)
        self._counted = counters
        if self.is_multiprocess:
            now_s = time.process_time()
            self._cpu.inc(now_s - self._cpu_s)
            self._cpu_s = now_s

    def _bounded(self, sample: Sample) -> Sample:
        """A sample whose labels are bounded in number."""
        name = sample[0]
        if name not in _OF_RULES:
            return sample
        known, rule = self._rules.setdefault(name, set()), sample[1]
        if rule not in known:
            if len(known) >= _MAX_RULES:
                return name, _OTHER, *sample[2:]
            known.add(rule)
        return sample

    def observe_event_loop_lag(self, seconds: float) -> None:
        """Observe how late a timer was."""
        self.times["relay_event_loop_lag_seconds"].observe(max(0.0, seconds))


def _proves_model(record: Record) -> bool:
    """True if a provider, or a stored response of one, shows that the model of a call exists."""
    answered = 200 <= record.status < 300 or record.status == 101
    return answered and (record.usage is not None or record.outcome == "cached")


def _tally(records: Sequence[Record]) -> Mapping[Sample, int]:
    """Count what the sums of a batch do not include: status classes, cache misses, retries and
    fallbacks.
    """
    classes: dict[tuple[str, str, int], int] = {}
    found: dict[Sample, int] = {}
    for record in records:
        key = answered_by(record)[0], record.transport, record.status // 100
        classes[key] = classes.get(key, 0) + 1
        if record.cache == "MISS" or record.attempts is not None:
            for sample in _rare_samples(record):
                found[sample] = found.get(sample, 0) + 1
    for (provider, transport, status_class), number in classes.items():
        labels = provider or _OTHER, transport, f"{status_class}xx"
        found["relay_responses_total", *labels] = number
    return found


def _rare_samples(record: Record) -> Iterator[Sample]:
    if record.cache == "MISS":
        yield "relay_cache_misses_total", answered_by(record)[0] or _OTHER
    for failed, following in pairwise(record.attempts or ()):
        if failed.provider == following.provider:
            yield "relay_retries_total", following.provider
        else:
            yield "relay_fallbacks_total", failed.provider, following.provider


class _CallGroup:
    """The counters of calls with the same labels, looked up once: the lookup costs as much as the
    count.
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
        """Count the sums of a batch."""
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
    """Observe many times at once, by their number in each bucket; a time counts as the middle of
    its bucket.

    The library has no public way to do this: tests/ledger/test_metrics.py compares the result with
    that of `observe`.
    """
    total = 0.0
    for number, count in enumerate(counts):
        if count:
            below = bound_ms(number - 1) if number else 0.0
            total += (below + bound_ms(number)) / 2000 * count
            child._buckets[min(max(0, (number - 3) // 2), len(child._buckets) - 1)].inc(count)
    if total:
        child._sum.inc(total)
