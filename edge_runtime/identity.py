"""What proves who a device (or an administrator) is to one coordinator: a key and a certificate.

The key is made here and never leaves; the coordinator's authority signs a certificate for it. Both
are in one file, so that a renewal replaces them together.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from edge_runtime.errors import TrustError
from edge_runtime.files import check_readable, write_atomic


@dataclass(frozen=True)
class Identity:
    """One party's credentials at one coordinator. All but the address is PEM."""

    coordinator: str
    """HOST:PORT."""
    ca: str
    """Certificate of the coordinator's authority, the only one trusted."""
    certificate: str
    key: str = field(repr=False)
    """Private key: a secret."""
    invitation: str = ""
    """SHA-256 (hex) of the token of the invitation that it came from; an administrator has none."""
    received: float = 0.0
    """When the certificate came, in seconds since the epoch by this machine's clock; 0: unknown."""

    @property
    def name(self) -> str:
        """The name that the certificate is for."""
        (common,) = self._x509.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return str(common.value)

    @property
    def valid_until(self) -> datetime.datetime:
        return self._x509.not_valid_after_utc

    def needs_renewal(self) -> bool:
        """Whether less than a third of the certificate's time is left, by its dates or by how long
        it has been here: this machine's clock may be another than the coordinator's. One that has
        just come is not renewed, whatever the clock says, unless that was set back since."""
        lifetime = self.valid_until - self._x509.not_valid_before_utc
        now = datetime.datetime.now(datetime.UTC)
        due = self.valid_until - now < lifetime / 3
        if not self.received:
            return due
        age = (now.timestamp() - self.received) / lifetime.total_seconds()
        return age < 0 or age > 2 / 3 or (due and age > 1 / 30)

    def check(self) -> None:
        """
        Raises:
            TrustError: the certificate has lapsed.
        """
        if datetime.datetime.now(datetime.UTC) > self.valid_until:
            raise TrustError(
                f"the certificate of {self.name} for the coordinator at {self.coordinator} lapsed "
                f"on {self.valid_until:%Y-%m-%d %H:%M} UTC; if this machine's clock is right, ask "
                f"for a new invitation (comigs invite {self.name}) and give it with --invitation"
            )

    @functools.cached_property
    def _x509(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.certificate.encode())


def began(pem: str) -> datetime.datetime:
    """Since when a certificate is good."""
    return x509.load_pem_x509_certificate(pem.encode()).not_valid_before_utc


def new_key() -> str:
    """A fresh EC key on P-256, as PEM."""
    return (
        ec.generate_private_key(ec.SECP256R1())
        .private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        .decode()
    )


def public_key_of(key: str) -> ec.EllipticCurvePublicKey:
    return _private(key).public_key()


def sign(key: str, message: bytes) -> bytes:
    """ECDSA with SHA-256, DER."""
    return _private(key).sign(message, ec.ECDSA(hashes.SHA256()))


def signing_request(key: str, name: str) -> bytes:
    """PKCS #10 request (DER) for a certificate of `key` under `name`."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .sign(_private(key), hashes.SHA256())
    )
    return request.public_bytes(serialization.Encoding.DER)


def read_identity(path: Path) -> Identity | None:
    """What `write_identity` wrote, or None if there is no such file.

    Raises:
        TrustError: the file is damaged.
        StorageError: it cannot be read.
    """
    check_readable(path)
    known = {each.name for each in fields(Identity)}
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        # What a newer version may have added is not needed.
        identity = Identity(**{name: written[name] for name in written if name in known})
        certified = x509.load_pem_x509_certificate(identity.certificate.encode()).public_key()
        if certified != public_key_of(identity.key):
            raise ValueError("its key is not that of its certificate")
        if not math.isfinite(identity.received):
            raise ValueError(f"received {identity.received} is no time")
        began(identity.ca)
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise TrustError(
            f"{path} is damaged: {error}; restore it from a copy, or move it away: a device then "
            "needs a new invitation, and a coordinator makes its administrator's anew"
        ) from error
    return identity


def write_identity(path: Path, identity: Identity) -> None:
    """Replaces the file, which only its owner can read.

    Raises:
        StorageError: the disk is full or not writable; the old content is intact.
    """
    write_atomic(path, (json.dumps(asdict(identity), indent=2) + "\n").encode())


def _private(key: str) -> ec.EllipticCurvePrivateKey:
    loaded = serialization.load_pem_private_key(key.encode(), password=None)
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise ValueError("not an EC key")
    return loaded
