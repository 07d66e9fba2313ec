"""What the relay adds to the URL and headers of a WebSocket that its client did not send."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from yarl import URL

from relay.registry.load import ConfigError, Sources, load
from tests.conftest import StartRelay, Through
from tests.relays import Relay, packaged_provider, provider
from tests.upstream.vendors import SEEN, Seen, echo, vendor

CARTESIA_DEFAULT, CARTESIA_OTHER = "2026-03-01", "2026-08-14"


async def _handshake(relay: Relay, endpoint: str, seen: list[Seen], name: str = "openai", **options: Any) -> Seen:
    """Open a socket and return its handshake as it arrived at the provider."""
    async with relay.client.ws_connect(URL(relay.ws(name, endpoint), encoded=True), **options):
        pass
    return seen[-1]


def _query(seen: Seen) -> dict[str, list[str]]:
    return parse_qs(urlsplit(seen.target).query, keep_blank_values=True)


@pytest.fixture
async def openai(start: StartRelay, aiohttp_server: Any) -> tuple[Relay, list[Seen]]:
    """The shipped entry of OpenAI, in front of an echo at every path."""
    server = await aiohttp_server(vendor(("GET", "/{any:.*}", echo)))
    relay = await start(openai=packaged_provider("openai", str(server.make_url("")).rstrip("/")))
    return relay, server.app[SEEN]


@pytest.mark.parametrize("endpoint", ["", "realtime", "v1/realtime", "realtime?x=1"])
async def test_the_default_path_gets_the_default_model(openai: tuple[Relay, list[Seen]], endpoint: str) -> None:
    relay, seen = openai
    assert _query(await _handshake(relay, endpoint, seen))["model"] == ["gpt-realtime-2.1"]
    assert (await relay.events())[0]["model"] == "gpt-realtime-2.1"


OTHERS = ["v1/responses", "responses", "v1/live/sessions", "v1/live/sessions/live_1/attach", "v1/realtime/translations", "realtime/x"]


@pytest.mark.parametrize("endpoint", OTHERS)
async def test_no_other_path_gets_a_query_and_its_model_is_unknown(openai: tuple[Relay, list[Seen]], endpoint: str) -> None:
    relay, seen = openai
    assert "?" not in (await _handshake(relay, endpoint, seen)).target
    [row] = await relay.events()
    assert "model" not in row and "cost_nano_usd" not in row


async def test_no_other_path_gets_a_query_through_cloudflare(through: Through) -> None:
    seen = await _handshake(through.relay, "v1/responses", through.vendors.seen("openai"))
    assert seen.target.endswith("/responses")
    seen = await _handshake(through.relay, "", through.vendors.seen("openai"))
    assert _query(seen) == {"model": ["gpt-realtime-2.1"]}


@pytest.mark.parametrize("query", ["model=", "MODEL=a", "%6dodel=a", "intent=transcription", "call_id=c", "agent_id=a"])
async def test_a_query_of_the_client_is_unchanged(openai: tuple[Relay, list[Seen]], query: str) -> None:
    relay, seen = openai
    assert (await _handshake(relay, f"realtime?{query}", seen)).target == f"/v1/realtime?{query}"


async def test_a_fallback_gets_the_query_of_its_own_path(start: StartRelay, aiohttp_server: Any) -> None:
    server = await aiohttp_server(vendor(("GET", "/{any:.*}", echo)))
    base = str(server.make_url("")).rstrip("/")
    entries = {
        "first": provider("http://127.0.0.1:9", websocket={"default_path": "a", "default_query": {"x": "first"}}, fallback=[{"provider": "second"}]),
        "second": provider(base, websocket={"default_path": "b", "default_query": {"x": "second"}}),
    }
    relay = await start({"providers": entries})
    assert (await _handshake(relay, "", server.app[SEEN], "first")).target == "/b?x=second"


@pytest.mark.parametrize(
    ("base_path", "default_path", "endpoint", "target"),
    [
        ("/v1", "v1/listen", "v1/listen", "/v1/listen?x=1"),
        ("/v1", "v1/listen", "listen", "/v1/listen?x=1"),
        ("/v1", "listen", "v1/listen", "/v1/listen?x=1"),
        ("", "v1/listen", "listen", "/listen"),
        ("", "listen", "listen/", "/listen/"),
    ],
)
async def test_the_default_path_is_recognised_however_its_version_is_written(
    start: StartRelay, aiohttp_server: Any, base_path: str, default_path: str, endpoint: str, target: str
) -> None:
    server = await aiohttp_server(vendor(("GET", "/{any:.*}", echo)))
    rules = {"default_path": default_path, "default_query": {"x": "1"}}
    relay = await start(openai=provider(str(server.make_url("")).rstrip("/") + base_path, websocket=rules))
    assert (await _handshake(relay, endpoint, server.app[SEEN])).target == target


@pytest.fixture
async def cartesia(start: StartRelay, aiohttp_server: Any) -> tuple[Relay, list[Seen]]:
    """The shipped entry of Cartesia, in front of an echo at every path."""
    server = await aiohttp_server(vendor(("GET", "/{any:.*}", echo)))
    relay = await start(cartesia=packaged_provider("cartesia", str(server.make_url("")).rstrip("/")))
    return relay, server.app[SEEN]


VERSIONS: dict[str, tuple[str, dict[str, str], str | None, str | None]] = {
    "the default path": ("", {}, CARTESIA_DEFAULT, None),
    "the default path, named": ("tts/websocket", {}, CARTESIA_DEFAULT, None),
    "another path": ("stt/websocket?model=ink-2", {}, CARTESIA_DEFAULT, None),
    "a header": ("tts/websocket", {"Cartesia-Version": CARTESIA_OTHER}, CARTESIA_OTHER, None),
    "a header, another path": ("stt/websocket", {"Cartesia-Version": CARTESIA_OTHER}, CARTESIA_OTHER, None),
    "a query": (f"tts/websocket?cartesia_version={CARTESIA_OTHER}", {}, None, CARTESIA_OTHER),
    "a query, another path": (f"stt/websocket?cartesia_version={CARTESIA_OTHER}", {}, None, CARTESIA_OTHER),
    "a query beside a model": (f"tts/websocket?model=m&cartesia_version={CARTESIA_OTHER}", {}, None, CARTESIA_OTHER),
    "a model": ("tts/websocket?model=m", {}, CARTESIA_DEFAULT, None),
}  # fmt: skip


@pytest.mark.parametrize("case", VERSIONS)
async def test_cartesias_version_is_forwarded_once_as_the_client_set_it(cartesia: tuple[Relay, list[Seen]], case: str) -> None:
    (relay, seen), (endpoint, headers, in_header, in_query) = cartesia, VERSIONS[case]
    arrived = await _handshake(relay, endpoint, seen, "cartesia", headers=headers)
    assert [value for name, value in arrived.headers if name.lower() == "cartesia-version"] == ([in_header] if in_header else [])
    assert _query(arrived).get("cartesia_version") == ([in_query] if in_query else None)


async def test_two_cartesia_versions_of_a_client_are_both_forwarded(cartesia: tuple[Relay, list[Seen]]) -> None:
    relay, seen = cartesia
    arrived = await _handshake(relay, "tts/websocket?cartesia_version=a", seen, "cartesia", headers={"Cartesia-Version": "b"})
    assert (arrived.header("cartesia-version"), _query(arrived)["cartesia_version"]) == ("b", ["a"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "providers:\n  p:\n    base_url: https://x\n    headers: {x-version: '1'}\n    websocket:\n      default_path: s\n      header_queries: {x-verson: version}\n",
            "gateway.yaml:7:24: providers.p.websocket.header_queries.x-verson: has no effect, because it has no default: no 'x-verson' in `headers`, no 'version' in websocket.default_query",
        ),
        (
            "providers:\n  p:\n    base_url: https://x\n    websocket: {default_path: s, header_queries: [a]}\n",
            "gateway.yaml:4:34: providers.p.websocket.header_queries: should be a mapping, but is a list: write `key: value`, without the -",
        ),
    ],
)
def test_a_header_query_without_a_default_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "gateway.yaml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        load(Sources(tmp_path / "gateway.yaml", None))
    assert [str(each) for each in refused.value.problems] == [problem]
