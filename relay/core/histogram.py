"""Histograms of durations with logarithmic buckets, and percentiles computed from them.

Owns the buckets and the packed histogram: one integer with 32 bits for each bucket of each measure.
The sum of two such integers is the merged histogram, across rows and processes too.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate
from math import ceil

BUCKETS = 48
"""Two buckets per octave, from 1/16 ms to about 12 minutes."""
MIN_MS = 1 / 16
BUCKET_BITS = 32
MEASURES = ("duration", "first_byte", "overhead")
_all_buckets = struct.Struct(f"<{len(MEASURES) * BUCKETS}I")
_one_measure = struct.Struct(f"<{BUCKETS}I")
_ALL = (1 << (BUCKET_BITS * BUCKETS)) - 1
_UPPER = [MIN_MS * 2 ** (number / 2) for number in range(BUCKETS)]
_BOUNDS = _UPPER[:-1]
_ONES = tuple(1 << (BUCKET_BITS * at) for at in range(BUCKETS))


def bound_ms(number: int) -> float:
    """Return the upper bound of a bucket, in milliseconds."""
    return _UPPER[number]


def build_histogram(
    durations: Iterable[float], first_bytes: Iterable[float], overheads: Iterable[float]
) -> int:
    """Return the packed histogram of some calls, from their times in milliseconds."""
    packed = 0
    for at, times in enumerate((durations, first_bytes, overheads)):
        buckets = sum([_ONES[bisect_left(_BOUNDS, ms)] for ms in times])
        packed += buckets << (BUCKET_BITS * BUCKETS * at)
    return packed


def bucket_counts(packed: int) -> dict[str, tuple[int, ...]]:
    """Return the count of each bucket, by measure."""
    buckets = _all_buckets.unpack(packed.to_bytes(_all_buckets.size, "little"))
    return {name: buckets[at * BUCKETS :][:BUCKETS] for at, name in enumerate(MEASURES)}


def percentiles(packed: int, measure: str, wanted: Iterable[float]) -> dict[str, float] | None:
    """Return `{"p50": ms, …}`, with three digits; None if nothing was counted.

    Each is the nearest-rank percentile, where the values of a bucket are taken as evenly spread
    between its bounds. The bounds differ by a factor of 1.41: the error is at most 21 % for a
    single value of a bucket, and less for many.
    """
    at = BUCKET_BITS * BUCKETS * MEASURES.index(measure)
    found = _one_measure.unpack(((packed >> at) & _ALL).to_bytes(_one_measure.size, "little"))
    passed = list(accumulate(found))
    if not passed[-1]:
        return None
    made = {}
    for share in wanted:
        rank = max(1, ceil(passed[-1] * share / 100))
        number = bisect_left(passed, rank)
        below = _UPPER[number - 1] if number else 0.0
        within = (rank - passed[number] + found[number] - 0.5) / found[number]
        made[f"p{share:g}"] = float(f"{below + (_UPPER[number] - below) * within:.3g}")
    return made


def to_bytes(packed: int) -> bytes:
    """Encode a packed histogram for storage: little-endian, without trailing empty buckets."""
    return packed.to_bytes((packed.bit_length() + 7) // 8, "little")


def from_bytes(stored: bytes) -> int:
    """Decode a stored histogram."""
    return int.from_bytes(stored, "little")
