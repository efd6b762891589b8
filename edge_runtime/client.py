"""The device's side of protos/coordinator.proto: calls that outlive a bad network."""

from __future__ import annotations

import hashlib
import random
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc

from edge_runtime import wire
from edge_runtime.errors import ComigsError, RefusedError, TrustError, UnreachableError
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc

CALL_SECONDS = 15.0
TRANSFER_SECONDS = 300.0
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 10.0

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 2 * wire.CHUNK_BYTES),
    ("grpc.max_send_message_length", 2 * wire.CHUNK_BYTES),
    # A coordinator that vanished while a call was open is noticed within about 30 seconds.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # The pauses between attempts are ours, so that we can tell the user about them.
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
]

# CANCELLED is what calls get that a stopping coordinator did not wait for.
TRANSIENT = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
}

# gRPC reports failed handshakes as UNAVAILABLE; these, found in the details, will not pass.
HANDSHAKE_FAILURES = {
    # OpenSSL's CERTIFICATE_VERIFY_FAILED
    "1000007d": "has a certificate of an authority that this device does not trust; give that "
    "coordinator's ca.pem with --ca, and if it is that one, do not go on",
    "Hostname Verification": "has a certificate for other names; use an address that is on it, or "
    "start the coordinator with --name and the one that devices use",
    # OpenSSL's WRONG_VERSION_NUMBER
    "100000f7": "does not speak TLS; start it without --insecure, or this device with it",
    "create security handshaker": "was not called: the file given with --ca holds no certificate; "
    "give the coordinator's ca.pem",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Identity:
    """What a coordinator gave a device at its enrolment. The token is a secret."""

    device_id: str
    token: str


class Client:
    """A connection to one coordinator.

    Every call retries while the coordinator cannot be reached, and raises:
        UnreachableError: that lasted for `retry_seconds`.
        TrustError: the coordinator's certificate or this device's identity is not trusted.
        RefusedError: the coordinator answered, and said no.
    """

    def __init__(
        self,
        address: str,
        *,
        ca: Path | None,
        insecure: bool = False,
        retry_seconds: float = 120,
        on_wait: Callable[[str], None],
    ) -> None:
        """
        Args:
            address: HOST:PORT.
            ca: certificate authority to trust, as PEM; None for the system's.
            insecure: no TLS; `ca` is ignored.
            retry_seconds: how long a call goes on trying.
            on_wait: gets one line for a person before each pause.

        Raises:
            TrustError: `ca` cannot be read.
        """
        self.identity: Identity | None = None
        self.bytes_sent = 0
        """Serialized gRPC messages, attempts included; `bytes_received` likewise."""
        self.bytes_received = 0
        self._address = address
        self._insecure = insecure
        self._retry_seconds = retry_seconds
        self._on_wait = on_wait
        if insecure:
            self._channel = grpc.insecure_channel(address, CHANNEL_OPTIONS)
        else:
            credentials = grpc.ssl_channel_credentials(_read_ca(ca))
            self._channel = grpc.secure_channel(address, credentials, CHANNEL_OPTIONS)
        self._stub = coordinator_pb2_grpc.CoordinatorStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def ping(self) -> float:
        """Seconds that one standard health check takes; needs no identity."""
        check = self._channel.unary_unary(
            "/grpc.health.v1.Health/Check", request_serializer=bytes, response_deserializer=bytes
        )
        self._retry(lambda: check(b"", timeout=CALL_SECONDS))  # the connection is up after this
        started = time.monotonic()
        check(b"", timeout=CALL_SECONDS)
        return time.monotonic() - started

    def enroll(self, name: str, contract: str, key: bytes | None = None) -> Identity:
        """Makes this device known under `name` and keeps its identity for further calls.

        Args:
            contract: `bundle.contract_sha256` of the device's bundle.
            key: 16 to 64 random bytes. Who saves them before the call can repeat it after a crash
                and gets the same identity instead of "the name is taken".
        """
        request = pb.EnrollRequest(
            name=name, contract_sha256=contract, key=key or secrets.token_bytes(32)
        )

        def attempt() -> pb.EnrollReply:
            self.bytes_sent += request.ByteSize()
            return self._stub.Enroll(request, timeout=CALL_SECONDS)

        reply = self._retry(attempt)
        self.bytes_received += reply.ByteSize()
        self.identity = Identity(reply.device_id, reply.token)
        return self.identity

    def check_in(self, wait_seconds: float, *, stored_round: int = 0) -> pb.CheckInReply:
        """Asks what to do; the coordinator may take `wait_seconds` (at most 30) to answer.

        With `stored_round` it says that the final generalist of that round is safe here.
        """
        request = pb.CheckInRequest(wait_seconds=wait_seconds, stored_round=stored_round)

        def attempt() -> pb.CheckInReply:
            self.bytes_sent += request.ByteSize()
            return self._stub.CheckIn(
                request, timeout=CALL_SECONDS + wait_seconds, metadata=self._metadata()
            )

        reply = self._retry(attempt)
        self.bytes_received += reply.ByteSize()
        return reply

    def download(self, round_number: int) -> bytes:
        """The generalist that round `round_number` starts from; size and SHA-256 are verified."""
        request = pb.DownloadRequest(round=round_number)

        def attempt() -> bytes:
            self.bytes_sent += request.ByteSize()
            return self._receive(
                self._stub.Download(request, timeout=TRANSFER_SECONDS, metadata=self._metadata())
            )

        return self._retry(attempt)

    def upload(self, header: pb.UploadHeader, payload: bytes) -> pb.UploadReply:
        """Sends an update; `header` lacks only size and SHA-256, which are filled in here.

        Sending one again that was accepted is harmless: it is counted once and accepted again.

        Returns:
            Whether it counts and, if not, why: a refused update is no error here.
        """
        full = pb.UploadHeader()
        full.CopyFrom(header)
        full.total_bytes = len(payload)
        full.sha256 = hashlib.sha256(payload).digest()

        def attempt() -> pb.UploadReply:
            return self._stub.Upload(
                self._parts(full, payload), timeout=TRANSFER_SECONDS, metadata=self._metadata()
            )

        reply = self._retry(attempt)
        self.bytes_received += reply.ByteSize()
        return reply

    def _parts(self, header: pb.UploadHeader, payload: bytes) -> Iterator[pb.UploadPart]:
        first = pb.UploadPart(header=header)
        self.bytes_sent += first.ByteSize()
        yield first
        for data in wire.chunks(payload):
            part = pb.UploadPart(data=data)
            self.bytes_sent += part.ByteSize()
            yield part

    def _receive(self, chunks: Iterable[pb.Chunk]) -> bytes:
        payload = bytearray()
        total, digest = 0, b""
        for chunk in chunks:
            self.bytes_received += chunk.ByteSize()
            total, digest = chunk.total_bytes or total, chunk.sha256 or digest
            payload += chunk.data
            if len(payload) > total:
                break
        if len(payload) != total or hashlib.sha256(payload).digest() != digest:
            raise _DamagedTransferError("the generalist arrived damaged")
        return bytes(payload)

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        if self.identity is None:
            raise TrustError("this device has not enrolled with the coordinator yet")
        return (
            ("comigs-device", self.identity.device_id),
            ("authorization", f"Bearer {self.identity.token}"),
        )

    def _retry(self, attempt: Callable[[], T]) -> T:
        end = time.monotonic() + self._retry_seconds
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                return attempt()
            except _DamagedTransferError as error:
                trouble = str(error)
            except grpc.RpcError as error:
                trouble = self._check_transient(error)
            left = end - time.monotonic()
            if left <= 0:
                tls = "without TLS as this device does" if self._insecure else "with TLS"
                raise UnreachableError(
                    f"no answer from the coordinator at {self._address} for "
                    f"{self._retry_seconds:.0f} s ({trouble}); check that it runs there, that it "
                    f"speaks {tls}, and that no firewall is in between"
                )
            # Jitter keeps devices apart that all lost the same coordinator.
            seconds = min(pause * random.uniform(0.5, 1.0), left)  # noqa: S311
            self._on_wait(
                f"coordinator at {self._address}: {trouble}; trying again in {seconds:.1f} s"
            )
            time.sleep(seconds)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _check_transient(self, error: grpc.RpcError) -> str:
        """One line about trouble that may pass.

        Raises:
            TrustError, RefusedError: it will not pass.
        """
        code, details = error.code(), " ".join((error.details() or "").split())
        lasting = self._lasting(code, details)
        if lasting is not None:
            raise lasting from error
        # "failed to connect to all addresses; last error: UNKNOWN: ipv4:...: Connection refused"
        reason = details.rpartition("last error: ")[2]
        return reason[:200] or code.name

    def _lasting(self, code: grpc.StatusCode, details: str) -> ComigsError | None:
        if code == grpc.StatusCode.UNAUTHENTICATED:
            return TrustError(f"the coordinator at {self._address} says: {details}")
        if code == grpc.StatusCode.UNIMPLEMENTED:
            return RefusedError(
                f"what answers at {self._address} is no coordinator of this version ({details}); "
                "check the address, and update comigs on both sides"
            )
        if code not in TRANSIENT:
            return RefusedError(f"the coordinator at {self._address} refused: {details}")
        for mark, meaning in HANDSHAKE_FAILURES.items():
            if mark in details:
                return TrustError(f"the coordinator at {self._address} {meaning}")
        return None


class _DamagedTransferError(Exception):
    pass


def _read_ca(ca: Path | None) -> bytes | None:
    if ca is None:
        return None
    try:
        return ca.read_bytes()
    except OSError as error:
        raise TrustError(
            f"cannot read the certificate authority {ca}: {error.strerror}; give the coordinator's "
            "ca.pem with --ca"
        ) from error
