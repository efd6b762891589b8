"""A certificate authority of the coordinator's own, so that TLS needs no preparation.

The authority is made on first start and kept: devices get its certificate with their invitation.
The server's certificate is issued anew at every start and its key never touches the disk, so
another host name or a lapsed certificate needs no repair. Devices make their keys themselves.

A certificate says for what it is good: a server's is none for a client, and a client's names a role
that only this module writes.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import ipaddress
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from edge_runtime.errors import TrustError
from edge_runtime.files import storage_errors, write_atomic
from edge_runtime.identity import Identity, new_key, public_key_of

CA_FILE = "ca.pem"
CA_KEY_FILE = "ca-key.pem"
ADMIN_FILE = "admin.json"
ALWAYS_NAMED = ("localhost", "127.0.0.1", "::1")
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of SECP256R1
VALID_FOR = datetime.timedelta(days=3650)
# Devices' clocks may be behind the coordinator's.
CLOCK_SKEW = datetime.timedelta(days=1)


class Role(StrEnum):
    DEVICE = "device"
    ADMINISTRATOR = "administrator"
    COORDINATOR = "coordinator"


@dataclass(frozen=True)
class Subject:
    """Whom a client's certificate stands for."""

    name: str
    role: str
    """A Role."""
    id: str
    """Of the enrolment that it comes from, or of the administrator."""
    valid_until: float
    """Seconds since the epoch."""


@dataclass(frozen=True)
class Credentials:
    """What a TLS server needs, PEM encoded."""

    private_key: bytes
    certificate_chain: bytes


@dataclass(frozen=True)
class Issued:
    """A client's new certificate."""

    pem: str
    valid_until: float
    """Seconds since the epoch."""


class RefusedRequestError(Exception):
    """A signing request is not signed; the message is one line that says why."""


class Authority:
    """The key that signs, and its certificate."""

    def __init__(
        self,
        key: ec.EllipticCurvePrivateKey,
        certificate: x509.Certificate,
        device_lifetime: datetime.timedelta,
    ) -> None:
        self._key = key
        self._certificate = certificate
        self._device_lifetime = device_lifetime
        self.pem = certificate.public_bytes(serialization.Encoding.PEM)
        """The certificate; `der` likewise."""
        self.der = certificate.public_bytes(serialization.Encoding.DER)

    @classmethod
    def open(cls, directory: Path, device_lifetime: datetime.timedelta) -> Authority:
        """The authority in `directory`, which is made if there is none.

        Args:
            device_lifetime: of the certificates that it issues to devices.

        Raises:
            StorageError: it cannot be written.
            TrustError: its files are damaged.
        """
        exists = (directory / CA_FILE).exists()
        key, certificate = _load(directory) if exists else _create(directory)
        return cls(key, certificate, device_lifetime)

    def for_links(self) -> Authority:
        """What certifies coordinators to each other: of a key that who has this one's can make, so
        that where they alone are to come in, no handshake with another certificate succeeds."""
        secret = self._key.private_numbers().private_value.to_bytes(32, "big")
        made = HKDF(hashes.SHA256(), 48, salt=None, info=b"comigs links").derive(secret)
        key = ec.derive_private_key(int.from_bytes(made, "big") % (ORDER - 1) + 1, ec.SECP256R1())
        since = self._certificate.not_valid_before_utc
        return Authority(key, _certify_itself(key, "comigs links", since), self._device_lifetime)

    def server_credentials(self, names: Iterable[str]) -> Credentials:
        """A fresh server certificate for `names` (host names or IP addresses) and ALWAYS_NAMED."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives = [_general_name(name) for name in dict.fromkeys([*ALWAYS_NAMED, *names])]
        certificate = self._sign(
            _builder(
                _name("comigs coordinator"),
                key.public_key(),
                VALID_FOR,
                # Not from now: the clock may be ahead, and be put right.
                since=self._certificate.not_valid_before_utc,
            ).add_extension(x509.SubjectAlternativeName(alternatives), critical=False),
            ExtendedKeyUsageOID.SERVER_AUTH,
        )
        return Credentials(
            private_key=_key_pem(key),
            certificate_chain=certificate.public_bytes(serialization.Encoding.PEM) + self.pem,
        )

    def issue_to_device(self, key: ec.EllipticCurvePublicKey, name: str, enrolment: str) -> Issued:
        """A certificate for the device of this name, as long as this is its enrolment."""
        return self._issue(key, name, Role.DEVICE, enrolment, self._device_lifetime)

    def issue_to_administrator(self, key: ec.EllipticCurvePublicKey) -> Issued:
        """A certificate for a new administrator."""
        name = "administrator"
        return self._issue(key, name, Role.ADMINISTRATOR, secrets.token_hex(16), VALID_FOR)

    def issue_to_coordinator(self, key: ec.EllipticCurvePublicKey) -> Issued:
        """A certificate for a coordinator of the same state, which may speak for others."""
        return self._issue(key, "coordinator", Role.COORDINATOR, secrets.token_hex(16), VALID_FOR)

    def _issue(
        self,
        key: ec.EllipticCurvePublicKey,
        name: str,
        role: Role,
        identifier: str,
        lifetime: datetime.timedelta,
    ) -> Issued:
        attributes = {
            NameOID.ORGANIZATIONAL_UNIT_NAME: role.value,
            NameOID.SERIAL_NUMBER: identifier,
        }
        certificate = self._sign(
            _builder(_name(name, attributes), key, lifetime), ExtendedKeyUsageOID.CLIENT_AUTH
        )
        return Issued(
            pem=certificate.public_bytes(serialization.Encoding.PEM).decode(),
            valid_until=certificate.not_valid_after_utc.timestamp(),
        )

    def _sign(self, builder: x509.CertificateBuilder, usage: ObjectIdentifier) -> x509.Certificate:
        return (
            builder.issuer_name(self._certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )


def administrator(authority: Authority, known: Identity | None, address: str) -> Identity:
    """The one administrator, whose place is ADMIN_FILE: another than is `known` if that is none of
    this authority.

    Whoever holds a copy of the file is the administrator, until it is deleted there.

    Args:
        known: what the file holds.
        address: HOST:PORT by which the coordinator is reached; kept in the file.
    """
    ca = authority.pem.decode()
    identity = known
    if identity is None or identity.ca != ca:
        key = new_key()
        issued = authority.issue_to_administrator(public_key_of(key))
        identity = Identity(coordinator="", ca=ca, certificate=issued.pem, key=key)
    return replace(identity, coordinator=address)


@functools.lru_cache(maxsize=4096)
def subject_of(pem: bytes) -> Subject:
    """What this authority wrote into a client's certificate."""
    certificate = x509.load_pem_x509_certificate(pem)

    def attribute(oid: ObjectIdentifier) -> str:
        return "".join(str(a.value) for a in certificate.subject.get_attributes_for_oid(oid))

    return Subject(
        name=attribute(NameOID.COMMON_NAME),
        role=attribute(NameOID.ORGANIZATIONAL_UNIT_NAME),
        id=attribute(NameOID.SERIAL_NUMBER),
        valid_until=certificate.not_valid_after_utc.timestamp(),
    )


