"""/openapi.json lists exactly the routes of the relay, and its schemas describe the responses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

import relay.app
from relay.core.paths import API
from relay.registry.load import Sources, load
from relay.surfaces.openapi import OPERATIONS, document
from tests.conftest import StartRelay
from tests.processes import ROOT
from tests.relays import Relay
from tests.surfaces.test_keys import manage, small  # noqa: F401

DOCUMENT = document(API)
METHODS = {"get", "put", "post", "delete", "options", "head", "patch", "trace"}


def _routes() -> set[tuple[str, str]]:
    sources = Sources(ROOT / "gateway.yaml", None)
    app = relay.app.standalone(load(sources), sources)
    found = set()
    for route in app.router.routes():
        assert route.resource is not None
        path, method = route.resource.canonical, route.method.lower()
        if method == "*":
            calls = {f"{API}/providers": [f"{API}/providers/{{provider}}/{{endpoint}}"], f"{API}/ws": [f"{API}/ws/{{provider}}", f"{API}/ws/{{provider}}/{{endpoint}}"], "/{path}": [], "/v1": ["/v1/{endpoint}"]}
            methods = ("get",) if path.endswith("/ws") else ("get", "post", "put", "patch", "delete", "options", "head")
            found |= {(each, called) for called in calls[path] for each in methods}
        elif method != "head":
            found.add((method, path))
    return found


def test_the_document_has_every_route_of_the_relay_and_no_other() -> None:
    listed = {(method, path) for path, operations in DOCUMENT["paths"].items() for method in operations}
    assert listed == _routes()
    assert len(OPERATIONS) == len(listed)


def test_the_document_is_valid_openapi_3_1() -> None:
    """The rules of the specification that a document made from a table can break."""
    assert re.fullmatch(r"3\.1\.\d", DOCUMENT["openapi"]) and {"title", "version"} <= set(DOCUMENT["info"])
    ids = []
    for path, operations in DOCUMENT["paths"].items():
        assert path.startswith("/") and set(operations) <= METHODS
        for operation in operations.values():
            ids.append(operation["operationId"])
            templated = set(re.findall(r"\{(\w+)\}", path))
            assert {each["name"] for each in operation["parameters"] if each["in"] == "path"} == templated, path
            assert all(each["required"] for each in operation["parameters"] if each["in"] == "path")
            places = [(each["name"], each["in"]) for each in operation["parameters"]]
            assert len(places) == len(set(places)) and all(each["schema"] for each in operation["parameters"])
            assert all(re.fullmatch(r"[1-5]\d\d|default", status) and answer["description"] for status, answer in operation["responses"].items())
            assert {name for each in operation["security"] for name in each} <= set(DOCUMENT["components"]["securitySchemes"])
            if "requestBody" in operation:
                assert operation["requestBody"]["content"]["application/json"]["schema"]
    assert len(ids) == len(set(ids)) and all(re.fullmatch(r"[A-Za-z0-9_]+", each) for each in ids)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in DOCUMENT["components"]["schemas"])


def _refs(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for each in node.values():
            yield from _refs(each)
    elif isinstance(node, list):
        for each in node:
            yield from _refs(each)


def test_every_reference_leads_to_a_schema_and_every_schema_is_used() -> None:
    names = {ref.removeprefix("#/components/schemas/") for ref in _refs(DOCUMENT)}
    assert names == set(DOCUMENT["components"]["schemas"])


def _check(value: Any, schema: dict[str, Any], where: str) -> None:
    """Hold a response against its schema: types, required and unknown properties, enumerations."""
    if "$ref" in schema:
        _check(value, DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]], where)
        return
    if "enum" in schema:
        assert value in schema["enum"], where
    kinds = schema.get("type", [])
    names = {"string": str, "null": type(None), "integer": int, "number": (int, float), "array": list, "object": dict}
    kinds = [kinds] if isinstance(kinds, str) else kinds
    assert not kinds or any(isinstance(value, names[kind]) for kind in kinds), (where, value)
    if isinstance(value, list):
        for each in value:
            _check(each, schema.get("items", {}), f"{where}[]")
    elif isinstance(value, dict) and "properties" in schema and "title" not in schema:
        assert set(schema.get("required", [])) <= set(value) <= set(schema["properties"]), (where, value)
        for name, each in value.items():
            _check(each, schema["properties"][name], f"{where}.{name}")


async def test_the_schemas_describe_what_management_answers(small: Relay) -> None:  # noqa: F811
    _, made = await manage(small, "POST", "keys", {"client": "web", "record": {"providers": ["openai"], "limits": [{"requests": 5}]}, "expires": "2099-01-01"})
    asked = [
        ("post", "/keys", "keys", {"client": "own"}), ("get", "/keys", "keys", None), ("get", "/keys/{id}", f"keys/{made['id']}", None), ("get", "/clients", "clients", None),
        ("get", "/clients/{name}", "clients/own", None), ("get", "/clients/{name}", "clients/web", None), ("put", "/clients/{name}", "clients/web", {}), ("post", "/clients/{name}/rotate", "clients/web/rotate", {}),
        ("get", "/audit", "audit", None), ("get", "/sessions", "sessions", None), ("delete", "/keys/{id}", f"keys/{made['id']}", None), ("delete", "/clients/{name}", "clients/web", None), ("delete", "/cache", "cache", None),
    ]  # fmt: skip
    for method, path, called, body in asked:
        status, answer = await manage(small, method.upper(), called, body)
        described = DOCUMENT["paths"][API + path][method]["responses"]
        assert str(status) in described, (method, path, status)
        _check(answer, described[str(status)]["content"]["application/json"]["schema"], f"{method} {path}")
    status, answer = await manage(small, "GET", "keys/000000000000")
    _check(answer, DOCUMENT["components"]["schemas"]["Error"], "error")


@pytest.mark.parametrize("headers", [{}, {"Host": "anywhere.example"}])
async def test_anybody_may_read_the_document(start: StartRelay, headers: dict[str, str]) -> None:
    served = await start({"access": {"mode": "required"}, "clients": {"web": {"key": "a-key-of-sixteen-characters"}}})
    status, answered, body = await served.call("GET", f"{served.url}/openapi.json", headers=headers)
    assert status == 200 and answered["content-type"].startswith("application/json")
    assert json.loads(body) == json.loads(json.dumps(DOCUMENT))


async def test_a_mounted_relay_names_its_own_paths(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_text("{database: null, demo: {enabled: false}, providers: {one: {base_url: https://one.example.com}}}")
    host = web.Application()
    host.add_subapp("/ai", relay.app.create(tmp_path / "gateway.yaml"))
    async with TestServer(host) as server:
        async with aiohttp.ClientSession() as session, session.get(server.make_url("/ai/openapi.json")) as answer:
            described = await answer.json()
    assert described["servers"] == [{"url": "/ai"}] and "/keys" in described["paths"] and "/providers/{provider}/{endpoint}" in described["paths"]
