"""How a home gets its identity, killed at any moment or not."""

from __future__ import annotations

from edge_runtime.client import connect_to_enrol, enrol
from edge_runtime.connection import Patience, Traffic
from edge_runtime.identity import Identity, new_key
from edge_runtime.invitation import token_sha256
from edge_runtime.store import Enrolment, Home
from protos import coordinator_pb2 as pb


def identity_from(
    invitation: pb.Invitation,
    *,
    home: Home,
    contract: str,
    tier: str,
    patience: Patience,
    traffic: Traffic,
) -> Identity:
    """The identity that `invitation` gives to `home`: at once, if it was used here before.

    The key is saved before the invitation is used, and the coordinator gives its holder a
    certificate again: whoever is killed in between repeats the call and loses nothing.

    Raises:
        TrustError: the invitation is not accepted.
        UnreachableError, RefusedError: see `Connection`.
        StorageError: the home cannot be written.
    """
    digest = token_sha256(invitation)
    identity = home.identity()
    if identity is not None and identity.invitation == digest:
        return identity
    begun = home.enrolment()
    if begun is None or begun.invitation != digest:
        begun = Enrolment(invitation=digest, key=new_key())
        home.save_enrolment(begun)
    with connect_to_enrol(invitation, patience) as connection:
        identity = enrol(
            connection,
            invitation,
            key=begun.key,
            contract=contract,
            tier=tier,
            traffic=traffic,
        )
    home.save_identity(identity)
    return identity
