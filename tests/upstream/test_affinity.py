"""Key affinity: the calls of a session use one key of a pool, so that prompt caches, stored
responses and encrypted reasoning stay with the key that made them.
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from relay.core.retry_policy import AttemptResult
from tests.conftest import StartRelay
from tests.relays import HANG_GUARD_S, Relay, canary, provider
from tests.upstream.raw import LAST_CHUNK, SSE_HEAD, RawUpstream, chunk, ok
from tests.upstream.vendors import echo, vendor

NAMES = ("openai", "fal", "groq")
A, B, C = (f"Bearer {canary(name)}" for name in NAMES)
LABELS = {A: "OPENAI_API_KEY", B: "FAL_KEY", C: "GROQ_API_KEY"}
VALUES = [f"Bearer ${{{name}}}" for name in LABELS.values()]
POOL = {"header": "Authorization", "value": VALUES}
CLAUDE, CODEX = "x-claude-code-session-id", "session-id"
CLIENTS = {name: {"key": canary(f"affinity-{name}")} for name in ("ann", "bob")}
MODEL = {"model": "gpt-5-mini"}


def error(status: int, code: str | None, message: str) -> web.Response:
    document = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return web.json_response(document, status=status)


def unknown_response(name: str) -> web.Response:
    return error(400, "previous_response_not_found", f"Previous response with id '{name}' not found.")


@dataclass
class Accounts:
    """A provider whose keys are of different organisations: it knows a response, and encrypted
    content, only with the key that made it.
    """

    made: dict[str, str] = field(default_factory=dict)
    """The key of each response."""
    limited: dict[str, dict[str, str]] = field(default_factory=dict)
    """The headers of the 429 that each of these keys gets."""
    broken: set[str] = field(default_factory=set)
    """The keys that get a 503."""
    used: list[str] = field(default_factory=list)
    executed: list[str] = field(default_factory=list)
    """The keys of the calls that were executed."""
    numbers: Any = field(default_factory=lambda: itertools.count(1))

    def application(self) -> web.Application:
        app = vendor(("POST", "/responses", self.create), ("POST", "/chat/completions", self.chat), ("GET", "/socket", self.socket), ("GET", "/responses", self.socket))
        app.router.add_route("*", "/responses/{id}", self.read)
        return app

    def begin(self, request: web.Request) -> tuple[str, web.Response | None]:
        key = request.headers["Authorization"]
        self.used.append(key)
        if key in self.limited:
            return key, web.json_response({"error": {"message": "slow"}}, status=429, headers=self.limited[key])
        return key, web.Response(status=503) if key in self.broken else None

    async def create(self, request: web.Request) -> web.StreamResponse:
        key, refusal = self.begin(request)
        if refusal is not None:
            return refusal
        sent = json.loads(await request.read())
        previous = sent.get("previous_response_id")
        if previous is not None and self.made.get(previous) != key:
            return unknown_response(previous)
        if any(item["encrypted_content"] != key for item in sent.get("input", [])):
            return error(400, "invalid_encrypted_content", "The encrypted content gAAA...DQ== could not be verified.")
        name = f"resp_{next(self.numbers)}"
        self.made[name] = key
        self.executed.append(key)
        made = {"id": name, "object": "response", "model": sent["model"], "status": "completed", "output": []}
        if not sent.get("stream"):
            answer = web.json_response(made)
            if "gzip" in request.headers.get("Accept-Encoding", ""):
                answer.body = gzip.compress(json.dumps(made).encode())
                answer.headers["Content-Encoding"] = "gzip"
            return answer
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        for kind in ("response.created", "response.completed"):
            await stream.write(f"event: {kind}\ndata: {json.dumps({'type': kind, 'response': made})}\n\n".encode())
        return stream

    async def read(self, request: web.Request) -> web.StreamResponse:
        key, refusal = self.begin(request)
        name = request.match_info["id"]
        if self.made.get(name) != key:
            return refusal or error(404, None, f"Response with id '{name}' not found.")
        return web.json_response({"id": name, "object": "response", "status": "completed"})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        _, refusal = self.begin(request)
        return refusal or web.json_response({"id": "chatcmpl-1", "choices": []})

    async def socket(self, request: web.Request) -> web.StreamResponse:
        _, refusal = self.begin(request)
        return refusal or await echo(request)


@dataclass
class Setting:
    """A relay in front of the accounts, and the clock of its cooldowns."""

    relay: Relay
    accounts: Accounts
    now_s: float = 1000.0

    async def call(self, endpoint: str = "chat/completions", headers: dict[str, str] | None = None, method: str = "POST", **body: Any) -> tuple[int, Any]:
        sent = json.dumps(MODEL | body).encode() if method == "POST" else None
        headers = {"Accept-Encoding": "identity"} | (headers or {})
        status, _, answer = await self.relay.call(method, self.relay.path("openai", endpoint), data=sent, headers=headers)
        return status, json.loads(answer) if answer.startswith(b"{") else answer

    async def keys(self, count: int, headers: dict[str, str] | None = None, **body: Any) -> set[str]:
        """The keys of `count` calls."""
        before = len(self.accounts.used)
        assert {(await self.call(headers=headers, **body))[0] for _ in range(count)} == {200}
        return set(self.accounts.used[before:])

    async def key(self, headers: dict[str, str] | None = None, **body: Any) -> str:
        """The one key of several calls."""
        [key] = await self.keys(4, headers, **body)
        return key

    async def attempts(self) -> list[tuple[str, int, str, str]]:
        """The attempts of the last call."""
        await self.relay.idle()
        event = (await self.relay.events())[-1]
        return [(each["key"], each["status"], each["error"], each.get("affinity", "")) for each in event.get("attempts", [])]


Start = Callable[..., Any]


@pytest.fixture
async def begin(start: StartRelay, aiohttp_server: Any) -> Start:
    """Start a relay with three keys; `auth` and `document` are added to its configuration."""

    async def begin(document: dict[str, Any] | None = None, auth: dict[str, Any] | None = None, **entry: Any) -> Setting:
        accounts = Accounts()
        server = await aiohttp_server(accounts.application())
        url = str(server.make_url("")).rstrip("/")
        relay = await start(document, openai={"base_url": url, "auth": POOL | (auth or {}), "websocket": {"default_path": "socket"}} | entry)
        setting = Setting(relay, accounts)
        relay.gateway.attempts.health._clock = lambda: setting.now_s
        return setting

    return begin


@pytest.fixture
async def setting(begin: Start) -> Setting:
    started: Setting = await begin()
    return started


# The key of a session -----------------------------------------------------------------------------


@pytest.mark.parametrize("header", [CLAUDE, CODEX])
async def test_the_calls_of_an_agents_session_use_one_key(setting: Setting, header: str) -> None:
    assert len(await setting.keys(9, {header: "s1"})) == 1


async def test_different_sessions_use_different_keys(setting: Setting) -> None:
    assert {await setting.key({CODEX: f"s{number}"}) for number in range(12)} == {A, B, C}


async def test_calls_with_the_same_prompt_cache_key_use_one_key(setting: Setting) -> None:
    assert len(await setting.keys(9, prompt_cache_key="chat-1")) == 1


async def test_calls_without_a_session_are_in_rotation_as_ever(setting: Setting) -> None:
    for _ in range(6):
        await setting.call()
    assert setting.accounts.used == [A, B, C, A, B, C]


async def test_two_clients_with_the_same_session_id_do_not_share_its_key(begin: Start) -> None:
    setting = await begin({"clients": CLIENTS})
    sessions = [{CODEX: f"s{number}"} for number in range(6)]
    of_ann, of_bob = [[await setting.key(each | {"x-relay-key": client["key"]}) for each in sessions] for client in CLIENTS.values()]
    assert of_ann != of_bob


async def test_a_session_has_the_same_key_in_another_relay_whose_pool_has_another_order(begin: Start) -> None:
    first, second = await begin(), await begin(auth={"value": VALUES[::-1]})
    for number in range(6):
        session = {CODEX: f"s{number}"}
        assert await first.key(session) == await second.key(session)


async def test_weights_divide_the_sessions(begin: Start) -> None:
    setting = await begin(auth={"pool": "weight", "weights": [1e-9, 1, 1e-9]})
    assert {await setting.key({CODEX: f"s{number}"}) for number in range(5)} == {B}


async def test_affinity_can_be_turned_off(begin: Start) -> None:
    setting = await begin(auth={"affinity": False})
    assert await setting.keys(3, {CODEX: "s1"}) == {A, B, C}


async def test_the_sockets_of_a_session_use_the_key_of_its_calls(setting: Setting) -> None:
    for number in range(6):
        session = {CODEX: f"s{number}"}
        key = await setting.key(session)
        async with setting.relay.client.ws_connect(setting.relay.ws("openai"), headers=session) as ws:
            await ws.send_str("hello")
            assert (await ws.receive(HANG_GUARD_S)).data == "hello"
        assert setting.accounts.used[-1] == key


async def test_a_response_of_a_socket_is_read_with_the_key_that_made_it(setting: Setting) -> None:
    for number in range(6):
        name = f"resp_of_socket_{number}"
        async with setting.relay.client.ws_connect(setting.relay.ws("openai", "responses")) as socket:
            setting.accounts.made[name] = setting.accounts.used[-1]
            await socket.send_json({"type": "response.created", "response": {"id": name, "model": "gpt-5-mini"}})
            await socket.receive(HANG_GUARD_S)  # the stand-in sends it back
        assert (await setting.call(f"responses/{name}", method="GET"))[0] == 200
        assert await setting.attempts() == [], "the first key was the right one"
    assert len(set(setting.accounts.made.values())) == 3


async def test_sockets_without_a_session_are_in_rotation(setting: Setting) -> None:
    for _ in range(3):
        async with setting.relay.client.ws_connect(setting.relay.ws("openai")):
            pass
    assert setting.accounts.used == [A, B, C]


# Health -------------------------------------------------------------------------------------------


async def test_while_its_key_is_limited_a_session_uses_one_other_key_and_then_returns(setting: Setting) -> None:
    session = {CODEX: "s1"}
    own = await setting.key(session)
    setting.accounts.limited[own] = {"Retry-After": "30"}
    assert len(await setting.keys(1, session) - {own}) == 1
    other = await setting.key(session)
    assert other != own
    setting.accounts.limited.clear()
    setting.now_s += 31
    assert await setting.key(session) == own


async def test_other_sessions_stay_when_a_key_is_limited(setting: Setting) -> None:
    sessions = [{CODEX: f"s{number}"} for number in range(8)]
    before = [await setting.key(each) for each in sessions]
    setting.accounts.limited[A] = {"Retry-After": "30"}
    await setting.keys(3)
    after = [await setting.key(each) for each in sessions]
    assert [new for old, new in zip(before, after, strict=True) if old != A] == [old for old in before if old != A]


async def test_a_call_with_another_key_than_its_sessions_is_logged(setting: Setting) -> None:
    session = {CODEX: "s1"}
    own = await setting.key(session)
    setting.accounts.limited[own] = {"Retry-After": "30"}
    await setting.call(headers=session)
    other = setting.accounts.used[-1]
    broken = (LABELS[other], 200, "", "broken")
    assert await setting.attempts() == [(LABELS[own], 429, "", ""), broken]
    await setting.call(headers=session)
    assert await setting.attempts() == [broken]


async def test_a_call_with_its_sessions_key_has_no_attempts_in_its_line(setting: Setting) -> None:
    await setting.call(headers={CODEX: "s1"})
    assert await setting.attempts() == []


async def test_a_fallback_breaks_the_affinity_of_a_session(begin: Start, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}"))
    setting = await begin(document={"providers": {"other": provider(raw.url, "ANTHROPIC_API_KEY")}}, fallback=[{"provider": "other"}])
    setting.accounts.limited = {key: {"Retry-After": "30"} for key in (A, B, C)}
    assert (await setting.call(headers={CODEX: "s1"}))[0] == 200
    assert [(key, affinity) for key, _, _, affinity in await setting.attempts()][-1] == ("ANTHROPIC_API_KEY", "broken")


# The key that made a response ---------------------------------------------------------------------

FORMS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {"whole": ({}, {}), "streamed": ({"stream": True}, {}), "compressed": ({}, {"Accept-Encoding": "gzip"})}


@pytest.mark.parametrize("form", FORMS)
async def test_a_response_is_continued_with_the_key_that_made_it(setting: Setting, form: str) -> None:
    body, headers = FORMS[form]
    for number in range(1, 10):
        assert (await setting.call("responses", headers, **body))[0] == 200
        assert (await setting.call("responses", previous_response_id=f"resp_{2 * number - 1}"))[0] == 200
    assert len(setting.accounts.used) == 18, "no other key was tried"


async def test_a_response_whose_head_is_sent_before_its_first_event_is_continued_with_its_key(start: StartRelay, raw: RawUpstream) -> None:
    """While no other key is usable, a stream is not held back for its first event."""
    gate = asyncio.Event()
    events = [b'data: {"type":"%s","response":{"id":"resp_1","model":"m"}}\n\n' % kind for kind in (b"response.created", b"response.completed")]
    raw.plays(ok(b"{}", "Retry-After: 600", status="429 Slow"))
    raw.plays(SSE_HEAD, gate, *map(chunk, events), LAST_CHUNK)
    raw.plays(ok(b"{}"))
    relay = await start(openai={"base_url": raw.url, "auth": POOL | {"value": VALUES[:2]}})
    async with relay.client.post(relay.path("openai", "responses"), data=b'{"model":"m","stream":true}') as answer:
        gate.set()
        assert await answer.read() == b"".join(events)
    await relay.idle()
    relay.gateway.attempts.health._keys.clear()
    for _ in range(3):
        await relay.call("POST", relay.path("openai", "responses"), data=b'{"model":"m","previous_response_id":"resp_1"}')
    assert [request.header("Authorization") for request in raw.arrived] == [[A], [B], [B], [B], [B]]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_a_stored_response_is_read_with_the_key_that_made_it(setting: Setting, method: str) -> None:
    for number in range(1, 7):
        await setting.call("responses")
        assert (await setting.call(f"responses/resp_{number}", method=method))[0] == 200
    assert len(setting.accounts.used) == 12


async def test_the_key_of_a_response_goes_before_that_of_the_session(setting: Setting) -> None:
    session = {CODEX: "s1"}
    own = await setting.key(session)
    setting.accounts.limited[own] = {"Retry-After": "30"}
    await setting.call("responses", session)
    setting.accounts.limited.clear()
    setting.now_s += 31
    setting.accounts.used.clear()
    assert (await setting.call("responses", session, previous_response_id="resp_1"))[0] == 200
    assert len(setting.accounts.used) == 1 and setting.accounts.used != [own]


async def test_the_key_of_a_response_goes_before_the_one_that_is_remembered_for_the_session(setting: Setting) -> None:
    session = {CODEX: "s1"}
    own = await setting.key(session)
    remembered, maker = (key for key in (A, B, C) if key != own)
    await setting.call("responses", session, input=[{"encrypted_content": remembered}])
    setting.accounts.made["resp_x"] = maker
    await setting.call("responses", session, previous_response_id="resp_x")
    setting.accounts.used.clear()
    assert (await setting.call("responses", session, previous_response_id="resp_x"))[0] == 200
    assert setting.accounts.used == [maker]


async def test_a_thousand_turns_over_three_keys_have_no_error_and_one_attempt_each(setting: Setting) -> None:
    """Seven conversations without a session, each turn with `previous_response_id`."""
    first = [await setting.call("responses") for _ in range(7)]
    chains = [made["id"] for _, made in first]
    for turn in range(1000):
        status, made = await setting.call("responses", previous_response_id=chains[turn % 7])
        assert status == 200, made
        chains[turn % 7] = made["id"]
    assert set(setting.accounts.used) == {A, B, C} and len(setting.accounts.used) == 1007


async def test_while_keys_are_limited_in_turn_no_turn_gets_the_error_of_a_wrong_key(begin: Start) -> None:
    """A turn gets its answer, or the 429 of the only key that can answer."""
    setting = await begin({"retry_budget": {"percent": 100, "per_s": 1000}})
    _, made = await setting.call("responses")
    statuses = []
    for turn in range(300):
        if turn % 10 == 0:
            setting.now_s += 31
            setting.accounts.limited = {(A, B, C)[turn // 10 % 3]: {"Retry-After": "30"}}
        status, answer = await setting.call("responses", {CODEX: "s1"}, previous_response_id=made["id"])
        statuses.append(status)
        made = answer if status == 200 else made
    assert (statuses.count(200), statuses.count(429)) == (200, 100)


# An unknown id ------------------------------------------------------------------------------------


@pytest.fixture
async def foreign(setting: Setting) -> Setting:
    """Another relay, or an earlier process, has made resp_a, resp_b and resp_c with these keys."""
    setting.accounts.made = {"resp_a": A, "resp_b": B, "resp_c": C}
    return setting


@pytest.mark.parametrize("name", ["resp_a", "resp_b", "resp_c"])
async def test_an_unknown_id_is_tried_with_each_key_once(foreign: Setting, name: str) -> None:
    assert (await foreign.call("responses", previous_response_id=name))[0] == 200
    assert len(foreign.accounts.used) == len(set(foreign.accounts.used)) and len(foreign.accounts.executed) == 1


async def test_the_key_that_knows_an_id_is_used_from_then_on(foreign: Setting) -> None:
    await foreign.call("responses", previous_response_id="resp_c")
    foreign.accounts.used.clear()
    for _ in range(5):
        assert (await foreign.call("responses", previous_response_id="resp_c"))[0] == 200
    assert foreign.accounts.used == [C] * 5


async def test_the_attempts_of_an_unknown_id_are_logged(foreign: Setting) -> None:
    await foreign.call("responses", previous_response_id="resp_b")
    assert await foreign.attempts() == [("OPENAI_API_KEY", 400, "previous_response_not_found", ""), ("FAL_KEY", 200, "", "")]


async def test_the_key_that_knows_encrypted_content_is_used_for_the_session_from_then_on(setting: Setting) -> None:
    session = {CODEX: "s1"}
    own = await setting.key(session)
    other = next(key for key in (A, B, C) if key != own)
    for _ in range(3):
        assert (await setting.call("responses", session, input=[{"encrypted_content": other}]))[0] == 200
    assert setting.accounts.used[-2:] == [other] * 2
    assert await setting.key(session) == other


async def test_an_unknown_id_does_not_move_the_session(foreign: Setting) -> None:
    sessions = [{CODEX: f"s{number}"} for number in range(4)]
    before = [await foreign.key(each) for each in sessions]
    for each in sessions:
        assert (await foreign.call("responses/resp_c", each, method="GET"))[0] == 200
    assert [await foreign.key(each) for each in sessions] == before


async def test_an_id_that_no_key_knows_is_the_providers_error(setting: Setting) -> None:
    status, answer = await setting.call("responses", previous_response_id="resp_0")
    assert (status, answer["error"]["code"]) == (400, "previous_response_not_found")
    assert sorted(setting.accounts.used) == sorted((A, B, C))


async def test_a_stored_response_that_no_key_knows_is_the_providers_404(setting: Setting) -> None:
    status, answer = await setting.call("responses/resp_0", method="GET")
    assert (status, answer["error"]["message"]) == (404, "Response with id 'resp_0' not found.")
    assert sorted(setting.accounts.used) == sorted((A, B, C))


async def test_a_404_of_another_path_is_tried_with_one_key(setting: Setting) -> None:
    assert (await setting.call("nothing", method="GET"))[0] == 404
    assert setting.accounts.used == []


async def test_an_unknown_id_puts_no_key_into_cooldown(foreign: Setting) -> None:
    await foreign.call("responses", previous_response_id="resp_c")
    assert all(state.failures == 0 for state in foreign.relay.gateway.attempts.health._keys.values())


async def test_the_429_of_the_key_that_knows_an_id_is_the_answer(foreign: Setting) -> None:
    """An error for the id, from a key that cannot know it, would end the client's session."""
    foreign.accounts.limited[A] = {"Retry-After": "30"}
    for _ in range(2):
        status, _ = await foreign.call("responses", previous_response_id="resp_a")
        assert status == 429
    assert foreign.accounts.executed == []


