"""The certificate of the relay's own TLS, as bytes: what was checked is what is served.

Owns reading and checking the files, and loading their bytes into an SSL context.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from relay.registry.files import Files, TooLarge, Unreadable
from relay.registry.problems import Document
from relay.registry.schema import Tls


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """The paths of the PEM files."""

    chain: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Certificate:
    """The contents of the PEM files."""

    chain: bytes
    key: bytes = field(repr=False)

    shown: str = ""
    """The path of the chain, for messages."""

    def load_into(self, context: ssl.SSLContext) -> None:
        """Use the certificate from the next handshake on. Raises ssl.SSLError if chain and key do
        not match.

        OpenSSL reads files only. An encrypted key is an error: OpenSSL must not prompt for a
        password.
        """
        with _as_path(self.chain) as chain, _as_path(self.key) as key:
            context.load_cert_chain(chain, key, password="")


@contextlib.contextmanager
def _as_path(data: bytes) -> Iterator[str]:
    """Provide a path to these bytes: in memory on Linux, otherwise a file for this user only."""
    if hasattr(os, "memfd_create"):
        with open(os.memfd_create("relay-certificate"), "wb", buffering=0) as file:
            file.write(data)
            yield f"/proc/self/fd/{file.fileno()}"
        return
    with tempfile.NamedTemporaryFile() as named:
        named.write(data)
        named.flush()
        yield named.name


def written_paths(main: Document, tls: Tls, folder: Path) -> CertificateFiles | None:
    """Return the files of `tls:`, relative to gateway.yaml; None if TLS is off."""
    if tls.certificate is None and tls.key is None:
        return None
    if tls.certificate is None or tls.key is None:
        main.add_problem(("tls",), "needs both certificate and key")
        return None
    return CertificateFiles(folder / tls.certificate, folder / tls.key)


def read_certificate(main: Document, paths: CertificateFiles, files: Files) -> Certificate | None:
    """Read the certificate and load it once, so that a wrong one is found at start."""
    read: dict[str, bytes] = {}
    for at, path in (("certificate", paths.chain), ("key", paths.key)):
        try:
            read[at] = files.read(path)
        except Unreadable as error:
            main.add_problem(("tls", at), f"cannot be read: {error}")
        except TooLarge:
            main.add_problem(("tls", at), "all configuration files together are larger than 4 MiB")
    if len(read) < len(("certificate", "key")):
        return None
    found = Certificate(read["certificate"], read["key"], str(paths.chain))
    try:
        found.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    except ssl.SSLError as error:
        reason = (error.reason or "not PEM").lower().replace("_", " ")
        main.add_problem(("tls", "certificate"), f"is no valid certificate with tls.key: {reason}")
    return found
