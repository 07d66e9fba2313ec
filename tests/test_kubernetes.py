"""The Kubernetes manifests that ship: their schema, their restrictions and their grace period."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import msgspec
import pytest
import yaml

from relay.registry.load import Sources, load
from tests.processes import ROOT

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
        monkeypatch.setenv(name, value.removeprefix("your_"))
    monkeypatch.setenv("POD_IP", "10.0.0.7")
    (tmp_path / "gateway.yaml").write_text(_of_kind("ConfigMap")["data"]["gateway.yaml"])
    config = load(Sources(tmp_path / "gateway.yaml", None))
    assert [provider.missing for provider in config.registry.providers.values()] == [(), ()]
    assert "10.0.0.7" in config.settings.server.hosts and config.settings.redis.url and config.settings.database
    before_s = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert before_s + config.settings.server.drain_timeout_s + KILLED_AFTER_S < POD["terminationGracePeriodSeconds"]


def test_the_filled_in_secret_is_kept_out_of_git_and_of_the_image() -> None:
    for name in (".gitignore", ".dockerignore"):
        assert "config/kubernetes/secret.yaml" in (ROOT / name).read_text().splitlines()


def test_the_command_line_accepts_the_arguments_of_the_container() -> None:
    from relay.cli.main import build_parser

    parsed = build_parser(CONTAINER["args"][:1]).parse_args(CONTAINER["args"])
    assert (parsed.config, parsed.host, parsed.open) == ("/etc/relay/gateway.yaml", "0.0.0.0", True)
