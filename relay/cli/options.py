"""Types of command-line options: numbers, parsed strictly and within bounds."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from relay.core.budgets import nano_of_text
from relay.core.numbers import whole_number
from relay.core.text import quoted


def whole(least: int, most: int) -> Callable[[str], int]:
    """Return the type of an option that is a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        number = whole_number(text, least, most)
        if number is None:
            raise argparse.ArgumentTypeError(
                f"'{quoted(text)}' is not a whole number from {least} to {most}"
            )
        return number

    return parse


def nano_usd(text: str) -> int:
    """The type of an option that is an amount of money in US dollars; returns nano-dollars."""
    try:
        return nano_of_text(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{quoted(text)}' {error}") from None
