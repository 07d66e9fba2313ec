"""A document against the schema: what is wrong with it, and what is left of it.

Owns: that as much as possible is checked at once. One wrong provider hides no problem of another.
"""

from __future__ import annotations

from pydantic import ValidationError

from relay.registry.entries import Section
from relay.registry.hints import worded
from relay.registry.problems import Document, Where

_ACCOUNT = ("account_id", "gateway_id", "api_key")


def validated(document: Document, model: type[Section]) -> Section | None:
    """The document as a section. Where something is wrong with it that is complained of, and the
    rest is taken, so that the problems of the rest are found too; None if nothing is left.
    """
    data = document.data
    if isinstance(data, dict) and isinstance(account := data.get("cloudflare"), dict):
        # An empty variable means the default here, not an empty gateway name.
        data["cloudflare"] = {k: v for k, v in account.items() if v != "" or k not in _ACCOUNT}
    try:
        section = model.model_validate(data)
    except ValidationError as error:
        said = {problem.where for problem in document.problems}
        for detail in error.errors(include_url=False, include_context=False):
            where = _written(document, detail["loc"])
            if where not in said:
                document.complain(where, worded(detail, where, model))
    else:
        if not document.problems:
            return section
    return _left(document, model)


def _left(document: Document, model: type[Section]) -> Section | None:
    """Without the providers and sections that have problems."""
    if not isinstance(document.data, dict):
        return None
    data = dict(document.data)
    if isinstance(data.get("providers"), dict):
        data["providers"] = dict(data["providers"])
    for problem in document.problems:
        if problem.where[:1] == ("providers",) and len(problem.where) > 1:
            if isinstance(data.get("providers"), dict):
                data["providers"].pop(problem.where[1], None)
        elif problem.where[:2] == ("cloudflare", "delegate"):
            data["cloudflare"] = {k: v for k, v in data["cloudflare"].items() if k != "delegate"}
        elif problem.where[:1] == ("cloudflare",):
            return None  # which way a provider is reached is not known
        elif problem.where:
            data.pop(str(problem.where[0]), None)
    try:
        return model.model_validate(data)
    except ValidationError:
        return None


def _written(document: Document, place: Where) -> Where:
    """A place of pydantic's as far as the file has it, without the names of its own checks."""
    parts = tuple(part for part in place if part != "[key]")
    known = len(parts)
    while known and parts[:known] not in document.marks:
        known -= 1
    tail = parts[known:]
    return parts if len(tail) <= 1 else parts[:known]
