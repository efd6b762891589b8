"""Who is calling, and whether they may: told by the certificate of the connection and nothing else.

Revocation is looked up on every call, and ends the calls that are open.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc

from coordinator.cohorts import Cohorts
from coordinator.course import PRESENT_SECONDS
from coordinator.forwarding import caller_of
from coordinator.limits import CALLS_AT_ONCE, Pace
from coordinator.policy import Report
from coordinator.state import State
from coordinator.tables import Device
from coordinator.tls import Role, Subject, subject_of
from edge_runtime import protocol
from edge_runtime.bundle import contract_sha256
from edge_runtime.errors import StorageError, VersionError
from edge_runtime.invitation import NAMING, is_name

if TYPE_CHECKING:  # this name is in the stub only
    from protos.coordinator_pb2_grpc import _ServicerContext as Context

UNKNOWN = (
    "this device was revoked, or another one enrolled under its name, or it never enrolled here; "
    "if that is a mistake, ask for a new invitation"
)

NO_BUNDLE = (
    "this device's bundle has another base, mixing or other shared tensors than the coordinator's; "
    "export both from the same base with the same rank, alpha, mixing and targets"
)


@contextlib.asynccontextmanager
async def storage_errors(
    context: grpc.aio.ServicerContext[Any, Any], report: Report
) -> AsyncIterator[None]:
    """A disk that is full or gone is the operator's to mend; who called may try again meanwhile."""
    try:
        yield
    except (TimeoutError, ConnectionError):
        raise  # of the call, though Python counts them among a disk's
    except (StorageError, OSError) as error:
        report("storage_failed", {"reason": str(error)})
        await context.abort(grpc.StatusCode.UNAVAILABLE, protocol.NO_STORAGE)


async def common_protocol(newest: int, context: Context, oldest: int | None = None) -> int:
    """The version to speak with a device whose newest is that; ends the call if there is none.

    Args:
        oldest: that will do, if not the oldest of all.
    """
    try:
        return protocol.common(newest, oldest)
    except VersionError as error:
        await context.abort(
            grpc.StatusCode.UNIMPLEMENTED,
            f"this device speaks {error}; update comigs on the device",
        )


class Callers:
    """Knows the parties of one coordinator."""

    def __init__(
        self, *, state: State, cohorts: Cohorts, administrator: str | None, calls_per_second: float
    ) -> None:
        """
        Args:
            administrator: the id in the one administrator's certificate; None without TLS, where
                devices are who they say they are, and nobody is administrator.
            calls_per_second: of each device, on average.
        """
        self._pace = Pace(calls_per_second)
        self._state = state
        self._cohorts = cohorts
        self._administrator = administrator
        # Device id -> its open calls -> the enrolment that each was made with.
        self._open: defaultdict[str, dict[asyncio.Timeout, str | None]] = defaultdict(dict)
        self.last_seen: dict[str, float] = {}
        """Device id -> last call since the start, in seconds since the epoch."""

    @contextlib.asynccontextmanager
    async def device(self, context: Context) -> AsyncIterator[Device]:
        """The device that calls. `shut_out` cancels the body and ends the call."""
        device = await self._device(context)
        self.heard(device)
        if len(self._open[device.id]) >= CALLS_AT_ONCE:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"this device has {CALLS_AT_ONCE} calls open; end one first",
            )
        scope = asyncio.timeout(None)
        self._open[device.id][scope] = device.enrolment
        try:
            async with scope:
                yield device
        except TimeoutError:
            if not scope.expired():
                raise
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, UNKNOWN)
        finally:
            self._open[device.id].pop(scope, None)

    def heard(self, device: Device) -> None:
        """Notes that it has made a call, here or at a coordinator that follows."""
        self.last_seen[device.id] = time.time()

    def connected(self) -> set[str]:
        """Ids of the devices that have a call open, or made one a short while ago."""
        oldest = time.time() - PRESENT_SECONDS
        heard = {device for device, seen in list(self.last_seen.items()) if seen >= oldest}
        return heard | {device for device, scopes in list(self._open.items()) if scopes}

    def shut_out(self, device: str) -> None:
        """Ends the open calls of a device whose certificate the state does not accept any more."""
        for scope in self._open.pop(device, ()):
            scope.reschedule(0)
        self._cohorts.leave(device)

    def shut_out_revoked(self) -> None:
        """Ends the open calls of devices that were revoked or replaced at another coordinator."""
        if any(self._open.values()):
            accepted = self._state.enrolments()
            for scopes in self._open.values():
                for scope, enrolment in scopes.items():
                    if enrolment not in accepted and not scope.expired():
                        scope.reschedule(0)

    async def require_administrator(self, context: Context) -> None:
        """Ends the call unless the administrator makes it."""
        subject = await self._subject(context, Role.ADMINISTRATOR)
        if subject.id != self._administrator:
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "this administrator's certificate was replaced; use the one that the coordinator "
                "prints when it starts",
            )

    async def _device(self, context: Context) -> Device:
        if self._administrator is None:
            return await self._believed(context)
        subject = await self._subject(context, Role.DEVICE)
        await self._slow_down(subject.id, context)
        device = self._state.enrolled(subject.id)
        if device is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, UNKNOWN)
        return device

    async def _slow_down(self, who: str, context: Context) -> None:
        """Lets `who` wait, or ends the call, if it calls too often."""
        delay = self._pace.delay(who)
        if delay is None:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, "this device calls too often; wait a little"
            )
        if delay:
            await asyncio.sleep(delay)

    async def _subject(self, context: Context, role: Role) -> Subject:
        """Whom the connection's certificate is for. TLS checked it when the connection began."""
        pem = caller_of(context)
        if pem is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "there is no certificate")
        subject = subject_of(pem)
        if subject.role != role:
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED,
                f"this call needs a certificate of the role {role}; this one's is {subject.role}",
            )
        if time.time() > subject.valid_until:
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "the certificate has lapsed; ask for a new invitation",
            )
        return subject

    async def _believed(self, context: Context) -> Device:
        """Without TLS: the device of the name that the caller claims."""
        said = dict(context.invocation_metadata() or ())
        name = said.get("comigs-device-bin", b"")
        name = name.decode(errors="replace") if isinstance(name, bytes) else name
        if not is_name(name):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, NAMING)
        await self._slow_down(name, context)
        cohort = self._cohorts.all[0]
        contract = said.get("comigs-contract") or contract_sha256(cohort.manifest)
        placed = self._cohorts.place(str(contract), None)
        if placed is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, NO_BUNDLE)
        return self._state.named(name, cohort=placed.name, contract_sha256=str(contract))
