"""Who makes a call: whom the connection's certificate is for or, if that is another coordinator of
the same state which passes the call on, whom it says so of."""

from __future__ import annotations

from typing import Any

from coordinator.tls import Role, subject_of

CALLER = "comigs-caller-bin"
ADDRESS = "comigs-address"


def caller_of(context: Any) -> bytes | None:
    """Certificate (PEM) of the caller; None if it showed none."""
    pem = _certificate(context)
    if pem is None or not _is_coordinator(pem):
        return pem
    caller = _said(context).get(CALLER)
    return caller if isinstance(caller, bytes) else None


def address_of(context: Any) -> str:
    """Where the call came from: an IP address, as far as gRPC knows it."""
    if is_from_coordinator(context):
        return str(_said(context).get(ADDRESS, ""))
    # Such as "ipv4:127.0.0.1:4321" or "ipv6:%5B::1%5D:4321".
    peer: str = context.peer()
    host = peer.partition(":")[2].rpartition(":")[0]
    return host.replace("%5B", "").replace("%5D", "") or peer


def is_from_coordinator(context: Any) -> bool:
    """Whether another coordinator of the same state is at the other end."""
    pem = _certificate(context)
    return pem is not None and _is_coordinator(pem)


def forwarded(context: Any) -> tuple[tuple[str, str | bytes], ...]:
    """The metadata with which a call is passed on."""
    address, pem = (ADDRESS, address_of(context)), caller_of(context)
    return (address,) if pem is None else (address, (CALLER, pem))


def _certificate(context: Any) -> bytes | None:
    pems = context.auth_context().get("x509_pem_cert", ())
    return pems[0] if pems else None


def _is_coordinator(pem: bytes) -> bool:
    return subject_of(pem).role == Role.COORDINATOR


def _said(context: Any) -> dict[str, Any]:
    return dict(context.invocation_metadata() or ())
