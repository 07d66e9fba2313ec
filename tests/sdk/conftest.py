"""Run the relay for official SDKs: over HTTP and TLS, with and without the nginx site that ships.

Owns also the check of the ledger rows after each test (tests/golden/sdk-rows.json).
"""

from __future__ import annotations

import json
import os
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import aiohttp.abc
import pytest
import trustme
from aiohttp import web

from relay import log
from relay.app import API
from relay.registry.certificates import Certificate
from relay.server.tls import server_context
from tests.conftest import StartRelay
from tests.ledger.test_ledger import rows
from tests.nginx import Nginx
from tests.relays import KEYS, Relay, packaged_provider
from tests.upstream.media import SDK_APPS, fal_queue_host
from tests.upstream.vendors import SEEN, Seen

AUTHORITY = trustme.CA()
FAL_HOSTS = {"fal.run": "fal", "queue.fal.run": "fal-queue"}

# The header in which each provider takes its credential, and the value that it must receive: the
# credential of the relay, whatever the SDK sent.
CREDENTIALS = {
    "openai": ("Authorization", f"Bearer {KEYS['OPENAI_API_KEY']}"),
    "anthropic": ("x-api-key", KEYS["ANTHROPIC_API_KEY"]),
    "google-ai-studio": ("x-goog-api-key", KEYS["GOOGLE_AI_API_KEY"]),
    "cartesia": ("Authorization", f"Bearer {KEYS['CARTESIA_API_KEY']}"),
    "elevenlabs": ("xi-api-key", KEYS["ELEVENLABS_API_KEY"]),
    "fal": ("Authorization", f"Key {KEYS['FAL_KEY']}"),
    "fal-queue": ("Authorization", f"Key {KEYS['FAL_KEY']}"),
    "deepgram": ("Authorization", f"Token {KEYS['DEEPGRAM_API_KEY']}"),
    "groq": ("Authorization", f"Bearer {KEYS['GROQ_API_KEY']}"),
}


@dataclass
class Front:
    """The URLs that an SDK uses: `url` is plain HTTP, `tls_url` is for SDKs that require TLS.

    `authority` is the certificate that an SDK must trust for `tls_url`.
    """

    url: str
    tls_url: str
    authority: Path
    relay: Relay
    servers: dict[str, Any]

    def base(self, provider: str, *, tls: bool = False) -> str:
        return f"{self.tls_url if tls else self.url}{API}/providers/{provider}"

    def seen(self, name: str) -> list[Seen]:
        found: list[Seen] = self.servers[name].app[SEEN]
        return found

    def check_credentials(self) -> None:
        """Check that each provider got the credential of the relay and none of the client."""
        arrived = 0
        for name, (header, value) in CREDENTIALS.items():
            for seen in self.seen(name):
                arrived += 1
                assert seen.header(header) == value, (name, seen.headers)
                assert "CANARY-client" not in f"{seen.target} {seen.headers}", name
        assert arrived, "nothing arrived at any provider"


