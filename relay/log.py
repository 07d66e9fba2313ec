"""Write the structured log: one line for each Exchange, its Record, and one for each event.

Owns the one structlog logger, the JSON lines, and the redaction of tracebacks and of standard
error. Lines are JSON in a file or pipe, and text on a terminal (log_pretty.py). Writing never
raises into a call and never blocks (log_output.py). No line has a query, credential or body. All
relays of a process share its log.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TextIO

import msgspec
import structlog

from relay.core.errors import InternalError
from relay.core.exchange import Exchange
from relay.core.record import Record
from relay.core.redaction import Redactor, Secrets
from relay.core.text import clean, escaped_lines
from relay.log_output import Losses, Output, TextOutput, output_of
from relay.log_pretty import PrettyLines, colours_for

FLUSH_S = 0.02
"""The longest that a JSON line waits for others; a kill -9 loses the lines that wait."""
EXIT_S = 1.0
"""The longest that the end of the process waits for a slow reader of the log."""
_MAX_TRACEBACK_CHARACTERS = 16 * 1024
_STOPPED_RELAYS = 16
"""How many stopped relays have their secrets redacted still: lines about them may follow."""
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_encode = msgspec.json.Encoder(enc_hook=str).encode
losses = Losses()
"""Lines that were never written."""


class _Lines:
    """structlog's output: it writes lines in batches, at most `wait_s` after the first of a batch.

    Writing a line costs several times what rendering it does. Warnings and errors are written at
    once, behind the lines that wait; so is every line outside an event loop, and with `wait_s` 0.
    """

    def __init__(self, output: Output, wait_s: float) -> None:
        self.output, self._wait_s = output, wait_s
        self._pending: list[bytes] = []

    def msg(self, line: bytes) -> bytes:
        """Write a line, given without its end; return it."""
        self._pending.append(line)
        if not self._wait_s:
            self.flush()
        elif len(self._pending) == 1:
            try:
                asyncio.get_running_loop().call_later(self._wait_s, self.flush)
            except RuntimeError:
                self.flush()
        return line

    debug = info = msg

    def warning(self, line: bytes) -> None:
        """Write a line at once."""
        self._pending.append(line)
        self.flush()

    error = warning

    def flush(self) -> None:
        """Write the lines that wait."""
        lines, self._pending = self._pending, []
        if lines:
            self.output.write(b"\n".join([*lines, b""]), len(lines))


class _Log(NamedTuple):
    """The logger of this process and its output."""

    logger: Any
    lines: _Lines | None = None
    """None where the host application has configured structlog."""
    is_json: bool = False


_current = _Log(structlog.get_logger("relay"))


def setup(level: str, style: str, stream: TextIO | None = None) -> None:
    """Write this process's log to `stream` from now on; `style` is `auto`, `json` or `pretty`.

    By default it goes to standard error; then text that others write to `sys.stderr` is redacted,
    escaped for a terminal, and written without blocking too.
    """
    global _current
    own = sys.stderr if stream is None else stream
    is_pretty = style == "pretty" or (style == "auto" and own.isatty())
    pretty = PrettyLines(colours_for(own, os.environ))
    processors: list[Any] = [pretty.render_event if is_pretty else _render_json]
    output = output_of(own, losses, lambda lost: _render_notice(processors, lost))
    lines = _Lines(output, 0 if is_pretty else FLUSH_S)
    logger_class: Any = structlog.make_filtering_bound_logger(_LEVELS[level])
    if _LEVELS[level] <= _LEVELS["info"]:
        encode = pretty.render_record if is_pretty else _encode
        logger_class = _taking_records(logger_class, encode)
    logger = structlog.wrap_logger(lines, processors, logger_class).bind()
    _current = _Log(logger, lines, not is_pretty)
    if stream is None:
        sys.stderr = TextOutput(output, own, _shown if own.isatty() else redacted)
    _quiet_aiohttp()


def is_json() -> bool:
    """True if this process writes its log as JSON."""
    return _current.is_json


def setup_embedded() -> None:
    """Keep the structlog configuration of the host application.

    Without one, structlog would print to standard output and could block; then lines are written
    there without blocking.
    """
    if _current.lines is None and not structlog.is_configured():
        setup("info", "pretty", sys.stdout)


@atexit.register
def flush() -> None:
    """Write all lines that wait, at the end of the process; give up after EXIT_S."""
    if _current.lines is not None:
        _current.lines.flush()
        _current.lines.output.flush(EXIT_S)


def _taking_records(logger_class: Any, encode: Callable[[Record], bytes]) -> Any:
    """A logger class that writes a Record by `encode`, without structlog's processors."""

    class RecordLogger(logger_class):  # type: ignore[misc]
        def info(self, name: str, record: Record | None = None, **fields: Any) -> Any:
            if record is not None:
                return self._logger.info(encode(record))
            return super().info(name, **fields)

    return RecordLogger


