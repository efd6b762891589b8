"""A gRPC connection to a coordinator: calls that outlive a bad network, and errors for people."""

from __future__ import annotations

import datetime
import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import grpc
from google.protobuf.message import Message

from edge_runtime import protocol
from edge_runtime.errors import (
    ComigsError,
    RefusedError,
    TrustError,
    UnreachableError,
    VersionError,
)
from edge_runtime.identity import Identity, began

CALL_SECONDS = 15.0
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 10.0

CHANNEL_OPTIONS = [
    # `retry` holds every reply to its own limit.
    ("grpc.max_receive_message_length", protocol.LARGEST_LIST),
    ("grpc.max_send_message_length", protocol.LARGEST),
    # A coordinator that vanished while a call was open is noticed within about 30 seconds.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # The pauses between attempts are ours, so that we can tell the user about them.
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
]

# Something failed that should not have; a coordinator that was restarted or mended goes on.
FAULTS = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}
# CANCELLED is what calls get that a stopping coordinator did not wait for, ABORTED an upload that
# is to be taken up again.
TRANSIENT = {
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    *FAULTS,
}
FAILED = "it failed"
# gRPC's words, under the same codes, for what is wrong on this side or with what came.
SENSELESS = (
    "Exception serializing request",
    "Exception deserializing response",
    "Exception iterating requests",
)

NO_SUCH_METHOD = "Method not found!"  # gRPC's words

# gRPC reports failed handshakes as UNAVAILABLE; these, found in the details, will not pass. That
# the coordinator does not take our certificate is not among them: gRPC only says that the
# connection was closed.
NOT_VERIFIED = "1000007d"  # OpenSSL's CERTIFICATE_VERIFY_FAILED
HANDSHAKE_FAILURES = {
    NOT_VERIFIED: "has a certificate of another authority than the invitation was from, or this "
    "machine's clock is wrong; if it is right and that coordinator was set up anew, ask for a new "
    "invitation, and if it was not, do not go on",
    "Hostname Verification": "has a certificate for other names; use an address that is on it, or "
    "start the coordinator with --name and the one that devices use",
    # OpenSSL's WRONG_VERSION_NUMBER
    "100000f7": "does not speak TLS; start it without --insecure, or this device with it",
}

M = TypeVar("M", bound=Message)
T = TypeVar("T")


@dataclass
class Traffic:
    """Serialized gRPC messages, attempts included, in bytes; TLS and HTTP/2 framing are not."""

    sent: int = 0
    received: int = 0

    def send(self, message: M) -> M:
        self.sent += message.ByteSize()
        return message

    def receive(self, message: M) -> M:
        self.received += message.ByteSize()
        return message


@dataclass(frozen=True)
class Patience:
    """How long calls go on trying while the coordinator cannot be reached."""

    seconds: float
    on_wait: Callable[[str], None]
    """Gets one line for a person before each pause."""


@dataclass(frozen=True)
class Unproven:
    """A device that says who it is and proves nothing, for a coordinator with --insecure."""

    coordinator: str
    """HOST:PORT."""
    name: str
    contract: str = ""
    """`bundle.contract_sha256` of its bundle; empty if the coordinator has but one."""


class DamagedTransferError(Exception):
    """What arrived is not what was sent; `Connection.retry` tries again."""


