"""Expand the `${…}` references of a document, and warn of misspelled ones.

Owns which texts are expanded, and the warnings about the spellings of other programs.
credentials.py expands one template.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relay.core.text import quoted
from relay.registry import credentials
from relay.registry.files import Files
from relay.registry.problems import Document, Where
from relay.registry.yaml_file import unfit_character

_REFERENCE = re.compile(r"\$\{[^}]*\}")
_WITHOUT_BRACES = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)")
_OF_LITELLM = re.compile(r"(?:\A|\s)os\.environ/([A-Za-z_][A-Za-z0-9_]{0,63})")


@dataclass(frozen=True, slots=True)
class Expander:
    """Expands the documents of one configuration."""

    variables: credentials.Variables
    folder: Path
    """The folder of gateway.yaml, to which paths of secret files are relative."""
    files: Files

    def expand(self, document: Document) -> dict[Where, credentials.Expanded]:
        """Expand every text of the document in place.

        In a provider's `auth`, a missing variable means that the provider is not configured: these
        templates are returned by their paths. Anywhere else, a missing variable is a problem.
        """
        templates: dict[Where, credentials.Expanded] = {}
        for where, holder, key in list(_texts(document.data, ())):
            template = holder[key]
            expanded = credentials.expand(template, self.variables.values, self.folder, self.files)
            if expanded.bad:
                document.add_problem(where, expanded.bad)
            self._warn_of_spellings(document, where, template)
            self._warn_of_quotes(document, where, expanded)
            if _is_auth(where):
                templates[where] = expanded
            elif expanded.missing:
                names = ", ".join(map(quoted, expanded.missing))
                document.add_problem(
                    where, f"{names} is not set; set it, or write ${{NAME:-default}}"
                )
            else:
                holder[key] = expanded.text
                if (unfit := unfit_character(expanded.text)) and not unfit_character(template):
                    document.add_problem(where, unfit)
        return templates

    def _warn_of_spellings(self, document: Document, where: Where, template: str) -> None:
        if found := _OF_LITELLM.search(template):
            document.add_problem(where, f"os.environ/… is not supported; write ${{{found[1]}}}")
        for found in _WITHOUT_BRACES.finditer(_REFERENCE.sub("", template)):
            # The text may be part of a password: the message shows only names of known variables.
            name = found[1] if found[1] in self.variables.values else "NAME"
            document.warn(
                where, f"`$` without braces is plain text; a variable is written ${{{name}}}"
            )

    def _warn_of_quotes(
        self, document: Document, where: Where, expanded: credentials.Expanded
    ) -> None:
        for name in expanded.names:
            if name in self.variables.unquoted:
                document.warn(
                    where,
                    f"the value of the environment variable {name} has quotes, which were removed"
                    " (docker's --env-file keeps them); write it without quotes",
                )


def _is_auth(where: Where) -> bool:
    return where[0] == "providers" and "auth" in where[2:] and "value" in where


def _texts(node: Any, where: Where) -> Iterator[tuple[Where, Any, Any]]:
    pairs = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    for key, value in pairs:
        if isinstance(value, str):
            yield (*where, key), node, key
        else:
            yield from _texts(value, (*where, key))
