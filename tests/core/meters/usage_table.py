"""The table "Where usage is read" of docs/ledger.md, generated from the recorded responses.

The document therefore says what the tests check.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

from relay.core.formats import format_of
from relay.core.provider import Provider, rest_route
from relay.core.usage import Part
from relay.registry.load import Sources, load
from tests.core.meters.recorded import ROWS, Row
from tests.processes import ROOT

BEGIN, END = "<!-- usage: made by `make golden` of tests/core/meters/recorded.py -->\n", "<!-- end of usage -->\n"
_HEAD = "| provider | call | format | answer | read | not read |\n|---|---|---|---|---|---|\n"
_PLACES = (
    (r"models/[^/:]+([:/])", r"models/{model}\1"),
    (r"(?<=/)[a-z]+[_-]\d+\b", "{id}"),
    (r"fal-ai/flux(/dev)?", "{app}"),
    (r"^(gpt-4o|deepseek)/", "{deployment}/"),
)


def shipped() -> dict[str, Provider]:
    """Return the providers of the shipped gateway.yaml."""
    name, before = "AZURE_OPENAI_RESOURCE", os.environ.get("AZURE_OPENAI_RESOURCE")
    os.environ[name] = "x"
    try:
        return dict(load(Sources(ROOT / "gateway.yaml", None)).registry.providers)
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def routed(row: Row, providers: dict[str, Provider]) -> tuple[str, str]:
    """Return the endpoint and format of a call.

    A provider that is not shipped is taken to speak OpenAI's format.
    """
    known = providers.get(row.provider)
    if known is None:
        return row.path, format_of(row.path, "openai", ())
    route = rest_route(known, row.path)
    return route.endpoint, route.format


def table() -> str:
    """Return the table as Markdown."""
    providers = shipped()
    grouped: dict[tuple[str, str, str], list[Row]] = {}
    for row in ROWS:
        path = row.path
        for pattern, shown in _PLACES:
            path = re.sub(pattern, shown, path)
        call = f"{row.method} {path}"
        grouped.setdefault((row.provider, call, routed(row, providers)[1]), []).append(row)
    lines = []
    for (provider, call, form), rows in grouped.items():
        kinds = list(dict.fromkeys(_kind(row) for row in rows))
        read = list(dict.fromkeys(name for row in rows for part in row.expected for name in _read(part)))
        notes = list(dict.fromkeys(row.note for row in rows if row.note))
        shown = ", ".join(f"`{name}`" for name in read) or "nothing: the call has no usage, or repeats usage that is counted elsewhere"
        lines.append(f"| {provider} | `{call}` | {form} | {', '.join(kinds)} | {shown} | {'; '.join(notes)} |\n")
    return _HEAD + "".join(lines)


def _kind(row: Row) -> str:
    if row.content_type == "text/event-stream":
        return "stream"
    if "json" not in row.content_type:
        return "not JSON"
    return "whole" if row.answer.count(b"\n") < 2 else "lines" if row.answer[:1] == b"{" else "array"


def _read(part: Part) -> Iterator[str]:
    if part.model is not None:
        yield "model"
    names: Iterable[str] = part.usage.__struct_fields__
    defaults = type(part.usage)()
    yield from (name for name in names if getattr(part.usage, name) != getattr(defaults, name))


def text_with_table(text: str) -> str:
    """Return the document with the table replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, behind = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{behind}"
