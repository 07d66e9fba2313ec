"""Options of TCP connections.

Owns: the probes by which the system finds out that the other end of a silent connection is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

_PROBE_EACH_S = 10
_PROBES = 3


def probe_when_idle(transport: asyncio.BaseTransport, after_s: int) -> None:
    """Let the system probe the other end when nothing came for `after_s`, again every 10 s, and
    reset the connection if three probes are not answered.
    """
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):  # closed already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", after_s), ("TCP_KEEPINTVL", _PROBE_EACH_S), ("TCP_KEEPCNT", _PROBES),
        ):  # fmt: skip
            if hasattr(socket, name):  # macOS calls the first another name
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
