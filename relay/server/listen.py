"""The listening sockets: bound once, by whoever starts the relay, and handed to the workers.

Owns: what may be listened on, and what an operator is told where it may not. Bound without
SO_REUSEPORT, so that a foreign listener is found.
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
_FIRST_HANDED_OVER = 3


class CannotListen(OperatorError):
    """The address cannot be taken, or must not be; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Listeners:
    """The listening sockets: plain, and TLS where there is a certificate."""

    plain: socket.socket
    tls: socket.socket | None = None

    def descriptors(self) -> list[int]:
        """To be inherited by workers."""
        return [sock.fileno() for sock in (self.plain, self.tls) if sock is not None]

    def close(self) -> None:
        """Let go of them. What no other process holds refuses connections from now on."""
        for sock in (self.plain, self.tls):
            if sock is not None:
                sock.close()


def listen(config: Config, check_address: Callable[[str], None]) -> Listeners:
    """All that the configuration asks for, bound here or handed over by systemd, where
    `check_address` raises nothing. Raises CannotListen.
    """
    server, tls = config.settings.server, config.settings.tls
    if given := _handed_over():
        if config.certificate is not None and len(given) < 2:
            raise CannotListen("the .socket unit has one ListenStream; TLS needs a second")
        for sock in given:
            check_address(sock.getsockname()[0])
        return Listeners(given[0], given[1] if config.certificate is not None else None)
    check_address(server.host)
    plain = bind(server.host, server.port)
    if config.certificate is None:
        return Listeners(plain)
    host = tls.host or server.host
    check_address(host)
    return Listeners(plain, bind(host, tls.port))


def _handed_over() -> list[socket.socket]:
    """The sockets of a systemd .socket unit (sd_listen_fds(3)): plain, then TLS.

    They outlive this process: while it restarts, connections wait in their queue.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.pop("LISTEN_FDS", "0"))
    given = [socket.socket(fileno=_FIRST_HANDED_OVER + at) for at in range(count)]
    for sock in given:
        sock.setblocking(False)
    return given


def require_loopback(host: str) -> None:
    """Raise CannotListen for an address that others can reach: calls need no key."""
    if not is_loopback(host):
        raise CannotListen(
            f"access is open (calls need no key), so {host} is refused: anybody could spend your"
            " keys. Listen on 127.0.0.1 behind your backend or nginx, or say --open if the network"
            " is yours alone."
        )


def bind(host: str, port: int) -> socket.socket:
    """The listening socket. Raises CannotListen with a sentence for the operator."""
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
                f"port {port} on {host} is taken by another program (see `ss -ltnp`)."
                " Choose another with --port or RELAY_PORT."
            ) from error
        raise CannotListen(f"cannot listen on {host}:{port}: {error.strerror}") from error
    sock.setblocking(False)
    return sock


def raise_file_limit() -> None:
    """Allow as many open files as the system lets us: a session takes two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
