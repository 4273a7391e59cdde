"""Keys and certificates of a federation: an authority and a server's, and a pair for each client.

Elliptic curves throughout, P-384, as Flower's nodes have them. A private key is readable by its
owner alone, and none is ever written over.
"""

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedrevive_jax.errors import ConfigError

AUTHORITY, AUTHORITY_KEY = "ca.crt", "ca.key"
CERTIFICATE, KEY = "server.crt", "server.key"
DAYS = 825
_NAME = re.compile(r"[A-Za-z0-9*][A-Za-z0-9.-]{0,252}")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def make_server(folder: Path, hosts: Sequence[str]) -> None:
    """Makes an authority, and a certificate for a server that clients know by these names.

    Args:
      folder: gets ca.crt, which clients need, ca.key, which nobody needs but who makes further
        certificates, server.crt and server.key.
      hosts: names or addresses; those of loopback come along.

    Raises:
      ConfigError: one of the files is there already, or the folder cannot be written.
    """
    own_key, key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    own_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedrevive federation")])
    authority = (
        _certificate(own_name, own_name, own_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(own_key.public_key()), critical=False
        )
        .sign(own_key, hashes.SHA384())
    )
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0] if hosts else LOOPBACK[0])])
    names = [_general_name(host) for host in dict.fromkeys((*hosts, *LOOPBACK))]
    certificate = (
        _certificate(name, own_name, key.public_key())
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(own_key.public_key()), critical=False
        )
        .sign(own_key, hashes.SHA384())
    )
    pem = serialization.Encoding.PEM
    _write(
        {
            folder / AUTHORITY_KEY: _private(own_key, serialization.PrivateFormat.PKCS8),
            folder / KEY: _private(key, serialization.PrivateFormat.PKCS8),
            folder / AUTHORITY: authority.public_bytes(pem),
            folder / CERTIFICATE: certificate.public_bytes(pem),
        }
    )


def make_client(path: Path) -> None:
    """Makes a client's pair: `path`, which stays with the client, and `path`.pub for the server.

    Raises:
      ConfigError: one of the files is there already, or they cannot be written.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    _write(
        {
            path: _private(key, serialization.PrivateFormat.OpenSSH),
            path.with_name(path.name + ".pub"): public + b"\n",
        }
    )


def _certificate(subject: x509.Name, issuer: x509.Name, public_key) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=DAYS))
    )


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not _NAME.fullmatch(host):
        raise ConfigError(
            "hosts", host, "must be a name in letters, digits, dots and hyphens, or an address"
        )
    return x509.DNSName(host)


def _private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _write(contents: dict[Path, bytes]) -> None:
    """Writes new files that their owner alone reads."""
    for path in contents:
        if path.exists():
            raise ConfigError("out", path, "is there already, and no key is written over")
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
    except OSError as error:
        for path in contents:  # all of them or none
            path.unlink(missing_ok=True)
        raise ConfigError("out", error.filename, f"cannot be written ({error.strerror})") from None
