"""The deadline queue returns items by their deadlines and keeps nothing of removed items."""

from __future__ import annotations

import gc
import weakref

from relay.core.deadline_queue import DeadlineQueue


class Item:
    """An object that a weak reference can refer to."""


def test_due_items_are_taken_with_the_earliest_first() -> None:
    times: DeadlineQueue[str] = DeadlineQueue()
    for name, deadline_s in (("late", 3.0), ("early", 1.0), ("next", 2.0)):
        times.add(name, deadline_s)
    assert times.take_due(0.9) == []
    assert times.take_due(2.0) == ["early", "next"]
    assert times.take_due(2.0) == [], "an item is due once"
    assert "early" in times and len(times) == 3 and set(times) == {"late", "early", "next"}


def test_an_item_that_is_added_again_is_due_only_at_the_later_time() -> None:
    times: DeadlineQueue[str] = DeadlineQueue()
    times.add("a", 1.0)
    times.add("a", 5.0)
    assert times.take_due(4.0) == [] and times.take_due(5.0) == ["a"]


def test_an_item_that_was_discarded_is_never_due() -> None:
    times: DeadlineQueue[str] = DeadlineQueue()
    times.add("a", 1.0)
    times.discard("a")
    times.discard("never added")
    assert times.take_due(2.0) == [] and "a" not in times and len(times) == 0


def test_a_discarded_item_is_freed_at_once() -> None:
    times: DeadlineQueue[Item] = DeadlineQueue()
    item = Item()
    reference = weakref.ref(item)
    times.add(item, 1000.0)
    times.discard(item)
    gc.disable()
    try:
        del item
        assert reference() is None
    finally:
        gc.enable()


def test_items_that_are_added_and_discarded_do_not_grow_the_heap() -> None:
    times: DeadlineQueue[int] = DeadlineQueue()
    for number in range(10_000):
        times.add(number, 1000.0)
        times.discard(number)
    assert len(times._heap) < 200


def test_all_can_be_made_due_at_once() -> None:
    times: DeadlineQueue[str] = DeadlineQueue()
    times.add("a", 5.0)
    times.add("b", 1.0)
    times.discard("b")
    times.make_all_due()
    assert times.take_due(0.0) == ["a"]
