"""The status page at `/`, only for a browser on the machine of the relay; and connection probes,
which get 200.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import StartRelay
from tests.ledger.test_ledger import rows
from tests.relays import Relay, _packaged_providers, provider
from tests.upstream.raw import RawUpstream


@pytest.fixture
async def relay(start: StartRelay) -> Relay:
    """A relay that calls nothing."""
    return await start(openai=_packaged_providers()["openai"])


async def test_the_page_is_one_file_that_runs_nothing_else(relay: Relay) -> None:
    status, headers, body = await relay.call("GET", f"{relay.url}/")
    assert (status, headers["content-type"], headers["x-content-type-options"]) == (200, "text/html; charset=utf-8", "nosniff")
    policy = dict(rule.strip().split(" ", 1) for rule in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'" and policy["script-src"].startswith("'sha256-") and "unsafe" not in str(policy)
    text = body.decode()
    assert "://" not in text and "innerHTML" not in text and 'src="' not in text


ELSEWHERE = {
    "another host": {"Host": "relay.example"}, "a proxy": {"X-Forwarded-For": "192.0.2.1"}, "a proxy with Forwarded": {"Forwarded": "for=192.0.2.1"},
    "a foreign page": {"Origin": "https://evil.example"}, "a link of a foreign page": {"Sec-Fetch-Site": "cross-site"},
}  # fmt: skip


@pytest.mark.parametrize("headers", ELSEWHERE.values(), ids=ELSEWHERE)
async def test_elsewhere_there_is_no_page(relay: Relay, headers: dict[str, str]) -> None:
    status, answered, body = await relay.call("GET", f"{relay.url}/", headers=headers)
    assert (status, answered["x-relay-error"]) == (404, "unknown_route") and b"<" not in body


@pytest.mark.parametrize("headers", [{}, {"Sec-Fetch-Site": "none"}, {"Sec-Fetch-Site": "same-origin"}])
async def test_a_person_on_this_machine_gets_it(relay: Relay, headers: dict[str, str]) -> None:
    assert (await relay.call("GET", f"{relay.url}/?x=1", headers=headers))[0] == 200


PROBES = ["/", "/api/v1/ai-gateway/providers/anthropic", "/api/v1/ai-gateway/providers/anthropic/", "/api/v1/ai-gateway/providers/anthropic/api/hello", "/api/v1/ai-gateway/providers/openai"]


async def test_a_probe_of_claude_code_is_answered_and_leaves_no_trace(start: StartRelay, raw: RawUpstream, tmp_path: Path) -> None:
    providers = {"anthropic": provider(raw.url, format="anthropic"), "openai": provider(raw.url)}
    relay = await start({"database": str(tmp_path / "relay.db"), "providers": providers})
    for path in PROBES:
        status, headers, body = await relay.call("HEAD", relay.url + path)
        assert (status, body) == (200, b"") and "x-relay-error" not in headers, path
    assert raw.connections == 0 and not relay.logged.lines
    assert await rows(relay) == []
    _, _, metrics = await relay.call("GET", f"{relay.url}/metrics")
    assert b"relay_requests_total{" not in metrics


async def test_a_probe_is_refused_where_a_call_is(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(anthropic=provider(raw.url, format="anthropic"))
    assert (await relay.call("HEAD", relay.path("antropic")))[0] == 404
    assert (await relay.call("HEAD", relay.path("anthropic"), headers={"Host": "evil.example"}))[0] == 403


async def test_any_other_head_goes_to_the_provider(start: StartRelay, raw: RawUpstream) -> None:
    relay = await start(anthropic=provider(raw.url, format="anthropic"), openai=provider(raw.url))
    for name, endpoint in (("anthropic", "v1/models"), ("openai", "api/hello"), ("openai", "?file=1")):
        raw.plays(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n")
        assert (await relay.call("HEAD", relay.path(name, endpoint)))[0] == 200
    assert [arrived.target for arrived in raw.arrived] == ["/v1/models", "/api/hello", "/?file=1"]
