"""What `relay doctor` finds, and how it is printed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Literal

from relay.core.text import escaped

_TEXT_CHARS = 500
"""The most of a provider's own words that is shown."""
_RESULT_CHARS = len("not tried")

Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one probe. `cause` and `advice` belong to a failure."""

    result: Literal["ok", "FAILED", "not tried"]
    what: str
    cause: str = ""
    advice: str = ""


def report(name: str, finding: Finding, say: Say) -> None:
    """Say a finding, with what to do in a line of its own."""
    what, result = escaped(finding.what[:_TEXT_CHARS]), f"{finding.result:<{_RESULT_CHARS}}"
    if finding.result == "FAILED":
        say(f"{name}  {result}  {what}  [{finding.cause}]")
        say(f"{' ' * len(name)}  {' ' * _RESULT_CHARS}  to do: {escaped(finding.advice)}")
    else:
        say(f"{name}  {result}  {what}")


def elapsed_ms(began: float) -> str:
    """The time since `began`, as it is shown."""
    return f"{(monotonic() - began) * 1e3:.0f} ms"
