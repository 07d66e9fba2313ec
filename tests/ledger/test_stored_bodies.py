"""Stored bodies hold no key: whatever their bytes, wherever they are cut, however they are packed or spelled."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import brotli
import pytest

from tests.conftest import StartRelay
from tests.relays import CLIENT_KEY, KEYS, Relay, provider
from tests.upstream.raw import LAST_CHUNK, SSE_HEAD, RawUpstream, chunk, head, ok

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

KEY = KEYS["OPENAI_API_KEY"]
MARK = b"[redacted]"
CUT = 400
ODD_KEY = 'odd+key/with="all\\of&<it>'
RUSSIAN = "Ответ модели: "
PACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress, "br": lambda data: brotli.compress(data, quality=4), "zstd": zstd.compress}


async def _start(start: StartRelay, raw: RawUpstream, database: str, *, body_bytes: int = 64 * 1024, key: str = "OPENAI_API_KEY") -> Relay:
    return await start({"database": database, "ledger": {"bodies": "on", "body_bytes": body_bytes}}, openai=provider(raw.url, key))


async def _stored(relay: Relay, said: bytes = b"", **options: Any) -> dict[str, tuple[bytes, bool]]:
    """What is stored of a call's bodies, and whether it is whole."""
    _, answered, _ = await relay.call("POST", relay.path("openai", "chat/completions"), data=said, **options)
    await relay.idle()
    found = {}
    for side in ("request", "response"):
        status, headers, body = await relay.call("GET", f"{relay.url}/api/v1/ai-gateway/logs/{answered['cf-aig-log-id']}/{side}")
        assert status == 200
        found[side] = body, headers["x-relay-complete"] == "true"
    return found


def _cut_texts(key: str) -> list[bytes]:
    """Texts whose cut at CUT falls everywhere in the key, behind characters of two bytes."""
    spelled = key.encode()
    texts = []
    for into in range(-1, len(spelled) + 2, 3):
        before = RUSSIAN.encode() * 40
        texts.append(before[: CUT - into] + spelled + RUSSIAN.encode() * 40)
    return texts


@pytest.mark.parametrize("side", ["request", "response"])
async def test_no_part_of_a_key_is_left_at_a_cut_in_text_that_is_not_english(start: StartRelay, raw: RawUpstream, database_setting: str, side: str) -> None:
    texts = _cut_texts(KEY)
    if side == "response":
        raw.scripts = [(ok(text),) for text in texts]
    else:
        raw.plays(ok(b"{}"))
    relay = await _start(start, raw, database_setting, body_bytes=CUT)
    for text in texts:
        body, whole = (await _stored(relay, text if side == "request" else b""))[side]
        assert not whole and len(body) <= CUT
        assert b"CANA" not in body and KEY.encode()[8:12] not in body


@pytest.mark.parametrize("before", [RUSSIAN.encode()[:-3], bytes(range(256)), b"\xff\xfe\x00"], ids=["cut text", "all bytes", "no text"])
async def test_a_key_within_bytes_that_are_no_text_is_taken_out(start: StartRelay, raw: RawUpstream, database_setting: str, before: bytes) -> None:
    raw.plays(ok(before + KEY.encode() + before))
    relay = await _start(start, raw, database_setting)
    found = await _stored(relay, before + KEY.encode())
    assert found == {"request": (before + MARK, True), "response": (before + MARK + before, True)}


