"""A memo computes a result once and holds no more entries than its bound."""

from __future__ import annotations

import pytest

from relay.core.memo import BoundedMemo


def test_a_result_is_computed_once() -> None:
    computed: list[str] = []
    memo = BoundedMemo[str, int](lambda key: computed.append(key) or len(key), 10)
    assert [memo["abc"], memo["abc"], memo["d"]] == [3, 3, 1]
    assert computed == ["abc", "d"]


def test_a_result_of_none_is_remembered() -> None:
    computed: list[str] = []
    memo = BoundedMemo[str, None](computed.append, 10)
    assert memo["a"] is memo["a"] is None and computed == ["a"]


def test_a_memo_never_holds_more_than_its_bound() -> None:
    memo = BoundedMemo[int, int](lambda key: key + 1, 10)
    for key in range(1000):
        assert memo[key] == key + 1
        assert len(memo) <= 10


def test_an_error_is_raised_each_time_and_nothing_is_remembered() -> None:
    memo = BoundedMemo[str, int](int, 10)
    for _ in range(2):
        with pytest.raises(ValueError, match="abc"):
            memo["abc"]
    assert not memo
