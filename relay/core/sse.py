"""Where an SSE stream stands: at an event boundary, or inside an event (WHATWG HTML, 9.2.5).

Owns: just that question. The relay never parses or rebuilds the events that it passes on.
"""

from __future__ import annotations

_BOUNDARIES = (b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n", b"\r\n\n")


def at_boundary(tail: bytes) -> bool:
    """True if an event may follow a stream whose last bytes (four or more, or all of it) are
    `tail`.

    True too where nothing has passed yet.
    """
    return not tail or tail.endswith(_BOUNDARIES)
