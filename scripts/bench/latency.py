"""Measure the latency that a relay adds to each SSE chunk. usage: latency.py URL

Each event contains the time at which the provider wrote it.
"""

import asyncio
import re
import sys
import time

import aiohttp
import uvloop


async def stream(session, url, latencies_ns):
    async with session.get(url) as answer:
        async for chunk in answer.content.iter_any():
            now = time.monotonic_ns()
            latencies_ns += [now - int(t) for t in re.findall(rb'"t":(\d+)', chunk)]


async def main():
    latencies_ns: list[int] = []
    async with aiohttp.ClientSession() as session:
        await asyncio.gather(
            *(stream(session, sys.argv[1] + "?n=300&d=10", latencies_ns) for _ in range(8))
        )
    latencies_ns.sort()
    print(f"{latencies_ns[len(latencies_ns) // 2] / 1e6:.3f} {latencies_ns[int(len(latencies_ns) * 0.99)] / 1e6:.3f}")


uvloop.run(main())
