"""Handle the signals of a serving process, from its first statement on.

Owns the effect of a signal before the event loop runs. Until then nothing is served: SIGINT and
SIGTERM end the process without a traceback, and SIGHUP, by which a service manager requests a
reload, is remembered and does not end the process. This module imports no other module of the
relay, because it runs before the imports.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

_remembered: list[int] = []


def before_start() -> None:
    """Install the handlers for the time until `handle`; the first statement of the process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, lambda number, _frame: _remembered.append(number))


def handle(stop: Callable[[], None], hang_up: Callable[[], None]) -> None:
    """Handle signals in the running loop until it is closed.

    `stop` is called for each SIGTERM and SIGINT, `hang_up` for SIGHUP, also for one that arrived
    before.
    """
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop)
    loop.add_signal_handler(signal.SIGINT, stop)
    loop.add_signal_handler(signal.SIGHUP, hang_up)
    if _remembered:
        _remembered.clear()
        hang_up()
