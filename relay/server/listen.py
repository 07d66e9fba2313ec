"""Open the listening sockets: bound here, or passed by systemd, and inherited by the workers.

Owns the rule for addresses that others can reach, and the errors for an address that is taken or
refused. Sockets are bound without SO_REUSEPORT, so that another program on the port is an error.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
from collections.abc import Callable
from dataclasses import dataclass

from relay.core.addresses import is_loopback
from relay.core.errors import OperatorError
from relay.registry.load import Config

BACKLOG = 1024
_FIRST_PASSED_FD = 3


class CannotListen(OperatorError):
    """The relay cannot listen on an address, or must not; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Listeners:
    """The listening sockets: plain, and TLS where there is a certificate."""

    plain: socket.socket
    tls: socket.socket | None = None
    admin: socket.socket | None = None
    """The socket of management, which the others do not answer then."""

    def descriptors(self) -> list[int]:
        """The descriptors that workers inherit."""
        return [sock.fileno() for sock in self._open()]

    def close(self) -> None:
        """Close the sockets. One that no other process has open refuses connections from now on."""
        for sock in self._open():
            sock.close()

    def _open(self) -> list[socket.socket]:
        return [sock for sock in (self.plain, self.tls, self.admin) if sock is not None]


def listen(config: Config, check_address: Callable[[str], None]) -> Listeners:
    """The sockets for this configuration, bound here or passed by systemd.

    `check_address` raises CannotListen for an address that is not allowed. Raises CannotListen.
    """
    if passed := _passed_by_systemd():
        return _in_order(config, passed, check_address)
    server, tls = config.settings.server, config.settings.tls
    tls_host = tls.host or server.host
    check_address(server.host)
    if config.certificate is not None:
        check_address(tls_host)
    if server.admin_port is not None:
        _check_admin_address(config, server.admin_host)
    plain, encrypted, admin = bind(server.host, server.port), None, None
    if config.certificate is not None:
        encrypted = bind(tls_host, tls.port)
    if server.admin_port is not None:
        admin = bind(server.admin_host, server.admin_port)
    return Listeners(plain, encrypted, admin)


def _in_order(
    config: Config, passed: list[socket.socket], check_address: Callable[[str], None]
) -> Listeners:
    """The sockets that systemd passed, in the order of the unit: plain, TLS, management."""
    has_tls, has_admin = config.certificate is not None, config.settings.server.admin_port
    wanted = ["calls", *(["TLS"] if has_tls else [])]
    wanted += ["management (server.admin_port)"] if has_admin is not None else []
    if len(passed) < len(wanted):
        raise CannotListen(
            f"the .socket unit has {len(passed)} ListenStream; it needs {len(wanted)}, in this"
            f" order: {', '.join(wanted)}"
        )
    admin = passed[len(wanted) - 1] if has_admin is not None else None
    for sock in passed:
        host = sock.getsockname()[0]
        if sock is admin:
            _check_admin_address(config, host)
        else:
            check_address(host)
    return Listeners(passed[0], passed[1] if has_tls else None, admin)


def scheme_of_management(config: Config, host: str) -> str:
    """`https` where others can reach management, if there is a certificate. Commands on this
    machine call it by a loopback address, for which the certificate is not.
    """
    return "https" if config.certificate is not None and not is_loopback(host) else "http"


def _check_admin_address(config: Config, host: str) -> None:
    """Raise CannotListen for an address that other machines can reach, if there is no token."""
    access = config.settings.access
    if not (access.admin_token or access.read_token or is_loopback(host)):
        raise CannotListen(
            f"management needs a token to listen on {host}: set RELAY_ADMIN_TOKEN or"
            " RELAY_READ_TOKEN (access.admin_token, access.read_token), or listen on 127.0.0.1"
            " (server.admin_host)"
        )


def _passed_by_systemd() -> list[socket.socket]:
    """The sockets of a systemd .socket unit (sd_listen_fds(3)).

    systemd keeps them open: while this process restarts, connections wait in their queue.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.pop("LISTEN_FDS", "0"))
    sockets = [socket.socket(fileno=_FIRST_PASSED_FD + at) for at in range(count)]
    for sock in sockets:
        sock.setblocking(False)
    return sockets


def require_loopback(host: str) -> None:
    """Raise CannotListen for an address that other machines can reach: calls need no key."""
    if not is_loopback(host):
        raise CannotListen(
            f"calls need no key, so the relay does not listen on {host}: anyone who can reach it"
            " could use your keys. Set access.mode: required and give your clients keys; or listen"
            " on 127.0.0.1 behind your backend or nginx; or pass --open if you trust the whole"
            " network."
        )


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises CannotListen."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise CannotListen(f"the address {host} is unknown ({error.strerror or error})") from error
    family, kind, proto, _, address = found[0]
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise CannotListen(
                f"port {port} on {host} is in use by another program (see `ss -ltnp`)."
                " Choose another with --port or RELAY_PORT."
            ) from error
        raise CannotListen(f"cannot listen on {host}:{port}: {error.strerror}") from error
    sock.setblocking(False)
    return sock


def raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard limit: a session takes two descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
