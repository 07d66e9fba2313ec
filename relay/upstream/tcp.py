"""Set options of TCP connections.

Owns the keep-alive probes by which the system detects that the peer of a silent connection is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

_PROBE_EACH_S = 10
_PROBES = 3


def probe_when_idle(transport: asyncio.BaseTransport, after_s: int) -> None:
    """Let the system probe the peer when nothing was received for `after_s`, then every 10 s, and
    reset the connection if three probes get no answer.
    """
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):  # the socket may be closed already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", after_s), ("TCP_KEEPINTVL", _PROBE_EACH_S), ("TCP_KEEPCNT", _PROBES),
        ):  # fmt: skip
            if hasattr(socket, name):  # macOS has another name for the first option
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
