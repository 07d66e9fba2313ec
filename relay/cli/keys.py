"""`relay keys`: make, list, show, revoke and rotate the keys of clients in the database.

Works on the database of gateway.yaml, whether or not a relay runs: each relay that uses it reads
the change within a second. A new key is the only text on standard output, so that
`KEY=$(relay keys create web)` works; everything else that is said goes to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pwd
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import msgspec
import uvloop

from relay.cli.ledger_access import to_json
from relay.cli.sources import load_config
from relay.core.access import is_relay_secret
from relay.core.errors import OperatorError
from relay.core.numbers import whole_number
from relay.core.text import escaped, quoted
from relay.gate.key_making import KeyMaker, KeyRefused, KeyUnknown, MadeKey
from relay.registry.load import Config
from relay.storage.access import AccessStore
from relay.storage.access_rows import PAGE_ROWS, ClientRow, KeyRow
from relay.storage.database import Database, DatabaseUnavailable, RowsRefused, database_url
from relay.storage.readers import QueryRefused

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
    create = _add(actions, "create", "make a key, and print it, this once")
    create.add_argument("name", metavar="NAME", help="the client; made unless it exists")
    for name, text in _LISTS.items():
        create.add_argument(f"--{name}", action="append", type=_items, metavar="A,B", help=text)
    create.add_argument("--limit", action="append", type=_limit, metavar="A=B,C=D", help=_LIMIT)
    create.add_argument(
        "--metadata", action="append", type=_entry, metavar="NAME=VALUE",
        help="metadata of each call, such as team=growth; several times: each of them",
    )  # fmt: skip
    create.add_argument("--expires", metavar="WHEN", help=_EXPIRES)
    listing = _add(actions, "list", "print the keys of the database and of gateway.yaml")
    listing.add_argument("--client", metavar="NAME", help="only the keys of this client")
    show = _add(actions, "show", "print a key, or a client with its keys")
    show.add_argument("target", metavar="ID|NAME", help=_TARGET)
    for action in (listing, show):
        action.add_argument("--json", action="store_true", help="JSON, for programs")
    revoke = _add(actions, "revoke", "revoke a key, or a client with all its keys")
    revoke.add_argument("target", metavar="ID|NAME", help=_TARGET)
    rotate = _add(actions, "rotate", "make a new key, and let the older ones expire")
    rotate.add_argument("name", metavar="NAME", help="the client")
    rotate.add_argument(
        "--grace", default="24h", metavar="TIME", help="how long older keys go on (default: 24h)"
    )
    rotate.add_argument("--expires", metavar="WHEN", help=_EXPIRES)


def _add(actions: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text)
    return parser


def run(options: argparse.Namespace) -> int:
    """Carry out one action; 0."""
    uvloop.run(carry_out(load_config(options), options, print))
    return 0


async def carry_out(
    config: Config, options: argparse.Namespace, out: Callable[[str], None]
) -> None:
    """Carry out one action. Raises KeysFailed."""
    async with _open_store(config) as store:
        maker = KeyMaker(store, config, f"cli:{_user()}", time.time())
        await _ACTIONS[options.action](maker, options, out)


@contextlib.asynccontextmanager
async def _open_store(config: Config) -> AsyncIterator[AccessStore]:
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
    except (KeyRefused, KeyUnknown, RowsRefused, QueryRefused) as error:
        raise KeysFailed(str(error)) from error
    finally:
        await database.close()


async def _create(maker: KeyMaker, options: argparse.Namespace, out: Callable[[str], None]) -> None:
    record: dict[str, Any] = {
        name: [item for items in given for item in items]
        for name in _LISTS
        if (given := getattr(options, name)) is not None
    }
    if options.limit:
        record["limits"] = options.limit
    if options.metadata:
        record["metadata"] = dict(options.metadata)
    made = await maker.create(options.name, record, options.expires)
    _print_made(made, out)


async def _rotate(maker: KeyMaker, options: argparse.Namespace, out: Callable[[str], None]) -> None:
    made = await maker.rotate(options.name, options.grace, options.expires)
    _print_made(made, out)
    _say(f"its older keys of the database expire after {options.grace}, or before")
    if stay := _configured(maker.config, options.name):
        _say(f"{', '.join(stay)} in gateway.yaml go on; remove them there, and reload")


def _print_made(made: MadeKey, out: Callable[[str], None]) -> None:
    row = made.row
    until = f"until {_time(row.expires_s)}" if row.expires_s is not None else "without an end"
    _say(f"key {row.id} of the client '{row.client}', {until}; the key itself is shown only now")
    for warning in made.warnings:
        _say(f"warning: {warning}")
    out(made.secret)


async def _target(maker: KeyMaker, given: str) -> str:
    """Return the id or name that is meant. Raises KeyRefused, KeyUnknown."""
    if is_relay_secret(given):
        raise KeyRefused(
            "other users of this machine see the arguments of a command, so no key should be among"
            " them: write - and the key on standard input"
        )
    if given != "-":
        return given
    secret = sys.stdin.readline(_MAX_KEY_CHARACTERS).strip()
    digest = sha256(secret.encode("utf-8", "surrogateescape")).digest()
    if (configured := maker.config.clients.keys.get(digest)) is not None:
        return configured.id
    if (row := await maker.store.key_of_digest(digest)) is None:
        raise KeyUnknown("the text on standard input is not a key of any client")
    return row.id


async def _revoke(maker: KeyMaker, options: argparse.Namespace, out: Callable[[str], None]) -> None:
    revoked = await maker.revoke(await _target(maker, options.target))
    if revoked.key_id is not None:
        done = "revoked" if revoked.keys else "was revoked before"
        _say(f"key {revoked.key_id} of the client '{revoked.client}' {done}")
    else:
        count = "1 key" if revoked.keys == 1 else f"{revoked.keys} keys"
        _say(f"client '{revoked.client}': {count} revoked")
    if revoked.configured:
        ids = ", ".join(revoked.configured)
        _say(f"{ids} in gateway.yaml go on; remove them there, and reload")


async def _list(maker: KeyMaker, options: argparse.Namespace, out: Callable[[str], None]) -> None:
    known = await _client_names(maker, options.client)
    keys = _configured_keys(maker, options.client)
    if not options.json:
        out(_row(_HEADS))
    for key in keys:
        out(to_json(key) if options.json else _key_row(key))
    async for row in _stored_keys(maker.store, options.client):
        key = _shown(row, known, maker.now_s)
        out(to_json(key) if options.json else _key_row(key))


async def _show(maker: KeyMaker, options: argparse.Namespace, out: Callable[[str], None]) -> None:
    store, target = maker.store, await _target(maker, options.target)
    shown = [key for key in _configured_keys(maker, None) if target in (key["id"], key["client"])]
    rows = [found] if (found := await store.key(target)) is not None else []
    name = rows[0].client if rows else target
    if not rows and shown:
        name = shown[0]["client"]
    if name == target:
        rows = [row async for row in _stored_keys(store, name)]
    known = await _client_names(maker, name)
    shown += [_shown(row, known, maker.now_s) for row in rows]
    client = await _client(maker, name)
    if client is None and not shown:
        raise KeyUnknown(f"there is no key and no client '{quoted(target)}'")
    if options.json:
        out(to_json({"client": client, "keys": shown}))
        return
    if client is not None:
        out(escaped(f"client {name} ({client['source']}): {to_json(client['record'])}"))
    out(_row(_HEADS))
    for key in shown:
        out(_key_row(key))


async def _client(maker: KeyMaker, name: str) -> dict[str, Any] | None:
    """Return the client that is in force under a name; None if there is none."""
    settings = maker.config.settings.clients
    if name in settings:
        record = settings[name].model_dump(
            mode="json", exclude={"key", "key_sha256", "expires"}, exclude_defaults=True
        )
        return {"name": name, "source": "gateway.yaml", "record": record}
    row = await maker.store.client(name)
    if row is None or row.deleted_s is not None:
        return None
    return {"name": name, "source": "database", "record": msgspec.json.decode(row.record)}


async def _client_names(maker: KeyMaker, only: str | None) -> set[str]:
    """The names of the clients in force, or the one of them that is named."""
    names = set(maker.config.clients.by_name)
    if only is not None:
        return names | ({only} if await _client(maker, only) else set())
    page: Sequence[ClientRow] = await maker.store.clients()
    while page:
        names |= {row.name for row in page}
        page = await maker.store.clients(page[-1].name) if len(page) == PAGE_ROWS else ()
    return names


async def _stored_keys(store: AccessStore, client: str | None) -> AsyncIterator[KeyRow]:
    page = await store.keys(client)
    while page:
        for row in page:
            yield row
        page = await store.keys(client, page[-1].id) if len(page) == PAGE_ROWS else ()


def _configured(config: Config, client: str) -> list[str]:
    return [key.id for key in config.clients.keys.values() if key.client.name == client]


def _configured_keys(maker: KeyMaker, client: str | None) -> list[dict[str, Any]]:
    return [
        {
            "id": key.id, "client": key.client.name, "source": "gateway.yaml",
            "state": _state(key.expires_s, maker.now_s), "created_at": None, "created_by": None,
            "expires_at": _time(key.expires_s), "revoked_at": None,
        }
        for key in maker.config.clients.keys.values()
        if client in (None, key.client.name)
    ]  # fmt: skip


def _shown(row: KeyRow, known: set[str], now_s: float) -> dict[str, Any]:
    state = "revoked" if row.revoked_s is not None else _state(row.expires_s, now_s)
    if state == "valid" and row.client not in known:
        state = "no client"
    return {
        "id": row.id, "client": row.client, "source": "database", "state": state,
        "created_at": _time(row.created_s), "created_by": row.created_by,
        "expires_at": _time(row.expires_s), "revoked_at": _time(row.revoked_s),
    }  # fmt: skip


def _state(expires_s: int | None, now_s: float) -> str:
    return "valid" if expires_s is None or expires_s > now_s else "expired"


_HEADS = ("id", "client", "state", "expires", "made", "by")
_WIDTHS = (12, 20, 9, 20, 20)


def _key_row(key: dict[str, Any]) -> str:
    made, by = key["created_at"] or "gateway.yaml", key["created_by"] or "-"
    return _row((key["id"], key["client"], key["state"], key["expires_at"] or "-", made, by))


def _row(cells: Sequence[str]) -> str:
    padded = [*map(str.ljust, cells, _WIDTHS), *cells[len(_WIDTHS) :]]
    return escaped("  ".join(padded).rstrip())


def _time(at_s: int | None) -> str | None:
    if at_s is None:
        return None
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _say(text: str) -> None:
    print(escaped(text), file=sys.stderr)


def _user() -> str:
    """Name of the user that runs the command, by the system and not by the environment."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


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
