"""Render log lines for a person: one line a call or session, one line an event.

Owns the layout, the colours, and the word that says how a call ended. It writes nothing
(log_output.py), and JSON lines are made in log.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TextIO

from relay.core.errors import CATALOGUE, InternalError
from relay.core.pricing import usd_text
from relay.core.record import Record
from relay.core.text import escaped
from relay.core.usage import Usage

Ending = Literal[
    "ok", "client error", "client left", "refused", "cut", "relay failed", "provider failed"
]  # fmt: skip
"""How a call ended: `client error` is a 4xx of the provider's that the client can put right;
`refused` is the relay's own decision, such as a limit, an unknown name or a missing key; `cut` is
one about a response or session that had begun, such as the end of a drain."""

_RESET = "\x1b[0m"
COLOURS: Mapping[str, str] = {
    "ok": "\x1b[32m",
    "client error": "\x1b[33m",
    "client left": "\x1b[33m",
    "refused": "\x1b[35m",
    "cut": "\x1b[35m",
    "relay failed": "\x1b[31m",
    "provider failed": "\x1b[31m",
    "debug": "\x1b[2m",
    "info": "\x1b[36m",
    "warning": "\x1b[33m",
    "error": "\x1b[31m",
}
PLAIN: Mapping[str, str] = {}

_LABEL_CHARS = max(map(len, COLOURS))
_SIDES = {error.code: error.side for error in CATALOGUE}
_FIRST_ERROR_STATUS = 400
_OPERATOR_STATUSES = frozenset({401, 402, 403, 429})
"""Statuses of a provider that concern the relay's key or account there."""
_MINUTE_MS = 60_000


def colours_for(stream: TextIO, environment: Mapping[str, str]) -> Mapping[str, str]:
    """COLOURS for a terminal; PLAIN for a pipe or file, or where NO_COLOR (no-color.org) is set to
    anything but the empty string.
    """
    if not stream.isatty() or environment.get("NO_COLOR") or environment.get("TERM") == "dumb":
        return PLAIN
    return COLOURS


class PrettyLines:
    """Renders records and events. `colours` is COLOURS or PLAIN."""

    def __init__(self, colours: Mapping[str, str]) -> None:
        self._colours = colours

    def render_event(self, _logger: Any, level: str, event: Mapping[str, Any]) -> bytes:
        """The line of an event, as structlog's last processor; a traceback follows it, indented."""
        fields = dict(event)
        name, traceback = str(fields.pop("event")), fields.pop("traceback", None)
        texts = (f"{field}={_value(value)}" for field, value in fields.items())
        line = self._line(level, "  ".join([name, *texts]))
        if traceback is not None:
            line += b"".join(
                _encoded(f"\n    {escaped(each)}") for each in str(traceback).splitlines()
            )
        return line

    def render_record(self, record: Record) -> bytes:
        """The line of a call or session that ended."""
        return self._line(ending_of(record), "  ".join(_parts(record)))

    def _line(self, label: str, text: str) -> bytes:
        colour = self._colours.get(label)
        shown = f"{label:<{_LABEL_CHARS}}"
        if colour is not None:
            shown = f"{colour}{shown}{_RESET}"
        now = time.strftime("%H:%M:%S", time.localtime())
        return _encoded(f"{now}  {shown}  {escaped(text)}")


def ending_of(record: Record) -> Ending:
    """How a call ended, judged by its error, its outcome and its status."""
    if record.outcome == "client_gone":
        return "client left"
    if record.error is not None:
        if _SIDES.get(record.error) == "upstream":
            return "provider failed"
        if record.error == InternalError.code:
            return "relay failed"
        return "cut" if 0 < record.status < _FIRST_ERROR_STATUS else "refused"
    if record.status >= 500 or record.status in _OPERATOR_STATUSES or record.outcome == "failed":
        return "provider failed"
    return "client error" if record.status >= 400 else "ok"


def _parts(record: Record) -> Iterable[str]:
    is_session = record.transport == "websocket"
    target = f"{record.provider}/{record.endpoint}".removesuffix("/")
    yield f"{'WS' if is_session else record.method} {target}"
    yield str(record.status or "-")
    if models := _models(record.model, record.model_answered):
        yield models
    yield _duration(record.duration_ms)
    if is_session and record.messages_up is not None:
        yield f"{record.messages_up} up, {record.messages_down} down"
    if is_session and record.close_code is not None:
        yield f"closed {record.close_code}" + (
            f" by {record.closed_by}" if record.closed_by else ""
        )
    if record.usage is not None:
        yield _used(record.usage)
        yield _cost(record.usage, record.cost_nano_usd)
    if fallback := _fallback(record):
        yield f"fallback {fallback}"
    if record.outcome == "cached":
        yield "cached"
    if record.error is not None:
        yield record.error if record.cause is None else f"{record.error}: {record.cause}"


def _models(requested: str | None, answered: str | None) -> str:
    """Both names, or the longer one where it is the other's with a date or version behind it."""
    if requested and answered and not answered.startswith(requested):
        return f"{requested} → {answered}"
    return answered or requested or ""


def _fallback(record: Record) -> str:
    """The targets of a call in their order, such as `openai → anthropic`; empty if it had one."""
    attempts = record.attempts or ()
    last = record.answered_by or record.provider
    providers = [*(attempt.provider for attempt in attempts), last]
    ways = [*(attempt.via for attempt in attempts), record.via]
    if len(set(providers)) > 1 or record.answered_by is not None:
        steps = providers if attempts else [record.provider, last]
    else:
        steps = [way for way in ways if way is not None]
    distinct = [step for at, step in enumerate(steps) if at == 0 or steps[at - 1] != step]
    return " → ".join(distinct) if len(distinct) > 1 else ""


def _duration(milliseconds: float) -> str:
    if milliseconds < 1000:
        return f"{milliseconds:.0f} ms"
    if milliseconds < _MINUTE_MS:
        return f"{milliseconds / 1000:.1f} s"
    minutes, rest = divmod(int(milliseconds), _MINUTE_MS)
    return f"{minutes} min {rest // 1000} s"


def _used(usage: Usage) -> str:
    counts = [
        (
            usage.input_tokens + usage.output_tokens,
            f"{usage.input_tokens}+{usage.output_tokens} tokens",
        ),
        (usage.characters, f"{usage.characters} characters"),
        (usage.audio_ms, f"{usage.audio_ms / 1000:.1f} s of audio"),
        (usage.units_milli, f"{usage.units_milli / 1000:g} units"),
        (usage.images, f"{usage.images} images"),
    ]
    return ", ".join(text for count, text in counts if count) or "0 tokens"


def _cost(usage: Usage, nano_usd: int | None) -> str:
    """Dollars to the millionth; `~` before an estimate."""
    if nano_usd is None:
        return "no price"
    text = "<$0.000001" if 0 < nano_usd < 1000 else f"${usd_text(round(nano_usd, -3))}"
    return f"~{text}" if usage.estimated else text


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "; ".join(map(str, value)) or "none"
    return str(value)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")
