"""A certificate authority of the coordinator's own, so that TLS needs no preparation.

The authority is made on first start and kept: devices trust its `ca.pem`. The server's certificate
is issued anew at every start and its key never touches the disk, so another host name or a lapsed
certificate needs no repair.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edge_runtime.errors import TrustError
from edge_runtime.files import storage_errors, write_atomic

CA_FILE = "ca.pem"
CA_KEY_FILE = "ca-key.pem"
ALWAYS_NAMED = ("localhost", "127.0.0.1", "::1")
VALID_FOR = datetime.timedelta(days=3650)
# Devices' clocks may be behind the coordinator's.
CLOCK_SKEW = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Credentials:
    """What a TLS server needs, PEM encoded."""

    private_key: bytes
    certificate_chain: bytes


@dataclass(frozen=True)
class _Authority:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def server_credentials(directory: Path, names: Iterable[str]) -> Credentials:
    """A fresh server certificate for `names` (host names or IP addresses) and ALWAYS_NAMED.

    It is signed by the authority in `directory`, which is made if there is none.

    Raises:
        StorageError: the authority cannot be written.
        TrustError: the authority's files are damaged.
    """
    authority = _load(directory) if (directory / CA_FILE).exists() else _create(directory)
    key = ec.generate_private_key(ec.SECP256R1())
    alternatives = [_general_name(name) for name in dict.fromkeys([*ALWAYS_NAMED, *names])]
    certificate = (
        _builder("comigs coordinator", key.public_key(), authority.certificate.subject)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()),
            critical=False,
        )
        .sign(authority.key, hashes.SHA256())
    )
    chain = [certificate, authority.certificate]
    return Credentials(
        private_key=_key_pem(key),
        certificate_chain=b"".join(c.public_bytes(serialization.Encoding.PEM) for c in chain),
    )


def _create(directory: Path) -> _Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _common_name("comigs coordinator CA")
    certificate = (
        _builder("comigs coordinator CA", key.public_key(), name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=False,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=True,
                crl_sign=True,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    # The key first: a certificate on disk then always has its key. Both files start as 0600.
    write_atomic(directory / CA_KEY_FILE, _key_pem(key))
    write_atomic(directory / CA_FILE, certificate.public_bytes(serialization.Encoding.PEM))
    with storage_errors(directory / CA_FILE):
        (directory / CA_FILE).chmod(0o644)
    return _Authority(key, certificate)


def _load(directory: Path) -> _Authority:
    try:
        certificate = x509.load_pem_x509_certificate((directory / CA_FILE).read_bytes())
        key = serialization.load_pem_private_key(
            (directory / CA_KEY_FILE).read_bytes(), password=None
        )
    except (OSError, ValueError) as error:
        raise TrustError(
            f"the certificate authority in {directory} is damaged ({error}); restore {CA_FILE} "
            f"and {CA_KEY_FILE} from a copy, or delete both and give devices the new {CA_FILE}"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or (
        key.public_key() != certificate.public_key()
    ):
        raise TrustError(
            f"{CA_KEY_FILE} in {directory} is not the key of {CA_FILE}; restore both from a copy, "
            f"or delete both and give devices the new {CA_FILE}"
        )
    return _Authority(key, certificate)


def _builder(
    name: str, key: ec.EllipticCurvePublicKey, issuer: x509.Name
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_common_name(name))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + VALID_FOR)
    )


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(name: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    return x509.DNSName(name)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
