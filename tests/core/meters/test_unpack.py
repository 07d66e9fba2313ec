"""Whole bodies are decompressed step by step: every coding, stacked codings, and broken data."""

from __future__ import annotations

import gzip
import zlib

import brotli
import pytest

from relay.core.meters.unpack import CannotUnpack, CutShort, steps, unpack, unpacker, zstd

TEXT = b'{"model":"m","x":"' + bytes(range(32, 127)).replace(b'"', b"").replace(b"\\", b"") * 5000 + b'"}'


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


PACKERS = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress, "br": brotli.compress, "zstd": zstd.compress}


@pytest.mark.parametrize("coding", PACKERS)
def test_every_coding_is_decoded_in_bounded_steps(coding: str) -> None:
    pieces = list(steps(PACKERS[coding](TEXT), coding.upper(), 10_000))
    assert b"".join(pieces) == TEXT and len(pieces) > 5
    assert max(map(len, pieces)) <= 70_000  # brotli and zstd round up


@pytest.mark.parametrize("coding", PACKERS)
def test_a_large_chunk_of_a_response_is_read_like_several_small_ones(coding: str) -> None:
    """It may decompress to more than a small one."""
    lines = b"".join(b'{"id":%d,"text":"%032d"}\n' % (n, n * n) for n in range(100_000))
    packed, unpacking = PACKERS[coding](lines), unpacker(coding)
    assert unpacking is not None and len(lines) > 4 << 20 and len(packed) > 1 << 17
    assert unpacking.feed(packed) == lines and not unpacking.gave_up


def test_deflate_without_its_header_is_decoded() -> None:
    assert b"".join(steps(raw_deflate(TEXT), "deflate")) == TEXT


@pytest.mark.parametrize("codings", [["gzip", "br"], ["zstd", "deflate"], ["br", "gzip", "zstd"]])
def test_stacked_codings_are_decoded_from_the_last_to_the_first(codings: list[str]) -> None:
    packed = TEXT
    for coding in codings:
        packed = PACKERS[coding](packed)
    assert b"".join(steps(packed, " , ".join([*codings, "identity"]), 10_000)) == TEXT


def test_stacked_codings_cannot_hide_work_without_output() -> None:
    empty_blocks = b"\x00\x00\x00\xff\xff" * (40 * 1024 * 1024 // 5)
    with pytest.raises(CutShort):
        list(steps(zlib.compress(b"\x78\x9c" + empty_blocks, 1), "deflate, deflate", 1 << 20))


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_concatenated_members_are_one_body(coding: str) -> None:
    pack = PACKERS[coding]
    assert b"".join(steps(pack(TEXT) + pack(b"more") + pack(b""), coding, 10_000)) == TEXT + b"more"
    with pytest.raises(CutShort):
        list(steps(pack(b"x") * 100, coding))


@pytest.mark.parametrize("coding", PACKERS)
def test_data_that_is_broken_truncated_or_followed_by_garbage_is_refused(coding: str) -> None:
    packed = PACKERS[coding](TEXT)
    for broken in (packed[:-5], packed + b"garbage", b"\x00" + packed, b"garbage"):
        with pytest.raises(CannotUnpack):
            list(steps(broken, coding))
    assert unpack(packed[:-5], coding, 100) == (TEXT[:100], False)


@pytest.mark.parametrize("codings", ["compress", "aws-chunked", "gzip, nonsense", "gzip, gzip, gzip, gzip"])
def test_an_unknown_coding_is_refused(codings: str) -> None:
    with pytest.raises(CannotUnpack):
        list(steps(gzip.compress(TEXT), codings))


@pytest.mark.parametrize("coding", PACKERS)
def test_a_decompression_bomb_costs_no_more_than_the_steps_taken(coding: str) -> None:
    pack = (lambda data: brotli.compress(data, quality=1)) if coding == "br" else PACKERS[coding]
    pieces = steps(pack(bytes(16 << 20)), coding, 256 << 10)
    assert sum(len(next(pieces)) for _ in range(4)) <= 4 << 20