async def test_a_key_that_is_limited_while_the_right_one_is_sought_is_asked_again_last(foreign: Setting) -> None:
    foreign.accounts.limited[B] = {"Retry-After": "30"}
    status, _ = await foreign.call("responses", previous_response_id="resp_b")
    assert (status, foreign.accounts.used) == (429, [A, B, C, B])


async def test_keys_in_cooldown_are_tried_after_the_usable_ones(foreign: Setting) -> None:
    foreign.accounts.limited[A] = {"Retry-After": "30"}
    await foreign.call()
    foreign.accounts.used.clear()
    assert (await foreign.call("responses", previous_response_id="resp_c"))[0] == 200
    assert A not in foreign.accounts.used


async def test_a_key_after_its_cooldown_is_probed_by_the_call_that_seeks_it(foreign: Setting) -> None:
    health = foreign.relay.gateway.attempts.health
    route = foreign.relay.gateway.registry.match_rest("openai", "responses")
    keys = route.target.pool[0]
    health.report(route, keys, AttemptResult(429, None, 30))
    health.use(route, keys)
    assert not health.key(route, keys).probing, "in cooldown it is used because no other key can answer"
    foreign.now_s += 31
    health.use(route, keys)
    assert health.key(route, keys).probing


async def test_a_fallback_is_retried_after_the_right_key_was_sought(begin: Start, raw: RawUpstream) -> None:
    raw.plays(ok(b"{}", status="503 Busy"))
    raw.plays(ok(b"{}"))
    document = {"providers": {"other": provider(raw.url, "ANTHROPIC_API_KEY")}, "retries": {"max_attempts": 2, "delay_s": 0.001}}
    setting = await begin(document, fallback=[{"provider": "other"}])
    setting.accounts.broken = {B}
    assert (await setting.call("responses", previous_response_id="resp_0"))[0] == 200
    assert setting.accounts.used == [A, B] and len(raw.arrived) == 2


