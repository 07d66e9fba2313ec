"""Deployment: the locks, the image, the systemd units and the commands of docs/deployment.md."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from relay.cli.main import build_parser
from relay.core.errors import PackageMissing
from relay.ledger.traces import Traces
from relay.registry.schema import Server, Tracing
from relay.storage.database import Database, database_url
from tests.processes import ROOT
from tests.tools import need

LOCKS = ROOT / "requirements"
MINORS = ("3.11", "3.12", "3.13", "3.14")
UNITS = ROOT / "config/systemd"
SERVICE, SOCKET = UNITS / "ai-gateway-relay.service", UNITS / "ai-gateway-relay.socket"
DOCKERFILE = (ROOT / "config/docker/Dockerfile").read_text()
DEPLOYMENT = (ROOT / "docs/deployment.md").read_text()
AFTER_THE_DRAIN_S = 15
"""The time in which the relay cancels calls and writes their records (docs/deployment.md)."""


# Locks --------------------------------------------------------------------------------------------


def _locked(name: str) -> set[tuple[str, str]]:
    """The packages and versions of a lock. Each must have hashes."""
    text = (LOCKS / name).read_text()
    hashed = re.findall(r"^([a-z0-9.-]+)==(\S+)(?: ;[^\n]*)? \\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE)
    assert len(hashed) == len(re.findall(r"^\S+==", text, re.MULTILINE)), f"{name} has an entry without a hash"
    return set(hashed)


def test_the_build_backend_is_the_locked_version() -> None:
    [required] = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert {tuple(required.split("=="))} == _locked("build.txt")


@pytest.mark.parametrize("minor", MINORS)
def test_the_deployed_versions_are_the_tested_versions(minor: str) -> None:
    small, full, tested = (_locked(f"py{minor}{kind}.txt") for kind in ("", "-full", "-test"))
    assert small <= full <= tested and _locked("build.txt") <= tested
    assert {"asyncpg", "opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"} <= {package for package, _ in full - small}


def test_a_missing_driver_names_the_lock_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(PackageMissing, match=r"PostgreSQL needs the package asyncpg.*requirements/(\S+) has it") as raised:
        Database(database_url("postgresql+asyncpg://u:p@127.0.0.1/x"))
    assert re.search(r"requirements/(\S+) has", str(raised.value))[1] in [path.name for path in LOCKS.iterdir()]  # type: ignore[index]


def test_missing_packages_of_traces_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(PackageMissing, match=r"tracing\.endpoint needs the package opentelemetry-sdk"):
        Traces(Tracing(endpoint="http://127.0.0.1:9"), lambda _: None)


def test_no_document_installs_a_package_that_is_not_published() -> None:
    known = subprocess.run(("git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"), check=True, capture_output=True, text=True).stdout
    names = [name for name in known.split("\0") if name and not name.startswith("tests/") and not name.endswith((".json", ".txt"))]
    said = r"(?:pip|uv|pipx|npm|yarn|pnpm)3? (?:install|add|i) [^\n]*?(?<![/\w-])ai-gateway-(?:relay|client)(?![\w./-])"
    found = [name for name in names if (ROOT / name).is_file() and re.search(said, re.sub(r"\n# ?", " ", (ROOT / name).read_text(errors="replace")))]
    assert found == []


# The image ----------------------------------------------------------------------------------------


def test_the_image_is_installed_from_locks_with_hashes_and_compiles_nothing() -> None:
    steps = re.sub(r"\\\n", " ", DOCKERFILE)
    installs = re.findall(r"(?:pip|/opt/relay) (?:install|wheel) [^&\n]*", steps)
    of_locks = [install for install in installs if " -r " in install]
    assert [re.search(r"-r (\S+)", install)[1] for install in of_locks] == ["requirements/build.txt", "requirements/py3.13-full.txt"]  # type: ignore[index]
    assert all("--require-hashes" in install and "--only-binary :all:" in install for install in of_locks)
    assert "PIP_NO_DEPS=1" in DOCKERFILE and "--no-build-isolation" in steps
    python = set(re.findall(r"^FROM python:(\S+)-slim", DOCKERFILE, re.MULTILINE))
    assert python == {"3.13"}, "the Python of the lock"


def test_the_image_serves_as_a_user_with_a_health_check_and_a_stop_signal() -> None:
    last = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    assert "--uid 10001" in last and "\nUSER relay\n" in last
    assert "\nSTOPSIGNAL SIGTERM\n" in last and "\nVOLUME /relay/data\n" in last
    command = re.search(r"\nHEALTHCHECK [^\n]*? CMD (\[.*?\])\n", re.sub(r"\\\n", "", last))
    assert command is not None
    check = yaml.safe_load(command[1])
    assert check[:2] == ["python", "-c"] and "/readyz" in check[2]
    compile(check[2], "HEALTHCHECK", "exec")
    entry, arguments = (yaml.safe_load(re.search(rf"\n{name} (\[.*\])", last)[1]) for name in ("ENTRYPOINT", "CMD"))  # type: ignore[index]
    assert entry == ["relay"]
    build_parser().parse_args(arguments)


def test_the_compose_file_publishes_on_loopback_and_waits_for_the_drain() -> None:
    service = yaml.safe_load((ROOT / "config/docker/compose.yaml").read_text())["services"]["relay"]
    folder = ROOT / "config/docker"
    assert (folder / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == ROOT / "config/docker/Dockerfile"
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["init"] and service["read_only"] and service["cap_drop"] == ["ALL"]
    assert int(service["stop_grace_period"].removesuffix("s")) == Server().drain_timeout_s + AFTER_THE_DRAIN_S


# systemd ------------------------------------------------------------------------------------------


def _setting(unit: Path, name: str) -> str:
    lines = re.sub(r"\\\n", " ", unit.read_text())
    [value] = re.findall(rf"^{name}=(.*)$", lines, re.MULTILINE)
    return str(value)


@pytest.fixture
def units(tmp_path: Path) -> list[str]:
    """Copies of the units that start an existing program: systemd-analyze reports a missing one."""
    need("systemd-analyze")
    for unit in (SERVICE, SOCKET):
        (tmp_path / unit.name).write_text(unit.read_text().replace("/opt/ai-gateway-relay/bin/relay", "/bin/true"))
    return [str(tmp_path / unit.name) for unit in (SERVICE, SOCKET)]


def test_systemd_accepts_the_units(units: list[str]) -> None:
    checked = subprocess.run(("systemd-analyze", "verify", "--man=no", *units), capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_systemd_rates_the_exposure_of_the_service_as_low(units: list[str]) -> None:
    """The scale ends at 10. The rest of the exposure is mostly the use of the network."""
    command = ("systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", units[0])
    rated = subprocess.run(command, capture_output=True, text=True, check=False)
    assert rated.returncode == 0, rated.stdout[-500:]


def test_the_units_use_existing_commands_of_the_relay() -> None:
    program, *serve = shlex.split(_setting(SERVICE, "ExecStart").replace("%d", "/run/credentials"))
    build_parser().parse_args(serve)
    same, *reload = shlex.split(_setting(SERVICE, "ExecReload"))
    assert build_parser().parse_args(reload).url == f"http://{_setting(SOCKET, 'ListenStream')}"
    assert program == same == "/opt/ai-gateway-relay/bin/relay"
    assert int(_setting(SERVICE, "TimeoutStopSec")) == Server().drain_timeout_s + AFTER_THE_DRAIN_S
    assert int(_setting(SOCKET, "Backlog")) == 1024


# docs/deployment.md -------------------------------------------------------------------------------


def _blocks() -> Iterator[str]:
    """The blocks of commands; some are settings instead."""
    for block in re.findall(r"(?:^    .*\n)+", DEPLOYMENT, re.MULTILINE):
        text = re.sub("^    ", "", block, flags=re.MULTILINE)
        if not re.match(r"[A-Z_]+=", text):
            yield text


def test_the_commands_of_the_document_exist() -> None:
    relay_commands = 0
    for block in _blocks():
        subprocess.run(("bash", "-n"), input=block, text=True, check=True)
        for line in re.sub(r"\\\n", " ", block).splitlines():
            if line.startswith("/opt/ai-gateway-relay/bin/relay "):
                build_parser().parse_args(shlex.split(line)[1:])
                relay_commands += 1
    assert relay_commands == 2


def test_every_file_that_the_commands_copy_is_in_the_checkout() -> None:
    named = set(re.findall(r"(?<![\w/.])(?:config|requirements|scripts)/[\w./-]*\w", "\n".join(_blocks()).replace("requirements/$(", "")))
    assert named >= {"config/nginx/relay.conf", "requirements/build.txt"}
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_settings_that_the_document_changes_are_in_the_shipped_file() -> None:
    [command] = [block for block in _blocks() if "sed -i" in block]
    shipped = (ROOT / "relay/defaults/gateway.yaml").read_text()
    for found in re.findall(r"-e 's\|(.*?)\|(.*?)\|'", command):
        shipped, count = re.subn(found[0], found[1], shipped, flags=re.MULTILINE)
        assert count == 1, found
    server = yaml.safe_load(shipped)["server"]
    assert (server["public_url"], server["trusted_proxies"]) == ("https://ai.example.com", ["127.0.0.1"])
