"""The documents match the code: they cover what exists, and what they name exists and runs."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import textwrap
from argparse import _SubParsersAction
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

import relay.app
from relay.cli.main import build_parser
from relay.core.errors import CATALOGUE
from relay.core.meters import answer_meter
from relay.core.meters.sent_call import SentCall
from relay.core.paths import API
from relay.core.usage import Part, Usage
from relay.registry import entries, schema
from relay.registry.load import Sources, load
from tests.isolated import python_command
from tests.processes import ROOT, output, serve
from tests.tools import need

DOCS = {path: path.read_text() for path in (ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"))}
DOCS |= {path: path.read_text() for path in (ROOT / "docs").rglob("*.md")}
GATEWAY_YAML = (ROOT / "docs/gateway-yaml.md").read_text()


def _rows(model: type[BaseModel], prefix: str) -> list[str]:
    rows = []
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else field.get_default()
        shown = {None: "none", True: "true", False: "false"}.get(default) if default is None or isinstance(default, bool) else default
        shown = "empty" if shown in ("", [], {}) else "none" if isinstance(shown, BaseModel) else shown
        rows.append(f"| `{prefix}{name}` | {shown} | {field.description} |")
    return rows


def test_every_setting_is_documented_with_its_default_and_meaning() -> None:
    rows = [row for name, field in schema.GatewayFile.model_fields.items() if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel) for row in _rows(field.annotation, f"{name}.")]
    sections = {entries.ProviderEntry: "", entries.ViaEach: "via.", entries.Auth: "auth.", schema.Delegation: "cloudflare.delegate.", entries.CloudflareSlug: "cloudflare.", entries.CloudflareWebSocket: "cloudflare.websocket.", entries.ProviderWebSocket: "websocket.", entries.Rewrite: "rewrite.", entries.Fallback: "fallback.", schema.Limit: "limits.", schema.BudgetEntry: "budgets.rules.", schema.UnpricedCharge: "budgets.unpriced.", entries.Pricing: "pricing.", schema.UnifiedSockets: "unified.sockets."}
    rows += [row for model, prefix in sections.items() for row in _rows(model, prefix)]
    for model, prefix in ((schema.ModelAlias, "models.NAME."), (schema.ModelTarget, "models.NAME.targets.")):
        assert [row for row in _rows(model, prefix) if row not in GATEWAY_YAML] == []
    assert [row for row in rows if row not in GATEWAY_YAML] == []
    documented = re.findall(r"^\| `([a-z0-9_.]+)` \|", GATEWAY_YAML, re.MULTILINE)
    assert len(documented) == len(rows) + 3, "only `include`, `database` and `inject_usage` are documented besides the sections"


def test_the_shipped_file_shows_every_setting_with_its_default(tmp_path: Path) -> None:
    text = (ROOT / "gateway.yaml").read_text()
    shipped = yaml.safe_load(text)
    for name, field in schema.GatewayFile.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            assert set(shipped[name]) == set(field.annotation.model_fields), name
    (tmp_path / "empty.yaml").write_text("{}")
    defaults = load(Sources(tmp_path / "empty.yaml", None)).settings
    for line, problem in ((number, line) for number, line in enumerate(text.splitlines(), 1) if line.startswith("  ") and "://" not in line):
        assert problem or line
    loaded = load(Sources(ROOT / "gateway.yaml", None)).settings
    for section in ("server", "tls", "upstream", "websocket", "retries", "retry_budget", "database", "ledger", "metrics", "tracing", "cors", "log", "demo", "inject_usage"):
        assert getattr(loaded, section) == getattr(defaults, section), section
    assert loaded.cloudflare.delegate == defaults.cloudflare.delegate
    for key in entries.ProviderEntry.model_fields:
        assert re.search(rf"^#? *{key}\b|[ ,]{key}[ ,]", text, re.MULTILINE), key


_LEVELS = {"event": "info", "warn": "warning", "bug": "error"}


def _events() -> set[tuple[str, str]]:
    """The names and levels of all events that the relay logs, except `exchange`."""
    found = {("log.lines_lost", "warning"), ("redis.recovered", "info")}
    for path in (ROOT / "relay").rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call) and node.args):
            function, name = call.func, call.args[0]
            called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if not isinstance(name, ast.Constant) or not re.fullmatch(r"[a-z_]+\.[a-z_]+", str(name.value)):
                continue
            # The Redis code reports to the gateway, which logs the event.
            if called == "_report":
                found |= {(name.value, "warning")} if name.value != "redis.recovered" else set()
            elif called in _LEVELS:
                found.add((name.value, _LEVELS[called]))
    return found


def test_every_log_event_is_documented_with_its_level() -> None:
    documented = re.findall(r"^\| `([a-z_]+\.[a-z_]+)` \| (info|warning|error) \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert documented == sorted(_events())


def test_every_error_code_is_documented_with_status_and_close_code() -> None:
    text = (ROOT / "docs/errors.md").read_text()
    for error in CATALOGUE:
        status = "as is" if error.code == "handshake_refused" else str(error.status)
        assert f"| `{error.code}` | {status} | {error.close_code} |" in text, error.code
    assert set(re.findall(r"^\| `([a-z_]+)` \| [\da]", text, re.MULTILINE)) == {error.code for error in CATALOGUE}


def test_every_command_and_option_is_documented() -> None:
    text = DOCS[ROOT / "docs/commands.md"]
    commands = next(action for action in build_parser()._actions if action.choices)
    assert commands.choices is not None
    for name, parser in commands.choices.items():  # type: ignore[attr-defined]
        if name == "worker":
            continue
        assert f"`relay {name}" in text, name
        parsers = [parser, *(each for action in parser._actions if isinstance(action, _SubParsersAction) for each in action.choices.values())]
        options = {option for each in parsers for action in each._actions for option in action.option_strings if option.startswith("--")} - {"--help"}
        assert [option for option in options if f"`{option}" not in text] == [], name


def test_the_map_of_the_architecture_lists_exactly_the_modules() -> None:
    folder, named = "", []
    for row in DOCS[ROOT / "ARCHITECTURE.md"].partition("\n## Map\n")[2].partition("\nBeside `relay/`")[0].splitlines():
        if found := re.match(r"\| \*\*`([a-z/]+)`\*\*", row):
            folder = found[1]
        named += [f"{folder}{name}" for name in re.findall(r"`(\w+\.py)`", row)]
    there = {str(module.relative_to(ROOT / "relay")) for module in (ROOT / "relay").rglob("*.py") if module.name != "__init__.py" and "migrations" not in module.parts}
    assert set(named) == there and len(named) == len(there)


def test_the_packaged_configuration_equals_that_of_the_checkout() -> None:
    """After a change of these files, copy them.

    cp gateway.yaml .env.example relay/defaults/
    cp config/providers/*.yaml relay/defaults/config/providers/
    """
    packaged = {str(file.relative_to(ROOT / "relay/defaults")): file.read_text() for file in (ROOT / "relay/defaults").rglob("*") if file.is_file()}
    shown = [ROOT / "gateway.yaml", ROOT / ".env.example", *(ROOT / "config/providers").glob("*.yaml")]
    assert packaged == {str(file.relative_to(ROOT)): file.read_text() for file in shown}


def test_every_path_that_the_relay_serves_is_documented() -> None:
    text = DOCS[ROOT / "docs/api.md"]
    sources = Sources(ROOT / "gateway.yaml", None)
    app = relay.app.standalone(load(sources), sources)
    paths = {route.resource.canonical for route in app.router.routes() if route.resource is not None} - {"/{path}"}
    assert len(paths) > 10
    for path in paths:
        shown = f"{API}/logs…" if path.startswith(f"{API}/logs") else path.replace("{endpoint}", "{endpoint…}")
        assert shown in text, path


def test_every_provider_is_listed_and_its_variable_in_the_example() -> None:
    listed, example = DOCS[ROOT / "docs/providers.md"], (ROOT / ".env.example").read_text()
    for file in (ROOT / "gateway.yaml", *(ROOT / "config/providers").glob("*.yaml")):
        for name, entry in yaml.safe_load(file.read_text())["providers"].items():
            assert f"`{name}`" in listed
            for variable in re.findall(r"\$\{(\w+)", str(entry)):
                assert f"{variable}=" in example
    for variable in re.findall(r"\$\{(\w+)", (ROOT / "gateway.yaml").read_text().partition("\nserver:")[2]):
        assert f"{variable}=" in example or variable.startswith(("MY_", "NAME")), variable


def _anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of headings, at which links can point."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_modules_and_tests_that_documents_name_exist() -> None:
    for path, text in DOCS.items():
        for link, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)", text):
            target = path.parent / link if link else path
            assert target.exists(), f"{path.name}: {link}"
            assert not anchor or target.suffix != ".md" or anchor in _anchors(target.read_text()), f"{path.name}: {link}#{anchor}"
        for module in re.findall(r"`(?:relay/)?((?:core|registry|upstream|surfaces|gate|ledger)/(?!test_)\w+\.py)`", text):
            assert (ROOT / "relay" / module).exists(), f"{path.name}: {module}"
        for test in re.findall(r"tests/[\w/]*\.py", text):
            assert (ROOT / test).exists(), f"{path.name}: {test}"


def test_each_invariant_names_tests_that_exist() -> None:
    text = DOCS[ROOT / "ARCHITECTURE.md"]
    invariants = text[text.index("## Invariants") : text.index("## The two request paths")]
    numbered = re.split(r"^\d+\. ", invariants, flags=re.MULTILINE)[1:]
    assert len(numbered) == 14
    for invariant in numbered:
        named = re.findall(r"`((?:[\w]+/)*test_\w+\.py)`:\s+((?:`\w+`(?:,\s+)?)+)", invariant)
        assert named, invariant
        for module, tests in named:
            source = (ROOT / "tests" / module).read_text()
            assert [test for test in re.findall(r"`(\w+)`", tests) if f"def test_{test}(" not in source] == [], module


def test_the_recipe_of_a_wire_format_makes_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = DOCS[ROOT / "CONTRIBUTING.md"]
    [code] = re.findall(r"^   ```python\n(.*?)^   ```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "acme_of_the_recipe.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(answer_meter._READERS, "acme", importlib.import_module("acme_of_the_recipe").Acme)
    for kind, answer in (
        ("application/json", b'{"engine": "acme-2", "text": "Hi", "spent": {"in": 10, "out": 5}}'),
        ("text/event-stream", b'data: {"text": "Hi"}\n\ndata: {"type": "end", "engine": "acme-2", "spent": {"in": 10, "out": 5}}\n\n'),
    ):
        meter = answer_meter.AnswerMeter("acme", SentCall("chat", b"{}", 1000, "POST", "v1/chat"), {"Content-Type": kind}.get)
        meter.feed(answer)
        assert meter.parts == (Part("acme-2", Usage(10, 5)),)


def test_every_page_is_in_the_index_once_by_division() -> None:
    index = DOCS[ROOT / "docs/README.md"]
    divisions = index[index.index("## Get started") :]
    assert re.findall(r"^## (.+)$", divisions, re.MULTILINE) == ["Get started", "How to", "Reference", "How it works"]
    linked = re.findall(r"\]\(([\w./-]+\.md)\)", divisions)
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")} - {"README.md"}
    pages |= {f"../{page.name}" for page in ROOT.glob("*.md")}
    assert set(linked) >= pages - {"../SECURITY.md"} and "../SECURITY.md" in linked
    assert [page for page in pages if linked.count(page) != 1] == []


@pytest.mark.programs
def test_no_file_names_a_path_or_package_index_of_one_machine() -> None:
    files = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file() and name != "tests/test_docs.py":
            text = (ROOT / name).read_text("utf-8", "replace")
            assert not re.search(r"/(?:root|work|farm)/|--(?:index-url|extra-index|find-links)|file:/{2}", text), name


def _blocks(kind: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", DOCS[ROOT / page], re.MULTILINE | re.DOTALL)


@pytest.mark.programs
async def test_the_code_of_the_readme_and_of_the_projects_clients_runs(tmp_path: Path) -> None:
    """Each runs with only the packages of its install line.

    The snippets of SDKs run in tests/sdk/test_snippets.py.
    """
    need("curl")
    served = await serve(tmp_path, None)
    try:
        env = {"RELAY_URL": served.url}
        first, second = (code.replace("http://127.0.0.1:8787", served.url) for code in _blocks("sh"))
        assert (await output("bash", "-c", first, env=env)).endswith("data: [DONE]\n\n")
        assert "provider_not_configured" in await output("bash", "-c", second, env=env)
        [sdk] = _blocks("python")
        client, mounted = (next(code for code in _blocks("python", "docs/sdks.md") if word in code) for word in ("relay.client", "add_subapp"))
        for code, install_line, expected in (
            (sdk.replace("http://127.0.0.1:8787", served.url), "pip install openai", "Hello!"),
            (client, "pip install .", "[DONE]"),
            (mounted, "pip install .", ""),
        ):
            folder = tmp_path / f"{len(code)}"
            shutil.copytree(ROOT / "config", folder / "config")
            shutil.copy(ROOT / "gateway.yaml", folder)
            (folder / "snippet.py").write_text(code)
            assert expected in await output(*python_command(install_line, folder / "packages"), "snippet.py", env=env, cwd=folder)
    finally:
        await served.stop()


def test_the_yaml_of_the_readme_is_a_valid_provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PROVIDER_KEY", "k-1")
    [text] = _blocks("yaml")
    (tmp_path / "gateway.yaml").write_text(text)
    assert load(Sources(tmp_path / "gateway.yaml", None)).registry.match_rest("my-provider", "x").url("") == "https://api.example.com/v1/x"
