"""Stored bodies contain no key, whatever their bytes, truncation, compression or escaping."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import brotli
import pytest

from relay.core.meters.unpack import zstd
from tests.conftest import StartRelay
from tests.relays import CLIENT_KEY, KEYS, Relay, provider
from tests.upstream.raw import LAST_CHUNK, SSE_HEAD, RawUpstream, chunk, head, ok

KEY = KEYS["OPENAI_API_KEY"]
MARK = b"[redacted]"
CUT = 400
ODD_KEY = 'odd+key/with="all\\of&<it>'
RUSSIAN = "Ответ модели: "
COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress, "br": lambda data: brotli.compress(data, quality=4), "zstd": zstd.compress}


async def _start(start: StartRelay, raw: RawUpstream, database: str, *, body_bytes: int = 64 * 1024, key: str = "OPENAI_API_KEY") -> Relay:
    return await start({"database": database, "ledger": {"bodies": "on", "body_bytes": body_bytes}}, openai=provider(raw.url, key))


async def _stored(relay: Relay, data: bytes = b"", **options: Any) -> dict[str, tuple[bytes, bool]]:
    """Make a call. Returns its stored bodies, and for each whether it is complete."""
    _, response_headers, _ = await relay.call("POST", relay.path("openai", "chat/completions"), data=data, **options)
    await relay.idle()
    found = {}
    for side in ("request", "response"):
        status, headers, body = await relay.call("GET", f"{relay.url}/api/v1/ai-gateway/logs/{response_headers['cf-aig-log-id']}/{side}")
        assert status == 200
        found[side] = body, headers["x-relay-complete"] == "true"
    return found


def _cut_texts(key: str) -> list[bytes]:
    """Texts whose truncation at CUT falls on each part of the key, after two-byte characters."""
    escaped = key.encode()
    texts = []
    for key_bytes_before_cut in range(-1, len(escaped) + 2, 3):
        before = RUSSIAN.encode() * 40
        texts.append(before[: CUT - key_bytes_before_cut] + escaped + RUSSIAN.encode() * 40)
    return texts


@pytest.mark.parametrize("side", ["request", "response"])
async def test_no_part_of_a_key_is_left_where_non_ascii_text_is_truncated(start: StartRelay, raw: RawUpstream, database_setting: str, side: str) -> None:
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
async def test_a_key_within_binary_data_is_redacted(start: StartRelay, raw: RawUpstream, database_setting: str, before: bytes) -> None:
    raw.plays(ok(before + KEY.encode() + before))
    relay = await _start(start, raw, database_setting)
    found = await _stored(relay, before + KEY.encode())
    assert found == {"request": (before + MARK, True), "response": (before + MARK + before, True)}


async def test_a_key_that_arrives_in_pieces_is_redacted(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(SSE_HEAD, *[chunk(bytes([byte])) for byte in b"data: " + KEY.encode() + b"\n\n"], LAST_CHUNK)
    relay = await _start(start, raw, database_setting)
    assert (await _stored(relay))["response"] == (b"data: " + MARK + b"\n\n", True)


ESCAPINGS: dict[str, Callable[[str], str]] = {
    "as it is": str, "URL": lambda key: quote(key, safe=""), "JSON": lambda key: json.dumps(key)[1:-1], "JSON within JSON": lambda key: json.dumps(json.dumps(key))[3:-3],
}  # fmt: skip


@pytest.mark.parametrize("escaping", ESCAPINGS)
async def test_a_key_is_redacted_in_every_escaping(start: StartRelay, raw: RawUpstream, database_setting: str, escaping: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODD_KEY", ODD_KEY)
    escaped = ESCAPINGS[escaping](ODD_KEY).encode()
    raw.plays(ok(b"<" + escaped + b">"))
    relay = await _start(start, raw, database_setting, key="ODD_KEY")
    assert await _stored(relay, b"<" + escaped + b">") == {"request": (b"<" + MARK + b">", True), "response": (b"<" + MARK + b">", True)}


async def test_basic_credentials_are_redacted_encoded_and_decoded(start: StartRelay, raw: RawUpstream, database_setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASIC", "dXNlcjpzZWNyZXQtd29yZA==")  # user:secret-word
    raw.plays(ok(b"dXNlcjpzZWNyZXQtd29yZA== user:secret-word secret-word"))
    entry = {"base_url": raw.url, "auth": {"header": "Authorization", "value": "Basic ${BASIC}"}}
    relay = await start({"database": database_setting, "ledger": {"bodies": "on"}}, openai=entry)
    assert (await _stored(relay))["response"] == (b" ".join([MARK] * 3), True)


@pytest.mark.parametrize("coding", COMPRESS)
async def test_compressed_bodies_are_stored_decompressed_and_redacted(start: StartRelay, raw: RawUpstream, database_setting: str, coding: str) -> None:
    text = RUSSIAN.encode() * 50 + KEY.encode() + b"end"
    raw.plays(ok(COMPRESS[coding](text), f"Content-Encoding: {coding}"))
    relay = await _start(start, raw, database_setting)
    found = await _stored(relay, COMPRESS[coding](text), headers={"Content-Encoding": coding})
    expected = RUSSIAN.encode() * 50 + MARK + b"end"
    assert found == {"request": (expected, True), "response": (expected, True)}


@pytest.mark.parametrize("coding", COMPRESS)
async def test_a_truncated_compressed_body_contains_no_part_of_a_key(start: StartRelay, raw: RawUpstream, database_setting: str, coding: str) -> None:
    texts = _cut_texts(KEY)
    raw.scripts = [(ok(COMPRESS[coding](text), f"Content-Encoding: {coding}"),) for text in texts]
    relay = await _start(start, raw, database_setting, body_bytes=CUT)
    for _ in texts:
        body, whole = (await _stored(relay))["response"]
        assert not whole and 0 < len(body) <= CUT and b"CANA" not in body


@pytest.mark.parametrize("coding", COMPRESS)
async def test_a_partly_captured_compressed_body_ends_before_a_key(start: StartRelay, raw: RawUpstream, database_setting: str, coding: str) -> None:
    noise = bytes(range(33, 127)).replace(b"C", b"")
    text = b"".join(noise[n % 90 :] + KEY.encode() for n in range(0, 9000, 7))
    raw.plays(ok(COMPRESS[coding](text), f"Content-Encoding: {coding}"))
    relay = await _start(start, raw, database_setting, body_bytes=CUT)
    body, whole = (await _stored(relay))["response"]
    assert not whole and len(body) <= CUT and b"CANA" not in body


@pytest.mark.parametrize("coding", COMPRESS)
async def test_a_decompression_bomb_is_decompressed_only_up_to_the_stored_size(start: StartRelay, raw: RawUpstream, database_setting: str, coding: str) -> None:
    compressed = COMPRESS[coding](bytes(16 * 1024 * 1024))
    raw.plays(head(f"Content-Encoding: {coding}", f"Content-Length: {len(compressed)}"), compressed)
    relay = await _start(start, raw, database_setting, body_bytes=1024 * 1024)
    body, whole = (await _stored(relay))["response"]
    assert not whole and len(body) <= 1024 * 1024 and not body.strip(b"\0")


@pytest.mark.parametrize(("coding", "body"), [("compress", b"x"), ("gzip, br", b"x"), ("gzip", b"no gzip"), ("br", b"\xff\xff\xff"), ("zstd", b"no zstd")])
async def test_a_body_that_cannot_be_decompressed_is_not_stored(start: StartRelay, raw: RawUpstream, database_setting: str, coding: str, body: bytes) -> None:
    raw.plays(ok(body + KEY.encode(), f"Content-Encoding: {coding}"))
    relay = await _start(start, raw, database_setting)
    assert (await _stored(relay))["response"] == (b"", False)


async def test_credentials_of_the_client_are_redacted(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(f"{CLIENT_KEY}-1 {CLIENT_KEY}-2".encode()))
    entry = {"base_url": raw.url, "auth": {"query": "key", "value": "${OPENAI_API_KEY}"}, "client_credentials": "allow"}
    relay = await start({"database": database_setting, "ledger": {"bodies": "on"}}, openai=entry)
    headers = {"Authorization": f"Bearer {CLIENT_KEY}-1"}
    found = await _stored(relay, f"{CLIENT_KEY}-2".encode(), headers=headers, params={"key": f"{CLIENT_KEY}-2"})
    assert found == {"request": (MARK, True), "response": (MARK + b" " + MARK, True)}


async def test_a_long_credential_of_the_client_is_redacted_before_the_body_is_truncated(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    credential = f"{CLIENT_KEY}+/=" * 20
    raw.plays(ok(b"x" * (CUT - 30) + credential.encode() + b"x" * 100_000))
    relay = await _start(start, raw, database_setting, body_bytes=CUT)
    found = await _stored(relay, headers={"Authorization": f"Bearer {credential}"})
    assert found["response"] == (b"x" * (CUT - 30) + MARK, False)


async def test_a_gzip_body_with_many_members_is_not_decompressed_to_its_end(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(gzip.compress(b"x") * 1000, "Content-Encoding: gzip"))
    relay = await _start(start, raw, database_setting)
    body, whole = (await _stored(relay))["response"]
    assert not whole and 0 <= len(body) <= 64 and not body.strip(b"x")


async def test_keys_from_before_a_reload_are_still_redacted(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    raw.plays(ok(KEY.encode()))
    relay = await _start(start, raw, database_setting)
    env = relay.folder / ".env"
    env.write_text(env.read_text().replace(KEY, "another-key-of-the-relay"))
    assert relay.gateway.reload is not None
    await relay.gateway.reload()
    assert (await _stored(relay))["response"] == (MARK, True)


async def test_a_body_of_the_maximum_size_is_stored_complete(start: StartRelay, raw: RawUpstream, database_setting: str) -> None:
    size = 1024 * 1024
    body = (KEY.encode() + b"x" * 100) * (size // 150)
    raw.plays(ok(body))
    relay = await _start(start, raw, database_setting, body_bytes=size)
    assert (await _stored(relay))["response"] == (body.replace(KEY.encode(), MARK), True)
