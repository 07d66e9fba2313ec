"""Private parts of other packages: each one in use is checked at start and explained."""

from __future__ import annotations

import ast
import configparser
import functools
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import http_parser

from relay import internals
from relay.app import create
from relay.cli.main import main
from relay.internals import AIOHTTP_VERSION, PRIVATE_PARTS, UnknownLibrary, check_private_parts
from tests.relays import provider, write_config

ROOT = Path(__file__).parent.parent
NAMEDTUPLE = {"_asdict", "_fields", "_make", "_replace"}
"""Public despite the underscore (see the documentation of collections.namedtuple)."""
PYTHON = {"relay", "builtins", "typing", "abc", "enum"}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_" and name not in NAMEDTUPLE


def _attributes(tree: ast.AST) -> list[ast.Attribute]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_private(node.attr)]


def _is_own(node: ast.Attribute) -> bool:
    """True for `self._x`, `cls._x` and `super()._x`."""
    value = node.value.func if isinstance(node.value, ast.Call) else node.value
    return isinstance(value, ast.Name) and value.id in ("self", "cls", "super")


@functools.cache
def _names_of(cls: type) -> set[str]:
    """The names of all methods and attributes of a class, wherever they are set."""
    source = _classes_of(cls.__module__).get(cls.__qualname__)
    if source is None:  # a class in C has no source
        return set(vars(cls))
    return {node.attr for node in _attributes(source) if _is_own(node)} | set(vars(cls)) | set(inspect.get_annotations(cls))


@functools.cache
def _classes_of(module: str) -> dict[str, ast.ClassDef]:
    """The classes in the source of a module, by qualified name.

    inspect.getsource would parse the module again for each class.
    """
    file = getattr(sys.modules[module], "__file__", None)
    if file is None or not file.endswith(".py"):
        return {}
    return dict(_classes_in(ast.parse(Path(file).read_text()), ""))


def _classes_in(parent: ast.AST, prefix: str) -> Iterator[tuple[str, ast.ClassDef]]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef):
            yield prefix + node.name, node
            yield from _classes_in(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _classes_in(node, f"{prefix}{node.name}.<locals>.")
        elif isinstance(node, ast.stmt | ast.ExceptHandler):
            yield from _classes_in(node, prefix)


def private_names(file: Path) -> set[str]:
    """The private names of other packages that a module of the relay uses."""
    tree = ast.parse(file.read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("relay") for alias in node.names if _is_private(alias.name)}
    own = {node.attr for node in _attributes(tree) if _is_own(node)}
    # Attributes of objects other than `self` that no class of the same module defines.
    inherited = _inherited(file, tree)
    found |= {node.attr for node in _attributes(tree) if not _is_own(node) and node.attr not in own - inherited}
    return (found | inherited) - {"_abc_impl"}


def _inherited(file: Path, tree: ast.Module) -> set[str]:
    """Private names that classes use, or override, of a base from another package."""
    module = importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
    found: set[str] = set()
    for node in tree.body:
        cls = getattr(module, node.name, None) if isinstance(node, ast.ClassDef) else None
        if cls is None:
            continue
        theirs = {name for base in cls.__mro__[1:] if base.__module__.partition(".")[0] not in PYTHON for name in _names_of(base)}
        used = {each.attr for each in _attributes(node) if _is_own(each)} | {name for name in vars(cls) if _is_private(name)}
        found |= used & theirs
    return found


LISTED = {f"{re.split('[.:]', owner)[-1]}.{name}" for owner, names in PRIVATE_PARTS.items() for name in names}


def test_the_list_names_exactly_the_private_parts_that_the_code_uses() -> None:
    modules = [file for file in (ROOT / "relay").rglob("*.py") if "migrations" not in file.parts and file.name != "internals.py"]
    used = {name: file for file in modules for name in private_names(file)}
    assert set(used) == {part.rpartition(".")[2] for part in LISTED}, used


def test_the_scan_finds_each_way_to_use_a_private_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
        from aiohttp import ClientSession, web
        from aiohttp.http_writer import _serialize_headers
        def look(request): return request._match_info
        class Own(web.StreamResponse):
            def __init__(self): self._mine = self._keep_alive
            def _write_headers(self): return super()._prepare_headers()
        def mine(own): return own._mine
    """
    (tmp_path / "scanned.py").write_text(textwrap.dedent(code))
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert private_names(tmp_path / "scanned.py") == {"_serialize_headers", "_match_info", "_keep_alive", "_write_headers", "_prepare_headers"}


def test_the_decision_explains_every_private_part_and_names_existing_tests() -> None:
    text = (ROOT / "docs/decisions/0006-aiohttp-private-parts.md").read_text()
    rows = re.findall(r"^\| `(\w+\._\w+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    assert sorted(part for part, *_ in rows) == sorted(LISTED)
    for part, *_, tests in rows:
        places, _, name = tests.partition(": ")
        for place in places.split(", "):
            assert (ROOT / "tests" / place.strip()).exists(), part
        assert not name or f"def test_{name}" in (ROOT / "tests" / places).read_text(), part


def test_the_tested_version_is_required_and_locked() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert f"aiohttp =={AIOHTTP_VERSION}" in setup["options"]["install_requires"].splitlines()
    for lock in (ROOT / "requirements").glob("py*.txt"):
        assert re.search(r"^aiohttp==(\S+)", lock.read_text(), re.MULTILINE)[1] == AIOHTTP_VERSION, lock  # type: ignore[index]
    assert f"aiohttp that the relay was tested with, {AIOHTTP_VERSION}:" in (ROOT / "docs/sdks.md").read_text()
    check_private_parts()


def test_a_start_with_another_aiohttp_is_refused_with_both_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(aiohttp, "__version__", "3.99.0")
    assert main(["serve"]) == 1
    assert "relay: aiohttp 3.99.0 is installed" in (err := capsys.readouterr().err) and f"'aiohttp=={AIOHTTP_VERSION}'" in err
    with pytest.raises(UnknownLibrary):
        create(write_config(tmp_path, {"providers": {"openai": provider("https://api.example.com")}}).config)


def test_a_start_without_the_c_parser_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(http_parser, "HttpRequestParser", http_parser.HttpRequestParserPy)
    assert main(["serve"]) == 1
    assert "AIOHTTP_NO_EXTENSIONS" in capsys.readouterr().err


@pytest.mark.parametrize(("owner", "name"), [("ClientRequest", "_get_content_length"), ("StreamReader", "_read_nowait")])
def test_a_missing_private_part_is_named(monkeypatch: pytest.MonkeyPatch, owner: str, name: str) -> None:
    monkeypatch.delattr(getattr(aiohttp, owner), name)
    with pytest.raises(UnknownLibrary, match=f"aiohttp.{owner} has no {name}"):
        check_private_parts()


@pytest.mark.parametrize("owner", ["aiohttp:ClientRequest", "aiohttp:Gone", "aiohttp.gone", "aiohttp.http_writer"])
def test_a_private_part_that_no_object_has_is_reported_missing(monkeypatch: pytest.MonkeyPatch, owner: str) -> None:
    monkeypatch.setattr(internals, "PRIVATE_PARTS", {owner: ("_never",)})
    with pytest.raises(UnknownLibrary, match="has no _never"):
        check_private_parts()
