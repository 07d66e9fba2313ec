"""Call /healthz every few milliseconds until stdin ends. usage: probe.py PORT

Then it prints the longest response time in ms and the number of responses. It is a separate
process, so that it measures pauses of the relay and not those of the program that creates the
load.
"""

import contextlib
import os
import select
import socket
import sys
import time

PAUSE_S = 0.003
PATIENCE_S = 20.0
REQUEST = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def main():
    with contextlib.suppress(PermissionError):
        os.nice(-10)
    longest, count = 0.0, 0
    connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=PATIENCE_S)
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], PAUSE_S)[0]:
        began = time.monotonic()
        try:
            connection.sendall(REQUEST)
            alive = connection.recv(65536).startswith(b"HTTP/1.1 200")
        except TimeoutError:
            alive = False
        longest, count = max(longest, time.monotonic() - began), count + 1
        if not alive:
            longest = max(longest, PATIENCE_S)
            break
    print(f"{longest * 1e3:.1f} {count}", flush=True)


if __name__ == "__main__":
    main()
