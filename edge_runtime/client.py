"""The device's side of protos/coordinator.proto."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from io import RawIOBase
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from edge_runtime import invitation as invitations
from edge_runtime import protocol, wire
from edge_runtime.connection import (
    CALL_SECONDS,
    Closing,
    Connection,
    DamagedTransferError,
    Patience,
    Traffic,
    Unproven,
    connect,
)
from edge_runtime.errors import RefusedError, TrustError, VersionError
from edge_runtime.files import storage_errors
from edge_runtime.identity import Identity, began, new_key, signing_request
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc

TRANSFER_SECONDS = 300.0
DIGEST_BYTES = hashlib.sha256().digest_size


def connect_to_enrol(invitation: pb.Invitation, patience: Patience) -> Connection:
    """A connection to the port where `invitation` is used.

    Raises:
        TrustError: the invitation holds no certificate.
    """
    return Connection(
        f"{invitation.host}:{invitation.enrolment_port}",
        grpc.ssl_channel_credentials(_authority(invitation).encode()),
        patience,
        began=began(_authority(invitation)),
    )


def enrol(
    connection: Connection,
    invitation: pb.Invitation,
    *,
    key: str,
    contract: str,
    tier: str,
    traffic: Traffic,
) -> Identity:
    """The identity that `invitation` gives to the holder of `key`; raises as `Connection` does.

    Who saves `key` before the call can repeat it after a crash.

    Args:
        connection: from `connect_to_enrol`.
        contract: `bundle.contract_sha256` of the device's bundle.
        tier: name of the tier that it was compiled for.
    """
    request = pb.EnrollRequest(
        token=invitation.token,
        request=pb.SigningRequest(pkcs10=signing_request(key, invitation.name)),
        contract_sha256=contract,
        protocol=protocol.NEWEST,
        tier=tier,
    )
    stub = coordinator_pb2_grpc.EnrolmentStub(connection.channel)
    reply = connection.retry(lambda: stub.Enroll(traffic.send(request), timeout=CALL_SECONDS))
    return Identity(
        coordinator=f"{invitation.host}:{invitation.port}",
        ca=_authority(invitation),
        certificate=traffic.receive(reply).pem,
        key=key,
        invitation=invitations.token_sha256(invitation),
        received=time.time(),
    )


def _authority(invitation: pb.Invitation) -> str:
    try:
        certificate = x509.load_der_x509_certificate(invitation.authority)
    except ValueError as error:
        raise TrustError(
            "the invitation holds no certificate; ask for one of this version of comigs"
        ) from error
    return certificate.public_bytes(Encoding.PEM).decode()


class Client(Closing):
    """One device at one coordinator. Every call retries and raises as `Connection` does."""

    def __init__(
        self,
        who: Identity | Unproven,
        *,
        patience: Patience,
        traffic: Traffic | None = None,
    ) -> None:
        """
        Args:
            traffic: to count in; a new one by default.

        Raises:
            TrustError: the certificate has lapsed.
        """
        self.traffic = traffic or Traffic()
        self.protocol = protocol.NEWEST
        """Version that is spoken; what both speak since the first check-in."""
        self._patience = patience
        self._open(who)

    def _open(self, who: Identity | Unproven) -> None:
        self.who = who
        self._connection = connect(who, self._patience)
        self._stub = coordinator_pb2_grpc.CoordinatorStub(self._connection.channel)
        self._metadata: tuple[tuple[str, str | bytes], ...] = ()
        if isinstance(who, Unproven):
            self._metadata = (
                ("comigs-device-bin", who.name.encode()),
                ("comigs-contract", who.contract),
            )

    def close(self) -> None:
        self._connection.close()

    def renew(self, identity: Identity) -> Identity:
        """A successor of `identity`, which is this client's, with a fresh key.

        Both are good until the old one lapses; `use` the new one once it is safe.
        """
        key = new_key()
        request = pb.SigningRequest(pkcs10=signing_request(key, identity.name))
        reply = self._connection.retry(
            lambda: self._stub.Renew(self.traffic.send(request), timeout=CALL_SECONDS)
        )
        certificate = self.traffic.receive(reply).pem
        return replace(identity, key=key, certificate=certificate, received=time.time())

    def use(self, identity: Identity) -> None:
        """Goes on with another identity, on another connection."""
        self.close()
        self._open(identity)

    def check_in(self, wait_seconds: float, *, stored_round: int = 0) -> pb.CheckInReply:
        """Asks what to do; the coordinator may take `wait_seconds` (at most 30) to answer.

        With `stored_round` it says that the final generalist of that round is safe here.
        """
        request = pb.CheckInRequest(
            wait_seconds=wait_seconds, stored_round=stored_round, protocol=protocol.NEWEST
        )

        def attempt() -> pb.CheckInReply:
            return self._stub.CheckIn(
                self.traffic.send(request),
                timeout=CALL_SECONDS + wait_seconds,
                metadata=self._metadata,
            )

        reply = self.traffic.receive(self._connection.retry(attempt))
        oldest = protocol.SECURE_AGGREGATION if reply.secure_aggregation else None
        try:
            self.protocol = protocol.common(reply.protocol, oldest)
        except VersionError as error:
            raise VersionError(
                f"the coordinator at {self.who.coordinator} speaks {error}; update comigs there"
            ) from error
        return reply

    def download(
        self, round_number: int, partial: Path | None = None, *, most_bytes: int | None = None
    ) -> bytes:
        """The generalist that round `round_number` starts from; size and SHA-256 are verified.

        After a break it goes on at the byte where it stopped.

        Args:
            partial: keeps what has come, so that another process can go on too; gone in the end.
            most_bytes: of an honest payload; no more is taken in.

        Raises:
            StorageError: `partial` cannot be written.
        """
        request = pb.DownloadRequest(round=round_number)
        furthest: dict[bytes, int] = {}

        def receive(file: RawIOBase) -> bytes:
            return self._connection.retry(
                lambda: self._receive(request, file, most_bytes, furthest)
            )

        if partial is None:
            with tempfile.TemporaryFile(buffering=0) as file:
                return receive(file)
        with storage_errors(partial):
            with partial.open("a+b", buffering=0) as file:
                payload = receive(file)
            partial.unlink()
        return payload

    def upload(
        self, header: pb.UploadHeader, payload: bytes, *, resume: bool = False
    ) -> pb.UploadReply:
        """Sends an update; `header` lacks only size, SHA-256 and offset, which are filled in here.

        Sending one again that was accepted is harmless: it is counted once and accepted again.

        Args:
            resume: some of it may be at the coordinator already, sent by an earlier process.

        Returns:
            Whether it counts and, if not, why: a refused update is no error here.
        """
        full = pb.UploadHeader()
        full.CopyFrom(header)
        full.total_bytes = len(payload)
        full.sha256 = hashlib.sha256(payload).digest()
        begun = resume

        def attempt() -> pb.UploadReply:
            nonlocal begun
            if begun and self.protocol > 1:
                offset = self._upload_offset(full)
                if offset > full.offset:
                    self._connection.progress()
                full.offset = offset
            begun = True
            return self._stub.Upload(
                self._parts(full, payload), timeout=TRANSFER_SECONDS, metadata=self._metadata
            )

        return self.traffic.receive(self._connection.retry(attempt))

    def aggregate(self, request: pb.AggregateRequest) -> pb.AggregateReply:
        """A step of secure aggregation; the coordinator may take `request.wait_seconds` (at most
        30) to answer. Repeating one is harmless."""

        def attempt() -> pb.AggregateReply:
            return self._stub.Aggregate(
                self.traffic.send(request),
                timeout=CALL_SECONDS + request.wait_seconds,
                metadata=self._metadata,
            )

        return self.traffic.receive(self._connection.retry(attempt))

    def _upload_offset(self, header: pb.UploadHeader) -> int:
        reply = self._stub.UploadOffset(
            self.traffic.send(header), timeout=CALL_SECONDS, metadata=self._metadata
        )
        return min(self.traffic.receive(reply).offset, header.total_bytes)

    def _parts(self, header: pb.UploadHeader, payload: bytes) -> Iterator[pb.UploadPart]:
        yield self.traffic.send(pb.UploadPart(header=header))
        for data in wire.chunks(payload[header.offset :]):
            yield self.traffic.send(pb.UploadPart(data=data))

    def _receive(
        self,
        request: pb.DownloadRequest,
        file: RawIOBase,
        most: int | None,
        furthest: dict[bytes, int],
    ) -> bytes:
        """One attempt at a download.

        Args:
            file: keeps the SHA-256 of what is downloaded, then as much of that as has come.
            furthest: keeps how many bytes had come of what has a SHA-256. Only more is progress:
                what arrives damaged time and again must not be waited for without end.
        """
        file.seek(0)
        kept = file.readall()
        digest, payload = kept[:DIGEST_BYTES], bytearray(kept[DIGEST_BYTES:])
        request.offset = len(payload)
        total = 0
        for chunk in self._stub.Download(
            self.traffic.send(request), timeout=TRANSFER_SECONDS, metadata=self._metadata
        ):
            self.traffic.receive(chunk)
            if not total:
                total = chunk.total_bytes
                if most is not None and total > most:
                    raise RefusedError(
                        f"the coordinator at {self.who.coordinator} announced a generalist of "
                        f"{total} bytes, and {most} are the most that this bundle's can have"
                    )
                if chunk.sha256 != digest:
                    file.seek(file.truncate(0))
                    if payload:
                        raise DamagedTransferError("the generalist has changed meanwhile")
                    digest = chunk.sha256
                    file.write(digest)
            payload += chunk.data
            file.write(chunk.data)
            if len(payload) > furthest.get(digest, 0):
                furthest[digest] = len(payload)
                self._connection.progress()
            if len(payload) > total:
                break
        if len(payload) < total:
            raise DamagedTransferError("the generalist has arrived in part")
        if not total or len(payload) != total or hashlib.sha256(payload).digest() != digest:
            file.truncate(0)
            raise DamagedTransferError("the generalist arrived damaged")
        return bytes(payload)
