"""Signals of a serving process, from its first statement on.

Owns: what a signal does before the event loop handles it. Until then nothing is served: SIGINT and
SIGTERM end the process without a traceback, and SIGHUP, by which a service manager asks for a
reload, is remembered instead of ending it. Imports nothing of ours, for it runs before anything is
imported.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

_remembered: list[int] = []


def before_start() -> None:
    """Call it first of all."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, lambda number, _frame: _remembered.append(number))


def handle(stop: Callable[[], None], hang_up: Callable[[], None]) -> None:
    """Let the running loop handle them until it is closed: `stop` for each SIGTERM and SIGINT,
    `hang_up` for SIGHUP, one that came before included.
    """
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop)
    loop.add_signal_handler(signal.SIGINT, stop)
    loop.add_signal_handler(signal.SIGHUP, hang_up)
    if _remembered:
        _remembered.clear()
        hang_up()