def _render_json(_logger: Any, level: str, event: Any) -> bytes:
    """Render an event as JSON; the only processor, since several would cost more than the line."""
    event["level"], event["timestamp"] = level, _timestamp(time.time())
    return _encode(event)


def _render_notice(processors: Sequence[Any], lost: int) -> bytes:
    """The line that reports lost lines."""
    rendered: Any = {"event": "log.lines_lost", "lines": lost}
    for process in processors:
        rendered = process(None, "warning", rendered)
    return bytes(rendered) + b"\n"


def _fields(record: Record) -> dict[str, Any]:
    """The fields of a record for a host's renderer, which adds event name, level and time."""
    fields: dict[str, Any] = msgspec.to_builtins(record)
    for name in ("event", "level", "timestamp"):
        fields.pop(name, None)
    return fields


def _timestamp(now: float) -> str:
    """ISO 8601 in UTC."""
    second = int(now)
    return "%s.%06dZ" % (_second_text(second), (now - second) * 1e6)  # noqa: UP031 (faster)


@lru_cache(maxsize=16)
def _second_text(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def _quiet_aiohttp() -> None:
    """Silence aiohttp's loggers: they print request lines and subprotocols, which may contain
    credentials.
    """
    logging.getLogger("aiohttp.access").disabled = True
    for name in ("aiohttp.websocket", "aiohttp.server", "aiohttp.web", "aiohttp.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.ERROR)


_NO_SECRETS = Redactor(())
_protected: tuple[weakref.ref[Secrets], ...] = ()
_stopped: deque[Secrets] = deque(maxlen=_STOPPED_RELAYS)
_protecting = threading.Lock()


def protect(secrets: Secrets) -> None:
    """Redact a relay's secrets, also later ones, until `secrets` is garbage-collected.

    Any thread may call this: each thread of a host may run a relay.
    """
    global _protected
    with _protecting:
        existing = [reference for reference in _protected if reference() is not None]
        _protected = (*existing, weakref.ref(secrets))


def keep_protecting(secrets: Secrets) -> None:
    """Redact the secrets of a relay that has stopped a while longer: lines about it may follow."""
    _stopped.append(secrets)


def redacted(text: str) -> str:
    """`text` with the secrets of every relay in this process redacted."""
    found = [secrets for reference in _protected if (secrets := reference()) is not None]
    return _NO_SECRETS.redact_text(text, [secrets.redactor for secrets in found])


def _shown(text: str) -> str:
    """`text` for a terminal: redacted, and without characters that a terminal obeys."""
    return escaped_lines(redacted(text))


def event(name: str, **fields: Any) -> None:
    """Log an event at level info."""
    _write("info", name, fields)


def warn(name: str, **fields: Any) -> None:
    """Log an event that an operator should look at."""
    _write("warning", name, fields)


def bug(name: str, error: BaseException, **fields: Any) -> None:
    """Log an unexpected exception with its traceback, redacted and bounded."""
    text = redacted("".join(traceback.format_exception(error)))
    if len(text) > _MAX_TRACEBACK_CHARACTERS:  # an exception may quote text from outside
        half = _MAX_TRACEBACK_CHARACTERS // 2
        text = f"{text[:half]}\n…\n{text[-half:]}"
    _write("error", name, {**fields, "traceback": text})


def exchange_failed(exchange: Exchange) -> None:
    """Log an exchange's internal error at once, with its traceback."""
    if isinstance(exchange.outcome.error, InternalError) and exchange.outcome.cause is not None:
        bug("exchange.failed", exchange.outcome.cause, id=exchange.id)


def exchange_ended(record: Record, unix_s: float) -> bytes | None:
    """Write the line of an Exchange that ended at `unix_s`; return it if lines are JSON."""
    record.event, record.level, record.timestamp = "exchange", "info", _timestamp(unix_s)
    logger, lines, is_json = _current
    try:
        if lines is None:
            logger.info("exchange", **_fields(record))
            return None
        line: bytes | None = logger.info("exchange", record=record)
        return line if is_json else None
    except Exception:  # a failing log must not end a call; counted
        losses.add(1)
    return None


def _write(level: str, name: str, fields: dict[str, Any]) -> None:
    for field, value in fields.items():
        if isinstance(value, str) and field != "traceback":
            fields[field] = clean(value)
    try:
        getattr(_current.logger, level)(name, **fields)
    except Exception:  # a failing log must not end a call; counted
        losses.add(1)
