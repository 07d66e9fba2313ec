"""The Kubernetes manifests that ship: their schema, their restrictions and their grace period."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import aiohttp
import msgspec
import pytest
import yaml

from relay.registry.load import Sources, load
from tests.processes import ROOT, serve
from tests.whole_run import canary

FOLDER = ROOT / "config/kubernetes"
MANIFESTS = [document for name in ("secret.example.yaml", "relay.yaml") for document in yaml.safe_load_all((FOLDER / name).read_text())]
KILLED_AFTER_S = 5
"""The longest time that the relay takes after its drain (docs/deployment.md)."""


class _Model(msgspec.Struct, forbid_unknown_fields=True):
    """The base of all models. An unknown field is an error, as in `kubectl apply`."""


def _field(metadata: dict[str, str] | None = None, default: Any = msgspec.NODEFAULT, **more: Any) -> Any:
    name = {"name": metadata["json"]} if metadata else {}
    return msgspec.field(default=default, **name, **more)


@pytest.fixture(scope="module")
def models() -> dict[str, ModuleType]:
    """The types of the OpenAPI document of Kubernetes, by API version, from lightkube-models.

    That package imports one module of the client lightkube, which this fixture provides.
    """
    schema = ModuleType("lightkube.core.schema")
    schema.DictMixin, schema.field, schema.dataclass = _Model, _field, lambda cls: cls  # type: ignore[attr-defined]
    sys.modules |= {"lightkube.core": ModuleType("lightkube.core"), "lightkube.core.schema": schema}
    names = {"v1": "core_v1", "apps/v1": "apps_v1", "policy/v1": "policy_v1", "networking.k8s.io/v1": "networking_v1"}
    return {version: importlib.import_module(f"lightkube.models.{module}") for version, module in names.items()}


def _check(document: dict[str, Any], models: dict[str, ModuleType]) -> None:
    """Raise msgspec.ValidationError if the document does not match its schema."""
    msgspec.convert(document, getattr(models[document["apiVersion"]], document["kind"]), strict=True)


def _of_kind(kind: str) -> dict[str, Any]:
    (found,) = (each for each in MANIFESTS if each["kind"] == kind)
    return cast(dict[str, Any], found)


POD = _of_kind("Deployment")["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


@pytest.mark.parametrize("document", MANIFESTS, ids=lambda document: document["kind"])
def test_manifests_match_the_schema_of_kubernetes(document: dict[str, Any], models: dict[str, ModuleType]) -> None:
    _check(document, models)


@pytest.mark.parametrize(("path", "value"), [(("spec", "replicas"), "two"), (("spec", "replica"), 2), (("spec", "selector"), None), (("spec", "template", "spec", "containers", 0, "livenessProbe", "httpget"), {})])
def test_the_check_rejects_what_the_schema_does_not_allow(path: tuple[Any, ...], value: Any, models: dict[str, ModuleType]) -> None:
    document = yaml.safe_load(yaml.safe_dump(_of_kind("Deployment")))
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(msgspec.ValidationError):
        _check(document, models)


def test_the_pod_meets_the_restricted_security_standard() -> None:
    """Kubernetes' Pod Security Standard `restricted`."""
    of_container = CONTAINER["securityContext"]
    assert of_container["allowPrivilegeEscalation"] is False and of_container["capabilities"] == {"drop": ["ALL"]}
    assert POD["securityContext"]["runAsNonRoot"] is True and POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert f"--uid {POD['securityContext']['runAsUser']} " in (ROOT / "config/docker/Dockerfile").read_text()
    assert of_container["readOnlyRootFilesystem"] is True and POD["automountServiceAccountToken"] is False


def test_selectors_and_names_match() -> None:
    labels = _of_kind("Deployment")["spec"]["template"]["metadata"]["labels"]
    selectors = [_of_kind("Service")["spec"]["selector"], *(_of_kind(kind)["spec"]["selector"]["matchLabels"] for kind in ("Deployment", "PodDisruptionBudget")), _of_kind("NetworkPolicy")["spec"]["podSelector"]["matchLabels"]]
    assert all(selector == labels for selector in selectors)
    assert CONTAINER["envFrom"] == [{"secretRef": {"name": _of_kind("Secret")["metadata"]["name"]}}]
    assert POD["volumes"][0]["configMap"]["name"] == _of_kind("ConfigMap")["metadata"]["name"]
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}
    assert {CONTAINER[probe]["httpGet"]["port"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")} == {port["name"] for port in CONTAINER["ports"]}


def test_the_configuration_is_valid_and_the_grace_period_exceeds_the_drain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _of_kind("Secret")["stringData"].items():
        monkeypatch.setenv(name, value.replace("your_", "0123456789abcdef-"))
    monkeypatch.setenv("POD_IP", "10.0.0.7")
    (tmp_path / "gateway.yaml").write_text(_of_kind("ConfigMap")["data"]["gateway.yaml"])
    config = load(Sources(tmp_path / "gateway.yaml", None))
    assert [provider.missing for provider in config.registry.providers.values()] == [(), ()]
    assert config.settings.access.mode == "required" and config.settings.access.admin_token and config.settings.access.read_token
    assert "10.0.0.7" in config.settings.server.hosts and config.settings.redis.url and config.settings.database
    before_s = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert before_s + config.settings.server.drain_timeout_s + KILLED_AFTER_S < POD["terminationGracePeriodSeconds"]


def test_the_filled_in_secret_is_kept_out_of_git_and_of_the_image() -> None:
    for name in (".gitignore", ".dockerignore"):
        assert "config/kubernetes/secret.yaml" in (ROOT / name).read_text().splitlines()


async def test_a_pod_refuses_calls_without_a_key_and_gives_its_metrics_to_prometheus(tmp_path: Path) -> None:
    """With the arguments and configuration of the manifests, but for the folder and databases."""
    document = yaml.safe_load(_of_kind("ConfigMap")["data"]["gateway.yaml"]) | {"database": str(tmp_path / "relay.db"), "redis": {}, "cache": {}}
    arguments = [str(tmp_path / "gateway.yaml") if each == "/etc/relay/gateway.yaml" else each for each in CONTAINER["args"]]
    environment = {"POD_IP": "10.0.0.7", "RELAY_ADMIN_TOKEN": canary("admin-token"), "RELAY_READ_TOKEN": canary("read-token"), "OPENAI_API_KEY": canary("k")}
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in environment.items()))
    (tmp_path / "gateway.yaml").write_text(yaml.safe_dump(document))
    served = await serve(tmp_path, None, *arguments[1:])
    url = served.url.replace("0.0.0.0", "127.0.0.1")
    async with aiohttp.ClientSession() as client:
        statuses = {}
        for token in ("", environment["RELAY_READ_TOKEN"]):
            headers = {"Host": "ai-gateway-relay", "X-Forwarded-For": "10.0.0.8"} | ({"Authorization": f"Bearer {token}"} if token else {})
            for path in ("/metrics", "/v1/models"):
                async with client.get(url + path, headers=headers) as answer:
                    statuses[path, bool(token)] = answer.status
    assert statuses == {("/metrics", False): 401, ("/v1/models", False): 401, ("/metrics", True): 200, ("/v1/models", True): 403}
    await served.stop()