async def test_a_key_that_comes_in_pieces_is_taken_out(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(SSE_HEAD, *[chunk(bytes([byte])) for byte in b"data: " + KEY.encode() + b"\n\n"], LAST_CHUNK)
    relay = await _start(start, raw, database_setting)
    assert (await _stored(relay))["response"] == (b"data: " + MARK + b"\n\n", True)


SPELLINGS: dict[str, Callable[[str], str]] = {
    "as it is": str, "URL": lambda key: quote(key, safe=""), "JSON": lambda key: json.dumps(key)[1:-1], "JSON within JSON": lambda key: json.dumps(json.dumps(key))[3:-3],
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_a_key_is_taken_out_in_every_spelling(start: StartRelay, raw: RawUpstream, database_setting: str, spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODD_KEY", ODD_KEY)
    spelled = SPELLINGS[spelling](ODD_KEY).encode()
    raw.plays(ok(b"<" + spelled + b">"))
    relay = await _start(start, raw, database_setting, key="ODD_KEY")
    assert await _stored(relay, b"<" + spelled + b">") == {"request": (b"<" + MARK + b">", True), "response": (b"<" + MARK + b">", True)}


async def test_basic_credentials_are_taken_out_encoded_and_decoded(start: StartRelay, raw: RawUpstream, database_setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASIC", "dXNlcjpzZWNyZXQtd29yZA==")  # user:secret-word
    raw.plays(ok(b"dXNlcjpzZWNyZXQtd29yZA== user:secret-word secret-word"))
    entry = {"base_url": raw.url, "auth": {"header": "Authorization", "value": "Basic ${BASIC}"}}
    relay = await start({"database": database_setting, "ledger": {"bodies": "on"}}, openai=entry)
    assert (await _stored(relay))["response"] == (b" ".join([MARK] * 3), True)


@pytest.mark.parametrize("coding", PACK)
async def test_compressed_bodies_are_stored_unpacked_and_without_a_key(start: StartRelay, raw: RawUpstream, database_setting: str, coding: str) -> None:
    text = RUSSIAN.encode() * 50 + KEY.encode() + b"end"
    raw.plays(ok(PACK[coding](text), f"Content-Encoding: {coding}"))
    relay = await _start(start, raw, database_setting)
    found = await _stored(relay, PACK[coding](text), headers={"Content-Encoding": coding})
    kept = RUSSIAN.encode() * 50 + MARK + b"end"
    assert found == {"request": (kept, True), "response": (kept, True)}


@pytest.mark.parametrize("coding", PACK)
async def test_a_compressed_body_is_cut_without_a_part_of_a_key(start: StartRelay, raw: RawUpstream, database_setting: str, coding: str) -> None:
    texts = _cut_texts(KEY)
    raw.scripts = [(ok(PACK[coding](text), f"Content-Encoding: {coding}"),) for text in texts]
    relay = await _start(start, raw, database_setting, body_bytes=CUT)
    for _ in texts:
        body, whole = (await _stored(relay))["response"]
        assert not whole and 0 < len(body) <= CUT and b"CANA" not in body


@pytest.mark.parametrize("coding", PACK)
async def test_a_compressed_body_of_which_only_a_part_was_captured_ends_before_a_key(start: StartRelay, raw: RawUpstream, database_setting: str, coding: str) -> None:
    noise = bytes(range(33, 127)).replace(b"C", b"")
    text = b"".join(noise[n % 90 :] + KEY.encode() for n in range(0, 9000, 7))
    raw.plays(ok(PACK[coding](text), f"Content-Encoding: {coding}"))
    relay = await _start(start, raw, database_setting, body_bytes=CUT)
    body, whole = (await _stored(relay))["response"]
    assert not whole and len(body) <= CUT and b"CANA" not in body


@pytest.mark.parametrize("coding", PACK)
async def test_a_bomb_is_unpacked_no_further_than_is_stored(start: StartRelay, raw: RawUpstream, database_setting: str, coding: str) -> None:
    packed = PACK[coding](bytes(16 * 1024 * 1024))
    raw.plays(head(f"Content-Encoding: {coding}", f"Content-Length: {len(packed)}"), packed)
    relay = await _start(start, raw, database_setting, body_bytes=1024 * 1024)
    body, whole = (await _stored(relay))["response"]
    assert not whole and len(body) <= 1024 * 1024 and not body.strip(b"\0")


@pytest.mark.parametrize(("coding", "body"), [("compress", b"x"), ("gzip, br", b"x"), ("gzip", b"no gzip"), ("br", b"\xff\xff\xff"), ("zstd", b"no zstd")])
async def test_what_cannot_be_unpacked_is_not_stored(start: StartRelay, raw: RawUpstream, database_setting: str, coding: str, body: bytes) -> None:
    raw.plays(ok(body + KEY.encode(), f"Content-Encoding: {coding}"))
    relay = await _start(start, raw, database_setting)
    assert (await _stored(relay))["response"] == (b"", False)


async def test_a_clients_own_credentials_are_taken_out(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(f"{CLIENT_KEY}-1 {CLIENT_KEY}-2".encode()))
    entry = {"base_url": raw.url, "auth": {"query": "key", "value": "${OPENAI_API_KEY}"}, "client_credentials": "allow"}
    relay = await start({"database": database_setting, "ledger": {"bodies": "on"}}, openai=entry)
    headers = {"Authorization": f"Bearer {CLIENT_KEY}-1"}
    found = await _stored(relay, f"{CLIENT_KEY}-2".encode(), headers=headers, params={"key": f"{CLIENT_KEY}-2"})
    assert found == {"request": (MARK, True), "response": (MARK + b" " + MARK, True)}


async def test_a_long_credential_of_the_clients_costs_no_stored_byte_and_leaves_no_part_at_the_cut(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    credential = f"{CLIENT_KEY}+/=" * 20
    raw.plays(ok(b"x" * (CUT - 30) + credential.encode() + b"x" * 100_000))
    relay = await _start(start, raw, database_setting, body_bytes=CUT)
    found = await _stored(relay, headers={"Authorization": f"Bearer {credential}"})
    assert found["response"] == (b"x" * (CUT - 30) + MARK, False)


async def test_a_body_of_endless_members_is_not_unpacked_to_its_end(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(gzip.compress(b"x") * 1000, "Content-Encoding: gzip"))
    relay = await _start(start, raw, database_setting)
    body, whole = (await _stored(relay))["response"]
    assert not whole and 0 <= len(body) <= 64 and not body.strip(b"x")


async def test_keys_of_before_a_reload_are_still_taken_out(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(KEY.encode()))
    relay = await _start(start, raw, database_setting)
    env = relay.folder / ".env"
    env.write_text(env.read_text().replace(KEY, "another-key-of-the-relay"))
    assert relay.gateway.reload is not None
    await relay.gateway.reload()
    assert (await _stored(relay))["response"] == (MARK, True)


async def test_a_body_as_large_as_may_be_stored_is_stored_whole(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    size = 1024 * 1024
    body = (KEY.encode() + b"x" * 100) * (size // 150)
    raw.plays(ok(body))
    relay = await _start(start, raw, database_setting, body_bytes=size)
    assert (await _stored(relay))["response"] == (body.replace(KEY.encode(), MARK), True)
