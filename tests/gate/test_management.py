"""Who may manage the relay: tokens and their roles, local callers, wrong tries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from relay.core.errors import (
    ClientKeyInvalid,
    ManagementDenied,
    ManagementForbidden,
    RelayError,
    TooManyAttempts,
)
from relay.core.exchange import Caller
from relay.gate.keys import ClientKeys
from relay.gate.management import Management, Question
from relay.gate.wrong_tries import MAX_TRIES, WINDOW_S, WrongTries
from relay.registry.load import ConfigError
from tests.conftest import StartRelay
from tests.relays import Relay, canary, configured, provider
from tests.upstream.raw import RawUpstream, ok

API = "/api/v1/ai-gateway"
ADMIN, READ, KEY = canary("management-admin"), canary("management-read"), canary("web-key")
ELSEWHERE = {"Host": "relay.example.com"}
ROUTES = [
    ("GET", f"{API}/providers"), ("POST", f"{API}/providers/reload"), ("DELETE", f"{API}/cache"), ("GET", f"{API}/logs"), ("DELETE", f"{API}/logs?since=1d"),
    ("GET", f"{API}/logs/export"), ("GET", f"{API}/logs/x"), ("PATCH", f"{API}/logs/x"), ("DELETE", f"{API}/logs/x"), ("GET", f"{API}/logs/x/request"), ("GET", f"{API}/usage"),
    ("GET", f"{API}/keys"), ("POST", f"{API}/keys"), ("GET", f"{API}/keys/x"), ("DELETE", f"{API}/keys/x"), ("GET", f"{API}/clients"), ("GET", f"{API}/clients/x"),
    ("PUT", f"{API}/clients/x"), ("DELETE", f"{API}/clients/x"), ("POST", f"{API}/clients/x/rotate"), ("GET", f"{API}/audit"),
    ("GET", f"{API}/budgets"), ("GET", f"{API}/budgets/ledger"), *(("POST", f"{API}/budgets/{each}") for each in ("raise", "reset", "release")),
    ("GET", f"{API}/sessions"), ("DELETE", f"{API}/sessions/x"),
]  # fmt: skip


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def document(**access: Any) -> dict[str, Any]:
    return {"access": access, "clients": {"web": {"key": KEY}}}


@pytest.fixture
async def relay(start: StartRelay, raw: RawUpstream) -> Relay:
    """A relay with both tokens and one client."""
    raw.plays(ok())
    return await start(document(admin_token=ADMIN, read_token=READ), openai=provider(raw.url))


async def asked(relay: Relay, method: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
    status, answered, _ = await relay.call(method, relay.url + path, headers=headers or {})
    return status, answered.get("x-relay-error", "")


# --- tokens


async def test_with_an_admin_token_management_needs_one_from_everywhere(relay: Relay) -> None:
    for method, path in ROUTES:
        for headers in ({}, ELSEWHERE, {"X-Forwarded-For": "192.0.2.1"}):
            assert await asked(relay, method, path, headers) == (401, "management_denied")
            assert (await asked(relay, method, path, headers | bearer(ADMIN)))[1] not in ("management_denied", "management_not_local")


async def test_a_read_token_reads_and_changes_nothing(relay: Relay) -> None:
    for method, path in ROUTES:
        status, code = await asked(relay, method, path, ELSEWHERE | bearer(READ))
        assert ((status, code) == (403, "management_denied")) == (method != "GET")
        assert status != 401


@pytest.mark.parametrize("tokens", [{}, {"admin_token": ADMIN, "read_token": READ}], ids=["local", "tokens"])
async def test_a_clients_key_never_opens_management(start: StartRelay, tokens: dict[str, str]) -> None:
    relay = await start(document(**tokens))
    for method, path in ROUTES:
        for headers in (bearer(KEY), {"x-relay-key": KEY}, {"x-api-key": "rk_unknown"}, {"Authorization": KEY}):
            assert await asked(relay, method, path, headers) == (403, "management_denied"), headers
        assert await asked(relay, method, f"{path}{'&' if '?' in path else '?'}x=rt_{'x' * 32}") == (403, "management_denied")


@pytest.mark.parametrize("spelling", ["bearer {}", "BEARER  {} ", "Bearer\t{}"])
async def test_the_scheme_of_a_token_has_any_case(relay: Relay, spelling: str) -> None:
    status, _ = await asked(relay, "GET", f"{API}/providers", {"Authorization": spelling.format(ADMIN)})
    assert status == (401 if "\t" in spelling else 200)


async def test_a_token_is_taken_from_authorization_alone(relay: Relay) -> None:
    for path in (f"?token={ADMIN}", f"?admin_token={ADMIN}", f"?key={ADMIN}", f"?access_token={ADMIN}"):
        assert (await asked(relay, "GET", f"{API}/providers{path}"))[0] == 401
    basic = {"Authorization": f"Basic {ADMIN}"}
    for headers in ({"x-api-key": ADMIN}, {"x-relay-key": ADMIN}, {"Cookie": f"token={ADMIN}"}, {"Authorization": ADMIN}, basic):
        assert (await asked(relay, "GET", f"{API}/providers", headers))[0] == 401, headers
    for first, second in (("x", ADMIN), (ADMIN, "x"), (ADMIN, ADMIN)):
        twice = CIMultiDict([("Authorization", f"Bearer {first}"), ("Authorization", f"Bearer {second}")])
        assert (await relay.call("GET", f"{relay.url}{API}/providers", headers=twice))[0] in (400, 401)


@pytest.mark.parametrize("wrong", ["", " ", ADMIN[:-1], ADMIN + "x", ADMIN.swapcase(), READ[::-1], "null", "undefined", "admin"])
async def test_a_wrong_token_is_401_with_a_challenge_and_nothing_of_it(relay: Relay, wrong: str) -> None:
    status, headers, body = await relay.call("GET", f"{relay.url}{API}/providers", headers=bearer(wrong))
    assert (status, headers["x-relay-error"], headers["x-should-retry"]) == (401, "management_denied", "false")
    assert headers["www-authenticate"].startswith("Bearer") and ADMIN not in body.decode()


async def test_a_page_of_another_origin_cannot_use_a_token(relay: Relay) -> None:
    assert await asked(relay, "GET", f"{API}/providers", bearer(ADMIN) | {"Origin": "https://evil.example"}) == (403, "origin_not_allowed")
    assert await asked(relay, "GET", f"{API}/providers", bearer(ADMIN) | {"Sec-Fetch-Site": "cross-site"}) == (403, "cross_site_request")


async def test_with_a_read_token_alone_changes_are_for_local_callers(start: StartRelay) -> None:
    relay = await start(document(read_token=READ))
    assert (await asked(relay, "GET", f"{API}/providers"))[0] == 200
    assert (await asked(relay, "POST", f"{API}/providers/reload"))[0] == 200
    assert await asked(relay, "POST", f"{API}/providers/reload", ELSEWHERE | bearer(READ)) == (403, "management_denied")
    assert await asked(relay, "GET", f"{API}/providers", ELSEWHERE) == (401, "management_denied")
    assert await asked(relay, "POST", f"{API}/providers/reload", ELSEWHERE) == (403, "management_not_local")
    assert (await asked(relay, "GET", f"{API}/providers", ELSEWHERE | bearer(READ)))[0] == 200


async def test_a_reload_replaces_the_tokens(relay: Relay) -> None:
    file = relay.folder / "gateway.yaml"
    other = canary("management-other")
    file.write_text(file.read_text().replace(ADMIN, other))
    assert (await asked(relay, "POST", f"{API}/providers/reload", bearer(ADMIN)))[0] == 200
    assert (await asked(relay, "GET", f"{API}/providers", bearer(ADMIN)))[0] == 401
    assert (await asked(relay, "GET", f"{API}/providers", bearer(other)))[0] == 200


@pytest.mark.parametrize(
    ("access", "why"),
    [
        ({"admin_token": "short"}, "16 to 512"), ({"admin_token": "rk_" + "abcdefgh" * 4}, "not begin with rk_"), ({"read_token": "rt_" + "abcdefgh" * 4}, "not begin with"),
        ({"admin_token": "1234" * 8}, "too easy"), ({"admin_token": ADMIN, "read_token": ADMIN}, "should differ"), ({"admin_token": KEY}, "a key of the client 'web'"),
        ({"read_token": "with blanks in the middle"}, "16 to 512"),
    ],
)  # fmt: skip
def test_a_token_that_is_weak_or_also_something_else_is_refused_at_start(tmp_path: Path, access: dict[str, str], why: str) -> None:
    with pytest.raises(ConfigError) as raised:
        configured(tmp_path, document(**access))
    text = str(raised.value)
    assert why in text and next(iter(access.values())) not in text


def test_an_empty_token_is_none(tmp_path: Path) -> None:
    config, _ = configured(tmp_path, document(admin_token="", read_token=""))
    assert "" not in config.secrets
    management = Management({"admin": "", "read": ""}, ClientKeys(lambda: 0.0))
    assert not management.has_tokens
    for sent in ("Bearer ", "Bearer", "", "Bearer \x00"):
        with pytest.raises(RelayError):
            management.require(question(CIMultiDict({"Authorization": sent}), "192.0.2.1"))


def question(headers: CIMultiDict[str], address: str = "127.0.0.1", method: str = "GET") -> Question:
    return Question(method, CIMultiDictProxy(headers), "", Caller(address, address, "http", address))


@given(st.text(max_size=60))
def test_nothing_but_the_token_opens_management(text: str) -> None:
    management = Management({"admin": ADMIN, "read": ""}, ClientKeys(lambda: 0.0))
    with pytest.raises((ManagementDenied, TooManyAttempts)):
        management.require(question(CIMultiDict({"Authorization": f"Bearer {text}"})))


# --- calls


@pytest.mark.parametrize("token", [ADMIN, READ])
@pytest.mark.parametrize("required", [False, True])
async def test_a_token_of_management_opens_no_call(start: StartRelay, raw: RawUpstream, token: str, required: bool) -> None:
    raw.plays(ok())
    relay = await start(document(admin_token=ADMIN, read_token=READ, mode="required" if required else "open"), openai=provider(raw.url, client_credentials="allow"))
    for headers in (bearer(token), {"x-relay-key": token}, {"x-api-key": token}, bearer("sk-mine") | {"x-api-key": token}):
        assert await asked(relay, "GET", f"{API}/providers/openai/x", headers) == (403, "management_denied")
        assert await asked(relay, "POST", f"{API}/tickets", headers) == (403, "management_denied")
    assert raw.connections == 0


async def test_a_token_of_management_beside_a_clients_key_never_reaches_a_provider(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok())
    relay = await start(document(admin_token=ADMIN, read_token=READ), openai=provider(raw.url, client_credentials="allow"))
    for headers in ({"x-relay-key": KEY} | bearer(ADMIN), {"x-relay-key": KEY, "x-api-key": READ}, {"x-relay-key": KEY, "cf-aig-authorization": ADMIN}):
        assert (await asked(relay, "GET", f"{API}/providers/openai/x", headers))[0] == 200
    assert len(raw.arrived) == 3
    assert not any(ADMIN.encode() in each.head or READ.encode() in each.head for each in raw.arrived)


# --- metrics, health and the page


METRICS = [
    ({}, {}, 200), ({}, {"Host": "relay.example.com"}, 403), ({"mode": "required"}, {}, 200), ({"mode": "required"}, ELSEWHERE, 403),
    ({"mode": "required"}, {"X-Forwarded-For": "192.0.2.1"}, 403), ({"mode": "required", "read_token": READ}, ELSEWHERE, 401), ({"mode": "required", "read_token": READ}, ELSEWHERE | bearer(READ), 200),
    ({"admin_token": ADMIN}, {}, 200), ({"admin_token": ADMIN}, ELSEWHERE, 401), ({"admin_token": ADMIN}, ELSEWHERE | bearer(ADMIN), 200),
    ({"read_token": READ}, bearer("wrong"), 401), ({"admin_token": ADMIN}, {"x-relay-key": KEY}, 403), ({"mode": "required", "read_token": READ}, ELSEWHERE | bearer(KEY), 403),
]  # fmt: skip


@pytest.mark.parametrize(("access", "headers", "status"), METRICS)
async def test_who_may_read_metrics_and_the_counters_of_readyz(start: StartRelay, access: dict[str, str], headers: dict[str, str], status: int) -> None:
    relay = await start(document(**access))
    assert (await asked(relay, "GET", "/metrics", headers))[0] == status
    ready, _, body = await relay.call("GET", f"{relay.url}/readyz", headers=headers)
    shows = status == 200 or not access
    assert ready == 200 and json.loads(body)["status"] == "ready" and ("in_flight" in json.loads(body)) == shows


async def test_the_status_page_is_for_local_callers_and_those_with_a_token(relay: Relay) -> None:
    assert (await asked(relay, "GET", "/"))[0] == 200
    assert (await asked(relay, "GET", "/", ELSEWHERE))[0] == 404
    assert (await asked(relay, "GET", "/", ELSEWHERE | bearer(READ)))[0] == 200


# --- wrong tries


async def test_after_ten_wrong_tokens_a_further_one_is_429_and_a_right_one_still_passes(relay: Relay) -> None:
    for _ in range(MAX_TRIES):
        assert (await asked(relay, "GET", f"{API}/providers", bearer("wrong")))[0] == 401
    status, headers, _ = await relay.call("GET", f"{relay.url}{API}/providers", headers=bearer("wrong again"))
    assert (status, headers["x-relay-error"], headers["x-should-retry"]) == (429, "too_many_attempts", "false")
    assert 1 <= int(headers["retry-after"]) <= WINDOW_S
    assert (await asked(relay, "GET", f"{API}/providers", bearer(ADMIN)))[0] == 200
    assert len(await relay.events("access.too_many_attempts")) == 1


async def test_wrong_keys_and_wrong_tokens_of_an_address_are_counted_together(start: StartRelay, raw: RawUpstream) -> None:
    raw.plays(ok())
    relay = await start(document(admin_token=ADMIN, mode="required"), openai=provider(raw.url))
    for number in range(MAX_TRIES):
        wrong = {"x-api-key": "sk-mine"} if number % 3 == 1 else bearer("rk_wrong")
        assert (await asked(relay, "GET", f"{API}/providers" if number % 3 == 0 else f"{API}/providers/openai/x", wrong if number % 3 else bearer("wrong")))[0] == 401
    assert await asked(relay, "GET", f"{API}/providers/openai/x", bearer("rk_wrong")) == (429, "too_many_attempts")
    assert await asked(relay, "GET", f"{API}/providers", bearer("wrong")) == (429, "too_many_attempts")
    assert (await asked(relay, "GET", f"{API}/providers/openai/x", bearer(KEY)))[0] == 200
    assert await asked(relay, "GET", f"{API}/providers/openai/x") == (401, "client_key_missing")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def tried(tries: WrongTries, address: str, count: int) -> list[str]:
    return [tries.refusal(address, ClientKeyInvalid()).code for _ in range(count)]


def test_the_count_of_an_address_ends_after_a_minute() -> None:
    clock = Clock()
    tries = WrongTries(clock)
    assert tried(tries, "192.0.2.1", 12) == ["client_key_invalid"] * 10 + ["too_many_attempts"] * 2
    clock.now += WINDOW_S - 0.5
    error = tries.refusal("192.0.2.1", ClientKeyInvalid())
    assert isinstance(error, TooManyAttempts) and error.retry_after_s == 0.5
    clock.now += 0.5
    assert tried(tries, "192.0.2.1", 1) == ["client_key_invalid"]


def test_addresses_are_counted_apart_and_a_network_of_ipv6_together() -> None:
    tries = WrongTries(Clock())
    tried(tries, "192.0.2.1", 11)
    assert tried(tries, "192.0.2.2", 1) == ["client_key_invalid"]
    assert tried(tries, "::ffff:192.0.2.1", 1) == ["too_many_attempts"]
    for host in range(11):
        last = tried(tries, f"2001:db8:0:1::{host:x}", 1)
    assert last == ["too_many_attempts"]
    assert tried(tries, "2001:db8:0:2::1", 1) == ["client_key_invalid"]


def test_the_counts_are_bounded_and_the_oldest_is_dropped_first() -> None:
    tries = WrongTries(Clock())
    tried(tries, "first", 11)
    tried(tries, "second", 11)
    for number in range(4095):
        tries.refusal(f"host-{number}", ClientKeyInvalid())
    assert len(tries) == 4096
    assert tried(tries, "second", 1) == ["too_many_attempts"]
    assert tried(tries, "first", 1) == ["client_key_invalid"]


def test_a_role_never_widens_with_the_order_of_the_tokens() -> None:
    management = Management({"read": READ, "admin": ADMIN}, ClientKeys(lambda: 0.0))
    assert management.require(question(CIMultiDict(bearer(READ)))).role == "read"
    assert management.require(question(CIMultiDict(bearer(ADMIN)), method="POST")).role == "admin"
    with pytest.raises(ManagementForbidden):
        management.require(question(CIMultiDict(bearer(READ)), method="POST"))
