"""The log: one line an exchange, and events of the relay's own life. Never a query, credential or
body.

Owns: structlog's set-up, the line, and the redaction of tracebacks. Lines are JSON to a file or
pipe, pretty on a terminal. Writing never raises into a call.
"""

from __future__ import annotations

import logging
import sys
import traceback
from typing import Any, TextIO

import msgspec
import structlog

from relay.core.errors import InternalError
from relay.core.exchange import Exchange
from relay.registry.load import Config

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_encoder = msgspec.json.Encoder(enc_hook=str)
_log: Any = structlog.get_logger("relay")
_secrets: tuple[str, ...] = ()
failures = 0
"""Lines that could not be written."""


def setup(level: str, style: str, stream: TextIO | None = None) -> None:
    """Write to `stream` (standard error by default) in this process from now on."""
    global _log
    stream = stream or sys.stderr
    pretty = style == "pretty" or (style == "auto" and stream.isatty())
    stamp = structlog.processors.TimeStamper(fmt="%H:%M:%S" if pretty else "iso", utc=not pretty)
    threshold = structlog.make_filtering_bound_logger(_LEVELS[level])
    if pretty:
        processors: list[Any] = [
            structlog.processors.add_log_level,
            stamp,
            structlog.dev.ConsoleRenderer(),
        ]
        _log = structlog.wrap_logger(structlog.PrintLogger(stream), processors, threshold)
    else:
        processors = [structlog.processors.add_log_level, stamp, _as_json]
        _log = structlog.wrap_logger(structlog.BytesLogger(stream.buffer), processors, threshold)
    _log = _log.bind()
    _quiet_aiohttp()


def _as_json(_logger: Any, _name: str, event: Any) -> bytes:
    return _encoder.encode(event)


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
    found = {config.settings.cloudflare.api_key}
    for provider in config.registry.providers.values():
        targets = [provider.rest, provider.websocket, *(rule.target for rule in provider.paths)]
        for credential in (c for target in targets for c in target.credentials):
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
    text = "".join(traceback.format_exception(error))
    for secret in _secrets:
        text = text.replace(secret, "[redacted]")
    _write("error", name, {**fields, "traceback": text})


def exchange_ended(exchange: Exchange, now_s: float) -> None:
    """The one line of an Exchange."""
    error = exchange.error
    if isinstance(error, InternalError) and exchange.cause is not None:
        bug("exchange.failed", exchange.cause, id=exchange.id)
    fields: dict[str, Any] = {
        "id": exchange.id,
        "method": exchange.method,
        "provider": exchange.provider,
        "endpoint": exchange.endpoint,
        "status": exchange.status or (error.status if error else 0),
        "outcome": exchange.outcome,
        "duration_ms": round((now_s - exchange.started_s) * 1e3, 2),
    }
    if exchange.first_byte_s:
        fields["first_byte_ms"] = round((exchange.first_byte_s - exchange.started_s) * 1e3, 2)
    if exchange.route is not None:
        fields["via"] = exchange.route.target.via
    if exchange.model is not None:
        fields["model"] = exchange.model
    fields["bytes_up"] = exchange.request_bytes
    fields["bytes_down"] = exchange.response_bytes
    if exchange.surface == "websocket":
        fields["messages_up"], fields["messages_down"] = (
            exchange.messages_up,
            exchange.messages_down,
        )
        fields["close_code"] = exchange.close_code
    fields["client"] = exchange.client
    if error is not None:
        fields["error"] = error.code
        if exchange.cause is not None:
            fields["cause"] = _cause(exchange.cause)
    _write("info", "exchange", fields)


def _cause(error: BaseException) -> str:
    """The types of a failure and of what caused it: their texts may hold URLs with keys."""
    names = [type(error).__name__]
    inner = error.__cause__ or getattr(error, "os_error", None)
    if inner is not None and inner is not error:
        names.append(type(inner).__name__)
    return " from ".join(names)


def _write(level: str, name: str, fields: dict[str, Any]) -> None:
    global failures
    try:
        getattr(_log, level)(name, **fields)
    except Exception:  # a log that cannot be written must not end a call; counted
        failures += 1
