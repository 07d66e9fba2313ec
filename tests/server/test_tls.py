"""TLS on its own port: certificate files, a self-signed certificate, renewal, several workers."""

from __future__ import annotations

import asyncio
import datetime
import os
import signal
import socket
import ssl
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from websockets.sync.client import connect

from relay.registry.load import ConfigError, Sources, load
from relay.server.tls import self_signed
from tests.processes import Served, run, serve
from tests.relays import provider
from tests.server.conftest import Serve
from tests.upstream.raw import RawUpstream, ok
from tests.upstream.vendors import echo, vendor

pytestmark = pytest.mark.programs



@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Serve]:
    running: list[Served] = []

    async def begin(document: dict[str, Any], *arguments: str) -> Served:
        running.append(await serve(tmp_path, document, *arguments, "--tls-port", "0"))
        return running[-1]

    yield begin
    for one in running:
        await one.stop()


def _files(folder: Path, authority: trustme.CA, *names: str) -> dict[str, Any]:
    issued = authority.issue_cert(*names or ("localhost", "127.0.0.1"))
    issued.private_key_pem.write_to_path(folder / "key.pem")
    for at, pem in enumerate(issued.cert_chain_pems):
        pem.write_to_path(folder / "cert.pem", append=at > 0)
    return {"certificate": "cert.pem", "key": "key.pem", "port": 0}


def _trusting(authority: trustme.CA) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())


async def _tls_url(relay: Served) -> str:
    return (await relay.until(r'"tls_url":"(https:[^"]+)"')).group(1)


async def test_rest_and_websocket_calls_work_with_a_configured_certificate(served: Serve, tmp_path: Path, raw: RawUpstream, aiohttp_server: Any) -> None:
    raw.plays(ok(b"fine"))
    server = await aiohttp_server(vendor(("GET", "/echo", echo)))
    authority = trustme.CA()
    providers = {"up": provider(raw.url), "sock": provider(str(server.make_url("")), websocket={"default_path": "echo"})}
    relay = await served({"tls": _files(tmp_path, authority), "providers": providers})
    url = await _tls_url(relay)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=_trusting(authority))) as session:
        async with session.get(f"{url}/api/v1/ai-gateway/providers/up/x") as answer:
            assert await answer.read() == b"fine"
        async with session.ws_connect(f"{url}/api/v1/ai-gateway/ws/sock") as socket:
            await socket.send_str("hello")
            assert await socket.receive_str() == "hello"
        async with session.get(f"{relay.url}/healthz") as answer:
            assert answer.status == 200, "the plain port still serves"


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_client_that_trusts_the_self_signed_certificate_is_served(served: Serve, tmp_path: Path, raw: RawUpstream, workers: str) -> None:
    raw.plays(ok(b"fine"))
    relay = await served({"providers": {"up": provider(raw.url)}}, "--tls-self-signed", "--workers", workers)
    url = await _tls_url(relay)
    chain = tmp_path / "data/tls/self-signed.pem"
    assert stat.S_IMODE((tmp_path / "data/tls/self-signed-key.pem").stat().st_mode) == 0o600
    context = ssl.create_default_context(cafile=str(chain))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
        for _ in range(4):
            async with session.get(f"{url}/api/v1/ai-gateway/providers/up/x", headers={"Connection": "close"}) as answer:
                assert await answer.read() == b"fine"


async def test_requests_right_after_the_tls_handshake_are_read(served: Serve, tmp_path: Path) -> None:
    """The sync client of websockets writes from one thread at once and reads in another."""
    relay = await served({"demo": {"enabled": True}}, "--tls-self-signed")
    url = (await _tls_url(relay)).replace("https", "wss").replace("127.0.0.1", "localhost")
    context = ssl.create_default_context(cafile=str(tmp_path / "data/tls/self-signed.pem"))

    def sessions() -> int:
        for _ in range(60):
            with connect(f"{url}/api/v1/ai-gateway/ws/demo", ssl=context) as socket_:
                assert "session.created" in str(socket_.recv(timeout=10))
        return 60

    assert await asyncio.gather(*(asyncio.to_thread(sessions) for _ in range(3))) == [60] * 3


async def test_a_reload_loads_the_renewed_certificate(served: Serve, tmp_path: Path) -> None:
    first, second = trustme.CA(), trustme.CA()
    relay = await served({"tls": _files(tmp_path, first)})
    url = await _tls_url(relay)
    _files(tmp_path, second)
    relay.send(signal.SIGHUP)
    await relay.until("reload.done")
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=_trusting(second))) as session:
        async with session.get(f"{url}/healthz") as answer:
            assert answer.status == 200


async def test_a_client_that_never_closes_tls_does_not_delay_the_stop(served: Serve, tmp_path: Path) -> None:
    authority = trustme.CA()
    relay = await served({"tls": _files(tmp_path, authority)})
    port = int((await _tls_url(relay)).rpartition(":")[2])
    client = _trusting(authority).wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="localhost")
    client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert client.recv(12) == b"HTTP/1.1 200"
    relay.send(signal.SIGTERM)
    assert await relay.ended() == 0
    assert not [line for line in relay.lines if "Traceback" in line or "Error" in line]
    client.close()


async def test_a_self_signed_certificate_is_renewed_when_it_is_old_or_lacks_a_name(tmp_path: Path) -> None:
    now = datetime.datetime(2026, 11, 24, tzinfo=datetime.UTC)
    first = self_signed(tmp_path, [], now).chain.read_bytes()
    assert self_signed(tmp_path, ["localhost"], now).chain.read_bytes() == first
    with_name = self_signed(tmp_path, ["ai.example.com"], now).chain.read_bytes()
    assert with_name != first
    assert self_signed(tmp_path, [], now + datetime.timedelta(days=380)).chain.read_bytes() != with_name


@pytest.mark.parametrize(
    ("tls", "message"),
    [
        ({"certificate": "cert.pem"}, "gateway.yaml:3:1: tls: needs both certificate and key"),
        ({"certificate": "none.pem", "key": "key.pem"}, "tls.certificate: cannot be read: No such file"),
        ({"certificate": "cert.pem", "key": "none.pem"}, "tls.key: cannot be read: No such file"),
        ({"certificate": "cert.pem", "key": "other.pem"}, "tls.certificate: is no valid certificate with tls.key"),
        ({"certificate": "gateway.yaml", "key": "key.pem"}, "tls.certificate: is no valid certificate with tls.key"),
    ],
)
def test_certificate_files_that_do_not_match_are_refused_at_start(tmp_path: Path, tls: dict[str, str], message: str) -> None:
    from tests.relays import write_config

    _files(tmp_path, trustme.CA())
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(tmp_path / "other.pem")
    write_config(tmp_path, {"tls": tls})
    with pytest.raises(ConfigError) as refused:
        load(Sources(tmp_path / "gateway.yaml", None))
    assert message.partition("tls")[2] in str(refused.value)


async def test_an_unwritable_folder_for_the_certificate_is_reported(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file, where a folder should be")
    relay = await run(tmp_path, "serve", "--tls-self-signed", "--port", "0")
    assert await relay.ended() == 1
    assert "cannot write data/tls" in "\n".join(relay.lines)
    assert os.path.isfile(tmp_path / "data")
