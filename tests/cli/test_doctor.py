"""`relay doctor`: which step failed, the advice, and what was not tried."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp import web

from relay.cli import doctor
from relay.cli.doctor import examine
from relay.cli.main import main
from relay.registry.load import Sources
from tests.conftest import Vendors
from tests.redis import RedisServer
from tests.relays import CLOUDFLARE_TOKEN, KEYS, LogStream, provider, write_config
from tests.upstream.cloudflare import cloudflare
from tests.upstream.vendors import APPS, vendor


async def _examine(folder: Path, providers: dict[str, Any], *names: str, **more: Any) -> tuple[bool, str]:
    write_config(folder, {"providers": providers} | more)
    lines: list[str] = []
    healthy = await examine(Sources(folder / "gateway.yaml", folder / ".env"), names, lines.append)
    text = "\n".join(lines)
    LogStream.everything.append(text)
    return healthy, text


def _provider_with_response(status: int, body: dict[str, Any]) -> Any:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=status)

    return vendor(("GET", "/{path:.*}", answer))


async def test_healthy_providers_are_reported_as_ok(tmp_path: Path, vendors: Vendors) -> None:
    entries = vendors.entries()
    healthy, text = await _examine(tmp_path, {name: entries[name] for name in ("openai", "elevenlabs", "cartesia")})
    assert healthy, text
    assert "openai      ok         GET models: 200 in" in text
    assert "openai      ok         WebSocket handshake: 101 in" in text
    assert text.endswith("3 provider(s) tried, 0 problem(s). Providers are called directly.")


@pytest.mark.parametrize(
    ("status", "body", "leg", "advice"),
    [
        (401, {"error": {"message": "bad key"}}, "the provider's credential", "check OPENAI_API_KEY"),
        (403, {"error": {"message": "no access"}}, "the provider's credential", "check OPENAI_API_KEY"),
        (429, {"error": {"message": "slow down"}}, "rate limit", "quota"),
        (503, {"error": {"message": "overloaded"}}, "the provider", "status page"),
        (400, {"error": {"message": "The model x does not exist"}}, "model", "default_query"),
        (405, {"error": {"message": "no"}}, "the request", "check base_url"),
    ],
)
async def test_the_error_of_the_provider_is_shown_with_advice(tmp_path: Path, aiohttp_server: Any, status: int, body: dict[str, Any], leg: str, advice: str) -> None:
    server = await aiohttp_server(_provider_with_response(status, body))
    entry = provider(str(server.make_url("")), check="models", websocket={"default_path": "realtime"})
    healthy, text = await _examine(tmp_path, {"openai": entry})
    assert not healthy
    assert f"GET models: {body['error']['message']}  [{leg}]" in text
    assert f"WebSocket handshake: {body['error']['message']}  [{leg}]" in text
    assert advice in text


async def test_a_probe_that_fails_unexpectedly_prints_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any) -> None:
        raise ValueError(f"cannot send ?key={KEYS['OPENAI_API_KEY']}")

    monkeypatch.setattr(doctor, "_probe_rest", fail)
    healthy, text = await _examine(tmp_path, {"openai": provider("http://127.0.0.1:1", check="models")})
    assert not healthy and "ValueError: cannot send ?key=" in text and KEYS["OPENAI_API_KEY"] not in text


async def test_a_name_that_does_not_resolve_is_reported_as_dns(tmp_path: Path) -> None:
    healthy, text = await _examine(tmp_path, {"openai": provider("https://nowhere.invalid/v1", check="models")})
    assert not healthy and "[DNS]" in text and "name server" in text


async def test_a_closed_port_is_reported_as_network(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    healthy, text = await _examine(tmp_path, {"openai": provider(f"http://127.0.0.1:{port}", check="models")})
    assert not healthy and "[network]" in text and f"127.0.0.1:{port}" in text


async def test_an_untrusted_certificate_is_reported_as_tls(tmp_path: Path, aiohttp_server: Any) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    server = await aiohttp_server(_provider_with_response(200, {}), ssl=context)
    healthy, text = await _examine(tmp_path, {"openai": provider(str(server.make_url("")), check="models")})
    assert not healthy and "[TLS]" in text


async def test_a_refused_credential_of_cloudflare_is_not_reported_as_the_providers(tmp_path: Path, vendors: Vendors, aiohttp_server: Any) -> None:
    front = await aiohttp_server(cloudflare({name: vendors.url(name) for name in APPS}, CLOUDFLARE_TOKEN))
    account = {"account_id": "acct", "gateway_id": "gw", "api_key": "wrong", "base_url": str(front.make_url("/v1"))}
    healthy, text = await _examine(tmp_path, {"openai": vendors.entries()["openai"]}, cloudflare=account)
    assert not healthy and "[Cloudflare's credential]" in text and "AI Gateway: Run" in text
    assert text.endswith("Providers with a slug are called through Cloudflare's gateway 'gw'.")


async def test_a_session_that_needs_more_than_a_probe_sends_is_not_tried(tmp_path: Path, aiohttp_server: Any) -> None:
    server = await aiohttp_server(_provider_with_response(422, {"detail": {"message": "agent_id is missing"}}))
    entry = provider(str(server.make_url("")), websocket={"default_path": "x"})
    healthy, text = await _examine(tmp_path, {"elevenlabs": entry})
    assert healthy and " ok " not in text
    assert "elevenlabs  not tried  WebSocket session: the provider answered 422: it needs more than this probe sends" in text
    assert text.endswith("0 provider(s) tried, 0 problem(s). Providers are called directly.")


async def test_parts_that_no_probe_reaches_are_listed_as_not_tried(tmp_path: Path, vendors: Vendors) -> None:
    entry = vendors.entries()["openai"] | {"check": None}
    keys = {"header": "Authorization", "value": ["Bearer ${OPENAI_API_KEY}", "Bearer ${GROQ_API_KEY}"]}
    plain = provider("http://127.0.0.1:9", "NOT_NEEDED") | {"auth": keys}
    healthy, text = await _examine(tmp_path, {"openai": entry, "plain": plain})
    assert healthy
    assert "openai  not tried  REST: gateway.yaml names no `check`; WebSockets at realtime/*, responses, live/*" in text
    assert "plain   not tried  REST: gateway.yaml names no `check`; 1 more of its keys" in text and "plain   ok" not in text
    assert "1 provider(s) tried, 0 problem(s)." in text


async def test_a_failed_route_is_not_ok_when_its_fallback_responds(tmp_path: Path, vendors: Vendors, aiohttp_server: Any) -> None:
    front = await aiohttp_server(_provider_with_response(503, {}))
    account = {"account_id": "acct", "gateway_id": "gw", "base_url": str(front.make_url("/v1"))}
    entry = vendors.entries()["openai"] | {"via": ["cloudflare", "direct"], "websocket": None}
    healthy, text = await _examine(tmp_path, {"openai": entry}, cloudflare=account)
    assert not healthy and "GET models: cloudflare failed, and another way answered  [cloudflare]" in text
    assert "not tried  the way direct, which is used when cloudflare fails" in text


async def test_only_named_providers_are_probed_and_missing_keys_are_listed(tmp_path: Path, vendors: Vendors) -> None:
    entries = {"openai": vendors.entries()["openai"], "other": provider("http://127.0.0.1:9", "NOT_SET_KEY", check="x")}
    healthy, text = await _examine(tmp_path, entries, "other")
    assert healthy and "other  not tried  not configured: set NOT_SET_KEY" in text and "No provider is configured" in text and "openai" not in text
    healthy, text = await _examine(tmp_path, entries, "opanai")
    assert not healthy and "gateway.yaml has no such provider" in text


async def test_the_demo_is_not_tried_and_is_no_unknown_provider(tmp_path: Path) -> None:
    healthy, text = await _examine(tmp_path, {}, "demo", demo={"enabled": True})
    assert healthy and "demo: not tried: it is built into the relay" in text


def test_the_command_exits_with_1_after_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(tmp_path, {"providers": {"openai": provider("http://127.0.0.1:9", check="models")}})
    code = main(["doctor", "--config", str(tmp_path / "gateway.yaml"), "--env-file", str(tmp_path / ".env")])
    assert code == 1 and "[network]" in capsys.readouterr().out


async def test_redis_is_probed(tmp_path: Path, vendors: Vendors, redis_server: RedisServer) -> None:
    openai = {"openai": vendors.entries()["openai"]}
    healthy, text = await _examine(tmp_path, openai, redis={"url": redis_server.url})
    assert healthy and "redis   ok         PING: answered in" in text
    await redis_server.stop()
    healthy, text = await _examine(tmp_path, openai, redis={"url": redis_server.url})
    assert not healthy and "[Redis]" in text and "check redis.url" in text


async def test_a_probe_does_not_use_cached_responses(tmp_path: Path, aiohttp_server: Any, redis_server: RedisServer) -> None:
    answers = [200, 401]

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response({}, status=answers.pop(0))

    server = await aiohttp_server(vendor(("GET", "/{path:.*}", answer)))
    entry = {"openai": provider(str(server.make_url("")), check="models")}
    shared = {"redis": {"url": redis_server.url}, "cache": {"ttl_s": 60, "store": "redis"}}
    assert (await _examine(tmp_path, entry, **shared))[0]
    assert not (await _examine(tmp_path, entry, **shared))[0]
