"""The gRPC service of protos/coordinator.proto for administrators: who may take part, and the
course of the rounds."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from coordinator.callers import Callers, storage_errors
from coordinator.cohorts import Cohorts
from coordinator.policy import NoSuchRoundError, RefusedCommandError, Report
from coordinator.rounds import Rounds
from coordinator.state import State
from edge_runtime import invitation as invitations
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc

if TYPE_CHECKING:  # this name is in the stub only
    from protos.coordinator_pb2_grpc import _ServicerContext as Context

LONGEST_INVITATION_SECONDS = 30 * 86400.0
TOKEN_BYTES = 16
LONGEST_REASON = 200
COMMAND_DIGITS = 32


@dataclass(frozen=True)
class Address:
    """How devices reach the coordinator."""

    host: str
    """Empty if it listens on all addresses and was given no name."""
    port: int
    enrolment_port: int
    authority: bytes
    """Certificate, DER."""


class Admin(coordinator_pb2_grpc.AdminServicer):
    """Answers the administrator, and refuses everybody else."""

    def __init__(
        self, *, state: State, cohorts: Cohorts, callers: Callers, address: Address, report: Report
    ) -> None:
        self._state = state
        self._cohorts = cohorts
        self._callers = callers
        self._address = address
        self._report = report

    async def Invite(self, request: pb.InviteRequest, context: Context) -> pb.InviteReply:  # noqa: N802
        await self._callers.require_administrator(context)
        if not invitations.is_name(request.name):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, invitations.NAMING)
        if not 0 < request.valid_seconds <= LONGEST_INVITATION_SECONDS:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                "an invitation works for more than 0 and up to "
                f"{LONGEST_INVITATION_SECONDS / 3600:.0f} hours",
            )
        if request.cohort and request.cohort not in self._cohorts:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"there is no cohort {request.cohort}; choose from "
                f"{', '.join(cohort.name for cohort in self._cohorts.all)}",
            )
        if not self._address.host:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                "the coordinator listens on all addresses and knows none that devices can use; "
                "start it with --name and that one",
            )
        token = secrets.token_bytes(TOKEN_BYTES)
        expires_at = time.time() + request.valid_seconds
        async with storage_errors(context, self._report):
            self._state.invite(request.name, token, expires_at, cohort=request.cohort or None)
        text = invitations.encode(
            pb.Invitation(
                name=request.name,
                token=token,
                host=self._address.host,
                port=self._address.port,
                enrolment_port=self._address.enrolment_port,
                authority=self._address.authority,
            )
        )
        return pb.InviteReply(invitation=text, expires_at=expires_at)

    async def Revoke(self, request: pb.RevokeRequest, context: Context) -> pb.RevokeReply:  # noqa: N802
        await self._callers.require_administrator(context)
        async with storage_errors(context, self._report):
            invited = self._state.disinvite(request.name)
            device = self._state.revoke(request.name)
        if device is not None:
            self._callers.shut_out(device.id)
        elif not invited:
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"no device is called {request.name}, and none is invited",
            )
        self._report("device_revoked", {"device": request.name})
        return pb.RevokeReply()

    async def ListDevices(  # noqa: N802
        self, request: pb.ListDevicesRequest, context: Context
    ) -> pb.ListDevicesReply:
        await self._callers.require_administrator(context)
        async with storage_errors(context, self._report):
            devices = self._state.devices()
        return pb.ListDevicesReply(
            devices=(
                pb.DeviceEntry(
                    name=device.name,
                    id=device.id,
                    enrolled_at=device.enrolled_at,
                    valid_until=device.valid_until,
                    last_seen=self._callers.last_seen.get(device.id, 0),
                    revoked_at=device.revoked_at or 0,
                    tier=device.tier or "",
                    cohort=device.cohort,
                )
                for device in devices
            )
        )

    async def Pause(self, request: pb.PauseRequest, context: Context) -> pb.PauseReply:  # noqa: N802
        async with self._command(context):
            await self._rounds(request.cohort).pause()
        return pb.PauseReply()

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> pb.ResumeReply:  # noqa: N802
        async with self._command(context):
            await self._rounds(request.cohort).resume()
        return pb.ResumeReply()

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortReply:  # noqa: N802
        async with self._command(context):
            await _check_command(request.command, context)
            if len(request.reason) > LONGEST_REASON or not request.reason.isprintable():
                await context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"a reason has at most {LONGEST_REASON} characters of printable text",
                )
            rounds = self._rounds(request.cohort)
            return pb.AbortReply(round=await rounds.abort(request.reason, request.command))

    async def RollBack(self, request: pb.RollBackRequest, context: Context) -> pb.RollBackReply:  # noqa: N802
        async with self._command(context):
            await _check_command(request.command, context)
            rounds = self._rounds(request.cohort)
            return pb.RollBackReply(round=await rounds.roll_back(request.round, request.command))

    def _rounds(self, cohort: str) -> Rounds:
        """Of that cohort, or of the only one."""
        if not cohort and len(self._cohorts.all) == 1:
            return self._cohorts.all[0].rounds
        if cohort not in self._cohorts:
            names = ", ".join(each.name for each in self._cohorts.all)
            problem = f"there is no cohort {cohort}" if cohort else "there are several cohorts"
            raise RefusedCommandError(f"{problem}; give --cohort and one of {names}")
        return self._cohorts[cohort].rounds

    @contextlib.asynccontextmanager
    async def _command(self, context: Context) -> AsyncIterator[None]:
        """Lets the administrator command the rounds, and says why if that cannot be."""
        await self._callers.require_administrator(context)
        try:
            async with storage_errors(context, self._report):
                yield
        except NoSuchRoundError as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except RefusedCommandError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))


async def _check_command(command: str, context: Context) -> None:
    if len(command) != COMMAND_DIGITS or not set(command) <= set("0123456789abcdef"):
        await context.abort(
            grpc.StatusCode.INVALID_ARGUMENT, f"a command's id has {COMMAND_DIGITS} hex digits"
        )