class Closing(ABC):
    """What `with` closes."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class GoneError(RefusedError):
    """The coordinator does not have what was asked for; what it has, a check-in tells."""


class Connection(Closing):
    """A channel to one coordinator.

    Everything passed to `retry` is repeated while the coordinator cannot be reached or fails, and
    raises:
        UnreachableError: patience ran out.
        TrustError: one side does not accept the other's certificate or role, or ours has lapsed.
        RefusedError: the coordinator answered, and said no, or something senseless.
        VersionError: it does not understand this program's version of the protocol.
    """

    def __init__(
        self,
        address: str,
        credentials: grpc.ChannelCredentials | None,
        patience: Patience,
        identity: Identity | None = None,
        began: datetime.datetime | None = None,
    ) -> None:
        """
        Args:
            address: HOST:PORT.
            credentials: None for no TLS.
            identity: what the credentials are made of, if they hold a client's certificate.
            began: when the certificate of the coordinator's authority did.
        """
        self.address = address
        self._secure = credentials is not None
        self._patience = patience
        self._identity = identity
        self._began = began
        self._progress = -math.inf
        self.channel = (
            grpc.insecure_channel(address, CHANNEL_OPTIONS)
            if credentials is None
            else grpc.secure_channel(address, credentials, CHANNEL_OPTIONS)
        )

    def close(self) -> None:
        self.channel.close()

    def ping(self) -> float:
        """Seconds that one standard health check takes."""
        check = self.channel.unary_unary(
            "/grpc.health.v1.Health/Check", request_serializer=bytes, response_deserializer=bytes
        )

        def timed() -> float:
            started = time.monotonic()
            check(b"", timeout=CALL_SECONDS)
            return time.monotonic() - started

        self.retry(timed)  # the connection is up after this
        return self.retry(timed)

    def progress(self) -> None:
        """Says that a transfer which may yet break is going on: patience begins anew."""
        self._progress = time.monotonic()

    def retry(self, attempt: Callable[[], T]) -> T:
        """The result of `attempt`, which makes one call."""
        started = time.monotonic()
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                return self._checked(attempt())
            except DamagedTransferError as error:
                trouble = str(error)
            except grpc.RpcError as error:
                trouble = self._check_transient(error)
                if trouble.endswith(protocol.CLOSING):
                    self.progress()  # it is there, and will say what became of the round
            left = max(started, self._progress) + self._patience.seconds - time.monotonic()
            if left <= 0:
                raise self._given_up(trouble)
            # Jitter keeps devices apart that all lost the same coordinator.
            seconds = min(pause * random.uniform(0.5, 1.0), left)  # noqa: S311
            self._patience.on_wait(
                f"coordinator at {self.address}: {trouble}; trying again in {seconds:.1f} s"
            )
            time.sleep(seconds)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _given_up(self, trouble: str) -> UnreachableError:
        if trouble.startswith(FAILED):
            return UnreachableError(
                f"the coordinator at {self.address} answers, but {trouble}; its own log says more"
            )
        if trouble == protocol.NO_STORAGE:
            return UnreachableError(
                f"the coordinator at {self.address} answers that it cannot use its disk or "
                "database; its own log says why"
            )
        tls = "with TLS" if self._secure else "without TLS as this device does"
        return UnreachableError(
            f"no answer from the coordinator at {self.address} for {self._patience.seconds:.0f} s "
            f"({trouble}); check that it runs there, that it speaks {tls}, that no firewall is in "
            "between, and both sides' clocks"
        )

    def _checked(self, result: T) -> T:
        if isinstance(result, Message):
            try:
                protocol.check(result)
            except protocol.TooLargeError as error:
                raise RefusedError(f"the coordinator at {self.address} sent {error}") from error
        return result

    def _check_transient(self, error: grpc.RpcError) -> str:
        """One line about trouble that may pass.

        Raises:
            TrustError, RefusedError, VersionError: it will not pass.
        """
        code, details = error.code(), " ".join((error.details() or "").split())
        now = datetime.datetime.now(datetime.UTC)
        if NOT_VERIFIED in details and self._began is not None and now < self._began:
            # Of a machine that has just started it will be right in a moment.
            return (
                f"this machine's clock says {now:%Y-%m-%d %H:%M} UTC, which is before the "
                "coordinator was set up; set it"
            )
        lasting = self._lasting(code, details)
        if lasting is not None:
            raise lasting from error
        if self._identity is not None:
            self._identity.check()
        # "failed to connect to all addresses; last error: UNKNOWN: ipv4:...: Connection refused"
        reason = details.rpartition("last error: ")[2][:200] or code.name
        return f"{FAILED}: {reason}" if code in FAULTS else reason

    def _lasting(self, code: grpc.StatusCode, details: str) -> ComigsError | None:
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            return TrustError(f"the coordinator at {self.address} says: {details}")
        if code == grpc.StatusCode.UNIMPLEMENTED:
            if details != NO_SUCH_METHOD:
                return VersionError(f"the coordinator at {self.address} says: {details}")
            return RefusedError(
                f"what answers at {self.address} is no coordinator of this version, or is its port "
                f"for enrolment ({details}); check the address, and update comigs on both sides"
            )
        if code not in TRANSIENT or details.startswith(SENSELESS):
            refused = GoneError if code == grpc.StatusCode.NOT_FOUND else RefusedError
            return refused(f"the coordinator at {self.address} refused: {details}")
        for mark, meaning in HANDSHAKE_FAILURES.items():
            if mark in details:
                return TrustError(f"the coordinator at {self.address} {meaning}")
        return None


def connect(who: Identity | Unproven, patience: Patience) -> Connection:
    """A connection on which the coordinator knows the caller; with TLS for an Identity.

    Raises:
        TrustError: the certificate has lapsed.
    """
    if isinstance(who, Unproven):
        return Connection(who.coordinator, None, patience)
    who.check()
    credentials = grpc.ssl_channel_credentials(
        who.ca.encode(), who.key.encode(), who.certificate.encode()
    )
    return Connection(who.coordinator, credentials, patience, who, began(who.ca))
