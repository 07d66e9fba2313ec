"""How times are spread: counts in log-spaced buckets, from which percentiles are read.

Owns: the buckets, and a Spread: one integer with a lane of 32 bits for each bucket of each measure.
Two of them are put together by adding them, whether in Python or from another process's row.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate

BUCKETS = 48
"""Two an octave, from 1/16 ms to some 17 minutes."""
LEAST_MS = 1 / 16
LANE_BITS = 32
MEASURES = ("duration", "first_byte", "overhead")
_lanes = struct.Struct(f"<{len(MEASURES) * BUCKETS}I")
_measure = struct.Struct(f"<{BUCKETS}I")
_ALL = (1 << (LANE_BITS * BUCKETS)) - 1
_UPPER = [LEAST_MS * 2 ** (number / 2) for number in range(BUCKETS)]
_BOUNDS = _UPPER[:-1]
_ONES = tuple(1 << (LANE_BITS * at) for at in range(BUCKETS))


def bucket(ms: float) -> int:
    """The bucket of a time in ms: the first whose bound is not below it."""
    return bisect_left(_BOUNDS, ms)


def bound_ms(number: int) -> float:
    """The upper bound of a bucket."""
    return _UPPER[number]


def spread(
    durations: Iterable[float], first_bytes: Iterable[float], overheads: Iterable[float]
) -> int:
    """The Spread of some calls, from the times in ms that they have of each measure."""
    whole = 0
    for at, times in enumerate((durations, first_bytes, overheads)):
        lanes = sum([_ONES[bisect_left(_BOUNDS, ms)] for ms in times])
        whole += lanes << (LANE_BITS * BUCKETS * at)
    return whole


def counts(whole: int) -> dict[str, tuple[int, ...]]:
    """How many there are in each bucket, by measure."""
    lanes = _lanes.unpack(whole.to_bytes(_lanes.size, "little"))
    return {name: lanes[at * BUCKETS :][:BUCKETS] for at, name in enumerate(MEASURES)}


def percentiles(whole: int, measure: str, wanted: Iterable[float]) -> dict[str, float] | None:
    """`{"p50": ms, …}`, each exact to a bucket's width (the square root of two) and laid straight
    between its bounds; None if nothing was counted.
    """
    at = LANE_BITS * BUCKETS * MEASURES.index(measure)
    found = _measure.unpack(((whole >> at) & _ALL).to_bytes(_measure.size, "little"))
    passed = list(accumulate(found))
    if not passed[-1]:
        return None
    made = {}
    for share in wanted:
        rank = passed[-1] * share / 100
        number = bisect_left(passed, rank)
        below = _UPPER[number - 1] if number else 0.0
        within = (rank - passed[number] + found[number]) / found[number]
        made[f"p{share:g}"] = round(below + (_UPPER[number] - below) * within, 2)
    return made


def to_bytes(whole: int) -> bytes:
    """As it is stored: little-endian, without the empty lanes at its end."""
    return whole.to_bytes((whole.bit_length() + 7) // 8, "little")


def from_bytes(stored: bytes) -> int:
    """The other way."""
    return int.from_bytes(stored, "little")
