"""Options, access to the database and output of `relay logs`, `usage`, `budgets` and `keys`.

These commands use the database directly, whether or not a relay runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pwd
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from relay.core.errors import OperatorError
from relay.core.text import escaped
from relay.ledger.queries import BadQuery
from relay.registry.load import Config
from relay.storage.database import Database, DatabaseUnavailable, database_url
from relay.storage.readers import QueryRefused

_encode = msgspec.json.Encoder(enc_hook=str).encode


class NoAnswer(OperatorError):
    """The ledger cannot be read, or a query is refused; the text says why."""


def add_selection(parser: argparse.ArgumentParser, since: str | None) -> None:
    """Add the options that select calls, and those for the format of the output."""
    parser.add_argument("--since", default=since, help="7d, 12h, or a date or time in ISO 8601")
    parser.add_argument("--provider", help="only calls of this provider")
    parser.add_argument("--model", help="only calls of this model")
    parser.add_argument("--client", help="only calls of this client")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="JSON, for programs")
    shape.add_argument("--csv", action="store_true", help="CSV, for spreadsheets")


def add_action(actions: Any, name: str, text: str) -> argparse.ArgumentParser:
    """Add an action of a command, such as `list`, and return the parser of its options."""
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text)
    return parser


def equal_filters(options: argparse.Namespace, *names: str) -> dict[str, str]:
    """The columns that must equal an option, for the options that were given."""
    filters = {{"user": "end_user"}.get(name, name): getattr(options, name) for name in names}
    return {name: value for name, value in filters.items() if value is not None}


@contextlib.asynccontextmanager
async def open_ledger(config: Config) -> AsyncIterator[Database]:
    """Open the ledger's database for queries. Raises NoAnswer, also for a query that fails within
    the context.
    """
    if not config.settings.database:
        raise NoAnswer("`database` is not set in gateway.yaml: there is no ledger")
    database = Database(database_url(config.settings.database))
    try:
        yield database
    except DatabaseUnavailable as error:
        raise NoAnswer(f"the database cannot be read ({error})") from error
    except (BadQuery, QueryRefused) as error:
        raise NoAnswer(str(error)) from error
    finally:
        await database.close()


def table_row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """A line of a table: cells of at least these widths, and then the others."""
    padded = [*map(str.ljust, cells, widths), *cells[len(widths) :]]
    return escaped("  ".join(padded).rstrip())


def to_json(answer: Any) -> str:
    """`answer` as JSON in one line; characters that a terminal would obey are JSON escapes."""
    text: str = _encode(answer).decode()
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def acting_user() -> str:
    """Name of the user that runs the command, by the system and not by the environment."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
