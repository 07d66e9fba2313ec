"""Write reports of the ledger as CSV, for spreadsheets.

Owns the columns, and the protection against CSV injection (OWASP): clients and providers choose
texts such as a team or a model, which a spreadsheet must not run as formulas.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from relay.core.text import clean
from relay.core.usage import COUNTS

_FORMULAS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
"""The first characters of a text that a spreadsheet may run; the last four are full-width."""
_TIMES = ("latency_ms", "first_byte_ms", "overhead_ms")
_SUMS = (
    "requests", "errors", "cache_hits", "unpriced", "estimated", "cost_usd", "saved_usd", *COUNTS,
)  # fmt: skip
_SHARES = ("p50", "p95", "p99")
_USED = (*COUNTS, "estimated", "incomplete")
CALL_COLUMNS = (
    "id", "created_at", "ended_at", "transport", "surface", "method", "provider", "endpoint",
    "model", "answered_by", "model_answered", "via", "kind", "status", "outcome", "success",
    "error", "client", "key_id", "team", "user", "metadata", "event_id", "request_id",
    "user_agent", "agent_session", "agent_parent", "cache", "duration_ms", "first_byte_ms",
    "overhead_ms", "bytes_up", "bytes_down", "cost_usd", "saved_usd", "feedback", "score", *_USED,
)  # fmt: skip


def row(values: Iterable[Any]) -> str:
    """Return one line of CSV, without a line end."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(map(_cell, values))
    return text.getvalue()


def _cell(value: Any) -> str | int | float:
    """Return the content of a cell: a number unchanged, a text that would be a formula with an
    apostrophe before it.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return value
    if isinstance(value, msgspec.Raw):  # a number with every digit
        return bytes(value).decode()
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    shown = clean(text, len(text) + 1)
    return f"'{shown}" if text.startswith(_FORMULAS) else shown


def usage_rows(answer: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """Return a usage report: a header, then a line for each row, with the keys first. There is no
    line for the total, since a spreadsheet can add up the rows.
    """
    times = [f"{name}_{share}" for name in _TIMES for share in _SHARES]
    lines = [row((*keys, *_SUMS, *times))]
    for each in answer["rows"]:
        shares = [(each[name] or {}).get(share) for name in _TIMES for share in _SHARES]
        lines.append(row([*(each[key] for key in keys), *(each[sum_] for sum_ in _SUMS), *shares]))
    return lines


def call_row(call: Mapping[str, Any]) -> str:
    """Return the line of a call, in the order of CALL_COLUMNS."""
    used = call.get("usage") or {}
    return row((used if name in _USED else call).get(name) for name in CALL_COLUMNS)
