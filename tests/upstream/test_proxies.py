"""Calls and sockets through a forward proxy that HTTPS_PROXY or a similar variable names."""

from __future__ import annotations

import base64
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from aiohttp import web
from yarl import URL

from relay.cli.doctor import examine
from relay.cli.explain import explain
from relay.core.paths import API
from relay.core.redaction import Secrets
from relay.registry.load import Config, ConfigError, Sources, load
from relay.registry.proxies import Proxies
from tests.conftest import StartRelay
from tests.relays import HANG_GUARD_S, LogStream, Relay, provider, write_config
from tests.upstream.proxy import ForwardProxy
from tests.upstream.raw import RawUpstream, ok
from tests.upstream.vendors import SEEN, echo, note, vendor

HOST = "api.example.test"
PASSWORD = "p@ss:w/rd"
AUTHORITY = trustme.CA()


def tls(*names: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    AUTHORITY.issue_cert(*names).configure_cert(context)
    return context


@pytest.fixture
async def proxy(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ForwardProxy]:
    """A proxy in HTTPS_PROXY, with a password; the relay trusts this module's authority."""
    trusting = ssl.create_default_context(cadata=AUTHORITY.cert_pem.bytes().decode())
    monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", trusting)
    running = await ForwardProxy.start()
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:p%40ss%3Aw%2Frd@{running.address}")
    yield running
    await running.stop()


@pytest.fixture
async def behind_proxy(proxy: ForwardProxy, aiohttp_server: Any) -> web.Application:
    """A provider with TLS that can only be reached through the proxy."""

    async def hello(request: web.Request) -> web.StreamResponse:
        seen = note(request, await request.read())
        return web.json_response({"hello": seen.body.decode()})

    app = vendor(("POST", "/v1/chat/completions", hello), ("GET", "/v1/models", hello), ("GET", "/v1/live", echo))
    server = await aiohttp_server(app, ssl=tls(HOST))
    proxy.routes[HOST, 443] = server.port
    return app


ENTRY = provider(f"https://{HOST}/v1", check="models", websocket={"default_path": "live"})


async def call(relay: Relay, body: bytes = b"{}") -> tuple[int, Any, bytes]:
    return await relay.call("POST", relay.path("openai", "chat/completions"), data=body)


async def test_a_call_goes_through_a_tunnel_with_the_proxys_password(start: StartRelay, proxy: ForwardProxy, behind_proxy: web.Application) -> None:
    relay = await start(openai=ENTRY)
    for body in (b"small", b"x" * 100_000, b""):
        status, _, response = await call(relay, body)
        assert status == 200 and body in response
    assert proxy.targets == [("CONNECT", f"{HOST}:443")], "one tunnel for all three calls"
    [connect] = proxy.arrived
    assert connect.header("Proxy-Authorization") == ["Basic " + base64.b64encode(f"user:{PASSWORD}".encode()).decode()]
    assert connect.header("Authorization") == []
    first = behind_proxy[SEEN][0]
    assert first.header("Host") == HOST and "proxy-authorization" not in first.names


async def test_a_socket_goes_through_a_tunnel(start: StartRelay, proxy: ForwardProxy, behind_proxy: web.Application) -> None:
    relay = await start(openai=ENTRY)
    async with relay.client.ws_connect(relay.ws("openai")) as ws:
        await ws.send_str("hello")
        assert (await ws.receive(HANG_GUARD_S)).data == "hello"
    assert proxy.targets == [("CONNECT", f"{HOST}:443")]


async def test_a_proxy_may_use_tls(start: StartRelay, proxy: ForwardProxy, behind_proxy: web.Application, monkeypatch: pytest.MonkeyPatch) -> None:
    secure = await ForwardProxy.start(tls("127.0.0.1"))
    secure.routes = proxy.routes
    monkeypatch.setenv("HTTPS_PROXY", f"https://{secure.address}")
    relay = await start(openai=ENTRY)
    assert (await call(relay))[0] == 200 and secure.targets == [("CONNECT", f"{HOST}:443")]
    await secure.stop()


async def test_plain_http_goes_through_its_own_proxy_with_the_whole_url(start: StartRelay, proxy: ForwardProxy, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"user:secret-word@{proxy.address}")
    proxy.routes["models.example.test", 8000] = raw.port
    raw.plays(ok(b"fine"))
    relay = await start(openai={"base_url": "http://models.example.test:8000/v1"})
    for body in (b"small", b"x" * 100_000):
        assert (await call(relay, body))[2] == b"fine" and raw.arrived[-1].body == body
    assert (await relay.call("GET", URL(relay.path("openai", "x%20y?a=%2F"), encoded=True)))[0] == 200  # type: ignore[arg-type]
    assert proxy.targets[0] == ("POST", "http://models.example.test:8000/v1/chat/completions")
    assert raw.arrived[-1].target == "http://models.example.test:8000/v1/x%20y?a=%2F", "on the connection that the proxy kept open"
    assert proxy.arrived[0].header("Proxy-Authorization") == ["Basic " + base64.b64encode(b"user:secret-word").decode()]


async def test_loopback_and_the_demo_use_no_proxy(start: StartRelay, proxy: ForwardProxy, raw: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", f"http://{proxy.address}")
    raw.plays(ok(b"fine"))
    relay = await start(openai=provider(raw.url), local=provider(f"http://localhost:{raw.port}"))
    assert (await call(relay))[2] == b"fine"
    assert (await relay.call("GET", relay.path("local", "models")))[2] == b"fine"
    assert not proxy.arrived


async def test_a_netrc_and_the_environment_at_call_time_are_not_read(start: StartRelay, proxy: ForwardProxy, behind_proxy: web.Application, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine {HOST} login a password b\nmachine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(netrc))
    relay = await start(openai={"base_url": f"https://{HOST}/v1"})
    monkeypatch.delenv("HTTPS_PROXY")
    assert (await call(relay))[0] == 200
    assert behind_proxy[SEEN][0].header("Authorization") is None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 407 Authentication Required\r\nContent-Length: 0\r\n\r\n", "answered 407: check its user name and password"),
        (b"HTTP/1.1 503 Down\r\nContent-Length: 0\r\n\r\n", "answered 503"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "closed the connection, or did not answer with HTTP"),
        (b"", "closed the connection, or did not answer with HTTP"),
    ],
    ids=["407", "503", "no HTTP", "closed"],
)
async def test_a_proxy_that_opens_no_tunnel_is_named_and_the_call_falls_back(answer: bytes, message: str, start: StartRelay, proxy: ForwardProxy, raw: RawUpstream) -> None:
    proxy.answers(answer)
    raw.plays(ok(b"from the other"))
    relay = await start(openai=ENTRY, backed=ENTRY | {"fallback": [{"provider": "other"}]}, other=provider(raw.url))
    status, headers, body = await call(relay)
    assert (status, headers["x-relay-error"]) == (502, "upstream_unreachable")
    assert f"No connection to the provider 'openai' at {HOST}:443: the proxy http://{proxy.address} (HTTPS_PROXY) {message}." in body.decode()
    assert (await relay.call("POST", relay.path("backed", "chat/completions"), data=b"{}"))[2] == b"from the other"
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await relay.client.ws_connect(relay.ws("openai"))
    assert refused.value.status == 502
    assert PASSWORD not in "".join(relay.logged.lines) and PASSWORD not in body.decode()


