"""The log on a terminal: one line per call, session or event, coloured by its outcome."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import pytest
from aiohttp import web

from relay import log
from relay.core.errors import CATALOGUE
from relay.core.exchange import Attempt
from relay.core.record import Record
from relay.core.usage import Usage
from relay.log_pretty import COLOURS, PLAIN, PrettyLines, colours_for, ending_of
from tests.conftest import StartRelay, Vendors
from tests.relays import Relay, provider
from tests.upstream.raw import RawUpstream, ok
from tests.upstream.vendors import vendor

TIME = r"\d\d:\d\d:\d\d"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


async def _lines(relay: Relay, terminal: Terminal) -> list[str]:
    await relay.idle()
    return terminal.getvalue().splitlines()


def _record(**fields: Any) -> Record:
    known = {"id": "id", "transport": "rest", "surface": "native", "method": "POST", "provider": "openai", "endpoint": "chat/completions", "status": 200,
             "outcome": "relayed", "duration_ms": 812.4, "bytes_up": 1, "bytes_down": 2, "client": "127.0.0.1"}  # fmt: skip
    return Record(**(known | fields))


def _shown(**fields: Any) -> str:
    text = PrettyLines(PLAIN).render_record(_record(**fields)).decode()
    assert re.match(TIME, text) and "\n" not in text
    return text[10:]


async def test_a_call_is_one_line_with_model_tokens_and_cost(start: StartRelay, vendors: Vendors, terminal: Terminal) -> None:
    relay = await start({"providers": vendors.entries(), "database": None})
    log.setup("info", "auto", terminal)
    body = {"model": "gpt-5-mini", "messages": [{"role": "user", "content": "hi"}]}
    assert (await relay.call("POST", relay.path("openai", "chat/completions"), json=body))[0] == 200
    [line] = await _lines(relay, terminal)
    assert re.fullmatch(rf"{TIME}  \x1b\[32mok +\x1b\[0m  POST openai/chat/completions  200  gpt-5-mini\S*  \d+ ms  \d+\+\d+ tokens  ~?\$0\.\d+", line), line


async def test_a_fallback_shows_both_providers(start: StartRelay, raw: RawUpstream, terminal: Terminal, aiohttp_server: Any) -> None:
    async def down(request: web.Request) -> web.Response:
        return web.json_response({}, status=503)

    first = await aiohttp_server(vendor(("POST", "/{path:.*}", down)))
    raw.plays(ok(b"{}"))
    relay = await start(openai=provider(str(first.make_url("")), fallback=[{"provider": "other"}]), other=provider(raw.url))
    log.setup("info", "auto", terminal)
    await relay.call("POST", relay.path("openai", "chat/completions"), json={"model": "m", "messages": []})
    [line] = await _lines(relay, terminal)
    assert "  fallback openai → other" in line and COLOURS["ok"] in line


async def test_a_session_is_one_line_with_its_duration(start: StartRelay, vendors: Vendors, terminal: Terminal) -> None:
    relay = await start({"providers": vendors.entries()})
    log.setup("info", "auto", terminal)
    async with relay.client.ws_connect(relay.ws("openai")) as socket:
        await socket.receive()
        await socket.close()
    [line] = await _lines(relay, terminal)
    assert re.search(r"ok +\x1b\[0m  WS openai  101  .*\d ms  \d+ up, \d+ down  closed 1000 by client", line), line


@pytest.mark.parametrize(
    ("fields", "ending"),
    [
        ({}, "ok"),
        ({"status": 101, "transport": "websocket"}, "ok"),
        ({"outcome": "cached"}, "ok"),
        ({"status": 404}, "client error"),
        ({"status": 499, "outcome": "client_gone", "error": "client_gone"}, "client left"),
        ({"status": 429, "outcome": "refused", "error": "rate_limited"}, "refused"),
        ({"status": 503, "outcome": "failed", "error": "provider_not_configured"}, "refused"),
        ({"status": 503, "outcome": "refused", "error": "draining"}, "refused"),
        ({"status": 200, "outcome": "failed", "error": "draining"}, "cut"),
        ({"status": 101, "outcome": "failed", "error": "draining", "transport": "websocket"}, "cut"),
        ({"status": 500, "outcome": "failed", "error": "internal_error"}, "relay failed"),
        ({"status": 200, "outcome": "failed", "error": "internal_error"}, "relay failed"),
        ({"status": 502, "outcome": "failed", "error": "upstream_unreachable"}, "provider failed"),
        ({"status": 200, "outcome": "failed", "error": "upstream_error_in_answer"}, "provider failed"),
        ({"status": 500}, "provider failed"),
        ({"status": 401}, "provider failed"),
        ({"status": 429}, "provider failed"),
    ],
)
def test_a_call_is_coloured_by_how_it_ended(fields: dict[str, Any], ending: str) -> None:
    assert ending_of(_record(**fields)) == ending
    line = PrettyLines(COLOURS).render_record(_record(**fields)).decode()
    assert f"  {COLOURS[ending]}{ending} " in line or f"  {COLOURS[ending]}{ending}\x1b" in line


def test_every_error_is_shown_as_a_failure_of_the_side_that_caused_it() -> None:
    for error in CATALOGUE:
        ending = ending_of(_record(status=200, outcome="failed", error=error.code))
        assert (ending == "provider failed") == (error.side == "upstream"), error.code


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"outcome": "cached", "usage": Usage(input_tokens=1, output_tokens=2), "cost_nano_usd": 0}, "1+2 tokens  $0  cached"),
        ({"usage": Usage(input_tokens=1, estimated=True), "cost_nano_usd": 1_234_000}, "1+0 tokens  ~$0.001234"),
        ({"usage": Usage(characters=12), "cost_nano_usd": 12}, "12 characters  <$0.000001"),
        ({"usage": Usage(audio_ms=1500)}, "1.5 s of audio  no price"),
        ({"model": "a", "model_answered": "b"}, "a → b"),
        ({"model": "a", "model_answered": "a-2026-01-01"}, "  a-2026-01-01  "),
        ({"duration_ms": 61_900.0}, "1 min 1 s"),
        ({"duration_ms": 1_500.0}, "1.5 s"),
        ({"status": 502, "error": "upstream_unreachable", "cause": "OSError"}, "upstream_unreachable: OSError"),
        ({"via": "direct", "attempts": (Attempt("openai", "cloudflare", "K", 503, "", 0.1), Attempt("openai", "direct", "K", 200, "", 0.1))}, "fallback cloudflare → direct"),
        ({"answered_by": "anthropic"}, "fallback openai → anthropic"),
    ],
)
def test_a_line_shows_usage_cost_models_duration_error_and_fallback(fields: dict[str, Any], text: str) -> None:
    assert text in _shown(**fields)


def test_a_call_that_was_retried_at_the_same_target_shows_no_fallback() -> None:
    attempts = (Attempt("openai", "direct", "A", 503, "", 0.1), Attempt("openai", "direct", "B", 200, "", 0.1))
    assert "fallback" not in _shown(attempts=attempts, via="direct")


def test_control_characters_from_clients_are_escaped() -> None:
    assert "\x1b" not in _shown(endpoint="x\x1b[2J\ny\ud800") and "\\x1b[2J\\ny\\ud800" in _shown(endpoint="x\x1b[2J\ny\ud800")


def test_what_others_write_to_stderr_cannot_command_a_terminal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_current", log._current)
    monkeypatch.setattr(sys, "stderr", terminal)
    log.setup("info", "auto")
    print("Traceback:\n  \x1b[35mKeyError\x1b[0m: '\x1b]0;title\x07'", file=sys.stderr)
    assert terminal.getvalue() == "Traceback:\n  KeyError: '\\x1b]0;title\\x07'\n"


def test_an_event_is_one_line_and_its_traceback_follows(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_current", log._current)
    log.setup("info", "auto", terminal)
    log.warn("reload.refused", problems=["a:1:1: x", "b:2:2: y"])
    log.bug("test.bug", ValueError("two\nlines"))
    first, second, *rest = terminal.getvalue().splitlines()
    assert re.fullmatch(rf"{TIME}  \x1b\[33mwarning +\x1b\[0m  reload\.refused  problems=a:1:1: x; b:2:2: y", first)
    assert re.fullmatch(rf"{TIME}  \x1b\[31merror +\x1b\[0m  test\.bug", second)
    assert rest == ["    ValueError: two", "    lines"]


def test_only_terminals_get_colours_and_no_color_or_dumb_switch_them_off() -> None:
    assert colours_for(Terminal(), {}) is COLOURS and colours_for(Terminal(), {"NO_COLOR": ""}) is COLOURS
    for stream, environment in ((Terminal(), {"NO_COLOR": "1"}), (Terminal(), {"TERM": "dumb"}), (io.StringIO(), {})):
        assert colours_for(stream, environment) is PLAIN