async def test_a_refused_key_is_not_tried_for_an_unknown_id(foreign: Setting) -> None:
    route = foreign.relay.gateway.registry.match_rest("openai", "responses")
    refused = route.target.pool[0]
    foreign.relay.gateway.attempts.health.report_refused_key(route, refused, "401")
    assert (await foreign.call("responses", previous_response_id="resp_a"))[0] == 400
    assert A not in foreign.accounts.used


async def test_unknown_ids_are_bounded_by_the_retry_budget(begin: Start) -> None:
    setting = await begin({"retry_budget": {"percent": 0, "per_s": 0}})
    assert (await setting.call("responses", previous_response_id="resp_0"))[0] == 400
    assert len(setting.accounts.used) == 1


async def test_an_unknown_id_is_not_tried_again_without_affinity(begin: Start) -> None:
    setting = await begin(auth={"affinity": False})
    await setting.call("responses", previous_response_id="resp_0")
    assert setting.accounts.used == [A]


@pytest.mark.parametrize("status", ["500 Broken", "502 Bad", "200 OK"])
async def test_a_call_that_may_have_been_executed_is_not_tried_with_another_key(start: StartRelay, raw: RawUpstream, status: str) -> None:
    raw.plays(ok(b'{"error": {"code": "previous_response_not_found", "message": "x"}}', "Content-Type: application/json", status=status))
    relay = await start(openai={"base_url": raw.url, "auth": POOL})
    await relay.call("POST", relay.path("openai", "responses"), data=b'{"model": "m", "previous_response_id": "resp_1"}')
    assert len(raw.arrived) == 1


async def test_a_clients_own_key_is_not_replaced_for_an_unknown_id(begin: Start) -> None:
    setting = await begin(client_credentials="allow")
    own = {"Authorization": f"Bearer {canary('client')}"}
    assert (await setting.call("responses", own, previous_response_id="resp_0"))[0] == 400
    assert setting.accounts.used == [own["Authorization"]]


async def test_an_upload_that_is_streamed_is_not_sent_again(begin: Start) -> None:
    setting = await begin({"server": {"buffer_bytes": 10, "json_buffer_bytes": 10}})
    assert (await setting.call("responses", previous_response_id="resp_0"))[0] == 400
    assert len(setting.accounts.used) == 1


async def test_a_pool_of_one_key_remembers_nothing(begin: Start) -> None:
    setting = await begin(auth={"value": VALUES[:1]})
    await setting.call("responses", {CODEX: "s1"})
    await setting.call("responses", previous_response_id="resp_0")
    assert setting.accounts.used == [A] * 2
    assert len(setting.relay.gateway.attempts.health.known_keys) == 0 and not setting.relay.gateway.attempts.health._keys
