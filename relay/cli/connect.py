"""`relay connect`: make a coding agent call its provider through the relay, and take that back.

Owns the choice of the relay's URL and of the key, the order of the steps, and what is printed. The
programs are in agent_tools.py; the files are changed in connections.py.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from relay.cli.agent_tools import (
    BASES,
    ENVIRONMENT,
    TOOLS,
    Key,
    SettingsFile,
    Tool,
    is_key,
    resolved,
    without_password,
)
from relay.cli.connections import (
    ConnectFailed,
    Connection,
    Plan,
    backup_of,
    load_record,
    plan_file,
    records_folder,
    remove_record,
    require_writable,
    restore_file,
    save_record,
    write_file,
)
from relay.cli.keys import open_store
from relay.cli.ledger_access import acting_user
from relay.cli.settings_formats import value_at
from relay.cli.sources import load_config
from relay.core.addresses import local_url
from relay.core.errors import ClientNotFound, OperatorError
from relay.core.text import escaped
from relay.gate.administration import Administration
from relay.registry.load import Config
from relay.registry.packaged import packaged
from relay.registry.urls import BadUrl, read_url
from relay.storage.database import database_url

KEY_VARIABLE = "RELAY_KEY"
_NO_KEY = "the-relay-has-it"
"""In place of a key while calls need none: programs insist on some text."""
_NEW_KEY = "(a new key)"
_HIDDEN = "(hidden)"
_ENV = "env"
_ENV_CLIENT = "shell"
_MAX_KEY_CHARACTERS = 1024
_SHELLS = {"sh": "export {name}={value}", "fish": "set -gx {name} {value}"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "tool",
        choices=[*TOOLS, _ENV],
        help="the program to connect; env prints variables for any other program",
    )
    parser.add_argument(
        "--url",
        help="the relay's URL (default: server.public_url of gateway.yaml, else server.host and"
        " port)",
    )
    parser.add_argument(
        "--key",
        help=f"the client's key, or - to read it from standard input (default: {KEY_VARIABLE} of"
        " the environment, else a new key is made in the database)",
    )
    parser.add_argument(
        "--client", help="name of the client whose key is made (default: the program's)"
    )
    parser.add_argument(
        "--shell", choices=_SHELLS, default="sh", help="whose syntax env prints (default: sh)"
    )
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument(
        "--dry-run", action="store_true", help="print what would change, and change nothing"
    )
    actions.add_argument(
        "--undo",
        action="store_true",
        help="restore the settings from before, and revoke the key that was made",
    )


def run(options: argparse.Namespace) -> int:
    """Connect or disconnect a program; 0. Raises ConnectFailed, ConfigError, KeysFailed."""
    environment = dict(os.environ)
    folder = records_folder(Path.home(), environment)
    record = load_record(folder, options.tool)
    if options.undo:
        if record is None:
            raise ConnectFailed(f"{options.tool} is not connected, so there is nothing to undo")
        _undo(options, folder, record)
        return 0
    _Connecting(options, load_config(options), environment, folder, record).connect()
    return 0


def _say(text: str) -> None:
    print(escaped(text), file=sys.stderr)


@dataclass(slots=True)
class _Connecting:
    """One run of the command that connects."""

    options: argparse.Namespace
    config: Config
    environment: Mapping[str, str]
    folder: Path
    before: Connection | None
    made_client: str | None = None

    @property
    def tool(self) -> Tool | None:
        """The program; None for `env`, which changes no file."""
        return TOOLS.get(self.options.tool)

    @property
    def client(self) -> str:
        """The name of the client for which a key is made."""
        name: str | None = self.options.client
        return name or (self.tool.client if self.tool is not None else _ENV_CLIENT)

    def connect(self) -> None:
        """Check everything, make the key, write the record, and then the files."""
        url, given = self._url(), self._given_key()
        if given is None:
            given = self._key_given_before()
        if given is None and not self._can_make_keys():
            given = self._without_database()
        plans = self._plan(url, given or self._known_key() or _NEW_KEY)
        if self.options.dry_run:
            self._print_plan(plans, url, given)
            return
        for plan in plans:
            if plan.is_change:
                require_writable(plan.contents.path)
        require_writable(self.folder / "record")
        connection = uvloop.run(self._connection(url, given))
        assert connection.key is not None
        plans = self._plan(url, connection.key)
        connection.files = [plan.record for plan in plans]
        if connection != self.before:
            save_record(self.folder, connection)
        copied = [path for plan in plans if (path := write_file(plan)) is not None]
        if self.tool is None:
            self._print_exports(url, connection.key)
        else:
            self._report(self.tool, plans, copied, connection)

    def _url(self) -> str:
        given: str | None = self.options.url
        server = self.config.settings.server
        found = given or server.public_url or local_url("http", server.host, server.port)
        try:
            return str(read_url(found)).rstrip("/")
        except BadUrl as error:
            raise ConnectFailed(f"--url {error}") from None

    def _given_key(self) -> str | None:
        """The key that the user names; None if there is none. Raises ConnectFailed."""
        given: str | None = self.options.key
        if given == "-":
            given = sys.stdin.readline(_MAX_KEY_CHARACTERS).strip()
        elif given is None:
            given = self.environment.get(KEY_VARIABLE) or None
        if given is not None and not is_key(given):
            raise ConnectFailed("the key is empty, or has characters that no key has")
        return given

    def _can_make_keys(self) -> bool:
        """True if the database is that of a relay here: a command in any other folder would make a
        new database, whose keys no relay knows.
        """
        setting = self.config.settings.database
        if not setting:
            return False
        if self.config.path.resolve().parent != packaged().resolve():
            return True
        file = database_url(setting).database
        is_file = database_url(setting).drivername.startswith("sqlite")
        return not self.options.url and (not is_file or (bool(file) and Path(str(file)).exists()))

    def _without_database(self) -> str:
        """The text in place of a key while calls need none. Raises ConnectFailed."""
        if self.config.path.resolve().parent == packaged().resolve() and (
            self.options.url or self.config.settings.database
        ):
            raise ConnectFailed(
                "no relay was run in this folder, so no key can be made here: run the command in"
                f" the relay's folder, or give a key by --key - or {KEY_VARIABLE}"
            )
        if self.config.settings.access.mode != "open":
            raise ConnectFailed(
                "calls need a key, and `database` is not set in gateway.yaml, so none can be made:"
                f" give one of `clients` by --key - or {KEY_VARIABLE}"
            )
        _say("Calls need no key (access.mode is open), and there is no database: none was made.")
        return _NO_KEY

    def _key_given_before(self) -> str | None:
        """The key that the user gave when the program was connected before."""
        before = self.before
        if before is None or before.key_id is not None or before.key == _NO_KEY:
            return None
        return before.key if self.options.client is None else None

    def _known_key(self) -> str | None:
        return self.before.key if self.before is not None and self.before.key_id else None

    def _plan(self, url: str, key: str) -> list[Plan]:
        if self.tool is None:
            return []
        known = {file.path: file for file in self.before.files} if self.before else {}
        plans = []
        for file in self.tool.files:
            path = file.path(Path.home(), self.environment)
            values = {each.path: resolved(each.value, url, key) for each in file.settings}
            plans.append(plan_file(path, file.format, values, known.pop(str(path), None)))
        if known:
            raise ConnectFailed(
                f"{self.options.tool} was connected by {', '.join(known)}, which is not the file"
                f" that it reads now: run `relay connect {self.options.tool} --undo` first"
            )
        return plans

    async def _connection(self, url: str, given: str | None) -> Connection:
        """The record of the connection: with the given key, the one that was made before, or a new
        one. A key that was made before and is no longer used is revoked.
        """
        before = self.before
        connection = Connection(self.options.tool, url)
        old_id = before.key_id if before is not None else None
        if given is not None and (old_id is None or not self.config.settings.database):
            if old_id is not None:
                _say(f"The key {old_id}, which is no longer used, is not revoked.")
            connection.key = given
            return connection
        async with open_store(self.config) as store:
            keys = Administration(store, self.config, f"cli:{acting_user()}", time.time)
            old = await keys.find_key(old_id) if old_id is not None else None
            is_same = self.options.client in (None, old.client if old is not None else None)
            is_valid = old is not None and old.revoked_s is None
            if is_valid and old is not None and old.expires_s is not None:
                is_valid = old.expires_s > time.time()
            if given is None and old is not None and is_valid and is_same and before is not None:
                connection.key, connection.key_id = before.key, old.id
                connection.client = old.client
                return connection
            if given is not None:
                connection.key = given
            else:
                try:
                    made = await keys.create_key(self.client)
                except ClientNotFound:
                    made = await keys.create_key(self.client, "{}")
                connection.key, connection.key_id = made.secret, made.row.id
                connection.client = self.made_client = made.row.client
                for warning in made.warnings:
                    _say(f"warning: {warning}")
            if old is not None and is_valid:
                await keys.revoke_key(old.id)
                _say(f"The key {old.id}, which is no longer used, is revoked.")
        return connection

    def _print_plan(self, plans: Sequence[Plan], url: str, given: str | None) -> None:
        """Print the settings that would change, without a secret."""
        if self.tool is None:
            self._print_exports(url, _HIDDEN if given != _NO_KEY else _NO_KEY)
            return
        for plan, file in zip(plans, self.tool.files, strict=True):
            print(escaped(f"{plan.contents.path}{'' if plan.is_change else ': nothing to change'}"))
            for line in _differences(plan, file) if plan.is_change else ():
                print(escaped(line))
        if given is None and self._known_key() is None:
            print(f"A key of the client '{escaped(self.client)}' would be made.")
        print("Nothing was changed.")

    def _print_exports(self, url: str, key: str) -> None:
        """Print the variables; they are the only text on standard output."""
        form = _SHELLS[self.options.shell]
        for name, value in ENVIRONMENT.items():
            print(form.format(name=name, value=shlex.quote(resolved(value, url, key))))

    def _report(
        self, tool: Tool, plans: Sequence[Plan], copied: Iterable[Path], connection: Connection
    ) -> None:
        copies, name = set(copied), self.options.tool
        if connection == self.before and not any(plan.is_change for plan in plans):
            print(f"{tool.title} calls the relay at {connection.url} already; nothing was changed.")
        else:
            print(f"{tool.title} now calls the relay at {connection.url}.")
        for plan, file in zip(plans, tool.files, strict=True):
            path = plan.contents.path
            settings = ", ".join(setting.name for setting in file.settings)
            kept = f" The file as it was is {backup_of(path)}." if backup_of(path) in copies else ""
            if plan.is_change:
                print(escaped(f"It reads {settings} from {path}.{kept}"))
            if path.is_symlink() and any(isinstance(each.value, Key) for each in file.settings):
                print(
                    escaped(
                        f"{path} is a link to {path.resolve()}, which has the key now: keep it out"
                        " of repositories."
                    )
                )
        if connection.key_id is not None:
            done = "was made" if self.made_client else "is used"
            print(
                f"The key {connection.key_id} of the client '{connection.client}' {done};"
                f" `relay usage --client {connection.client}` shows what it costs."
            )
        for text in (*tool.notes, *self._missing(tool)):
            print(escaped(text))
        print(f"Try it: {tool.next_command}")
        print(f"`relay doctor --agents` tests it, and `relay connect {name} --undo` takes it back.")

    def _missing(self, tool: Tool) -> list[str]:
        """What the relay lacks for the program, as far as the gateway.yaml here is the relay's."""
        if self.options.url:
            return []
        found, providers = [], self.config.registry.providers
        for vendor in dict.fromkeys(BASES[base][0] for base in tool.bases):
            if (provider := providers.get(vendor)) is None:
                found.append(f"The relay has no provider {vendor}: add it to gateway.yaml.")
            elif provider.missing:
                missing = ", ".join(provider.missing)
                found.append(
                    f"The relay has no credential for {vendor}: put {missing} into its .env, and"
                    " run `relay reload`."
                )
        return found