@pytest.fixture(autouse=True)
def _short_list_of_authorities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare each client that an SDK creates the 25 ms to read the system's certificates."""
    AUTHORITY.cert_pem.write_to_path(tmp_path / "authority.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))


@pytest.fixture(params=["bare", "nginx"])
async def front(
    request: pytest.FixtureRequest, start: StartRelay, sqlite_setting: str, aiohttp_server: Any, tmp_path: Path
) -> AsyncIterator[Front]:
    as_fal = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    AUTHORITY.issue_cert(*FAL_HOSTS).configure_cert(as_fal)
    tls = {"fal": as_fal}
    servers = {name: await aiohttp_server(make(), ssl=tls.get(name)) for name, make in SDK_APPS.items()}
    servers["fal-queue"] = await aiohttp_server(fal_queue_host(), ssl=as_fal)
    entries = {name: packaged_provider(name, _url(servers[name])) for name in SDK_APPS}
    entries["fal"]["base_url"] = "https://fal.run"
    relay = await start({"server": {"trusted_proxies": ["127.0.0.1"]}, "providers": entries, "database": sqlite_setting})
    _resolve_to_stand_ins(relay, {host: servers[name].port for host, name in FAL_HOSTS.items()}, AUTHORITY)
    nginx = Nginx(tmp_path, AUTHORITY) if request.param == "nginx" else None
    if nginx is not None:
        await nginx.start(relay.port)
        url, tls_url = nginx.url, nginx.tls_url
    else:
        issued = AUTHORITY.issue_cert("localhost", "127.0.0.1")
        issued.private_key_pem.write_to_path(tmp_path / "key.pem")
        issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
        context = server_context(Certificate((tmp_path / "cert.pem").read_bytes(), (tmp_path / "key.pem").read_bytes()))
        await web.TCPSite(relay.runner, "127.0.0.1", 0, ssl_context=context).start()
        url, tls_url = relay.url, f"https://127.0.0.1:{relay.runner.addresses[-1][1]}"
    made = Front(url, tls_url, tmp_path / "authority.pem", relay, servers)
    try:
        yield made
        await check_rows(made, request)
    finally:
        if nginx is not None:
            await nginx.stop()


ROWS = Path(__file__).parent.parent / "golden/sdk-rows.json"


async def check_rows(front: Front, request: pytest.FixtureRequest) -> None:
    """Compare the rows of a test, with usage and cost, with tests/golden/sdk-rows.json.

    Also checks that each call has exactly one row.
    """
    found = await rows(front.relay)
    assert len({row["id"] for row in found}) == len(found)
    callspec = request.node.callspec.params
    name = "-".join([request.node.originalname, *(str(value) for key, value in callspec.items() if key != "front" and not callable(value))])
    log.flush()
    assert len(found) == sum('"event":"exchange"' in line for line in front.relay.logged.lines)
    if request.node.path.name == "test_snippets.py":
        return  # the examples of docs/sdks.md change too often for a golden file
    # Equal rows count once: the number of status polls of a queue differs between runs.
    stable = [json.loads(text) for text in sorted({json.dumps(_stable_fields(row)) for row in found})]
    golden: dict[str, Any] = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    if os.environ.get("GOLDEN") == "write":
        golden[name] = stable
        ROWS.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    assert golden.get(name) == stable


def _stable_fields(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of a row that are equal in each run; the duration of an agent session is not."""
    usage = dict(row.get("usage") or {})
    if "convai" in row["endpoint"]:
        usage.pop("audio_ms", None)
    cost = row["cost_usd"]
    # An SDK that has read [DONE] may disconnect before the end of the stream arrives.
    outcome = "answered" if row["outcome"] in ("relayed", "client_gone") else row["outcome"]
    fields = {"call": f"{row['method']} {row['provider']} {row.get('kind', 'other')} {row.get('model_answered') or row.get('model')}", "outcome": outcome, "usage": usage}
    return fields | {"cost_usd": None if cost is None else bytes(cost).decode()}


class _StandInResolver(aiohttp.abc.AbstractResolver):
    """Resolves the names of real hosts to the stand-ins, for SDKs whose hosts are fixed."""

    def __init__(self, ports: dict[str, int]) -> None:
        self.ports = ports

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[aiohttp.abc.ResolveResult]:
        return [{"hostname": host, "host": "127.0.0.1", "port": self.ports[host], "family": socket.AF_INET, "proto": 0, "flags": socket.AI_NUMERICHOST}]

    async def close(self) -> None:
        """Nothing to close."""


def _resolve_to_stand_ins(relay: Relay, ports: dict[str, int], authority: trustme.CA) -> None:
    connector = relay.gateway.upstream.rest.connector
    assert isinstance(connector, aiohttp.TCPConnector)
    # Without `cadata`, it would load the authorities of the system, which takes 40 ms of CPU.
    trusted = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    connector._ssl, connector._resolver = trusted, _StandInResolver(ports)


def _url(server: Any) -> str:
    return str(server.make_url("/")).rstrip("/")
