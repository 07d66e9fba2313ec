"""The structured log: one line an exchange, which is its Record, and events of the relay's own
life. It holds no query, credential or body.

Owns: the one structlog logger, its renderers, and the redaction of tracebacks. Lines are JSON to a
file or pipe, pretty on a terminal. Writing never raises into a call and never blocks
(log_output.py). A process has one log; the relays in it share it.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TextIO

import msgspec
import structlog

from relay.core.errors import InternalError
from relay.core.exchange import Exchange
from relay.core.record import Record
from relay.core.redaction import Redactor, Secrets
from relay.core.text import clean
from relay.log_output import Losses, Output, TextOutput, output_of

FLUSH_S = 0.02
"""What a kill -9 may lose of the log."""
EXIT_S = 1.0
"""How long the end of the process waits for a reader of the log that is slow."""
_MAX_TRACEBACK_CHARACTERS = 16 * 1024
_STOPPED_RELAYS = 16
"""So many relays that stopped have their secrets redacted still: lines about them may follow."""
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_encode = msgspec.json.Encoder(enc_hook=str).encode
losses = Losses()
"""Lines that were never written."""


class _Lines:
    """structlog's output: JSON lines go out together, at most FLUSH_S after the first of them.

    Handing a line over costs several times what making it does. Warnings and errors go out at once,
    with what waits before them; so does everything outside an event loop, and every line for
    people.
    """

    def __init__(self, output: Output, wait_s: float) -> None:
        self.output, self._wait_s = output, wait_s
        self._pending: list[bytes] = []

    def msg(self, line: bytes) -> bytes:
        """Take one line, without its end; return it."""
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
        """Take one line that must not wait."""
        self._pending.append(line)
        self.flush()

    error = warning

    def flush(self) -> None:
        """Hand over what is there."""
        lines, self._pending = self._pending, []
        if lines:
            self.output.write(b"\n".join([*lines, b""]), len(lines))


class _Log(NamedTuple):
    """The logger of this process, and what it writes to."""

    logger: Any
    lines: _Lines | None = None
    """None where a host's configuration of structlog holds."""
    is_json: bool = False


_current = _Log(structlog.get_logger("relay"))


def setup(level: str, style: str, stream: TextIO | None = None) -> None:
    """Write to `stream` in this process from now on; by default to standard error, and then what
    others write there goes the same way.
    """
    global _current
    own = sys.stderr if stream is None else stream
    is_pretty = style == "pretty" or (style == "auto" and own.isatty())
    processors = _pretty_processors() if is_pretty else [_render_json]
    output = output_of(own, losses, lambda lost: _render_notice(processors, lost))
    lines = _Lines(output, 0 if is_pretty else FLUSH_S)
    logger_class: Any = structlog.make_filtering_bound_logger(_LEVELS[level])
    if not is_pretty and _LEVELS[level] <= _LEVELS["info"]:
        logger_class = _taking_records(logger_class)
    logger = structlog.wrap_logger(lines, processors, logger_class).bind()
    _current = _Log(logger, lines, not is_pretty)
    if stream is None:
        sys.stderr = TextOutput(output, own, redacted)
    _quiet_aiohttp()


def setup_embedded() -> None:
    """In somebody else's process: its configuration of structlog holds. Where there is none,
    structlog would print to standard output and block there: lines go there without blocking.
    """
    if _current.lines is None and not structlog.is_configured():
        setup("info", "pretty", sys.stdout)


@atexit.register
def flush() -> None:
    """Write what is still held; for the end of the process, which a reader that stopped delays by
    EXIT_S at most.
    """
    if _current.lines is not None:
        _current.lines.flush()
        _current.lines.output.flush(EXIT_S)


def _taking_records(logger_class: Any) -> Any:
    """A logger that writes a Record, which lacks nothing, without structlog's processing."""

    class RecordLogger(logger_class):  # type: ignore[misc]
        def info(self, name: str, record: Record | None = None, **fields: Any) -> Any:
            if record is not None:
                return self._logger.info(_encode(record))
            return super().info(name, **fields)

    return RecordLogger


def _render_json(_logger: Any, level: str, event: Any) -> bytes:
    """The only processor where lines are JSON: several would cost more than the line itself."""
    event["level"], event["timestamp"] = level, _timestamp(time.time())
    return _encode(event)


def _pretty_processors() -> list[Any]:
    stamp = structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False)
    console = structlog.dev.ConsoleRenderer()
    return [structlog.processors.add_log_level, stamp, console, _as_bytes]


def _as_bytes(_logger: Any, _level: str, line: str) -> bytes:
    return line.encode("utf-8", "backslashreplace")


def _render_notice(processors: Sequence[Any], lost: int) -> bytes:
    """The line that says how many others are missing."""
    made: Any = {"event": "log.lines_lost", "lines": lost}
    for process in processors:
        made = process(None, "warning", made)
    return bytes(made) + b"\n"


def _fields(record: Record) -> dict[str, Any]:
    """A record for a renderer that adds the event's name, level and time itself."""
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
    """aiohttp's own loggers print request lines and offered subprotocols, which hold
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
    """Redact the secrets of a relay, also those that it gets later, for as long as it exists; no
    call of its own is needed to forget them. Threads of a host may each have a relay.
    """
    global _protected
    with _protecting:
        existing = [reference for reference in _protected if reference() is not None]
        _protected = (*existing, weakref.ref(secrets))


def keep_protecting(secrets: Secrets) -> None:
    """The relay has stopped: lines about it may still come."""
    _stopped.append(secrets)


def redacted(text: str) -> str:
    """`text` without any secret of any relay in this process."""
    found = [secrets for reference in _protected if (secrets := reference()) is not None]
    return _NO_SECRETS.redact_text(text, [secrets.redactor for secrets in found])


def event(name: str, **fields: Any) -> None:
    """Something the relay did or noticed."""
    _write("info", name, fields)


def warn(name: str, **fields: Any) -> None:
    """Something an operator should look at."""
    _write("warning", name, fields)


def bug(name: str, error: BaseException, **fields: Any) -> None:
    """A failure of the relay's own, with its traceback, redacted."""
    text = redacted("".join(traceback.format_exception(error)))
    if len(text) > _MAX_TRACEBACK_CHARACTERS:  # its exceptions may quote what came from outside
        half = _MAX_TRACEBACK_CHARACTERS // 2
        text = f"{text[:half]}\n…\n{text[-half:]}"
    _write("error", name, {**fields, "traceback": text})


def exchange_failed(exchange: Exchange) -> None:
    """Log a failure of the relay's own at once, with its traceback."""
    if isinstance(exchange.outcome.error, InternalError) and exchange.outcome.cause is not None:
        bug("exchange.failed", exchange.outcome.cause, id=exchange.id)


def exchange_ended(record: Record, unix_s: float) -> bytes | None:
    """Write the line of an Exchange that ended at `unix_s`; return the line where it is JSON."""
    record.event, record.level, record.timestamp = "exchange", "info", _timestamp(unix_s)
    logger, _, is_json = _current
    try:
        if is_json:
            line: bytes | None = logger.info("exchange", record=record)
            return line
        logger.info("exchange", **_fields(record))
    except Exception:  # a log that cannot be written must not end a call; counted
        losses.add(1)
    return None


def _write(level: str, name: str, fields: dict[str, Any]) -> None:
    for field, value in fields.items():
        if isinstance(value, str) and field != "traceback":
            fields[field] = clean(value)
    try:
        getattr(_current.logger, level)(name, **fields)
    except Exception:  # a log that cannot be written must not end a call; counted
        losses.add(1)
