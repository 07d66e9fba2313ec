"""Make the server's SSL context, and a self-signed certificate for a developer's machine.

Owns both. Reading the certificate that gateway.yaml names is in registry/certificates.py. Five
entry points of official SDKs always open wss://: they can use a local relay only with TLS.
"""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from relay.core.addresses import LOOPBACK_NAMES
from relay.registry.certificates import Certificate, CertificateFiles

SELF_SIGNED_DAYS = 397
"""The longest that browsers accept."""
_RENEW_BEFORE = datetime.timedelta(days=30)


def server_context(certificate: Certificate) -> ssl.SSLContext:
    """A context for TLS 1.2 and later and HTTP/1.1. Raises ssl.SSLError if certificate and key do
    not match.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    # With TLS 1.3's session tickets, uvloop 0.22 under load did not read the request right behind
    # one handshake in 150, until the client timed out. Without tickets it always did.
    context.num_tickets = 0
    certificate.load_into(context)
    return context


def self_signed(folder: Path, hosts: Iterable[str], now: datetime.datetime) -> CertificateFiles:
    """A certificate for loopback and `hosts` in `folder`; an existing one that is valid is reused.

    It is reused so that clients which trust the file need no change. Only the owner may read the
    file of the key. Raises OSError.
    """
    chain, key_file = folder / "self-signed.pem", folder / "self-signed-key.pem"
    names = list(dict.fromkeys([*LOOPBACK_NAMES, *hosts]))
    if key_file.exists() and _is_valid(chain, names, now):
        return CertificateFiles(chain, key_file)
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    key_file.touch(mode=0o600)
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    certificate = _certificate(key, names, now)
    chain.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return CertificateFiles(chain, key_file)


def _certificate(
    key: ec.EllipticCurvePrivateKey, names: list[str], now: datetime.datetime
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "relay on this machine")])
    public = key.public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=SELF_SIGNED_DAYS))
        .add_extension(x509.SubjectAlternativeName([_san(each) for each in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )


def _san(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _is_valid(chain: Path, names: list[str], now: datetime.datetime) -> bool:
    try:
        found = x509.load_pem_x509_certificate(chain.read_bytes())
        covered = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        return False
    lasts = found.not_valid_after_utc - now > _RENEW_BEFORE
    return lasts and all(_san(name) in covered for name in names)
