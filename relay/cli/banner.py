"""Describe a relay that serves: its addresses and providers, who may call, and a first call.

Owns the text of the banner, and the fields of the event that replaces it in a log. When it is
printed, and whether a person reads it, is decided in serve.py.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
from dataclasses import dataclass
from typing import Any

import relay
from relay.core.addresses import LOOPBACK_NAMES, local_url
from relay.core.paths import API
from relay.registry.load import Config
from relay.registry.packaged import find_config
from relay.server.listen import Listeners, scheme_of_management

_FIRST_CALL = (
    "curl -N {url}{api}/providers/demo/chat/completions -H 'content-type: application/json'"
    ' -d \'{{"model":"demo-chat","stream":true,"messages":[{{"role":"user","content":"hi"}}]}}\''
)


@dataclass(frozen=True, slots=True)
class Started:
    """A relay that serves. It holds names of variables and hosts, no secret."""

    config: Config
    url: str
    tls_url: str | None
    admin_url: str | None = None

    @classmethod
    def at(cls, config: Config, listeners: Listeners) -> Started:
        """Call it while the sockets are open."""
        tls = address(listeners.tls, "https") if listeners.tls is not None else None
        admin = None
        if (sock := listeners.admin) is not None:
            admin = address(sock, scheme_of_management(config, sock.getsockname()[0]))
        return cls(config, address(listeners.plain), tls, admin)

    @property
    def ready(self) -> list[str]:
        """Names of the providers that can be called."""
        providers = self.config.registry.providers.values()
        return sorted(provider.name for provider in providers if not provider.missing)

    @property
    def fields(self) -> dict[str, Any]:
        """For the event `relay.started`."""
        fields = {
            "version": relay.__version__,
            "pid": os.getpid(),
            "workers": self.config.settings.server.workers,
            "url": self.url,
            "config": str(self.config.path),
            "providers_ready": len(self.ready),
            "providers_not_configured": len(self.config.registry.providers) - len(self.ready),
        }
        others = {"tls_url": self.tls_url, "admin_url": self.admin_url}
        return fields | {name: url for name, url in others.items() if url is not None}

    @property
    def banner(self) -> str:
        """For a terminal."""
        rows = [("url", self.url)]
        if self.tls_url is not None and self.config.certificate is not None:
            rows.append(("", f"{self.tls_url} (certificate {self.config.certificate.shown})"))
        if self.admin_url is not None:
            rows.append(("admin", self.admin_url))
        rows += [
            ("config", str(self.config.path)),
            ("providers", self._providers()),
            ("access", _access(self.config)),
        ]
        if origins := self.config.settings.cors.origins:
            rows.append(("pages", f"{', '.join(origins)} (cors.origins), and the relay's own"))
        workers = self.config.settings.server.workers
        lines = [
            f"relay {relay.__version__} is ready: pid {os.getpid()}"
            + (f", {workers} workers" if workers > 1 else ""),
            *(f"  {label:<9}  {text}" for label, text in rows),
        ]
        if "demo" in self.ready:
            lines += ["", "Try it:", _FIRST_CALL.format(url=self.url, api=API)]
        return "\n".join(lines) + "\n"

    def _providers(self) -> str:
        text = ", ".join(self.ready) or "none is ready"
        count = len(self.config.registry.providers) - len(self.ready)
        if not count:
            return text
        return f"{text}; {count} not configured: `{_check_command(self.config)}` lists them"


def address(sock: socket.socket, scheme: str = "http") -> str:
    """The URL by which this machine reaches a listening socket."""
    host, port = sock.getsockname()[:2]
    return local_url(scheme, host, port)


def _access(config: Config) -> str:
    """Who may call while calls need no key (gate/access.py)."""
    from relay.gateway import accepted_hosts  # only for a terminal, see serve.py

    hosts = accepted_hosts(config.settings)
    if "*" in hosts:
        return "no key needed, by any host name"
    names = ", ".join(dict.fromkeys([*LOOPBACK_NAMES, *hosts]))
    return f"no key needed, by the host names {names}"


def _check_command(config: Config) -> str:
    """`relay check`, as this process was started."""
    program = ["relay"]
    if os.path.basename(sys.argv[0]) != "relay":
        program = [os.path.relpath(sys.executable), "-m", "relay"]
    file = [] if config.path == find_config(None) else [str(config.path)]
    return shlex.join([*program, "check", *file])
