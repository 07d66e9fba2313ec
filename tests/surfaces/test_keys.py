"""Clients, keys and the audit over HTTP, on both databases."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any

import pytest

from tests.conftest import StartRelay
from tests.relays import Relay, canary, provider
from tests.upstream.raw import RawUpstream, ok

API = "/api/v1/ai-gateway"
ADMIN, OWN_KEY = canary("keys-admin"), canary("keys-own")
DOCUMENT = {
    "access": {"mode": "required", "admin_token": ADMIN},
    "clients": {"own": {"key": OWN_KEY, "models": ["gpt-5*"], "expires": "2099-01-31"}},
    "providers": {"openai": provider("https://openai.example.com")},
}  # fmt: skip


async def manage(relay: Relay, method: str, path: str, body: Any = None, token: str = ADMIN) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    status, headers, answer = await relay.call(method, f"{relay.url}{API}/{path}", data=data, headers={"Authorization": f"Bearer {token}"})
    if status < 400 and path.startswith(("keys", "clients", "audit")):
        assert headers["cache-control"] == "no-store"
    return status, json.loads(answer)


@pytest.fixture
async def relay(start: StartRelay, database_setting: str) -> Relay:
    """A relay with one client in gateway.yaml, on each database."""
    return await start(DOCUMENT | {"database": database_setting})


@pytest.fixture
async def small(start: StartRelay, sqlite_setting: str) -> Relay:
    """The same on SQLite alone, for rules that no database decides."""
    return await start(DOCUMENT | {"database": sqlite_setting})


async def test_a_key_is_made_with_its_client_shown_once_and_listed_without_its_secret(relay: Relay) -> None:
    status, made = await manage(relay, "POST", "keys", {"client": "web", "record": {"providers": "openai"}, "expires": "2099-02-03"})
    assert status == 201 and re.fullmatch(r"rk_[A-Za-z0-9_-]{32}", made["key"]) and made["warnings"] == []
    assert made["state"] == "valid" and made["expires_at"] == "2099-02-03T00:00:00Z" and re.fullmatch(r"[0-9a-f]{12}", made["id"])
    assert made["created_by"] == "admin 127.0.0.1"
    assert relay.gateway.access_store is not None
    row = await relay.gateway.access_store.key(made["id"])
    assert row is not None and row.sha256 == sha256(made["key"].encode()).digest()
    for path in ("keys", f"keys/{made['id']}", "clients", "clients/web", "audit"):
        status, shown = await manage(relay, "GET", path)
        assert status == 200 and made["key"] not in json.dumps(shown), path
    assert (await manage(relay, "GET", "clients/web"))[1]["record"] == {"providers": ["openai"]}
    assert made["key"] not in "".join(relay.logged.lines)


async def test_a_key_is_revoked_once_and_for_all(relay: Relay) -> None:
    _, made = await manage(relay, "POST", "keys", {"client": "own"})
    status, revoked = await manage(relay, "DELETE", f"keys/{made['id']}")
    assert status == 200 and revoked["state"] == "revoked" and revoked["revoked_at"] is not None
    assert (await manage(relay, "DELETE", f"keys/{made['id']}")) == (200, revoked)
    assert (await manage(relay, "GET", f"keys/{made['id']}")) == (200, revoked)


async def test_a_new_key_is_valid_when_its_response_arrives_and_dead_when_its_revocation_does(start: StartRelay, database_setting: str, raw: RawUpstream) -> None:
    raw.plays(ok())
    relay = await start(DOCUMENT | {"database": database_setting, "providers": {"openai": provider(raw.url)}})

    async def call(key: str) -> tuple[int, str]:
        status, headers, _ = await relay.call("GET", relay.path("openai", "models"), headers={"Authorization": f"Bearer {key}"})
        return status, headers.get("x-relay-error", "")

    _, first = await manage(relay, "POST", "keys", {"client": "web", "record": {}})
    assert (await call(first["key"]))[0] == 200
    _, second = await manage(relay, "POST", "clients/web/rotate", {"grace_s": 0})
    assert (await call(second["key"]))[0] == 200 and (await call(first["key"])) == (401, "client_key_expired")
    await manage(relay, "PUT", "clients/web", {"endpoints": ["speech"]})
    assert await call(second["key"]) == (403, "endpoint_not_allowed")
    await manage(relay, "DELETE", "clients/web")
    assert await call(second["key"]) == (401, "client_key_invalid")


async def test_keys_and_clients_are_listed_in_pages(relay: Relay) -> None:
    for name in ("a", "c", "web.2", "x"):
        for _ in range(2):
            await manage(relay, "POST", "keys", {"client": name} | ({} if _ else {"record": {}}))
    for path, field, count in (("keys", "id", 8), ("keys?client=c", "id", 2), ("clients", "name", 5), ("audit", "seq", 12)):
        seen: list[Any] = []
        cursor: str | None = ""
        while cursor is not None:
            _, page = await manage(relay, "GET", f"{path}{'&' if '?' in path else '?'}limit=3" + (f"&cursor={cursor}" if cursor else ""))
            seen += [each[field] for each in page[path.partition("?")[0]]]
            assert len(page[path.partition("?")[0]]) <= 3
            cursor = page["cursor"]
        assert len(seen) == len(set(seen)) == count, path
    assert [each["name"] for each in (await manage(relay, "GET", "clients"))[1]["clients"]] == ["a", "c", "own", "web.2", "x"]


async def test_a_client_is_put_replaced_and_deleted_with_its_keys(relay: Relay) -> None:
    assert (await manage(relay, "PUT", "clients/app", {"models": ["gpt-5*"], "metadata": {"team": "growth"}}))[0] == 200
    _, made = await manage(relay, "POST", "keys", {"client": "app"})
    status, client = await manage(relay, "PUT", "clients/app", {"providers": ["openai"]})
    assert (status, client["record"], client["source"]) == (200, {"providers": ["openai"]}, "database")
    assert (await manage(relay, "DELETE", "clients/app")) == (200, {"keys_revoked": 1})
    assert (await manage(relay, "GET", "clients/app"))[0] == (await manage(relay, "DELETE", "clients/app"))[0] == 404
    assert (await manage(relay, "POST", "keys", {"client": "app"}))[1]["error"]["code"] == "client_not_found"
    assert (await manage(relay, "GET", f"keys/{made['id']}"))[1]["state"] == "revoked"


async def test_a_rotation_leaves_the_older_keys_their_grace(relay: Relay) -> None:
    _, first = await manage(relay, "POST", "keys", {"client": "web", "record": {}})
    status, second = await manage(relay, "POST", "clients/web/rotate", {"grace_s": 0, "expires": "2099-01-01"})
    assert status == 201 and second["key"] != first["key"] and second["state"] == "valid"
    assert (await manage(relay, "GET", f"keys/{first['id']}"))[1]["state"] == "expired"
    status, _ = await manage(relay, "POST", "clients/web/rotate")
    assert status == 201 and (await manage(relay, "GET", f"keys/{second['id']}"))[1]["state"] == "valid"


async def test_every_change_is_in_the_audit_with_its_actor(relay: Relay) -> None:
    _, made = await manage(relay, "POST", "keys", {"client": "web", "record": {}})
    await manage(relay, "PUT", "clients/web", {"models": ["m"]})
    await manage(relay, "POST", "clients/web/rotate", {})
    await manage(relay, "DELETE", f"keys/{made['id']}")
    await manage(relay, "DELETE", "clients/web")
    await manage(relay, "DELETE", "cache")
    await manage(relay, "DELETE", "logs?provider=openai")
    _, page = await manage(relay, "GET", "audit")
    assert [row["action"] for row in page["audit"]] == ["logs.delete", "cache.purge", "client.revoke", "key.revoke", "key.rotate", "client.put", "key.create", "client.put"]
    assert {row["actor"] for row in page["audit"]} == {"admin 127.0.0.1"}
    assert page["audit"][6]["target"] == made["id"] and page["audit"][5]["details"] == {"record": {"models": ["m"]}}
    changed = await relay.events("access.changed", 5)
    assert [event["action"] for event in changed] == ["key.create", "client.put", "key.rotate", "key.revoke", "client.revoke"]


# --- rules


async def test_a_client_of_the_file_gets_keys_but_no_other_record(small: Relay) -> None:
    status, made = await manage(small, "POST", "keys", {"client": "own"})
    assert status == 201
    for method, path, body in (("PUT", "clients/own", {}), ("DELETE", "clients/own", None), ("POST", "keys", {"client": "own", "record": {}})):
        status, answer = await manage(small, method, path, body)
        assert (status, answer["error"]["code"]) == (409, "client_conflict") and "gateway.yaml" in answer["error"]["message"]
    _, shown = await manage(small, "GET", "clients/own")
    assert shown["source"] == "gateway.yaml" and shown["record"] == {"models": ["gpt-5*"], "expires": "2099-01-31"}
    assert [key["id"] for key in shown["keys"]] == ["own/1", made["id"]] and shown["keys"][0]["expires_at"] == "2099-01-31T00:00:00Z"
    assert OWN_KEY not in json.dumps(shown)
    _, rotated = await manage(small, "POST", "clients/own/rotate", {})
    assert "stay valid" in rotated["warnings"][0]


async def test_a_key_with_a_record_never_changes_a_client_that_exists(small: Relay) -> None:
    await manage(small, "PUT", "clients/web", {"models": ["gpt-5-mini"]})
    status, answer = await manage(small, "POST", "keys", {"client": "web", "record": {}})
    assert (status, answer["error"]["code"]) == (409, "client_conflict")
    assert (await manage(small, "GET", "clients/web"))[1]["record"] == {"models": ["gpt-5-mini"]}
    assert (await manage(small, "GET", "keys"))[1]["keys"] == []


async def test_a_key_with_the_record_that_the_client_has_is_one_more_key(small: Relay) -> None:
    for _ in range(2):
        status, _ = await manage(small, "POST", "keys", {"client": "web", "record": {"models": "o3"}})
        assert status == 201
    assert len((await manage(small, "GET", "clients/web"))[1]["keys"]) == 2


@pytest.mark.parametrize(("given", "then"), [({}, {"models": ["o3"]}), ({"models": []}, {"models": ["o3"]}), ({"models": ["o4"]}, {"models": ["o4"]})])
async def test_a_revoked_client_comes_back_with_the_record_that_it_had_or_with_the_fields_given(small: Relay, given: dict[str, Any], then: dict[str, Any]) -> None:
    await manage(small, "PUT", "clients/web", {"models": ["o3"]})
    await manage(small, "DELETE", "clients/web")
    status, made = await manage(small, "POST", "keys", {"client": "web", "record": given})
    assert status == 201 and ["record is again" in warning for warning in made["warnings"]] == [True] * (then["models"] == ["o3"])
    assert (await manage(small, "GET", "clients/web"))[1]["record"] == then


async def test_no_client_gets_a_name_in_the_form_of_a_keys_id(small: Relay) -> None:
    for method, path, body in (("POST", "keys", {"client": "0123456789ab", "record": {}}), ("PUT", "clients/0123456789ab", {})):
        status, answer = await manage(small, method, path, body)
        assert (status, answer["error"]["code"]) == (400, "bad_request") and "form of a key's id" in answer["error"]["message"]


async def test_a_key_may_expire_after_a_time_from_now(small: Relay) -> None:
    for path in ("keys", "clients/own/rotate"):
        status, made = await manage(small, "POST", path, ({"client": "own"} if path == "keys" else {}) | {"expires": "30d"})
        lifetime = datetime.fromisoformat(made["expires_at"]) - datetime.fromisoformat(made["created_at"])
        assert status == 201 and timedelta(days=29) < lifetime < timedelta(days=31)


async def test_keys_whose_client_is_gone_say_so_and_are_deleted_with_its_name(start: StartRelay, sqlite_setting: str) -> None:
    relay = await start(DOCUMENT | {"database": sqlite_setting})
    _, made = await manage(relay, "POST", "keys", {"client": "own"})
    relay = await start(DOCUMENT | {"database": sqlite_setting, "clients": {}})
    assert (await manage(relay, "GET", f"keys/{made['id']}"))[1]["state"] == "no client"
    assert [key["state"] for key in (await manage(relay, "GET", "keys"))[1]["keys"]] == ["no client"]
    assert await manage(relay, "DELETE", "clients/own") == (200, {"keys_revoked": 1})
    assert (await manage(relay, "GET", f"keys/{made['id']}"))[1]["state"] == "revoked"


async def test_names_that_no_row_has_are_refused_without_a_query(relay: Relay) -> None:
    for path in ("keys?client=%00", "clients?cursor=%00", "keys?cursor=%00", "clients?cursor=%ED%A0%80"):
        assert (await manage(relay, "GET", path))[0] == 400, path
    status, answer = await manage(relay, "POST", "keys", {"client": "\0"})
    assert (status, answer["error"]["code"]) == (404, "client_not_found")


async def test_while_access_is_open_the_first_key_comes_with_a_warning(start: StartRelay, sqlite_setting: str) -> None:
    relay = await start({"database": sqlite_setting})
    status, _, body = await relay.call("POST", f"{relay.url}{API}/keys", data=b'{"client": "web", "record": {}}')
    assert status == 201 and "access.mode: required" in json.loads(body)["warnings"][0] and json.loads(body)["created_by"] == "local 127.0.0.1"
    (event,) = await relay.events("access.still_open")
    assert event["client"] == "web" and event["level"] == "warning"
    status, _, body = await relay.call("POST", f"{relay.url}{API}/keys", data=b'{"client": "web"}')
    assert status == 201 and json.loads(body)["warnings"] == []
    assert len(await relay.events("access.still_open")) == 1


BAD = [
    ("POST", "keys", {}, "client"), ("POST", "keys", [], "documented"), ("POST", "keys", b"{", "JSON"), ("POST", "keys", b"", "JSON"), ("POST", "keys", {"client": 1}, "client"),
    ("POST", "keys", {"client": "web", "record": {}, "admin": True}, "admin"), ("POST", "keys", {"client": "../x", "record": {}}, "name"), ("POST", "keys", {"client": "127.0.0.1", "record": {}}, "name"),
    ("POST", "keys", {"client": "web", "record": {"provider": ["openai"]}}, "provider"), ("POST", "keys", {"client": "web", "record": {"providers": ["opanai"]}}, "no such provider"),
    ("POST", "keys", {"client": "web", "record": "all"}, "record"), ("POST", "keys", {"client": "web", "record": {"limits": [{"requests": -1}]}}, "limits"),
    ("POST", "keys", {"client": "web", "record": {"models": ["x" * 999]}}, "models"), ("POST", "keys", {"client": "own", "expires": "tomorrow"}, "expires"), ("POST", "keys", {"client": "own", "expires": "2020-01-01"}, "past"),
    ("PUT", "clients/web", {"key": "x"}, "key"), ("PUT", "clients/web", b"null", "record"), ("PUT", "clients/web", b'{"models": ["' + b"x" * 70_000 + b'"]}', "bytes"),
    ("POST", "clients/own/rotate", {"grace_s": -1}, "grace_s"), ("POST", "clients/own/rotate", {"grace_s": 1e99}, "grace_s"), ("GET", "keys?limit=0", None, "limit"), ("GET", "keys?limit=501", None, "limit"),
    ("GET", "keys?cursor=' OR 1=1 --", None, "cursor"), ("GET", "audit?cursor=x", None, "cursor"), ("GET", "clients?x=1", None, "unknown parameter"),
]  # fmt: skip


async def test_bad_input_is_400_with_the_reason_and_changes_nothing(small: Relay) -> None:
    for method, path, body, why in BAD:
        status, answer = await manage(small, method, path, body)
        assert (status, answer["error"]["code"]) == (400, "bad_request"), (path, body, answer)
        assert why in answer["error"]["message"], (path, body, answer)
    assert (await manage(small, "GET", "audit"))[1]["audit"] == []


async def test_names_and_ids_that_do_not_exist_are_404(small: Relay) -> None:
    for name in ("nobody", "%00", "a%2Fb", "x" * 300, "' OR 1=1", "%F0%9F%92%A9"):
        for method, path, code in (("GET", f"keys/{name}", "key_not_found"), ("DELETE", f"keys/{name}", "key_not_found"), ("GET", f"clients/{name}", "client_not_found"), ("DELETE", f"clients/{name}", "client_not_found"), ("POST", f"clients/{name}/rotate", "client_not_found")):
            status, answer = await manage(small, method, path)
            assert status in (400, 404) and answer["error"]["code"] in (code, "bad_path", "unknown_route"), (path, answer)


async def test_without_a_database_the_api_is_503(start: StartRelay) -> None:
    relay = await start({})
    for path in ("keys", "clients", "audit"):
        status, headers, _ = await relay.call("GET", f"{relay.url}{API}/{path}")
        assert (status, headers["x-relay-error"]) == (503, "store_unavailable")


async def test_a_change_is_announced_after_it_is_stored_and_before_it_is_answered(small: Relay) -> None:
    seen: list[int] = []

    async def announce() -> None:
        assert small.gateway.access_store is not None
        seen.append(await small.gateway.access_store.version())

    small.gateway.refresh_access = announce
    _, made = await manage(small, "POST", "keys", {"client": "web", "record": {}})
    await manage(small, "PUT", "clients/web", {})
    await manage(small, "POST", "clients/web/rotate", {})
    await manage(small, "DELETE", f"keys/{made['id']}")
    await manage(small, "DELETE", "clients/web")
    assert seen == sorted(set(seen)) and len(seen) == 5


async def test_parallel_rotations_make_one_key_each(small: Relay) -> None:
    await manage(small, "PUT", "clients/web", {})
    made = await asyncio.gather(*(manage(small, "POST", "clients/web/rotate", {}) for _ in range(8)))
    assert {status for status, _ in made} == {201} and len({answer["key"] for _, answer in made}) == 8


async def test_two_who_create_one_client_at_once_do_not_replace_its_record(relay: Relay) -> None:
    """Else the first key would get the rights that the second one asked for."""
    records = ({"providers": ["openai"]}, {"models": ["gpt-5*"]}, {})
    made = await asyncio.gather(*(manage(relay, "POST", "keys", {"client": "web", "record": record}) for record in records for _ in range(3)))
    assert {status for status, _ in made} == {201, 409}
    asked = [record for record in records for _ in range(3)]
    given = [record for record, (status, _) in zip(asked, made, strict=True) if status == 201]
    _, client = await manage(relay, "GET", "clients/web")
    assert given == [client["record"]] * 3, "the other two of the same record get a key too"


async def test_a_key_of_a_client_that_is_revoked_at_the_same_time_is_not_valid(relay: Relay) -> None:
    for number in range(4):
        name = f"web{number}"
        await manage(relay, "PUT", f"clients/{name}", {})
        both = (manage(relay, "POST", "keys", {"client": name}), manage(relay, "POST", f"clients/{name}/rotate", {}), manage(relay, "DELETE", f"clients/{name}"))
        made = await asyncio.gather(*both)
        assert made[2][0] == 200 and {made[0][0], made[1][0]} <= {201, 404}
        _, left = await manage(relay, "GET", "keys")
        assert [key["state"] for key in left["keys"] if key["client"] == name and key["state"] != "revoked"] == []