def requested_key(pkcs10: bytes, name: str) -> ec.EllipticCurvePublicKey:
    """The key of a signing request that is for `name` and proves that its sender has the key.

    Raises:
        RefusedRequestError: it is not, or does not.
    """
    try:
        request = x509.load_der_x509_csr(pkcs10)
        key = request.public_key()
        signed = request.is_signature_valid
        names = [a.value for a in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise RefusedRequestError("this is no certificate signing request") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise RefusedRequestError("the key is not an EC key on P-256")
    if not signed:
        raise RefusedRequestError("the request is not signed with its own key")
    if names != [name]:
        raise RefusedRequestError(f"the request is for {names}, but only {name} can be certified")
    return key


def _create(directory: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    # Short, since it travels in every invitation.
    certificate = _certify_itself(key, "comigs CA")
    # The key first: a certificate on disk then always has its key. Both files start as 0600.
    write_atomic(directory / CA_KEY_FILE, _key_pem(key))
    write_atomic(directory / CA_FILE, certificate.public_bytes(serialization.Encoding.PEM))
    with storage_errors(directory / CA_FILE):
        (directory / CA_FILE).chmod(0o644)
    return key, certificate


def _certify_itself(
    key: ec.EllipticCurvePrivateKey, called: str, since: datetime.datetime | None = None
) -> x509.Certificate:
    name = _name(called)
    return (
        _builder(name, key.public_key(), VALID_FOR, since)
        .issuer_name(name)
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


def _load(directory: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    mend = (
        "restore both from a copy, or delete both: devices then need new invitations, and "
        f"{ADMIN_FILE} is made anew"
    )
    try:
        certificate = x509.load_pem_x509_certificate((directory / CA_FILE).read_bytes())
        key = serialization.load_pem_private_key(
            (directory / CA_KEY_FILE).read_bytes(), password=None
        )
    except (OSError, ValueError) as error:
        raise TrustError(
            f"the certificate authority in {directory}, {CA_FILE} and {CA_KEY_FILE}, is damaged "
            f"({error}); {mend}"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or (
        key.public_key() != certificate.public_key()
    ):
        raise TrustError(f"{CA_KEY_FILE} in {directory} is not the key of {CA_FILE}; {mend}")
    return key, certificate


def _builder(
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    lifetime: datetime.timedelta,
    since: datetime.datetime | None = None,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(since or now - min(CLOCK_SKEW, lifetime / 10))
        .not_valid_after(now + lifetime)
    )


def _name(common: str, attributes: dict[ObjectIdentifier, str] | None = None) -> x509.Name:
    named = {NameOID.COMMON_NAME: common, **(attributes or {})}
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in named.items()])


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
