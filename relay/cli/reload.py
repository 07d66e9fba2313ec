"""`relay reload`: have a running relay read its configuration again, and print the result.

Owns the request to the relay, the text and the exit code. The reload itself is in app.py and
server/supervisor.py; SIGHUP starts the same reload, but its result is only in the log.
"""

from __future__ import annotations

import argparse
import http.client
import json
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from relay.cli.sources import load_config, print_warnings
from relay.core.addresses import local_url
from relay.core.errors import ConfigInvalid, OperatorError
from relay.core.paths import API
from relay.core.text import escaped
from relay.registry.credentials import EnvFileProblem, is_set, read_variables
from relay.registry.files import Files
from relay.registry.urls import BadUrl, read_url
from relay.server.listen import scheme_of_management

_PATH = f"{API}/providers/reload"
_TIMEOUT_S = 120.0
_ANSWER_BYTES = 1024 * 1024


class ReloadFailed(OperatorError):
    """The reload is not complete, or no relay answered; the text says why."""


class ReloadRefused(OperatorError):
    """The relay refused the new configuration and keeps the old one; the text has every problem
    with its file, line and column.
    """

    exit_code = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--url",
        help="where management listens (default: server.admin_host and admin_port of gateway.yaml,"
        " else server.host and port)",
    )


def run(options: argparse.Namespace) -> int:
    """Send the request and print the result; 0. Raises ConfigError, ReloadRefused, ReloadFailed.

    Without --url the local gateway.yaml is read first: it names the address, and its mistakes are
    printed without a request.
    """
    if (url := options.url) is None:
        config = load_config(options)
        print_warnings(config)
        server = config.settings.server
        url = local_url("http", server.host, server.port)
        if server.admin_port is not None:
            scheme = scheme_of_management(config, server.admin_host)
            url = local_url(scheme, server.admin_host, server.admin_port)
        token = config.settings.access.admin_token
    else:
        token = _token_of_environment(options.env_file)
    try:
        place = urlsplit(str(read_url(url)))
    except BadUrl as error:
        raise ReloadFailed(f"--url {error}") from None
    status, answer = _post_reload(place, token)
    if status != http.client.OK:
        raise _failure(status, answer)
    print(f"reloaded: {len(answer.get('providers', ()))} providers")
    print(f"changed: {_joined(answer, 'changed') or 'nothing'}")
    if needs_restart := _joined(answer, "needs_restart"):
        print(f"needs a restart: {needs_restart}")
    return 0


def _joined(answer: dict[str, Any], field: str) -> str:
    return escaped(", ".join(map(str, answer.get(field, ()))))


def _failure(status: int, answer: dict[str, Any]) -> OperatorError:
    """The error for an answer that is not 200, in the relay's own words where it has any."""
    error = answer.get("error")
    if not isinstance(error, dict) or "message" not in error:
        return ReloadFailed(f"the relay answered with status {status}")
    refused = error.get("code") == ConfigInvalid.code
    return (ReloadRefused if refused else ReloadFailed)(str(error["message"]))


def _token_of_environment(env_file: str) -> str:
    """Return RELAY_ADMIN_TOKEN of the environment or `env_file`; empty if it is not set. Raises
    ReloadFailed.
    """
    try:
        found = read_variables(Path(env_file), Files()).values.get("RELAY_ADMIN_TOKEN")
    except EnvFileProblem as error:
        raise ReloadFailed(f"{env_file} {error}") from None
    return found.strip() if found is not None and is_set(found) else ""


def _post_reload(url: SplitResult, token: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON body of the answer. Raises ReloadFailed."""
    secure = url.scheme == "https"
    place = f"{url.hostname}:{url.port or (443 if secure else 80)}"
    connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = connect(url.hostname or "", url.port, timeout=_TIMEOUT_S)
    try:
        headers = {"Content-Length": "0"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        connection.request("POST", _PATH, headers=headers)
        response = connection.getresponse()
        answer = json.loads(response.read(_ANSWER_BYTES))
    except (OSError, http.client.HTTPException) as error:  # some errors of TLS are ValueErrors too
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ReloadFailed(
            f"no relay answers on {place} ({reason}); if it listens elsewhere, as with --port,"
            " write --url and the URL that it printed at its start"
        ) from None
    except ValueError:  # not JSON, or not UTF-8
        answer = None
    finally:
        connection.close()
    if not isinstance(answer, dict):
        raise ReloadFailed(f"the server on {place} is not a relay; name the relay with --url")
    return response.status, answer
