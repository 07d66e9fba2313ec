"""Provide the event loop of the tests: uvloop's, which reports what a test left open.

uvloop warns of each open handle before it closes it. Where a warning is an error, the first one
skips the close of its handle, and the loop waits for that handle forever.
"""

from __future__ import annotations

import warnings

import uvloop


class StrictLoop(uvloop.Loop):
    """Closes everything, and only then warns of what was left open."""

    def close(self) -> None:
        """Close the loop. Raises the first warning of which the filters make an error."""
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            super().close()
        for each in found:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
