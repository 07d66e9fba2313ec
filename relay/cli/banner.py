"""What `relay serve` prints first: where it is, what it can reach and lacks, and a line to try."""

from __future__ import annotations

import ipaddress
import socket

import relay
from relay.core.paths import API
from relay.registry.load import Config

TRY = """\
curl -N {url}{api}/providers/{provider}/chat/completions \\
    -H 'content-type: application/json' \\
    -d '{{"model":"{model}","stream":true,"messages":[{{"role":"user","content":"hi"}}]}}'"""


def banner(config: Config, sock: socket.socket, tls: socket.socket | None = None) -> str:
    """The banner's text. Names of variables, never values."""
    url = address(sock)
    providers = config.registry.providers.values()
    ready = ", ".join(sorted(p.name for p in providers if not p.missing)) or "none"
    lacking = [f"{p.name} ({', '.join(p.missing)})" for p in providers if p.missing]
    lines = [
        f"relay {relay.__version__} on {url}   ({config.path})",
        f"  ready           {ready}",
        *([f"  not configured  {_wrapped(lacking)}"] if lacking else []),
        f"  access          {_access(config)}",
        f"  cloudflare      {_cloudflare(config)}",
        f"  ledger          {_ledger(config)}",
    ]
    if tls is not None and config.certificate is not None:
        lines.append(f"  tls             {address(tls, 'https')}   ({config.certificate.shown})")
    if config.settings.server.workers > 1:
        lines.append(f"  workers         {config.settings.server.workers}")
    if "demo" in config.registry.providers:
        lines += [
            "",
            "Try it:",
            "  " + TRY.format(url=url, api=API, provider="demo", model="demo-chat"),
        ]
    return "\n".join(lines) + "\n"


def address(sock: socket.socket, scheme: str = "http") -> str:
    """The URL to reach a listening socket by."""
    host, port = sock.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}:{port}"


def _wrapped(items: list[str]) -> str:
    """Three to a line, aligned."""
    rows = [", ".join(items[at : at + 3]) for at in range(0, len(items), 3)]
    return (",\n" + " " * 18).join(rows)


def _access(config: Config) -> str:
    hosts = config.settings.server.hosts
    names = f"loopback and {', '.join(hosts)}" if hosts else "loopback"
    return f"OPEN: calls by these host names need no key: {names}"


def _ledger(config: Config) -> str:
    """Where, without a password."""
    given = config.settings.database
    if not given:
        return "off (no `database`)"
    return (
        given if "://" not in given else f"{given.partition('://')[0]}://{given.rpartition('@')[2]}"
    )


def _cloudflare(config: Config) -> str:
    account = config.settings.cloudflare
    if not account.account_id:
        return "off (CLOUDFLARE_ACCOUNT_ID is not set): providers are called directly"
    token = "with" if account.api_key else "without"
    return f"gateway '{account.gateway_id}', {token} cf-aig-authorization"
