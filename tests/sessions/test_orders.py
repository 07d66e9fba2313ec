"""The money of responses that were ordered and have not ended."""

from __future__ import annotations

import pytest

from relay.core.meters.socket_meter import ResponseCounts
from relay.sessions.orders import ORDER_S, Orders


def ordered(*amounts: int) -> Orders:
    orders = Orders()
    for nano in amounts:
        orders.add(nano, 0.0)
    return orders


def test_a_response_keeps_the_price_of_its_order_until_it_ends() -> None:
    orders = ordered(700)
    orders.update(ResponseCounts(1, 1), 100, 1.0)
    assert orders.nano == 700
    orders.update(ResponseCounts(1, 0), 100, 2.0)
    assert orders.nano == 0


def test_the_end_of_one_of_several_frees_the_least() -> None:
    orders = ordered(700, 10, 300)
    orders.update(ResponseCounts(3, 2), 0, 1.0)
    assert orders.nano == 1000


def test_a_refusal_frees_the_least() -> None:
    """A cheap order that is refused on purpose does not free the money of a dear one."""
    orders = ordered(700, 10)
    orders.update(ResponseCounts(0, 0, refused=1), 0, 1.0)
    assert orders.nano == 700


def test_a_response_that_nobody_ordered_costs_what_the_next_may_cost() -> None:
    orders = Orders()
    orders.update(ResponseCounts(1, 1), 100, 1.0)
    assert orders.nano == 100


def test_a_response_that_began_in_the_place_of_an_ordered_one_leaves_the_price_of_the_order() -> None:
    orders = ordered(700)
    orders.update(ResponseCounts(2, 2), 100, 1.0)
    assert orders.nano == 1400


def test_an_order_that_does_not_begin_is_freed_after_a_minute() -> None:
    orders = ordered(700)
    orders.update(ResponseCounts(0, 0), 100, ORDER_S)
    assert orders.nano == 700
    orders.update(ResponseCounts(0, 0), 100, ORDER_S + 1)
    assert orders.nano == 0


def test_an_order_waits_for_as_long_as_the_provider_answers_others() -> None:
    orders = ordered(700, 700)
    for minute in range(1, 10):
        orders.update(ResponseCounts(1, 1), 100, minute * ORDER_S)
    orders.update(ResponseCounts(1, 0), 100, 10 * ORDER_S)
    assert orders.nano == 700


@pytest.mark.parametrize("running", [5000, 3, 0])
def test_many_orders_are_never_counted_for_less(running: int) -> None:
    amounts = list(range(5000))
    orders = ordered(*amounts)
    orders.update(ResponseCounts(5000, 5000), 0, 1.0)
    assert len(orders._amounts) <= 1000
    orders.update(ResponseCounts(5000, running), 0, 2.0)
    assert orders.nano >= sum(sorted(amounts)[5000 - running :]) and (running or not orders.nano)
