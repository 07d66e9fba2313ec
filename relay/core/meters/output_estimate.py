"""Estimate the output of a response from its bytes, for a response that does not report it.

Owns how many tokens a text, base64 or an unknown event counts. The readers of the formats name the
fields of the output.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

from relay.core.fields import STRING_TEXT
from relay.core.meters.format_reader import FormatReader
from relay.core.usage import BYTES_PER_TOKEN, Usage

_WINDOW_BYTES = 32 * 1024
"""So many bytes are counted at once. Most responses are shorter and report their usage: they are
never searched."""
_WINDOWS_LIKE_LAST = 7
"""After two windows with about as much output in each, so many are not searched: that would cost a
long stream as much as the rest of its meter."""
_KEY_BYTES = 64
"""A key and the beginning of its value are shorter."""
_MAX_COUNTED_BYTES = 1024 * 1024
"""Of a longer rest only this much is searched, and the rest of it is taken to be like that."""
_IMAGE_TOKENS = 1290
"""Of an image from Gemini, whatever its size in bytes."""
_LONG_LINE_BYTES = 8 * 1024
_UNKNOWN_BYTES_A_TOKEN = 64
"""Of short lines, which may be deltas of an unknown kind: their JSON is far longer than a token."""
_LONG_BYTES_A_TOKEN = 1024
"""Of long lines, which are results of tools, images, or requests that are repeated."""
_SHORTEST_LINE_BYTES = 48
"""Shorter lines are comments, names of events and signs of life."""
_HEAD_BYTES = 2048
"""Events without output that begin a stream."""


class Output(NamedTuple):
    """Estimated output tokens, with those that may cost more than text."""

    tokens: int = 0
    audio_tokens: int = 0
    image_tokens: int = 0
    is_guess: bool = False
    """True if no output was recognized: the tokens are those that so many bytes may hold."""

    def usage(self, input_tokens: int) -> Usage:
        """Return a Usage with this output."""
        return Usage(
            input_tokens,
            self.tokens,
            output_audio_tokens=self.audio_tokens,
            output_image_tokens=self.image_tokens,
            estimated=True,
        )


class _Counts(NamedTuple):
    """What was counted in a response, in bytes but for the images."""

    texts: int = 0
    arguments: int = 0
    thoughts: int = 0
    seals: int = 0
    media: int = 0
    images: int = 0
    short_lines: int = 0
    long_lines: int = 0

    @property
    def found(self) -> int:
        """The bytes of output that were recognized."""
        return self.texts + self.arguments + self.seals + self.media

    def times(self, factor: float) -> _Counts:
        return _Counts(*(round(count * factor) for count in self))

    def __add__(self, other: _Counts) -> _Counts:  # type: ignore[override]
        return _Counts(*(mine + its for mine, its in zip(self, other, strict=True)))


def _are_alike(one: int, other: int) -> bool:
    return 0 < max(one, other) <= 2 * min(one, other)


class _Field:
    """Counts the bytes of the texts under some keys."""

    __slots__ = ("_find", "_rare", "is_inside")

    def __init__(self, *keys: bytes) -> None:
        self._find = _pattern(keys) if keys else None
        self._rare = keys[0].strip(b":") if len(keys) == 1 else b""
        """The only key: most pieces do not have it."""
        self.is_inside = False
        """True if the last piece ended within a text."""

    def bytes_in(self, piece: bytes) -> int:
        """Return the bytes of the texts in a piece of a response."""
        if self._find is None or (not self.is_inside and self._rare not in piece):
            return 0
        begun = self._begun(piece)
        return begun + sum(map(len, self._find.findall(piece, begun)))

    def read(self, piece: bytes) -> tuple[int, int]:
        """Count the texts in a piece that may end within one. Returns their bytes, and the end of
        the last one.
        """
        if self._find is None:
            return 0, 0
        text_bytes = end = self._begun(piece)
        for found in self._find.finditer(piece, end):
            end = found.end(1)
            text_bytes += end - found.start(1)
        # The backslash of an escape that is split is not matched.
        self.is_inside = bool(end) and piece[end:] in (b"", b"\\")
        return text_bytes, end

    def _begun(self, piece: bytes) -> int:
        rest = _TEXT.match(piece) if self.is_inside else None
        return rest.end() if rest is not None else 0


_TEXT = re.compile(STRING_TEXT, re.DOTALL)


@cache
def _pattern(keys: tuple[bytes, ...]) -> re.Pattern[bytes]:
    """Return a search for texts under keys such as `"content":`. There is one for each format."""
    names = b"|".join(re.escape(key.strip(b'":')) for key in keys)
    text = rb'"(?:' + names + rb')"\s*:\s*"(' + STRING_TEXT + rb")"
    return re.compile(text, re.DOTALL)


_MEMBERS = rb'(?>[^{}"]++|"' + STRING_TEXT + rb'"?+|\{%b\})*+'
_ARGUMENTS = re.compile(
    rb'"(?:args|arguments)"\s*:\s*\{(' + _MEMBERS % (_MEMBERS % rb'[^{}"]*+') + rb")", re.DOTALL
)
_IMAGES = re.compile(rb'"mime_?[tT]ype"\s*:\s*"image/')


class OutputEstimator:
    """Counts the output in the chunks of a response, wherever in the response it is: neither a long
    head nor the result of a tool changes the estimate.
    """

    __slots__ = (
        "_counts", "_has_events", "_held", "_held_bytes", "_last", "_like_last", "_media",
        "_media_characters", "_seals", "_texts", "_thoughts",
    )  # fmt: skip

    def __init__(self, reader: FormatReader, has_events: bool) -> None:
        """`has_events` is true for a response of server-sent events."""
        self._has_events = has_events
        self._texts = _Field(*((has_events and reader.stream_texts) or reader.texts))
        self._seals = _Field(*reader.seals)
        self._thoughts = _Field(*(reader.thoughts if reader.seals else ()))
        self._media = _Field(*((_DATA,) if reader.media_characters else ()))
        self._media_characters = reader.media_characters
        self._counts = self._last = _Counts()
        self._like_last = 0
        """How many windows are taken to be like the last one that was counted."""
        self._held: list[bytes] = []
        self._held_bytes = 0

    def feed(self, chunk: bytes) -> None:
        """Observe one chunk."""
        if self._held_bytes >= _WINDOW_BYTES:
            self._count_held()
        self._held.append(chunk)
        self._held_bytes += len(chunk)

    def _count_held(self) -> None:
        """Count what is held, up to the end of a line if that is near."""
        if self._like_last:
            self._like_last -= 1
            self._counts += self._last.times(self._held_bytes / _WINDOW_BYTES)
            self._held, self._held_bytes = [], 0
            return
        held = b"".join(self._held)
        cut = held.rfind(b"\n") + 1
        if ends_with_line := len(held) - cut < _WINDOW_BYTES // 2:
            counts = self._in(held[:cut])
            for field in self._fields:
                field.is_inside = False
        else:
            counts, cut = self._in_part_of_line(held)
        if not counts.found:
            counts = counts._replace(**self._lines(held[:cut]))
        self._counts += counts
        self._held, self._held_bytes = [held[cut:]], len(held) - cut
        last, self._last = self._last, counts.times(_WINDOW_BYTES / max(1, cut))
        is_steady = ends_with_line and self._has_events and not counts.media
        if is_steady and _are_alike(last.found, self._last.found):
            self._like_last = _WINDOWS_LIKE_LAST

    @property
    def _fields(self) -> tuple[_Field, ...]:
        return self._texts, self._thoughts, self._seals, self._media

    def _in(self, piece: bytes) -> _Counts:
        texts, thoughts, seals, media = (field.bytes_in(piece) for field in self._fields)
        return _Counts(texts, self._arguments(piece), thoughts, seals, media, self._images(piece))

    def _in_part_of_line(self, piece: bytes) -> tuple[_Counts, int]:
        """Count a piece that ends anywhere. Returns also where the next one begins."""
        (texts, thoughts, seals, media), ends = zip(
            *(field.read(piece) for field in self._fields), strict=True
        )
        cut = max(ends)
        if not any(field.is_inside for field in self._fields):
            cut = max(cut, len(piece) - _KEY_BYTES)  # a key may be split
        before = piece[:cut]
        arguments, images = self._arguments(before), self._images(before)
        return _Counts(texts, arguments, thoughts, seals, media, images), cut

    def _arguments(self, piece: bytes) -> int:
        return sum(map(len, _ARGUMENTS.findall(piece))) if b'"arg' in piece else 0

    def _images(self, piece: bytes) -> int:
        return len(_IMAGES.findall(piece)) if self._media_characters else 0

    def _lines(self, piece: bytes) -> dict[str, int]:
        """Return the bytes of the lines of events in which nothing was recognized."""
        if not self._has_events:
            return {}
        lengths = [len(line) for line in piece.split(b"\n")]
        short = [length for length in lengths if _SHORTEST_LINE_BYTES < length <= _LONG_LINE_BYTES]
        long = [length for length in lengths if length > _LONG_LINE_BYTES]
        return {"short_lines": sum(short), "long_lines": sum(long)}

    @property
    def output(self) -> Output:
        """The estimate so far."""
        held = b"".join(self._held)
        piece = held[:_MAX_COUNTED_BYTES]
        counts = self._in(piece)
        if not (counts.found or self._counts.found):
            counts = counts._replace(**self._lines(piece))
        if len(held) > len(piece):
            counts = counts.times(len(held) / len(piece))
        return self._output(self._counts + counts)

    def _output(self, counts: _Counts) -> Output:
        # A seal is the encryption of the thoughts, of which the text may be a summary.
        sealed_bytes = max(0, counts.seals * 3 // 4 - counts.thoughts)
        text_bytes = counts.texts + counts.arguments + sealed_bytes
        text = max(1, round(text_bytes / BYTES_PER_TOKEN)) if text_bytes else 0
        images = counts.images * _IMAGE_TOKENS if counts.media else 0
        audio = -(-counts.media // self._media_characters) if counts.media and not images else 0
        unknown = max(0, counts.short_lines - _HEAD_BYTES) // _UNKNOWN_BYTES_A_TOKEN
        unknown += counts.long_lines // _LONG_BYTES_A_TOKEN
        return Output(text + audio + images + unknown, audio, images, not counts.found)


_DATA = b'"data":'
