"""Audio of the demo: a tone that it speaks, and speech that it detects in what a client sends.

Owns the input audio buffer of a Realtime session, of which only the length is kept, and the
detection of speech by loudness. All audio is PCM, 24 kHz, 16 bit, little-endian, mono. Which
events follow from it is decided in demo/realtime.py.
"""

from __future__ import annotations

import array
import math
import struct
import sys
from collections.abc import Iterator
from typing import Literal, NamedTuple

SAMPLE_RATE_HZ = 24_000
_BYTES_PER_MS = SAMPLE_RATE_HZ * 2 // 1000
_SLICE_BYTES = 100 * _BYTES_PER_MS
_LOUD = 1000
"""A sample beyond this is speech: 3 % of full scale."""
_EVERY_NTH_SAMPLE = 24
"""The loudness of 15 MiB, the largest append, is found in milliseconds this way."""


def tone(tenth: int) -> bytes:
    """The `tenth`th tenth of a second of a 440 Hz tone."""
    count = SAMPLE_RATE_HZ // 10
    step = 2 * math.pi * 440 / SAMPLE_RATE_HZ
    samples = (int(8000 * math.sin((tenth * count + at) * step)) for at in range(count))
    return struct.pack(f"<{count}h", *samples)


class SpeechEdge(NamedTuple):
    """Where speech begins or ends, in milliseconds of all audio that the session received."""

    kind: Literal["started", "stopped"]
    at_ms: int


class InputAudio:
    """The input audio buffer of a session."""

    def __init__(self) -> None:
        self._buffered_bytes = 0
        self._received_bytes = 0
        self._last_loud_ms: int | None = None
        """The end of the last loud slice of the current speech; None outside of speech."""

    @property
    def buffered_ms(self) -> int:
        """Audio since the last commit or clear."""
        return self._buffered_bytes // _BYTES_PER_MS

    @property
    def _received_ms(self) -> int:
        return self._received_bytes // _BYTES_PER_MS

    def append(self, pcm: bytes) -> None:
        """Add audio to the buffer."""
        self._buffered_bytes += len(pcm)
        self._received_bytes += len(pcm)

    def detect_speech(self, pcm: bytes, silence_ms: int) -> Iterator[SpeechEdge]:
        """Add audio to the buffer; yield where speech begins, and where `silence_ms` follow it."""
        for start in range(0, len(pcm), _SLICE_BYTES):
            part = pcm[start : start + _SLICE_BYTES]
            began_ms = self._received_ms
            self.append(part)
            if _is_loud(part):
                if self._last_loud_ms is None:
                    yield SpeechEdge("started", began_ms)
                self._last_loud_ms = self._received_ms
            elif self._last_loud_ms is not None:
                if self._received_ms - self._last_loud_ms >= silence_ms:
                    self._last_loud_ms = None
                    yield SpeechEdge("stopped", self._received_ms)

    def clear(self) -> None:
        """Empty the buffer. Speech ends with it."""
        self._buffered_bytes = 0
        self._last_loud_ms = None


def _is_loud(pcm: bytes) -> bool:
    samples = array.array("h", pcm[: len(pcm) & ~1])
    if sys.byteorder == "big":
        samples.byteswap()
    return any(abs(sample) >= _LOUD for sample in samples[::_EVERY_NTH_SAMPLE])
