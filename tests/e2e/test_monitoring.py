"""The alerts and the dashboard that ship: Prometheus accepts them, and their metrics exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from relay.core.meters.turns import Turn
from relay.core.record import Record
from relay.core.usage import Usage
from relay.ledger.metrics import Metrics
from relay.ledger.rollups import by_key
from tests.conftest import StartRelay
from tests.ledger.test_ledger import USAGE, post
from tests.processes import ROOT
from tests.relays import provider
from tests.tools import need
from tests.upstream.raw import RawUpstream, ok

FOLDER = ROOT / "config/prometheus"
ALERTS = [rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((ROOT / "config/grafana/relay.json").read_text())
OPERATIONS = (ROOT / "docs/operations.md").read_text()
OF_PROMETHEUS = {"job", "instance", "le"}
Exposition = dict[str, list[tuple[dict[str, str], float]]]


def dashboard_expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


def with_variables(expression: str) -> str:
    """An expression of the dashboard as Grafana sends it, with every variable set to `All`."""
    return expression.replace("$__rate_interval", "5m").replace("$job", ".*").replace("$instance", ".*").replace("$provider", ".*")


def _promtool(*arguments: str, folder: Path) -> str:
    need("promtool")
    program = shutil.which("promtool")
    assert program is not None
    completed = subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True, timeout=60)
    return completed.stdout + completed.stderr + f"exit code {completed.returncode}"


@pytest.mark.programs
def test_prometheus_accepts_the_alerts_and_each_fires_only_in_its_case() -> None:
    assert re.search(r"SUCCESS: \d+ rules found\s+exit code 0", _promtool("check", "rules", "alerts.yml", folder=FOLDER))
    assert re.search(r"SUCCESS\s+exit code 0", _promtool("test", "rules", "alerts_test.yml", folder=FOLDER))


def test_each_alert_has_a_case_and_a_runbook() -> None:
    cases = {case["name"] for case in yaml.safe_load((FOLDER / "alerts_test.yml").read_text())["tests"]}
    names = [rule["alert"] for rule in ALERTS]
    assert cases == {*names, "healthy"}
    assert [rule["annotations"]["runbook"] for rule in ALERTS] == [f"docs/operations.md#{name.lower()}" for name in names]
    assert re.findall(r"^### (Relay\w+)$", OPERATIONS, re.MULTILINE) == names


@pytest.fixture
async def exposition(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> Exposition:
    """The metrics of a relay after at least one event of each kind that a metric counts."""
    whole = ok(USAGE[:-1] + b', "choices": [{"finish_reason": "stop"}]}', "Content-Type: application/json")
    raw.plays(ok(b"{}", status="503 Busy"))
    raw.plays(ok(b"{}", status="503 Busy"))
    raw.plays(whole)
    entry = provider(raw.url, retries={"max_attempts": 2, "delay_s": 0.001}, fallback=[{"provider": "groq"}], cache={"ttl_s": 60})
    limits = [{"name": "few", "requests": 2}]
    budgets = {"rules": [{"usd": 1000, "per": "all", "period": "day", "name": "daily"}]}
    relay = await start({"limits": limits, "budgets": budgets, "database": f"{tmp_path}/relay.db"}, openai=entry, groq=provider(raw.url, "GROQ_API_KEY"))
    assert [(await post(relay))[0] for _ in range(3)] == [200, 200, 429]
    await relay.idle()
    metrics = relay.gateway.metrics
    assert metrics is not None
    _count_rare_calls(metrics)
    text = (await relay.call("GET", f"{relay.url}/metrics"))[2].decode()
    found: Exposition = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def _count_rare_calls(metrics: Metrics) -> None:
    """Count a voice session without a price, a paid call, and a cache hit that saves its cost."""
    voice = Record("1", "websocket", "native", "GET", "cartesia", "tts", 500, "failed", 9.0, 1, 1, "127.0.0.1", via="direct", usage=Usage(characters=5, audio_ms=900))
    voice.turns, voice.interruptions = (Turn(300.0, 0.1, 500.0, "audio", True),), 1
    paid = Record("2", "rest", "native", "POST", "openai", "chat/completions", 200, "relayed", 9.0, 1, 1, "127.0.0.1", via="direct", cost_nano_usd=9)
    cached = Record("3", "rest", "native", "POST", "openai", "chat/completions", 200, "cached", 9.0, 1, 1, "127.0.0.1", via="direct", saved_nano_usd=9)
    metrics.count([voice, paid, cached], by_key([voice, paid, cached]))


def _labels_of(expression: str) -> list[tuple[set[str], set[str]]]:
    """Pairs of metrics and the labels that they must have.

    One pair for each selector, and one for each `by` and `on` of the whole expression.
    """
    found = []
    for name, matchers in re.findall(r"\b((?:relay|process)_\w+)(?:\{([^}]*)\})?", expression):
        found.append(({name}, set(re.findall(r"(\w+)=", matchers))))
    names = {name for each, _ in found for name in each}
    grouped = re.findall(r"\b(?:by|on) \(([^)]*)\)", expression)
    found += [(names, set(re.split(r",\s*", labels))) for labels in grouped]
    return found


async def test_every_expression_uses_existing_metrics_and_labels(exposition: Exposition) -> None:
    expressions = [*(rule["expr"] for rule in ALERTS), *dashboard_expressions(), *(variable["definition"] for variable in DASHBOARD["templating"]["list"][1:])]
    assert len(expressions) > 60
    for expression in expressions:
        for names, labels in _labels_of(expression):
            assert names <= exposition.keys(), expression
            existing = {label for name in names for of_sample, _ in exposition[name] for label in of_sample}
            assert labels <= existing | OF_PROMETHEUS, expression


async def test_every_metric_of_the_relay_is_on_the_dashboard(exposition: Exposition) -> None:
    shown = " ".join(dashboard_expressions())
    names = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in exposition if name.startswith("relay_")}
    assert {name for name in names if not re.search(rf"\b{name.removesuffix('_total')}(_total|_bucket)?\b", shown)} == set()


def _case(exposition: Exposition) -> dict[str, Any]:
    """Make a case for promtool: each sample as a series, each expression with no result expected.

    A counter grows by its value in each interval. promtool then prints each actual result.
    """
    series = []
    for name, samples in exposition.items():
        for labels, value in samples:
            names = ",".join(f'{label}="{text}"' for label, text in {**labels, "job": "relay", "instance": "a"}.items())
            growing = name.endswith(("_total", "_bucket", "_sum", "_count"))
            series.append({"series": f"{name}{{{names}}}", "values": f"0+{value + 1}x70" if growing else f"{value}x70"})
    expressions = [{"expr": with_variables(each), "eval_time": "65m", "exp_samples": []} for each in dashboard_expressions()]
    return {"evaluation_interval": "1m", "tests": [{"interval": "1m", "input_series": series, "promql_expr_test": expressions}]}


@pytest.mark.programs
async def test_every_panel_has_data_in_prometheus(exposition: Exposition, tmp_path: Path) -> None:
    (tmp_path / "case.json").write_text(json.dumps(_case(exposition)))
    out = _promtool("test", "rules", "case.json", folder=tmp_path)
    with_data = [json.loads(f'"{each}"') for each in re.findall(r'expr: "((?:[^"\\]|\\.)*)", time: \S+\s+exp: nil\s+got: \S', out)]
    assert [each for each in dashboard_expressions() if with_variables(each) not in with_data] == [], out[-3000:]


def test_the_panels_of_the_dashboard_do_not_overlap_and_have_a_description() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        covered = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not covered & cells and max(x for x, _ in covered) < 24, panel["title"]
        cells |= covered
        assert panel["type"] == "row" or panel["description"], panel["title"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
