"""`relay reload`: have a running relay read its files again, and print what came of it.

Owns: the call and the words. What a reload does is app.py's and server/supervisor.py's. A signal
does the same, but answers nobody.
"""

from __future__ import annotations

import argparse
import http.client
import ipaddress
import json
from typing import Any
from urllib.parse import urlsplit

from relay.cli.sources import load_config, print_warnings
from relay.core.errors import OperatorError
from relay.core.paths import API
from relay.registry.load import Config
from relay.registry.urls import BadUrl, read_url

_PATH = f"{API}/providers/reload"
_TIMEOUT_S = 120.0
_ANSWER_BYTES = 1024 * 1024


class NoReload(OperatorError):
    """Nothing was reloaded; the text says why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--url", help="where the relay listens (default: server.host and port of gateway.yaml)"
    )


def run(options: argparse.Namespace) -> int:
    """Ask the relay, and print what it answers; 0. Raises ConfigError, NoReload."""
    config = load_config(options)
    print_warnings(config)
    try:
        place = urlsplit(str(read_url(options.url or _address(config))))
    except BadUrl as error:
        raise NoReload(f"--url {error}") from None
    status, said = _ask(place.hostname or "", place.port or 80)
    if status != http.client.OK:
        message = said.get("error", {}).get("message") if isinstance(said, dict) else None
        raise NoReload(message or f"the relay answered with status {status}")
    print(f"reloaded: {len(said.get('providers', ()))} providers")
    if restart := said.get("needs_restart"):
        print(f"needs a restart: {', '.join(map(str, restart))}")
    return 0


def _address(config: Config) -> str:
    server = config.settings.server
    try:
        anywhere = ipaddress.ip_address(server.host).is_unspecified
    except ValueError:
        anywhere = False
    host = "127.0.0.1" if anywhere else server.host
    return f"http://[{host}]:{server.port}" if ":" in host else f"http://{host}:{server.port}"


def _ask(host: str, port: int) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
    try:
        connection.request("POST", _PATH, headers={"Content-Length": "0"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read(_ANSWER_BYTES) or b"null")
    except json.JSONDecodeError:
        raise NoReload(f"what listens on {host}:{port} is no relay; name it with --url") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise NoReload(
            f"no relay answers on {host}:{port} ({reason}); if it listens elsewhere, name it with"
            " --url, such as --url http://127.0.0.1:8787"
        ) from None
    finally:
        connection.close()
