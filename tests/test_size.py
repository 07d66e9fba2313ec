"""`make size`: its counts."""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def size() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("size", str(ROOT / "scripts/size"))
    spec = importlib.util.spec_from_loader("size", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_make_size_prints_lines_functions_modules_and_the_writers_of_the_exchange(size: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["size"])
    size.main()
    out = capsys.readouterr().out
    lines = sum(len(file.read_text().splitlines()) for file in (ROOT / "relay").rglob("*.py"))
    assert f"lines of relay/       {lines} in " in out
    for title in ("largest modules", "longest functions"):
        rows = out.partition(f"\n{title}\n")[2].partition("\n\n")[0].splitlines()
        counts = [int(row.split()[0]) for row in rows]
        assert len(counts) == 10 and counts == sorted(counts, reverse=True)
    assert "\nExchange " in out and "written by" in out


def test_a_write_is_counted_under_any_name_of_the_exchange(size: ModuleType) -> None:
    known = {"Exchange": {"task": "Task", "request": "Request"}, "Request": {"model": "str"}}
    code = """
        def by_name(exchange): exchange.task = 1
        def by_annotation(given: Exchange): given.request.model = 2
        def by_alias(self): part = self.exchange.request; part.model = 3
        def in_a_tuple(exchange): exchange.task, exchange.request.model = 4, 5
        def reads(exchange, other): other.model = exchange.task
    """
    found = {}
    for node in ast.parse(textwrap.dedent(code)).body:
        writes = size.Writes(known, None)
        writes.visit(node)
        found[node.name] = writes.found  # type: ignore[attr-defined]
    task, model = ("Exchange", "task"), ("Request", "model")
    assert found == {"by_name": {task}, "by_annotation": {model}, "by_alias": {model}, "in_a_tuple": {task, model}, "reads": set()}
