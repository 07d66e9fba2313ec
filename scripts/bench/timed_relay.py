"""Run `relay` and measure the CPU time of each callback of its event loop.

usage: timed_relay.py FILE ARGUMENTS…

The relay runs on the event loop of asyncio, where each callback is a Python call that can be
wrapped, also those that read a socket; uvloop runs these from C. The work in the callbacks is the
same. SIGUSR1 resets the measurement; SIGUSR2 writes the longest callback to FILE, as JSON.
"""

import asyncio
import json
import os
import signal
import sys
import time

import uvloop

from relay.cli.main import main

_run = asyncio.events.Handle._run
longest_s, longest = 0.0, ""


def timed(handle):
    global longest_s, longest
    started_s = time.thread_time()
    _run(handle)
    duration_s = time.thread_time() - started_s
    if duration_s > longest_s:
        longest_s, longest = duration_s, name(handle)


def name(handle):
    """The name of the coroutine or function that a callback ran."""
    owner = getattr(handle._callback, "__self__", None)
    return owner.get_coro().__qualname__ if isinstance(owner, asyncio.Task) else repr(handle)[:200]


def reset(*_):
    global longest_s, longest
    longest_s, longest = 0.0, ""


def write(*_):
    with open(f"{file}.part", "w") as out:
        json.dump({"longest_s": longest_s, "callback": longest}, out)
    os.replace(f"{file}.part", file)


file = sys.argv[1]
asyncio.events.Handle._run = timed
uvloop.run = asyncio.run
signal.signal(signal.SIGUSR1, reset)
signal.signal(signal.SIGUSR2, write)
sys.exit(main(sys.argv[2:]))