def _differences(plan: Plan, file: SettingsFile) -> list[str]:
    """Lines for the settings of a file that change. Secrets are hidden, as are the old values of
    settings that hold a secret.
    """
    lines = []
    for setting in file.settings:
        change = next(c for c in plan.record.changes if tuple(c.path) == setting.path)
        before = value_at(plan.settings, setting.path)
        if before == change.after:
            continue
        secret = isinstance(setting.value, Key)
        if before is not None:
            old = _HIDDEN if secret else without_password(str(before), _HIDDEN)
            lines.append(f"- {setting.name} = {old}")
        new = change.after
        if secret and new not in (_NO_KEY, _NEW_KEY):
            new = _HIDDEN
        lines.append(f"+ {setting.name} = {new}")
    return lines


def _undo(options: argparse.Namespace, folder: Path, record: Connection) -> None:
    """Restore the files, then revoke the key. A record stays until both are done, or until the key
    is not found a second time.
    """
    title = TOOLS[record.tool].title if record.tool in TOOLS else "The shell"
    left: list[str] = []
    is_second_try = not record.files and record.tool != _ENV
    for file in list(record.files):
        left += restore_file(file)
        record.files.remove(file)
        save_record(folder, record)
    if left:
        _say(f"Changed since by others, and left as they are: {', '.join(left)}.")
    if record.key_id is not None:
        try:
            uvloop.run(_revoke(options, record))
            _say(f"The key {record.key_id} of the client '{record.client}' is revoked.")
        except ConnectFailed:
            if not is_second_try:  # its database may be gone
                raise
            _say(
                f"The key {record.key_id} of the client '{record.client}' is not in this database:"
                f" `relay keys revoke {record.key_id}`, in the relay's folder, revokes it."
            )
    remove_record(folder, record.tool)
    if record.tool == _ENV:
        _say("Open a new shell, or unset the variables: " + " ".join(ENVIRONMENT))
    else:
        _say(f"{title} has its settings from before.")


async def _revoke(options: argparse.Namespace, record: Connection) -> None:
    assert record.key_id is not None
    advice = (
        f"the settings are restored, but the key {record.key_id} is not revoked: run `relay connect"
        f" {record.tool} --undo` again in the relay's folder"
    )
    try:
        config = load_config(options)
        async with open_store(config) as store:
            keys = Administration(store, config, f"cli:{acting_user()}", time.time)
            if await keys.find_key(record.key_id) is not None:
                await keys.revoke_key(record.key_id)
                return
    except OperatorError as error:
        raise ConnectFailed(f"{advice} ({error})") from error
    raise ConnectFailed(f"{advice}, whose database has it")
