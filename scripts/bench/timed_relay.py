"""`relay` with the CPU time of every callback of its event loop measured. usage: timed_relay.py FILE ARGUMENTS…

It runs on asyncio's own loop: there each callback is a Python call that can be wrapped, those that
read a socket included, which uvloop runs from C. The work within them is the same. SIGUSR1 begins
anew; SIGUSR2 writes the longest callback to FILE, as JSON.
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
    began = time.thread_time()
    _run(handle)
    took = time.thread_time() - began
    if took > longest_s:
        longest_s, longest = took, name(handle)


def name(handle):
    """The coroutine whose turn it was, or the function."""
    owner = getattr(handle._callback, "__self__", None)
    return owner.get_coro().__qualname__ if isinstance(owner, asyncio.Task) else repr(handle)[:200]


def begin(*_):
    global longest_s, longest
    longest_s, longest = 0.0, ""


def write(*_):
    with open(f"{file}.part", "w") as out:
        json.dump({"longest_s": longest_s, "callback": longest}, out)
    os.replace(f"{file}.part", file)


file = sys.argv[1]
asyncio.events.Handle._run = timed
uvloop.run = asyncio.run
signal.signal(signal.SIGUSR1, begin)
signal.signal(signal.SIGUSR2, write)
sys.exit(main(sys.argv[2:]))
