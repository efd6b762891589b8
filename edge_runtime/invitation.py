"""An invitation as text: what `comigs invite` prints, a person copies, and a phone's camera reads.

Upper-case letters and digits only, which QR codes store densely and no shell takes for something
else. `Invitation` of protos/coordinator.proto says what is in it and how it is written.
"""

from __future__ import annotations

import base64
import binascii
import hashlib

from google.protobuf.message import DecodeError

from edge_runtime.errors import TrustError
from protos import coordinator_pb2 as pb

PREFIX = "COMIGS1"
CHECKSUM_BYTES = 4
MOST_NAME_BYTES = 64  # of a common name in X.509 (RFC 5280, appendix A)
NAMING = f"a device's name has 1 to {MOST_NAME_BYTES} bytes of printable text"


def is_name(name: str) -> bool:
    """Whether a device may be called that, as NAMING says."""
    return name.isprintable() and 1 <= len(name.encode()) <= MOST_NAME_BYTES


def encode(invitation: pb.Invitation) -> str:
    content = invitation.SerializeToString(deterministic=True)
    text = base64.b32encode(_checksum(content) + content).decode()
    return PREFIX + text.rstrip("=")


def decode(text: str) -> pb.Invitation:
    """The invitation that `text` holds; white space and lower case, as after a copy, do no harm.

    Raises:
        TrustError: it is truncated, altered, or none.
    """
    compact = "".join(text.split()).upper()
    if not compact.startswith(PREFIX):
        raise TrustError(
            f"this is no invitation: one starts with {PREFIX}; give what `comigs invite` printed"
        )
    body = compact.removeprefix(PREFIX)
    try:
        decoded = base64.b32decode(body + "=" * (-len(body) % 8))
        checksum, content = decoded[:CHECKSUM_BYTES], decoded[CHECKSUM_BYTES:]
        invitation = pb.Invitation.FromString(content)
        if checksum != _checksum(content) or not is_name(invitation.name):
            raise ValueError("not as it was written")
        return invitation
    except (binascii.Error, DecodeError, ValueError) as error:
        raise TrustError(
            "the invitation is incomplete or altered; copy all of what `comigs invite` printed"
        ) from error


def token_sha256(invitation: pb.Invitation) -> str:
    """Names an invitation without giving its secret away (hex)."""
    return hashlib.sha256(invitation.token).hexdigest()


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:CHECKSUM_BYTES]
