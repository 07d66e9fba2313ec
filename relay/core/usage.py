"""How many tokens a call uses: estimated before it is sent, read from its answer afterwards.

Owns: both readings, of the formats that say `usage` or `usageMetadata` (OpenAI and what is like it,
Anthropic, Gemini). Nothing here changes a byte or raises.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeGuard

import msgspec

BYTES_A_TOKEN = 4
_MAX_OBJECT_BYTES = 4 * 1024
_MAX_DECODED_BYTES = 64 * 1024 * 1024
_NEEDLE = re.compile(rb'"usage(?:Metadata)?"\s*:\s*\{')
_LONGEST_NEEDLE = 48
"""A needle that is cut between two chunks begins in so many bytes of the first."""


class _Generation(msgspec.Struct):
    maxOutputTokens: Any = None


class _Bounds(msgspec.Struct):
    """The fields by which a call bounds its answer."""

    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    generationConfig: Any = None
    n: Any = None


_bounds = msgspec.json.Decoder(_Bounds)


class Estimate(NamedTuple):
    """What a call may use, before it is sent."""

    input_tokens: int = 0
    bound: int | None = None
    """Of each answer, if the call names one."""
    answers: int = 1

    def tokens(self, answer_tokens: int) -> int:
        """All of it; `answer_tokens` stands for the bound of a call that names none."""
        bound = answer_tokens if self.bound is None else self.bound
        return self.input_tokens + bound * self.answers


def estimate(body: bytes) -> Estimate:
    """Of a request body, at four bytes a token."""
    try:
        asked = _bounds.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        asked = _Bounds()
    config = asked.generationConfig
    bounds = (
        asked.max_completion_tokens,
        asked.max_tokens,
        asked.max_output_tokens,
        config.get("maxOutputTokens") if isinstance(config, dict) else None,
    )
    bound = next((each for each in bounds if _is_count(each)), None)
    return Estimate(len(body) // BYTES_A_TOKEN, bound, asked.n if _is_count(asked.n) else 1)


def _is_count(given: Any) -> TypeGuard[int]:
    return isinstance(given, int) and not isinstance(given, bool) and 0 < given < 1 << 31


class Usage(NamedTuple):
    """Tokens of one call, as its provider counted them."""

    input_tokens: int
    output_tokens: int

    @property
    def tokens(self) -> int:
        """Both."""
        return self.input_tokens + self.output_tokens


class _Said(msgspec.Struct):
    """One usage object, whoever wrote it. Fields that are no counts are None."""

    prompt_tokens: Any = None
    completion_tokens: Any = None
    input_tokens: Any = None
    output_tokens: Any = None
    cache_creation_input_tokens: Any = None
    cache_read_input_tokens: Any = None
    promptTokenCount: Any = None
    candidatesTokenCount: Any = None
    thoughtsTokenCount: Any = None


_said = msgspec.json.Decoder(_Said)
_INPUT = (
    ("prompt_tokens",),
    ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"),
    ("promptTokenCount",),
)
_OUTPUT = (
    ("completion_tokens",),
    ("output_tokens",),
    ("candidatesTokenCount", "thoughtsTokenCount"),
)


class TokenMeter:
    """Reads an answer as it passes, however its bytes are cut. `usage` is what was last said."""

    __slots__ = ("_held", "_input", "_output", "_unpack", "_unpacked_bytes")

    def __init__(self, content_encoding: str = "") -> None:
        self._held = b""
        self._input: int | None = None
        self._output: int | None = None
        self._unpack = _unpacker(content_encoding)
        self._unpacked_bytes = 0

    @property
    def usage(self) -> Usage | None:
        """None while nothing was said."""
        if self._input is None and self._output is None:
            return None
        return Usage(self._input or 0, self._output or 0)

    def feed(self, chunk: bytes) -> None:
        """Look at one chunk."""
        if self._unpack is not None:
            chunk = self._unpacked(chunk)
        text = self._held + chunk
        at = 0
        while (found := _NEEDLE.search(text, at)) is not None:
            end = _end_of_object(text, found.end() - 1)
            if end is None:
                start = found.start()
                self._held = text[start:] if len(text) - start <= _MAX_OBJECT_BYTES else b""
                return
            self._read(text[found.end() - 1 : end])
            at = end
        self._held = text[max(at, len(text) - _LONGEST_NEEDLE) :]

    def _unpacked(self, chunk: bytes) -> bytes:
        assert self._unpack is not None
        room = _MAX_DECODED_BYTES - self._unpacked_bytes
        try:
            text = self._unpack.decompress(chunk, max(room, 1)) if room > 0 else b""
        except zlib.error:
            self._unpacked_bytes = _MAX_DECODED_BYTES
            return b""
        self._unpacked_bytes += len(text)
        return text

    def _read(self, text: bytes) -> None:
        try:
            said = _said.decode(text)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            return
        self._input = _sum(said, _INPUT, self._input)
        self._output = _sum(said, _OUTPUT, self._output)


def _sum(said: _Said, spellings: tuple[tuple[str, ...], ...], before: int | None) -> int | None:
    """The count of the first spelling that is there; `before` if none is."""
    for names in spellings:
        values: list[int] = [n for name in names if _is_number(n := getattr(said, name))]
        if _is_number(getattr(said, names[0])):
            return sum(values)
    return before


def _is_number(given: Any) -> TypeGuard[int]:
    return isinstance(given, int) and not isinstance(given, bool) and given >= 0


def _end_of_object(text: bytes, start: int) -> int | None:
    """Behind the brace that closes the one at `start`; None if it has not come yet."""
    depth = 0
    for found in _BRACES.finditer(text, start):
        if found[1] == b"":
            return None  # within a text
        depth += 1 if found[0] == b"{" else -1 if found[0] == b"}" else 0
        if depth == 0:
            return found.end()
    return None


_BRACES = re.compile(rb'[{}]|"(?:[^"\\]|\\.)*("?)', re.DOTALL)
"""Braces, and texts, whose braces do not count."""


def readable_encodings(accepted: Iterable[str]) -> str:
    """Of what a client accepts, what the meter reads too: an answer in another coding would not
    be counted.
    """
    named = [item.strip() for value in accepted for item in value.lower().split(",")]
    kept = [item for item in named if item.partition(";")[0].strip() in _READ]
    return ", ".join(kept) or "identity"


_READ = frozenset({"gzip", "x-gzip", "deflate", "identity"})


def _unpacker(content_encoding: str) -> Any:
    if content_encoding in ("gzip", "x-gzip", "deflate"):
        return zlib.decompressobj(wbits=47)  # either header
    return None
