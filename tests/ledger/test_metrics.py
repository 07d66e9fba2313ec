"""Prometheus and OpenTelemetry: the exported metrics and spans, read with the real libraries."""

from __future__ import annotations

import asyncio
import platform
import re
import threading
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client import CollectorRegistry, Histogram, Metric
from prometheus_client.parser import text_string_to_metric_families

from relay import __version__ as relay_version
from relay.core.histogram import bound_ms, bucket_counts, build_histogram
from relay.core.record import Record
from relay.ledger import metrics
from relay.ledger.rollups import Key, Sums
from tests.conftest import StartRelay
from tests.ledger.test_ledger import CALL, USAGE, post, rows
from tests.processes import ROOT, serve
from tests.relays import HANG_GUARD_S, Relay, provider, write_config
from tests.upstream.raw import CLOSE, RawUpstream, ok
from tests.upstream.vendors import echo, vendor
from tests.whole_run import canary

JSON = "Content-Type: application/json"


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Values by name and labels, read by the parser of Prometheus."""
    return {(s.name, frozenset(s.labels.items())): s.value for family in text_string_to_metric_families(text) for s in family.samples}


async def scraped(relay: Relay) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    await relay.idle()
    status, headers, body = await relay.call("GET", f"{relay.url}/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    return samples(body.decode())


def of(found: dict[Any, float], name: str, **labels: str) -> float | None:
    return found.get((name, frozenset(labels.items())))


async def test_calls_are_counted_with_their_tokens_cost_and_duration(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(USAGE, JSON))
    raw.plays(ok(USAGE, JSON))
    raw.plays(ok(b"{}", status="500 Broken"))
    relay = await start(openai=provider(raw.url))
    for _ in range(3):
        await post(relay)
    found = await scraped(relay)
    call = {"provider": "openai", "model": "gpt-4o-mini"}
    assert of(found, "relay_requests_total", **call, transport="rest", outcome="relayed") == 3
    assert of(found, "relay_errors_total", **call) == 1
    assert of(found, "relay_tokens_total", **call, kind="input") == 2000
    assert of(found, "relay_tokens_total", **call, kind="cache_read") == 400
    assert of(found, "relay_cost_usd_total", **call) == pytest.approx(0.00087)
    assert of(found, "relay_request_duration_seconds_count", provider="openai", transport="rest") == 3
    assert of(found, "relay_requests_in_flight") == of(found, "relay_sessions") == 0


async def test_models_beyond_the_maximum_share_a_label(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}", JSON))
    relay = await start({"metrics": {"max_models": 2}}, openai=provider(raw.url))
    for model in ("one", "two", "three", "four"):
        await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": model})
    found = await scraped(relay)
    models = {dict(labels).get("model") for name, labels in found if name == "relay_requests_total"}
    assert models == {"one", "two", "other"}


async def models(relay: Relay) -> set[str | None]:
    return {dict(labels).get("model") for name, labels in await scraped(relay) if name == "relay_requests_total"}


@pytest.mark.parametrize("answer", [ok(b'{"error": {"code": "model_not_found"}}', JSON, status="404 Not Found"), ok(USAGE, JSON, status="500 Broken"), CLOSE])
async def test_models_without_a_successful_response_get_no_label(answer: bytes | str, start: StartRelay, raw: RawUpstream) -> None:
    for _ in range(3):
        raw.plays(answer)
    raw.plays(ok(b'{"choices": []}', JSON))
    relay = await start({"metrics": {"max_models": 2}}, openai=provider(raw.url))
    for model in ("made-up-1", "made-up-2", "made-up-3", "real"):
        await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": model})
    assert await models(relay) == {"other", "real"}
    assert relay.gateway.metrics is not None and relay.gateway.metrics._models == {"real"}


async def test_a_response_without_usage_gives_a_model_no_label(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}", JSON))
    relay = await start(openai=provider(raw.url))
    for number in range(3):
        await relay.call("POST", relay.path("openai", "files"), json={"model": f"made-up-{number}"})
    assert await models(relay) == {"other"}


async def test_models_that_the_configuration_names_have_their_own_label_from_the_start(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}", JSON, status="404 Not Found"))
    rules = [{"requests": 9, "models": ["limited"]}]
    entry = provider(raw.url, fallback=[{"provider": "other", "model": "second"}])
    relay = await start({"metrics": {"max_models": 0}, "limits": rules}, openai=entry, other=provider(raw.url))
    for model in ("limited", "second", "made-up"):
        await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": model})
    assert await models(relay) == {"limited", "second", "other"}


async def test_an_unknown_provider_gets_no_label(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(openai=provider(raw.url))
    for at in range(3):
        await relay.call("GET", relay.path(f"unknown-{at}", "x"))
    found = await scraped(relay)
    assert {dict(labels).get("provider") for name, labels in found if name == "relay_requests_total"} == {"other"}


async def test_responses_are_counted_by_class_of_status(start: StartRelay, raw: RawUpstream) -> None:
    for status in ("200 OK", "204 No Content", "404 Not Found", "500 Broken"):
        raw.plays(ok(b"", status=status))
    relay = await start(openai=provider(raw.url))
    for _ in range(4):
        await post(relay)
    await relay.call("GET", relay.path("nobody", "x"))
    found = await scraped(relay)
    openai = {"provider": "openai", "transport": "rest"}
    assert [of(found, "relay_responses_total", **openai, status_class=each) for each in ("2xx", "4xx", "5xx")] == [2, 1, 1]
    assert of(found, "relay_responses_total", provider="other", transport="rest", status_class="4xx") == 1


async def test_a_session_is_counted_by_the_status_of_its_handshake(start: StartRelay, aiohttp_server: Any) -> None:
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    relay = await start(openai=provider(str(server.make_url("")), websocket={"default_path": "echo"}))
    async with relay.client.ws_connect(relay.ws("openai")) as ws:
        await ws.close()
    assert of(await scraped(relay), "relay_responses_total", provider="openai", transport="websocket", status_class="1xx") == 1


async def test_retries_and_fallbacks_are_counted_by_provider(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}", status="503 Busy"))
    raw.plays(ok(b"{}", status="503 Busy"))
    raw.plays(ok(USAGE, JSON))
    retries = {"max_attempts": 2, "delay_s": 0.001}
    entry = provider(raw.url, retries=retries, fallback=[{"provider": "groq"}])
    relay = await start(openai=entry, groq=provider(raw.url, "GROQ_API_KEY"))
    await post(relay)
    found = await scraped(relay)
    assert of(found, "relay_retries_total", provider="openai") == 1
    assert of(found, "relay_fallbacks_total", from_provider="openai", to_provider="groq") == 1
    assert of(found, "relay_retries_total", provider="groq") is None


async def test_cooldowns_are_counted_and_shown_while_they_last(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}", status="401 Unauthorized"))
    raw.plays(ok(b"{}", "Retry-After: 30", status="429 Too Many Requests"))
    raw.plays(ok(USAGE, JSON))
    pool = {"header": "Authorization", "value": ["Bearer ${OPENAI_API_KEY}", "Bearer ${GROQ_API_KEY}", "Bearer ${FAL_KEY}"]}
    relay = await start(openai=provider(raw.url, auth=pool), idle=provider(raw.url))
    now_s = relay.gateway.clock()
    relay.gateway.attempts.health._clock = lambda: now_s
    await post(relay)
    found = await scraped(relay)
    assert of(found, "relay_cooldowns_total", provider="openai", scope="key", reason="refused") == 1
    assert of(found, "relay_cooldowns_total", provider="openai", scope="key", reason="limited") == 1
    assert of(found, "relay_provider_keys", provider="openai") == 3
    assert of(found, "relay_provider_keys_cooling_down", provider="openai") == 2
    assert of(found, "relay_provider_keys_cooling_down", provider="idle") == 0
    assert of(found, "relay_cooldowns_total", provider="idle", scope="target", reason="failed") == 0, "exported as 0 from the start"
    now_s += 31
    assert of(await scraped(relay), "relay_provider_keys_cooling_down", provider="openai") == 1, "the rate-limited key is used again"


async def test_calls_that_fail_together_begin_one_cooldown(start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    for _ in range(6):
        raw.plays(gate, ok(b"{}", "Retry-After: 30", status="429 Too Many Requests"))
    raw.plays(ok(b"{}", status="401 Unauthorized"))
    relay = await start(openai=provider(raw.url, retries={"max_attempts": 1}))
    calls = [asyncio.create_task(post(relay)) for _ in range(6)]
    while len(raw.arrived) < len(calls):
        await asyncio.sleep(0.005)
    gate.set()
    await asyncio.gather(*calls)
    await post(relay)
    found = await scraped(relay)
    assert of(found, "relay_cooldowns_total", provider="openai", scope="key", reason="limited") == 1
    assert of(found, "relay_cooldowns_total", provider="openai", scope="key", reason="refused") == 1, "another reason"


async def test_calls_that_fail_together_open_a_circuit_once(start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    for _ in range(8):
        raw.plays(gate, CLOSE)
    relay = await start(openai={"base_url": raw.url, "retries": {"max_attempts": 1}})
    calls = [asyncio.create_task(post(relay)) for _ in range(8)]
    while len(raw.arrived) < len(calls):
        await asyncio.sleep(0.005)
    gate.set()
    await asyncio.gather(*calls)
    assert of(await scraped(relay), "relay_cooldowns_total", provider="openai", scope="target", reason="failed") == 1


@pytest.mark.parametrize("entry", [provider("http://127.0.0.1:1"), {"base_url": "http://127.0.0.1:1"}], ids=["key", "no key"])
async def test_an_open_circuit_of_a_target_is_shown(entry: dict[str, Any], start: StartRelay) -> None:
    relay = await start(openai=entry)
    for _ in range(5):
        await post(relay)
    found = await scraped(relay)
    assert of(found, "relay_provider_targets_cooling_down", provider="openai") == 1
    assert of(found, "relay_cooldowns_total", provider="openai", scope="target", reason="failed") == 1


async def test_a_provider_that_a_reload_removes_has_no_keys(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(openai=provider(raw.url), groq=provider(raw.url, "GROQ_API_KEY"))
    assert of(await scraped(relay), "relay_provider_keys", provider="groq") == 1
    write_config(relay.folder, {"providers": {"openai": provider(raw.url)}})
    assert relay.gateway.reload is not None
    await relay.gateway.reload()
    found = await scraped(relay)
    assert (of(found, "relay_provider_keys", provider="openai"), of(found, "relay_provider_keys", provider="groq")) == (1, 0)


@pytest.mark.parametrize("rule", [{"requests": 1, "per": "client"}, {"calls_at_once": 1, "per": ["client"]}])
async def test_refusals_are_counted_by_the_rule_that_refused(rule: dict[str, Any], start: StartRelay, raw: RawUpstream) -> None:
    gate = asyncio.Event()
    raw.plays(gate, ok(USAGE, JSON))
    relay = await start({"limits": [{"name": "few"} | rule, {"name": "many", "requests": 99}]}, openai=provider(raw.url))
    first = asyncio.create_task(post(relay))
    while not raw.arrived:
        await asyncio.sleep(0.005)
    assert (await post(relay))[0] == (await post(relay))[0] == 429
    gate.set()
    await first
    found = await scraped(relay)
    assert (of(found, "relay_limit_refusals_total", rule="few"), of(found, "relay_limit_refusals_total", rule="many")) == (2, 0)
    await relay.gateway.reload()  # type: ignore[misc]
    await post(relay)
    await post(relay)
    assert (of(await scraped(relay), "relay_limit_refusals_total", rule="few") or 0) >= 2, "a reload forgets none"


@pytest.mark.parametrize(("name", "rule", "labels"), [("limit_refusals", "rule", ()), ("budget_refusals", "budget", ()), ("budget_warnings", "budget", ("75",))])
def test_rules_above_a_hundred_share_a_label(name: str, rule: str, labels: tuple[str, ...]) -> None:
    shown = metrics.Metrics(0, 0)
    counted = f"relay_{name}_total"
    shown.update({}, {(counted, f"rule-{number}", *labels): 1.0 for number in range(103)})
    found = samples(shown.render().decode())
    assert sum(each == counted for each, _ in found) == 101
    assert of(found, counted, **{rule: "other"}, **dict(zip(("percent",), labels, strict=False))) == 3


async def test_cache_misses_are_counted_beside_hits(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(USAGE[:-1] + b', "choices": [{"finish_reason": "stop"}]}', JSON))
    relay = await start({"cache": {"ttl_s": 60}}, openai=provider(raw.url))
    for _ in range(3):
        await post(relay)
    found = await scraped(relay)
    assert (of(found, "relay_cache_misses_total", provider="openai"), of(found, "relay_cache_hits_total", provider="openai")) == (1, 2)


async def test_the_process_and_the_build_are_described(start: StartRelay) -> None:
    relay = await start({"providers": {}})
    found = await scraped(relay)
    build = {"version": relay_version, "python": platform.python_version(), "aiohttp": aiohttp.__version__}
    assert of(found, "relay_build_info", **build) == of(found, "relay_workers") == 1
    resident = of(found, "process_resident_memory_bytes")
    assert resident is not None and 10e6 < resident < 10e9
    for name in ("process_cpu_seconds_total", "process_open_fds", "process_max_fds", "process_start_time_seconds"):
        assert (of(found, name) or 0) > 0, name


async def test_a_worker_that_drains_is_not_counted_beside_its_successor(start: StartRelay) -> None:
    relay = await start({"providers": {}})
    relay.gateway.draining = True
    assert of(await scraped(relay), "relay_workers") == 0


async def test_stores_are_up_where_they_are_configured(start: StartRelay, tmp_path: Path) -> None:
    relay = await start({"providers": {}, "database": f"{tmp_path}/relay.db", "redis": {"url": "redis://127.0.0.1:1"}})
    assert relay.gateway.shared is not None

    async def fail() -> None:
        raise OSError

    await relay.gateway.shared.ask(fail)
    found = await scraped(relay)
    assert (of(found, "relay_store_up", store="database"), of(found, "relay_store_up", store="redis")) == (1, 0)
    assert of(found, "relay_redis_failures_total") == 1


async def test_a_store_that_is_not_configured_has_no_state(start: StartRelay) -> None:
    relay = await start({"providers": {}})
    assert not [labels for name, labels in await scraped(relay) if name == "relay_store_up"]


async def test_a_late_timer_is_lag_of_the_event_loop(start: StartRelay) -> None:
    relay = await start({"providers": {}})
    assert relay.gateway.metrics is not None
    clock, late_s = relay.gateway.clock, 0.0

    def skewed() -> float:
        nonlocal late_s
        late_s += 5  # the loop seems to block between two reads of the clock
        return clock() + late_s

    relay.gateway.clock = skewed
    async with asyncio.timeout(HANG_GUARD_S):
        while (of(await scraped(relay), "relay_event_loop_lag_seconds_sum") or 0) < 4:
            await asyncio.sleep(0.02)


async def test_calls_are_served_while_metrics_are_rendered(start: StartRelay) -> None:
    """With many labels and several workers that takes a good part of a second."""
    relay = await start({"providers": {}})
    began, served = threading.Event(), threading.Event()
    in_time = []

    class Slow:
        def describe(self) -> list[Metric]:
            return []

        def collect(self) -> list[Metric]:
            began.set()
            in_time.append(served.wait(HANG_GUARD_S / 4))
            return []

    assert relay.gateway.metrics is not None
    relay.gateway.metrics._registry.register(Slow())
    scrape = asyncio.create_task(relay.call("GET", f"{relay.url}/metrics"))
    while not began.is_set():
        await asyncio.sleep(0.005)
    assert (await relay.call("GET", f"{relay.url}/version"))[0] == 200
    served.set()
    assert (await scrape)[0] == 200 and in_time == [True]


async def test_metrics_can_be_switched_off(start: StartRelay) -> None:
    relay = await start({"metrics": {"enabled": False}, "providers": {}})
    assert (await relay.call("GET", f"{relay.url}/metrics"))[0] == 404


async def test_prometheus_may_scrape_an_address_that_is_listed_as_a_host(start: StartRelay) -> None:
    """The address of a pod, as config/kubernetes lists it."""
    relay = await start({"server": {"hosts": ["10.0.0.7"]}, "providers": {}})
    assert (await relay.call("GET", f"{relay.url}/metrics", headers={"Host": "10.0.0.7:8787"}))[0] == 200


async def test_metrics_are_refused_under_other_host_names(start: StartRelay) -> None:
    relay = await start({"providers": {}})
    assert (await relay.call("GET", f"{relay.url}/metrics", headers={"Host": "evil.example"}))[0] == 403


def test_observing_many_times_at_once_equals_observing_each() -> None:
    """`_observe_all` uses private parts of the library; it must equal repeated `observe`."""
    registry = CollectorRegistry()
    times = [0.1, 0.3, 0.9, 1.0, 5.5, 40.0, 333.0, 9_000.0, 600_000.0]
    whole = build_histogram(times, [], [])
    ours = Histogram("ours", "", buckets=metrics._BOUNDS, registry=registry)
    theirs = Histogram("theirs", "", buckets=metrics._BOUNDS, registry=registry)
    metrics._observe_all(ours, bucket_counts(whole)["duration"])
    for ms in times:
        theirs.observe(ms / 1000)
    found = [{s.labels["le"]: s.value for s in h.collect()[0].samples if s.name.endswith("_bucket")} for h in (ours, theirs)]
    assert found[0] == found[1]
    sums = [next(s.value for s in h.collect()[0].samples if s.name.endswith("_sum")) for h in (ours, theirs)]
    assert sums[0] == pytest.approx(sums[1], rel=0.25) and bound_ms(47) > 600_000


@pytest.mark.programs
async def test_any_worker_exports_the_metrics_of_all_workers_and_of_dead_ones(tmp_path: Path, raw: RawUpstream) -> None:
    import json
    import os
    import signal

    raw.plays(ok(USAGE, JSON))
    relay = await serve(tmp_path, {"providers": {"openai": provider(raw.url)}}, "--workers", "2")

    async def requests(session: aiohttp.ClientSession) -> float:
        async with session.get(f"{relay.url}/metrics", headers={"Connection": "close"}) as answer:
            found = samples(await answer.text())
        return sum(value for (name, _), value in found.items() if name == "relay_requests_total")

    async def until(session: aiohttp.ClientSession, count: int) -> None:
        async with asyncio.timeout(20):
            while await requests(session) != count:
                await asyncio.sleep(0.05)

    try:
        async with aiohttp.ClientSession() as session:
            for _ in range(20):
                async with session.post(relay.path("openai", "chat/completions"), json=CALL, headers={"Connection": "close"}) as answer:
                    assert answer.status == 200
            await until(session, 20)
            pid = next(json.loads(line)["pid"] for line in relay.lines if "worker.ready" in line)
            os.kill(pid, signal.SIGKILL)
            await relay.until("worker.died")
            await until(session, 20)
            async with session.get(f"{relay.url}/metrics") as answer:
                found = samples(await answer.text())
            workers, resident = of(found, "relay_workers"), of(found, "process_resident_memory_bytes")
            assert workers in (1, 2) and resident is not None and resident > workers * 10e6
            assert (of(found, "process_cpu_seconds_total") or 0) > 0 and (of(found, "process_open_fds") or 0) > 5
            assert [value for (name, _), value in found.items() if name == "relay_build_info"] == [1]
            keys = of(found, "relay_provider_keys", provider="openai")
            assert keys is not None and 1 <= keys <= workers, "a starting worker has not reported yet"
    finally:
        await relay.stop()


def _documented_rows() -> list[str]:
    kinds = [(metrics.COUNTERS, "counter"), (metrics.PROCESS_COUNTERS, "counter"), (metrics.HISTOGRAMS, "histogram")]
    described = [(name, kind, *of_each) for table, kind in kinds for name, of_each in table.items()]
    described += [(name, "gauge", spec.help, spec.labels) for name, spec in metrics.GAUGES.items()]
    return [f"| `{name}` | {kind} | {', '.join(f'`{label}`' for label in labels)} | {help_} |" for name, kind, help_, labels in described]


def test_every_metric_is_documented_with_its_labels_and_no_other() -> None:
    text = (ROOT / "docs/metrics.md").read_text()
    assert re.findall(r"^\| `relay_[a-z_]+` \|.*$", text, re.MULTILINE) == _documented_rows()


async def test_every_metric_that_is_served_is_documented(start: StartRelay) -> None:
    relay = await start({"providers": {}})
    text = (ROOT / "docs/metrics.md").read_text()
    families = text_string_to_metric_families((await relay.call("GET", f"{relay.url}/metrics"))[2].decode())
    served = [family.name for family in families if not family.name.endswith("_created")]
    assert [name for name in served if f"`{name}`" not in text and f"`{name}_total`" not in text] == []


@pytest.fixture
async def collector(aiohttp_server: Any) -> Any:
    """An OTLP endpoint that parses with the definitions of OpenTelemetry.

    A test requests this fixture before `start`, so that it outlives the relay: a relay that stops
    without a collector waits 5 s for one.
    """
    spans: list[Any] = []

    async def take(request: web.Request) -> web.Response:
        body = await request.read()
        if request.headers.get("Content-Encoding") == "gzip":
            import gzip

            body = gzip.decompress(body)
        for each in ExportTraceServiceRequest.FromString(body).resource_spans:
            spans.extend(span for scope in each.scope_spans for span in scope.spans)
        return web.Response()

    points: dict[str, list[Any]] = {}

    async def measure(request: web.Request) -> web.Response:
        body = await request.read()
        if request.headers.get("Content-Encoding") == "gzip":
            import gzip

            body = gzip.decompress(body)
        for each in ExportMetricsServiceRequest.FromString(body).resource_metrics:
            for scope in each.scope_metrics:
                for metric in scope.metrics:
                    points[metric.name] = list(getattr(metric, metric.WhichOneof("data")).data_points)
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/traces", take)
    app.router.add_post("/v1/metrics", measure)
    server = await aiohttp_server(app)
    server.spans, server.points = spans, points
    return server


async def _spans(relay: Relay, collector: Any) -> list[Any]:
    await rows(relay) if relay.gateway.ledger.database else await relay.idle()
    await asyncio.to_thread(relay.gateway.traces._processor.force_flush)  # type: ignore[union-attr]
    return list(collector.spans)


def attributes(span: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in span.attributes}


async def test_a_call_is_a_span_in_the_trace_of_its_client_and_the_provider_gets_it(collector: Any, start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(USAGE, JSON))
    relay = await start({"tracing": {"endpoint": str(collector.make_url(""))}}, openai=provider(raw.url))
    theirs = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await post(relay, headers={"traceparent": theirs, "cf-aig-metadata": '{"team": "a"}'})
    (span,) = await _spans(relay, collector)
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.name) == ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", "chat gpt-4o-mini")
    sent = re.search(rb"traceparent: (\S+)", raw.arrived[0].head, re.IGNORECASE)
    assert sent is not None and sent[1].decode() == f"00-{span.trace_id.hex()}-{span.span_id.hex()}-01"
    found = attributes(span)
    assert {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai", "gen_ai.request.model": "gpt-4o-mini", "gen_ai.usage.input_tokens": 1000,
        "gen_ai.usage.output_tokens": 500, "gen_ai.usage.cache_read.input_tokens": 200, "server.address": "127.0.0.1", "http.response.status_code": 200,
        "relay.metadata.team": "a", "relay.cost_usd": 0.000435,
    }.items() <= found.items()  # fmt: skip
    assert span.end_time_unix_nano - span.start_time_unix_nano > 0 and "error.type" not in found


async def test_an_unsampled_trace_is_not_exported_and_stays_unsampled_upstream(collector: Any, start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(USAGE, JSON))
    relay = await start({"tracing": {"endpoint": str(collector.make_url("")), "sample": 0}}, openai=provider(raw.url))
    await post(relay, headers={"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"})
    await post(relay)
    assert await _spans(relay, collector) == []
    assert all(re.search(rb"traceparent: \S+-00\r", arrived.head, re.IGNORECASE) for arrived in raw.arrived)


async def test_a_failed_call_is_a_span_with_its_error_type(collector: Any, start: StartRelay) -> None:
    relay = await start({"tracing": {"endpoint": str(collector.make_url(""))}}, openai=provider("http://127.0.0.1:1"))
    await post(relay)
    (span,) = await _spans(relay, collector)
    assert attributes(span)["error.type"] == "upstream_unreachable" and span.status.code == 2


async def test_without_tracing_the_trace_context_of_the_client_is_relayed(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(USAGE, JSON))
    relay = await start(openai=provider(raw.url))
    theirs = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await post(relay, headers={"traceparent": theirs})
    assert f"traceparent: {theirs}".encode() in raw.arrived[0].head.lower()


async def test_metrics_of_the_semantic_conventions_are_exported_with_the_traces(collector: Any, start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(USAGE, JSON))
    relay = await start({"tracing": {"endpoint": str(collector.make_url("")), "sample": 0}}, openai=provider(raw.url))
    await post(relay)
    await post(relay)
    await relay.idle()
    await asyncio.to_thread(relay.gateway.traces._metrics._provider.force_flush)  # type: ignore[union-attr]
    exported = {name: [(dict(attributes(point)), point.as_int) for point in points] for name, points in collector.points.items() if "usage" in name}
    names = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai", "gen_ai.request.model": "gpt-4o-mini", "gen_ai.response.model": "gpt-4o-mini", "gen_ai.token.modality": "text"}
    usage = "gen_ai.client.inference.usage"
    assert exported == {f"{usage}.input_tokens": [(names, 2000)], f"{usage}.output_tokens": [(names, 1000)], f"{usage}.cache_read.input_tokens": [(names, 400)]}
    (duration,) = collector.points["gen_ai.client.operation.duration"]
    assert duration.count == 2 and list(duration.explicit_bounds)[:3] == [0.01, 0.02, 0.04]


def test_metrics_of_the_semantic_conventions_are_documented() -> None:
    from relay.ledger import traces

    text = (ROOT / "docs/metrics.md").read_text()
    assert all(name in text or f"….{name.removeprefix(traces._USAGE + '.')}" in text for name in (*traces.COUNTERS, *traces.HISTOGRAMS))


async def test_ignored_fields_of_usage_are_counted(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(b'{"model": "m", "usage": {"prompt_tokens": 7, "completion_tokens": "many", "prompt_tokens_details": {"cached_tokens": []}}}', JSON))
    raw.plays(ok(b'{"model": "m", "usage": ' + b"[" * 20_000 + b"}", JSON))
    relay = await start(openai=provider(raw.url))
    await post(relay)
    assert of(await scraped(relay), "relay_usage_fields_ignored_total") == 2
    await post(relay)
    assert of(await scraped(relay), "relay_usage_fields_ignored_total") == 3, "a document whose parsing was stopped"


# --- clients


METERED = {name: {"key": canary(f"metrics-{name}")} for name in ("web", "ci")}


def with_key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {METERED[name]['key']}"}


async def test_calls_of_clients_are_counted_by_client_and_others_are_not(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(USAGE, JSON))
    relay = await start({"clients": METERED, "metrics": {"max_clients": 0}}, openai=provider(raw.url))
    for headers in (with_key("web"), with_key("web"), with_key("ci"), {}):
        await post(relay, headers=headers)
    found = await scraped(relay)
    requests = {labels: value for (name, labels), value in found.items() if name == "relay_client_requests_total"}
    assert requests == {frozenset({("client", "web"), ("outcome", "relayed")}): 2, frozenset({("client", "ci"), ("outcome", "relayed")}): 1}
    assert of(found, "relay_client_tokens_total", client="web", kind="input") == 2000
    assert of(found, "relay_client_tokens_total", client="web", kind="output") == 1000
    assert of(found, "relay_client_cost_usd_total", client="web") == pytest.approx(0.00087)
    call = {"provider": "openai", "model": "gpt-4o-mini", "transport": "rest", "outcome": "relayed"}
    assert of(found, "relay_requests_total", **call) == 4, "the other metrics have no label for clients"


def _counted_clients(shown: metrics.Metrics, *clients: str) -> dict[str, float]:
    """Count a call of each client. Returns the counts by the label of the client."""
    for client in clients:
        shown.count([], {Key(client, "openai", "m", "rest", "native", "relayed"): Sums([_call_of(client)])})
    found = samples(shown.render().decode())
    return {dict(labels)["client"]: value for (name, labels), value in found.items() if name == "relay_client_requests_total"}


def _call_of(client: str) -> Record:
    return Record("id", "rest", "native", "POST", "openai", "x", 200, "relayed", 1.0, 0, 0, client)


def test_the_number_of_clients_with_a_label_is_bounded() -> None:
    shown = metrics.Metrics(0, 2)
    shown.configure((), ("web", "ci"))
    stored = [f"stored-{number}" for number in range(1000)]
    assert _counted_clients(shown, "web", *stored, "ci", *stored) == {"web": 1, "ci": 1, "stored-0": 2, "stored-1": 2, "other": 1996}


def test_an_address_is_never_a_label() -> None:
    shown = metrics.Metrics(0, 100)
    assert _counted_clients(shown, "127.0.0.1", "2001:db8::7", "fe80::1%eth0", "::ffff:198.51.100.7", "", "web") == {"web": 1}


def test_a_reload_that_adds_a_client_gives_it_a_label() -> None:
    shown = metrics.Metrics(0, 0)
    assert _counted_clients(shown, "web") == {"other": 1}
    shown.configure((), ("web",))
    assert _counted_clients(shown, "web") == {"other": 1, "web": 1}


async def test_the_span_of_a_call_says_who_called(collector: Any, start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok(USAGE, JSON))
    relay = await start({"tracing": {"endpoint": str(collector.make_url(""))}, "clients": METERED}, openai=provider(raw.url))
    agent = {"User-Agent": "claude-cli/2", "x-claude-code-session-id": "s1", "x-claude-code-agent-id": "a1"}
    await post(relay, headers=with_key("web") | agent | {"cf-aig-metadata": '{"user": "ann"}'})
    (span,) = await _spans(relay, collector)
    assert {
        "relay.client": "web", "relay.key_id": "web/1", "relay.user": "ann", "user_agent.original": "claude-cli/2", "relay.agent_session": "s1", "relay.agent_parent": "s1",
    }.items() <= attributes(span).items()  # fmt: skip
