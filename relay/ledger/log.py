"""The log: one line an exchange, which is its Record, and events of the relay's own life. Never a
query, credential or body.

Owns: structlog's set-up, and the redaction of tracebacks. Lines are JSON to a file or
pipe, pretty on a terminal. Writing never raises into a call.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO, TextIO
from urllib.parse import urlsplit

import msgspec
import structlog

from relay.core.errors import InternalError
from relay.core.exchange import Exchange
from relay.core.record import Record
from relay.registry.load import Config

FLUSH_S = 0.02
"""What a kill -9 may lose of the log."""
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_encode = msgspec.json.Encoder(enc_hook=str).encode
_log: Any = structlog.get_logger("relay")
_lines: _Lines | None = None
_secrets: tuple[str, ...] = ()
failures = 0
"""Lines that could not be written."""


class _Lines:
    """structlog's output for JSON: lines go out together, at most FLUSH_S after the first of them.

    A write to a file costs several times what making a line does. Warnings and errors go out at
    once, with what waits before them; so does everything outside an event loop.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._pending: list[bytes] = []

    def msg(self, line: bytes) -> None:
        """Take one line, without its end."""
        self._pending.append(line)
        if len(self._pending) == 1:
            try:
                asyncio.get_running_loop().call_later(FLUSH_S, self.flush)
            except RuntimeError:
                self.flush()

    debug = info = msg

    def warning(self, line: bytes) -> None:
        """Take one line that must not wait."""
        self._pending.append(line)
        self.flush()

    error = warning

    def flush(self) -> None:
        """Write what is there."""
        global failures
        lines, self._pending = self._pending, []
        if not lines:
            return
        lines.append(b"")
        try:
            self._stream.write(b"\n".join(lines))
            self._stream.flush()
        except (OSError, ValueError):  # a full disk or a closed pipe must not end a call; counted
            failures += len(lines) - 1


def setup(level: str, style: str, stream: TextIO | None = None) -> None:
    """Write to `stream` (standard error by default) in this process from now on."""
    global _log, _lines, _write_line
    stream = stream or sys.stderr
    threshold = structlog.make_filtering_bound_logger(_LEVELS[level])
    if style == "pretty" or (style == "auto" and stream.isatty()):
        stamp = structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False)
        console = structlog.dev.ConsoleRenderer()
        processors: list[Any] = [structlog.processors.add_log_level, stamp, console]
        _log = structlog.wrap_logger(structlog.PrintLogger(stream), processors, threshold).bind()
        _lines, _write_line = None, _write_pretty
    else:
        _lines = _Lines(stream.buffer)
        processors = [structlog.processors.add_log_level, _stamped, _as_json]
        _log = structlog.wrap_logger(_lines, processors, threshold).bind()
        _write_line = _write_json if _LEVELS[level] <= _LEVELS["info"] else _drop
    _quiet_aiohttp()


def flush() -> None:
    """Write what is still held; for the end of the process."""
    if _lines is not None:
        _lines.flush()


def _as_json(_logger: Any, _name: str, event: Any) -> bytes:
    return _encode(event)


def _stamped(_logger: Any, _name: str, event: Any) -> Any:
    event["timestamp"] = _timestamp(time.time())
    return event


def _write_json(line: Record) -> bytes:
    """The hot line: what structlog's processors would make of it, without their detour."""
    assert _lines is not None
    encoded = _encode(line)
    _lines.msg(encoded)
    return encoded


def _write_pretty(line: Record) -> None:
    fields = msgspec.to_builtins(line)
    for name in ("event", "level", "timestamp"):
        fields.pop(name, None)
    _log.info("exchange", **fields)


def _drop(_line: Record) -> None:
    """The level says that calls are not logged."""


_write_line: Callable[[Record], bytes | None] = _write_pretty
_second, _second_text = 0, ""


def _timestamp(now: float) -> str:
    """ISO 8601 in UTC; the text of a second is made once."""
    global _second, _second_text
    second = int(now)
    if second != _second:
        _second, _second_text = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
    return "%s.%06dZ" % (_second_text, (now - second) * 1e6)  # noqa: UP031 (faster)


def _quiet_aiohttp() -> None:
    """aiohttp's own loggers print request lines and offered subprotocols, which hold
    credentials.
    """
    logging.getLogger("aiohttp.access").disabled = True
    for name in ("aiohttp.websocket", "aiohttp.server", "aiohttp.web", "aiohttp.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.ERROR)


def protect(config: Config) -> None:
    """Know the secrets in force, so that no traceback shows one."""
    global _secrets
    redis = urlsplit(config.settings.redis.url or "")
    database = urlsplit(config.settings.database or "")
    found = {config.settings.cloudflare.api_key, redis.password or "", database.password or ""}
    found |= set(config.settings.tracing.headers.values())
    for provider in config.registry.providers.values():
        targets = [provider.rest, provider.websocket, *(rule.target for rule in provider.paths)]
        for credential in (c for t in targets for keys in t.pool if (c := keys.provider)):
            found |= {credential.value, credential.value.rpartition(" ")[2]}
    _secrets = tuple(
        sorted((secret for secret in found if len(secret) >= 4), key=len, reverse=True)
    )


def event(name: str, **fields: Any) -> None:
    """Something the relay did or noticed."""
    _write("info", name, fields)


def warn(name: str, **fields: Any) -> None:
    """Something an operator should look at."""
    _write("warning", name, fields)


def bug(name: str, error: BaseException, **fields: Any) -> None:
    """A failure of the relay's own, with its traceback, redacted."""
    text = redacted("".join(traceback.format_exception(error)))
    _write("error", name, {**fields, "traceback": text})


def redacted(text: str) -> str:
    """Without any secret in force."""
    for secret in _secrets:
        text = text.replace(secret, "[redacted]")
    return text


def exchange_failed(exchange: Exchange) -> None:
    """A failure of the relay's own is told at once, with its traceback."""
    if isinstance(exchange.error, InternalError) and exchange.cause is not None:
        bug("exchange.failed", exchange.cause, id=exchange.id)


def exchange_ended(record: Record, unix_s: float) -> bytes | None:
    """The one line of an Exchange that ended then; as it was written, where that is JSON."""
    global failures
    record.event, record.level, record.timestamp = "exchange", "info", _timestamp(unix_s)
    try:
        return _write_line(record)
    except Exception:  # a log that cannot be written must not end a call; counted
        failures += 1
        return None


def _write(level: str, name: str, fields: dict[str, Any]) -> None:
    global failures
    try:
        getattr(_log, level)(name, **fields)
    except Exception:  # a log that cannot be written must not end a call; counted
        failures += 1
