"""Whether the process has file descriptors left.

Owns: that look, and the line in the log. The event loop drops new connections without a word when
there are none.
"""

from __future__ import annotations

import errno
import os
import resource

from relay.ledger import log


class Files:
    """Logs once that none are left, and once that there are some again."""

    def __init__(self) -> None:
        self._exhausted = False

    def look(self) -> None:
        """Try to open two, as a WebSocket session does."""
        try:
            for descriptor in os.pipe():
                os.close(descriptor)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            if not self._exhausted:
                limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
                log.warn("files.exhausted", limit=limit, cause=os.strerror(error.errno))
            self._exhausted = True
        else:
            if self._exhausted:
                log.event("files.available")
            self._exhausted = False
