"""`relay keys`: make, list, show, revoke and rotate the keys of clients in the database.

Works on the database of gateway.yaml, whether or not a relay runs: each relay that uses it reads
the change within a second. A new key is the only text on standard output, so that
`KEY=$(relay keys create web)` works; everything else that is said goes to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import uvloop

from relay.cli.ledger_access import acting_user, add_action, table_row, to_json
from relay.cli.sources import load_config
from relay.core.access import ClientKey, is_relay_secret
from relay.core.errors import (
    BadRequest,
    ClientConflict,
    ClientNotFound,
    OperatorError,
    RelayError,
)
from relay.core.numbers import duration_s, whole_number
from relay.core.text import escaped, quoted
from relay.gate.administration import Administration, MadeKey
from relay.gate.keys import digest_of
from relay.ledger.queries import iso
from relay.registry.load import Config
from relay.storage.access import AccessStore
from relay.storage.access_rows import PAGE_ROWS, KeyRow, is_client_name
from relay.storage.database import Database, DatabaseUnavailable, RowsRefused, database_url
from relay.storage.readers import QueryRefused
from relay.surfaces.descriptions import describe_client, describe_keys

_LISTS = {
    "providers": "providers that it may call, separated by commas (default: all)",
    "models": "models that it may use, with * and ? (default: all)",
    "endpoints": "kinds of endpoints, such as chat (default: all)",
    "origins": "origins of web pages that may use the key",
    "addresses": "addresses or networks from which it may be used (default: any)",
}
_LIMIT = "a limit of the client, such as requests=100,window_s=60; several times: each of them"
_EXPIRES = "when the key expires: 30d, or a date or time in ISO 8601 (default: never)"
_TARGET = "a key's id, a client's name, or - for the key itself on standard input"
_MAX_NUMBER, _MAX_KEY_CHARACTERS = 10**15, 1024


class KeysFailed(OperatorError):
    """The command failed; the text says why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of the command, with their options."""
    actions = parser.add_subparsers(required=True, metavar="action", dest="action")
    create = add_action(actions, "create", "make a key, and print it, this once")
    create.add_argument("name", metavar="NAME", help="the client; made unless it exists")
    for name, text in _LISTS.items():
        create.add_argument(f"--{name}", action="append", type=_items, metavar="A,B", help=text)
    create.add_argument("--limit", action="append", type=_limit, metavar="A=B,C=D", help=_LIMIT)
    create.add_argument(
        "--metadata", action="append", type=_entry, metavar="NAME=VALUE",
        help="metadata of each call, such as team=growth; several times: each of them",
    )  # fmt: skip
    create.add_argument("--expires", metavar="WHEN", help=_EXPIRES)
    listing = add_action(actions, "list", "print the keys of the database and of gateway.yaml")
    listing.add_argument("--client", metavar="NAME", help="only the keys of this client")
    show = add_action(actions, "show", "print a key, or a client with its keys")
    show.add_argument("target", metavar="ID|NAME", help=_TARGET)
    for action in (listing, show):
        action.add_argument("--json", action="store_true", help="JSON, for programs")
    revoke = add_action(actions, "revoke", "revoke a key, or a client with all its keys")
    revoke.add_argument("target", metavar="ID|NAME", help=_TARGET)
    rotate = add_action(actions, "rotate", "make a new key, and let the older ones expire")
    rotate.add_argument("name", metavar="NAME", help="the client")
    rotate.add_argument(
        "--grace", default="24h", metavar="TIME", help="how long older keys go on (default: 24h)"
    )
    rotate.add_argument("--expires", metavar="WHEN", help=_EXPIRES)


def run(options: argparse.Namespace) -> int:
    """Carry out one action; 0."""
    uvloop.run(carry_out(load_config(options), options, print))
    return 0


async def carry_out(
    config: Config, options: argparse.Namespace, out: Callable[[str], None]
) -> None:
    """Carry out one action. Raises KeysFailed."""
    async with open_store(config) as store:
        administration = Administration(store, config, f"cli:{acting_user()}", time.time)
        await _ACTIONS[options.action](administration, options, out)


@contextlib.asynccontextmanager
async def open_store(config: Config) -> AsyncIterator[AccessStore]:
    """Open the database. Raises KeysFailed, also for an error within the context."""
    if not config.settings.database:
        raise KeysFailed(
            "`database` is not set in gateway.yaml, so no key can be stored: set it, or write the"
            " client and its key to `clients` in gateway.yaml"
        )
    database = Database(database_url(config.settings.database))
    try:
        yield AccessStore(database)
    except DatabaseUnavailable as error:
        raise KeysFailed(
            f"the database cannot be used ({error}); see `database` in gateway.yaml, and whether"
            " this user may write it"
        ) from error
    except (RowsRefused, QueryRefused) as error:
        raise KeysFailed(str(error)) from error
    except RelayError as error:
        raise KeysFailed(_text_of(error)) from error
    finally:
        await database.close()


def _text_of(error: RelayError) -> str:
    """Return the text of an error without what concerns the API alone."""
    match error:
        case BadRequest(reason=reason):
            return reason
        case ClientConflict(name=name, reason=reason):
            return f"the client '{quoted(name)}' {reason}"
        case ClientNotFound(name=name):
            return f"there is no client '{quoted(name)}'"
    return error.message


async def _create(
    administration: Administration, options: argparse.Namespace, out: Callable[[str], None]
) -> None:
    record: dict[str, Any] = {
        name: [item for items in given for item in items]
        for name in _LISTS
        if (given := getattr(options, name)) is not None
    }
    if options.limit:
        record["limits"] = options.limit
    if options.metadata:
        record["metadata"] = dict(options.metadata)
    given = json.dumps(record) if record else None
    try:
        made = await administration.create_key(options.name, given, options.expires)
    except ClientNotFound:
        made = await administration.create_key(options.name, "{}", options.expires)
    _print_made(made, out)


async def _rotate(
    administration: Administration, options: argparse.Namespace, out: Callable[[str], None]
) -> None:
    grace_s = 0 if options.grace == "0" else duration_s(options.grace)
    if grace_s is None:
        raise KeysFailed(f"grace: '{quoted(options.grace)}' is not a time such as 24h, 90m or 0")
    made = await administration.rotate(options.name, grace_s, options.expires)
    _print_made(made, out)
    _say(f"its older keys of the database expire after {options.grace}, or before")


def _print_made(made: MadeKey, out: Callable[[str], None]) -> None:
    row = made.row
    until = f"until {iso(row.expires_s)}" if row.expires_s is not None else "without an end"
    _say(f"key {row.id} of the client '{row.client}', {until}; the key itself is shown only now")
    for warning in made.warnings:
        _say(f"warning: {warning}")
    out(made.secret)


async def _target(administration: Administration, given: str) -> str:
    """Return the id or name that is meant. Raises KeysFailed."""
    if is_relay_secret(given):
        raise KeysFailed(
            "other users of this machine see the arguments of a command, so no key should be among"
            " them: write - and the key on standard input"
        )
    if given != "-":
        return given
    digest = digest_of(sys.stdin.readline(_MAX_KEY_CHARACTERS).strip())
    if (configured := administration.config.clients.keys.get(digest)) is not None:
        return configured.id
    if (row := await administration.store.key_of_digest(digest)) is None:
        raise KeysFailed("the text on standard input is not a key of any client")
    return row.id


async def _revoke(
    administration: Administration, options: argparse.Namespace, out: Callable[[str], None]
) -> None:
    target = await _target(administration, options.target)
    if (before := await administration.find_key(target)) is not None:
        await administration.revoke_key(target)
        done = "revoked" if before.revoked_s is None else "was revoked before"
        _say(f"key {target} of the client '{before.client}' {done}")
        return
    if any(key.id == target for key in administration.own_keys()):
        raise KeysFailed(f"the key {target} is in gateway.yaml: remove it there, and reload")
    try:
        revoked = await administration.revoke_client(target)
    except ClientNotFound as error:
        raise _nothing_named(target) from error
    _say(f"client '{target}': {revoked} key{'' if revoked == 1 else 's'} revoked")
    for warning in administration.unchanged_keys(target):
        _say(warning)


async def _list(
    administration: Administration, options: argparse.Namespace, out: Callable[[str], None]
) -> None:
    if not options.json:
        out(table_row(_HEADS, _WIDTHS))
    async for page in _pages(administration, options.client):
        for key in await describe_keys(page, administration):
            out(to_json(key) if options.json else _key_row(key))


async def _show(
    administration: Administration, options: argparse.Namespace, out: Callable[[str], None]
) -> None:
    name = target = await _target(administration, options.target)
    rows: list[KeyRow | ClientKey] = [k for k in administration.own_keys() if k.id == target]
    if (found := await administration.find_key(target)) is not None:
        rows = [found]
    for row in rows:
        name = row.client if isinstance(row, KeyRow) else row.client.name
    if not rows:
        rows = [row async for page in _pages(administration, name) for row in page]
    client = None
    with contextlib.suppress(ClientNotFound):
        found_client = await administration.require_client(name)
        client = describe_client(found_client, administration.config)
    if client is None and not rows:
        raise _nothing_named(target)
    keys = await describe_keys(rows, administration)
    if options.json:
        out(to_json({"client": client, "keys": keys}))
        return
    if client is not None:
        out(escaped(f"client {name} ({client['source']}): {to_json(client['record'])}"))
    out(table_row(_HEADS, _WIDTHS))
    for key in keys:
        out(_key_row(key))


async def _pages(
    administration: Administration, client: str | None
) -> AsyncIterator[Sequence[KeyRow | ClientKey]]:
    """Yield the keys of one client or of all: those of gateway.yaml, then pages of the database."""
    yield administration.own_keys(client)
    if client is not None and not is_client_name(client):
        return
    page = await administration.store.keys(client)
    while page:
        yield page
        last = page[-1].id
        page = await administration.store.keys(client, last) if len(page) == PAGE_ROWS else ()


def _nothing_named(target: str) -> KeysFailed:
    return KeysFailed(f"there is no key and no client '{quoted(target)}'")


_HEADS = ("id", "client", "state", "expires", "made", "by")
_WIDTHS = (12, 20, 9, 20, 20)


def _key_row(key: dict[str, Any]) -> str:
    made, by = key["created_at"] or "gateway.yaml", key["created_by"] or "-"
    cells = (key["id"], key["client"], key["state"], key["expires_at"] or "-", made, by)
    return table_row(cells, _WIDTHS)


def _say(text: str) -> None:
    print(escaped(text), file=sys.stderr)


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _entry(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not name.strip() or not sign:
        raise argparse.ArgumentTypeError(f"should be NAME=VALUE, not '{quoted(text)}'")
    return name.strip(), value


def _limit(text: str) -> dict[str, Any]:
    """Parse `requests=100,window_s=60`."""
    limit: dict[str, Any] = {}
    for name, value in map(_entry, _items(text)):
        number = whole_number(value, 0, _MAX_NUMBER)
        given: Any = value if number is None else number
        if name in ("providers", "models", "per"):
            given = [*limit.get(name, ()), given]
        limit[name] = given
    return limit


_ACTIONS = {
    "create": _create,
    "list": _list,
    "show": _show,
    "revoke": _revoke,
    "rotate": _rotate,
}
