"""Bounds on the work of a call, for tests that refuse quadratic or unbounded work."""

from __future__ import annotations

import time
from collections.abc import Callable

ATTEMPTS = 10


def assert_cheap(call: Callable[[], object], bound_s: float) -> None:
    """Fail if `call` takes `bound_s` of this thread's own CPU time in every attempt.

    The bound is ten times what the call needs, and work that grows with the square of the input
    needs a hundred times as much. One attempt below the bound is enough: a busy machine makes some
    attempts slow, never all of a call that does little.
    """
    spent_s = []
    for _ in range(ATTEMPTS):
        began_s = time.thread_time()
        call()
        spent_s.append(time.thread_time() - began_s)
        if spent_s[-1] < bound_s:
            return
    raise AssertionError(f"the least of {ATTEMPTS} attempts took {min(spent_s):.3f} s, {bound_s} allowed")
