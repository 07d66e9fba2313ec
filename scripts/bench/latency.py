"""Latency that a relay adds to each SSE chunk: every event carries the time it was written. usage: latency.py URL"""

import asyncio
import re
import sys
import time

import aiohttp
import uvloop


async def stream(session, url, late):
    async with session.get(url) as answer:
        async for chunk in answer.content.iter_any():
            now = time.monotonic_ns()
            late += [now - int(t) for t in re.findall(rb'"t":(\d+)', chunk)]


async def main():
    late: list[int] = []
    async with aiohttp.ClientSession() as session:
        await asyncio.gather(
            *(stream(session, sys.argv[1] + "?n=300&d=10", late) for _ in range(8))
        )
    late.sort()
    print(f"{late[len(late) // 2] / 1e6:.3f} {late[int(len(late) * 0.99)] / 1e6:.3f}")


uvloop.run(main())
