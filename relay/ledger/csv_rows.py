"""The ledger's answers as CSV, for spreadsheets.

Owns: the columns, and that no cell is taken for a formula: what clients and providers choose, such
as a team or a model, must not be run by the program that opens the file (OWASP, CSV injection).
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
"""How a text begins that a spreadsheet may run; the last four are the wide forms."""
_TIMES = ("latency_ms", "first_byte_ms", "overhead_ms")
_SUMS = (
    "requests", "errors", "cache_hits", "unpriced", "estimated", "cost_usd", "saved_usd", *COUNTS,
)  # fmt: skip
_SHARES = ("p50", "p95", "p99")
_USED = (*COUNTS, "estimated", "incomplete")
CALL_COLUMNS = (
    "id", "created_at", "ended_at", "transport", "surface", "method", "provider", "endpoint",
    "model", "answered_by", "model_answered", "via", "kind", "status", "outcome", "success",
    "error", "client", "user", "metadata", "event_id", "request_id", "cache", "duration_ms",
    "first_byte_ms", "overhead_ms", "bytes_up", "bytes_down", "cost_usd", "saved_usd", "feedback",
    "score", *_USED,
)  # fmt: skip


def row(values: Iterable[Any]) -> str:
    """One line, without its end."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(map(_cell, values))
    return text.getvalue()


def _cell(value: Any) -> str | int | float:
    """A number as it is, negative too; a text that would be a formula behind an apostrophe."""
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
    """What was used: a head and a line a row, with the keys first. There is no line for the total:
    a spreadsheet adds up by itself.
    """
    times = [f"{name}_{share}" for name in _TIMES for share in _SHARES]
    lines = [row((*keys, *_SUMS, *times))]
    for each in answer["rows"]:
        spread = [(each[name] or {}).get(share) for name in _TIMES for share in _SHARES]
        lines.append(row([*(each[key] for key in keys), *(each[sum_] for sum_ in _SUMS), *spread]))
    return lines


def call_row(call: Mapping[str, Any]) -> str:
    """A call, in the order of CALL_COLUMNS."""
    used = call.get("usage") or {}
    return row((used if name in _USED else call).get(name) for name in CALL_COLUMNS)