@pytest.mark.parametrize(
    ("proxy_url", "message"),
    [("http://user:p%40ss%3Aw%2Frd@127.0.0.1:9", "the proxy http://127.0.0.1:9 (HTTPS_PROXY): connection refused"), ("proxy.invalid:3128", "the name of the proxy http://proxy.invalid:3128 (HTTPS_PROXY) does not resolve")],
)
async def test_a_proxy_that_cannot_be_reached_is_named(proxy_url: str, message: str, start: StartRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy_url)
    relay = await start(openai=ENTRY)
    status, _, body = await call(relay)
    assert status == 502 and message in body.decode()


async def test_a_proxy_whose_certificate_is_not_trusted_is_named(start: StartRelay, proxy: ForwardProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    secure = await ForwardProxy.start(tls("elsewhere.example"))
    monkeypatch.setenv("HTTPS_PROXY", f"https://{secure.address}")
    relay = await start(openai=ENTRY)
    _, headers, body = await call(relay)
    assert headers["x-relay-error"] == "upstream_tls_failed" and f"the proxy https://{secure.address} (HTTPS_PROXY)" in body.decode()
    await secure.stop()


async def test_an_untrusted_certificate_of_a_provider_is_not_blamed_on_the_proxy(start: StartRelay, proxy: ForwardProxy, behind_proxy: web.Application) -> None:
    proxy.routes["other.example.test", 443] = proxy.routes[HOST, 443]
    relay = await start(openai=provider("https://other.example.test/v1"))
    _, headers, body = await call(relay)
    assert headers["x-relay-error"] == "upstream_tls_failed" and "proxy" not in body.decode()


def load_config(folder: Path, **providers: Any) -> Config:
    write_config(folder, {"providers": providers})
    return load(Sources(folder / "gateway.yaml", folder / ".env"))


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("HTTPS_PROXY", "socks5://127.0.0.1:1080", "the relay supports http:// and https:// proxies, not 'socks5'"),
        ("ALL_PROXY", "socks5h://user:geheim@127.0.0.1:1080", "the relay supports http:// and https:// proxies, not 'socks5h'"),
        ("https_proxy", "http://user:geheim@", "is not the URL of a proxy"),
        ("https_proxy", "http://user:geheim@proxy:99999", "is not the URL of a proxy"),
        ("HTTPS_PROXY", "http://pro xy:3128", "is not the URL of a proxy"),
        ("HTTPS_PROXY", "http://proxy:3128/geheim", "is not the URL of a proxy"),
        ("HTTPS_PROXY", "http://proxy:3128?geheim", "is not the URL of a proxy"),
        ("HTTPS_PROXY", "[::1", "is not the URL of a proxy"),
        ("HTTPS_PROXY", "http://us%3Aer:geheim@proxy:3128", "the user must not have a colon"),
        ("HTTPS_PROXY", "http://user:geheim%E2%82%AC@proxy:3128", "must not have characters beyond Latin-1"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_an_error_at_start_that_names_the_variable(variable: str, value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as refused:
        load_config(tmp_path, openai=ENTRY, other=ENTRY)
    [problem] = refused.value.problems
    assert str(problem).startswith(f"environment:1:1: {variable}: ") and message in str(problem)
    assert "geheim" not in str(problem)


def test_a_proxy_that_no_target_needs_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    config = load_config(tmp_path, openai=ENTRY, local={"base_url": "http://127.0.0.1:1"})
    assert config.registry.providers["openai"].rest.proxy is not None


def find_proxy(target: str, **variables: str) -> str | None:
    problems: list[str] = []
    proxy = Proxies(variables, lambda name, text: problems.append(name)).find(URL(target))
    assert not problems
    return proxy and f"{proxy.shown} {proxy.variable}"


def test_the_variable_for_the_scheme_of_the_target_counts_and_the_lower_case_one_first() -> None:
    every = {"https_proxy": "a:1", "HTTPS_PROXY": "b:2", "http_proxy": "c:3", "HTTP_PROXY": "d:4", "all_proxy": "e:5", "ALL_PROXY": "f:6"}
    order = {"https://x": ["http://a:1 https_proxy", "http://b:2 HTTPS_PROXY"], "http://x": ["http://c:3 http_proxy", "http://d:4 HTTP_PROXY"]}
    for target, own in order.items():
        remaining = dict(every)
        for expected in [*own, "http://e:5 all_proxy", "http://f:6 ALL_PROXY"]:
            assert find_proxy(target, **remaining) == expected
            remaining[expected.split()[1]] = " "  # an empty variable is not set
        assert find_proxy(target, **remaining) is None
    assert find_proxy("https://x", HTTPS_PROXY="HTTPS://P.example") == "https://p.example:443 HTTPS_PROXY"
    assert find_proxy("https://x", HTTPS_PROXY="http://[2001:db8::1]:3128/") == "http://[2001:db8::1]:3128 HTTPS_PROXY"


@pytest.mark.parametrize(
    ("listed", "target", "direct"),
    [
        ("*", "https://a.example", True), ("a.example", "https://a.example", True), ("a.example", "https://b.a.example", True),
        (".a.example", "https://a.example", True), (".a.example", "https://b.a.example", True), ("*.a.example", "https://b.a.example", True),
        ("a.example", "https://ba.example", False), ("x, y A.Example.,z", "https://a.EXAMPLE", True), ("x  a.example", "https://a.example.", True),
        ("a.example:443", "https://a.example", True), ("a.example:8443", "https://a.example", False), ("a.example:8443", "https://a.example:8443", True),
        ("10.0.0.0/8", "http://10.1.2.3", True), ("10.0.0.0/8", "http://11.1.2.3", False), ("10.0.0.0/8", "http://10.example", False),
        ("10.1.2.3", "http://10.1.2.3", True), ("10.1.2.3:80", "http://10.1.2.3", True), ("10.1.2.3:81", "http://10.1.2.3", False),
        ("10.0.0.0/8", "http://[::ffff:10.1.2.3]", True), ("2001:db8::/32", "http://[2001:db8::1]", True), ("[2001:db8::1]:80", "http://[2001:db8::1]", True),
        ("[2001:db8::1]", "http://[2001:db8::2]", False), ("", "https://a.example", False), (",, .", "https://a.example", False), ("10.0.0.0/99,:,[", "https://a.example", False),
        ("nothing", "http://localhost:1", True), ("nothing", "http://127.8.8.8", True), ("nothing", "http://[::1]", True),
    ],
)  # fmt: skip
def test_no_proxy_names_hosts_that_are_called_directly(listed: str, target: str, direct: bool) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        assert (find_proxy(target, ALL_PROXY="p:1", **{name: listed}) is None) is direct


def test_every_target_of_a_provider_has_its_own_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "inner.example")
    paths = {"files": "https://inner.example/files", "beside": "/other"}
    config = load_config(tmp_path, openai=ENTRY | {"paths": paths, "websocket": {"default_path": "live", "base_url": "https://inner.example"}})
    openai = config.registry.providers["openai"]
    assert openai.rest.proxy is not None and openai.websocket.proxy is None
    assert {rule.prefix: rule.target.proxy is not None for rule in openai.paths} == {"files": False, "beside": True}


def test_the_env_file_may_name_the_proxy_and_a_reload_reads_it_again(tmp_path: Path) -> None:
    sources = write_config(tmp_path, {"providers": {"openai": ENTRY}})
    with (tmp_path / ".env").open("a") as file:
        file.write("HTTPS_PROXY=http://one.example:1\n")
    assert str(load(sources).registry.providers["openai"].rest.proxy) == "http://one.example:1 (HTTPS_PROXY)"


def test_explain_shows_the_proxy_and_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://user:geheim@proxy.example:3128")
    config = load_config(tmp_path, openai=ENTRY | {"fallback": [{"provider": "openai", "model": "m"}]})
    for method, path in (("POST", "providers/openai/chat/completions"), ("WS", "ws/openai")):
        text = explain(config, method, f"{API}/{path}")
        assert "proxy        http://proxy.example:3128   (from HTTPS_PROXY)" in text
        assert "proxy http://proxy.example:3128 (HTTPS_PROXY))" in text and "geheim" not in text
    assert "geheim" not in repr(config)


def test_the_proxys_password_is_redacted_in_stored_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://user:p%40ss%3Aw%2Frd@proxy.example:3128")
    secrets = Secrets(load_config(tmp_path, openai=ENTRY).secrets)
    assert secrets.redactor.redact(f"{PASSWORD} p%40ss%3Aw%2Frd".encode()) == b"[redacted] [redacted]"


async def test_doctor_names_the_proxy_and_blames_it_if_it_fails(tmp_path: Path, proxy: ForwardProxy, behind_proxy: web.Application) -> None:
    sources = write_config(tmp_path, {"providers": {"openai": ENTRY}})
    lines: list[str] = []
    assert await examine(sources, (), lines.append)
    assert f"(direct, proxy http://{proxy.address} (HTTPS_PROXY))" in lines[0] and "101 in" in lines[1]
    proxy.answers(b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n")
    del lines[:]
    assert not await examine(sources, (), lines.append)
    text = "\n".join(lines)
    LogStream.everything.append(text)
    assert "[the proxy]" in text and f"check http://{proxy.address} (HTTPS_PROXY), and that it lets this machine reach {HOST}:443" in text
    assert PASSWORD not in text
